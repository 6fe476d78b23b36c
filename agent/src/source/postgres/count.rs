//! Counts as the server's own `GROUP BY`s, under the promises of [`Source::marginals`](super::super::Source::marginals).
//!
//! In one read-only transaction, so over one state of the table: every unit's name is read with its number of rows; if one has
//! more than may count, only the agent knows which, and the table is streamed instead. The names that the gate lets through
//! go back into a temporary table, by `COPY`, which no log holds. Their rows are coded into another, one small number an
//! attribute, and each marginal is one `GROUP BY` over that. Edges and levels are bound as parameters.

use std::collections::BTreeMap;
use std::io::Write;

use arrow_array::StringArray;
use postgres::types::{ToSql, Type};
use tabmesh_contract::contract::{Column, LogicalType};
use tabmesh_privacy::release::{Binning, ReleaseQuery};

use super::super::marginals::{Admission, MarginalError, MarginalRequest, NamedUnits, Origin};
use super::super::raw::RawColumn;
use super::{BEGIN, PostgresSource, Session, SourceError, is_text};

type Parameter = Box<dyn ToSql + Sync>;

/// The counts; none where only streaming can tell.
pub(super) fn in_server(
    source: &PostgresSource,
    request: &MarginalRequest<'_>,
) -> Result<Option<Vec<i64>>, MarginalError> {
    let Admission::Named(units) = request.admission() else { return Ok(None) };
    let refused = |error: postgres::Error| MarginalError::from(source.refused(&error));
    let mut session = source.session()?;
    let places = places(&session, source, request)?;
    let Some(coding) = Coding::of(&session, &places, request) else { return Ok(None) };
    let Some(name) = named(&session, &places, units.column()) else { return Ok(None) };

    let columns: Vec<String> = (0..coding.cells.len()).map(|at| format!("a{at} int4")).collect();
    let tables = format!(
        "CREATE TEMP TABLE tabmesh_admitted (name text); CREATE TEMP TABLE tabmesh_coded ({})",
        columns.join(", ")
    );
    session
        .client
        .batch_execute(&tables)
        .and_then(|()| session.client.batch_execute(BEGIN))
        .map_err(refused)?;
    let Some(null) = admit(&mut session, &name, &units, source)? else { return Ok(None) };
    coding.store(&mut session, &name, null).map_err(refused)?;
    Ok(Some(group(&mut session, request.query()).map_err(refused)?))
}

/// Where the table has each declared column.
fn places(
    session: &Session,
    source: &PostgresSource,
    request: &MarginalRequest<'_>,
) -> Result<BTreeMap<String, usize>, SourceError> {
    let chosen = session.chosen(&source.path, request.contract())?;
    let columns = request.contract().columns.iter().map(|column| column.name.clone());
    Ok(columns.zip(chosen).collect())
}

/// The unit's column as text, where equal text is an equal unit and nothing else is.
fn named(session: &Session, places: &BTreeMap<String, usize>, column: &Column) -> Option<String> {
    let at = *places.get(&column.name)?;
    let kind = session.kind(at)?;
    let exact = is_text(kind) || matches!(*kind, Type::INT2 | Type::INT4 | Type::INT8);
    exact.then(|| session.text(at))
}

/// Reads every unit's name and copies those back that the gate lets through. Gives whether rows without a name count; none
/// where a unit has more rows than may count, or no name by its column.
fn admit(
    session: &mut Session,
    name: &str,
    units: &NamedUnits<'_>,
    source: &PostgresSource,
) -> Result<Option<bool>, MarginalError> {
    let refused = |error: postgres::Error| MarginalError::from(source.refused(&error));
    let declare = format!(
        "DECLARE tabmesh_names NO SCROLL CURSOR FOR SELECT {name}, count(*) FROM {} GROUP BY 1",
        session.table
    );
    session.client.batch_execute(&declare).map_err(refused)?;
    let mut null = false;
    loop {
        let fetch = format!("FETCH FORWARD {NAMES_AT_ONCE} FROM tabmesh_names");
        let rows = session.client.query(&fetch, &[]).map_err(refused)?;
        if rows.is_empty() {
            break;
        }
        let mut texts: Vec<Option<&str>> = Vec::with_capacity(rows.len());
        for row in &rows {
            texts.push(row.try_get(0).map_err(refused)?);
        }
        let cells = RawColumn::from_text(units.column(), &StringArray::from(texts.clone()));
        let mut lines = String::new();
        for (at, (row, text)) in rows.iter().zip(texts).enumerate() {
            if row.try_get::<_, i64>(1).map_err(refused)? > i64::from(units.max_rows()) {
                return Ok(None);
            }
            let Some(admitted) = units.admits(cells.cell(at)) else { return Ok(None) };
            match text {
                None => null = admitted,
                Some(text) if admitted => push_copied(&mut lines, text),
                Some(_) => {}
            }
        }
        let mut copy = session.client.copy_in("COPY tabmesh_admitted FROM STDIN").map_err(refused)?;
        copy.write_all(lines.as_bytes()).map_err(|error| source.read(error.to_string()))?;
        copy.finish().map_err(refused)?;
    }
    session.client.batch_execute("CLOSE tabmesh_names").map_err(refused)?;
    Ok(Some(null))
}

/// A line of `COPY`'s text format.
fn push_copied(lines: &mut String, text: &str) {
    for letter in text.chars() {
        match letter {
            '\\' => lines.push_str("\\\\"),
            '\n' => lines.push_str("\\n"),
            '\r' => lines.push_str("\\r"),
            '\t' => lines.push_str("\\t"),
            other => lines.push(other),
        }
    }
    lines.push('\n');
}

/// How each attribute becomes a fine cell, in the server's language.
struct Coding {
    cells: Vec<String>,
    parameters: Vec<Parameter>,
    /// The attribute without which a row counts in no marginal.
    label: Option<usize>,
}

impl Coding {
    /// None where the server's reading of a column isn't the agent's to the last value.
    fn of(
        session: &Session,
        places: &BTreeMap<String, usize>,
        request: &MarginalRequest<'_>,
    ) -> Option<Self> {
        let query = request.query();
        let mut coding = Self { cells: Vec::new(), parameters: Vec::new(), label: query.label_index() };
        for (at, attribute) in query.attributes.iter().enumerate() {
            let last = attribute.fine_cells().checked_sub(1)?;
            let cell = match request.origin(at)? {
                Origin::Missing => last.to_string(),
                Origin::Numeric { column } => {
                    let Binning::Edges { edges, .. } = &attribute.binning else { return None };
                    let number = number(session, *places.get(&column.name)?, column)?;
                    let bin = match edges.len() {
                        0 => "0".to_owned(),
                        _ => format!("width_bucket(x, {})", coding.bound(edges.clone(), "float8[]")),
                    };
                    let gone = "x IS NULL OR x IN ('NaN', 'Infinity', '-Infinity')";
                    format!(
                        "(SELECT CASE WHEN {gone} THEN {last} ELSE {bin} END FROM (SELECT {number} AS x) AS v)"
                    )
                }
                Origin::Label { column, classes } => {
                    let text = level(session, *places.get(&column.name)?, column)?;
                    let listed = classes.iter().map(|(text, code)| (text.as_str(), i32::from(*code)));
                    coding.listed(&text, listed)
                }
                Origin::Levels { column, levels } => {
                    let text = level(session, *places.get(&column.name)?, column)?;
                    let codes: Option<Vec<(&str, i32)>> = levels
                        .iter()
                        .map(|(text, code)| Some((text.as_str(), i32::try_from(*code).ok()?)))
                        .collect();
                    let known = coding.listed(&text, codes?.into_iter());
                    let other = last.checked_sub(1)?;
                    format!("CASE WHEN {text} IS NULL THEN {last} ELSE COALESCE({known}, {other}) END")
                }
            };
            coding.cells.push(cell);
        }
        Some(coding)
    }

    /// The number beside a text in a list; null for other texts.
    fn listed<'t>(&mut self, text: &str, listed: impl Iterator<Item = (&'t str, i32)>) -> String {
        let (texts, codes): (Vec<String>, Vec<i32>) =
            listed.map(|(text, code)| (text.to_owned(), code)).unzip();
        let (texts, codes) = (self.bound(texts, "text[]"), self.bound(codes, "int4[]"));
        format!("({codes})[array_position({texts}, {text})]")
    }

    fn bound<P: ToSql + Sync + 'static>(&mut self, parameter: P, kind: &str) -> String {
        self.parameters.push(Box::new(parameter));
        format!("${}::{kind}", self.parameters.len())
    }

    /// Codes the rows of admitted units.
    fn store(&self, session: &mut Session, name: &str, null: bool) -> Result<(), postgres::Error> {
        let cells: Vec<String> =
            self.cells.iter().enumerate().map(|(at, cell)| format!("{cell} AS a{at}")).collect();
        let known = self.label.map_or_else(String::new, |at| format!(" WHERE a{at} IS NOT NULL"));
        let unnamed = if null { format!(" OR {name} IS NULL") } else { String::new() };
        let insert = format!(
            "INSERT INTO tabmesh_coded SELECT * FROM (SELECT {} FROM {} WHERE {name} IN (SELECT name FROM \
             tabmesh_admitted){unnamed}) AS coded{known}",
            cells.join(", "),
            session.table
        );
        let parameters: Vec<&(dyn ToSql + Sync)> =
            self.parameters.iter().map(|parameter| &**parameter as &(dyn ToSql + Sync)).collect();
        session.client.execute(&insert, &parameters).map(drop)
    }
}

/// A column as the float that the agent would read; null where it couldn't.
fn number(session: &Session, at: usize, column: &Column) -> Option<String> {
    let name = super::quoted(&session.columns.get(at)?.name);
    let value = match *session.kind(at)? {
        Type::INT2 | Type::INT4 | Type::INT8 | Type::FLOAT8 => format!("{name}::float8"),
        // What no double holds is an error to the server, and may be none here: too large is missing, as the agent reads it.
        Type::NUMERIC => format!(
            "CASE WHEN {name} = 0 THEN 0 WHEN abs({name}) < 1e-307 THEN sign({name})::float8 * 1e-307::float8 WHEN \
             abs({name}) <= 1.7976931348623157e308 THEN {name}::float8 END"
        ),
        // The agent reads the shortest text, not the nearest double of a single.
        Type::FLOAT4 => format!("{name}::text::float8"),
        _ => return None,
    };
    let whole = matches!(*session.kind(at)?, Type::INT2 | Type::INT4 | Type::INT8);
    Some(match column.logical_type {
        LogicalType::Integer if !whole => format!("CASE WHEN {value} = trunc({value}) THEN {value} END"),
        LogicalType::Integer | LogicalType::Number => value,
        _ => return None,
    })
}

/// A column as the text that the agent would look up.
fn level(session: &Session, at: usize, column: &Column) -> Option<String> {
    let kind = session.kind(at)?;
    let whole = matches!(*kind, Type::INT2 | Type::INT4 | Type::INT8);
    let same = match column.logical_type {
        LogicalType::String => is_text(kind) || whole || *kind == Type::BOOL,
        LogicalType::Boolean => *kind == Type::BOOL,
        LogicalType::Integer => whole,
        _ => false,
    };
    same.then(|| session.text(at))
}

/// One `GROUP BY` a marginal, merged as the query says.
fn group(session: &mut Session, query: &ReleaseQuery) -> Result<Vec<i64>, postgres::Error> {
    let mut all = Vec::with_capacity(query.cells_total());
    for marginal in &query.marginals {
        let dims = query.dims(marginal);
        let mut counts = vec![0; dims.iter().product()];
        let columns: Vec<String> = marginal.attributes.iter().map(|at| format!("a{at}")).collect();
        let columns = columns.join(", ");
        let select = format!("SELECT {columns}, count(*) FROM tabmesh_coded GROUP BY {columns}");
        for row in session.client.query(&select, &[])? {
            let mut cell = 0;
            for (place, (at, dim)) in marginal.attributes.iter().zip(&dims).enumerate() {
                let fine = usize::try_from(row.try_get::<_, i32>(place)?).unwrap_or(usize::MAX);
                cell = cell * dim + query.attributes.get(*at).map_or(0, |attribute| attribute.merged(fine));
            }
            let count: i64 = row.try_get(dims.len())?;
            if let Some(held) = counts.get_mut(cell) {
                *held += count;
            }
        }
        all.extend(counts);
    }
    Ok(all)
}

/// Names read at once.
const NAMES_AT_ONCE: usize = 50_000;
