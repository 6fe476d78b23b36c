//! A table in PostgreSQL, named by a small file on the agent's own machine.
//!
//! The file stands where a table's file would: `connection` (as libpq writes it) and `table`. The contract, which the
//! coordinator gets to see, names the file alone. Without TLS the server has to be on this machine, by a socket or by
//! loopback. The agent's role needs `SELECT` on the table and `TEMP` on the database, nothing else: every transaction is
//! read-only, what is written is temporary and ends with the session.
//!
//! Rows are read by a cursor as text and parsed as those of a delimited file: an empty text is null. Counts are made in the
//! server where the promises of [`Source::marginals`] can be kept ([`count`]), and by streaming where they can't.

mod count;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use arrow_array::StringArray;
use arrow_schema::{DataType, TimeUnit};
use postgres::config::Host;
use postgres::types::{Kind, Type};
use postgres::{Client, NoTls, Row};
use serde::Deserialize;
use tabmesh_contract::contract::{Column, Contract};

use super::marginals::{MarginalError, MarginalRequest};
use super::raw::{RawBatch, RawColumn};
use super::{BATCH_ROWS, Batches, Source, SourceError, locate};
use crate::lineage::places_of;

/// Where the server is, and which of its tables is meant.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Place {
    /// As libpq writes it: `host=/run/postgresql dbname=shop user=agent`.
    connection: String,
    /// `table`, or `schema.table`.
    table: String,
}

/// A table of a PostgreSQL server.
pub(super) struct PostgresSource {
    path: PathBuf,
}

/// A session, and what is known of the table in it.
struct Session {
    client: Client,
    /// The table's quoted name.
    table: String,
    columns: Vec<Found>,
}

/// A column of the table.
struct Found {
    name: String,
    kind: Type,
}

impl PostgresSource {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    fn read(&self, message: String) -> SourceError {
        SourceError::Read { file: self.path.clone(), message }
    }

    /// What the server refused, without a word that could hold a cell.
    fn refused(&self, error: &postgres::Error) -> SourceError {
        let message = match error.code() {
            Some(code) => format!("the server refuses with SQLSTATE {}", code.code()),
            None => error.to_string(),
        };
        self.read(message)
    }

    fn place(&self) -> Result<(postgres::Config, String), SourceError> {
        let wrong = |message: String| SourceError::WrongFormat {
            file: self.path.clone(),
            expected: "connection and table",
            message,
        };
        let text = std::fs::read_to_string(&self.path).map_err(|error| self.read(error.to_string()))?;
        let options = serde_saphyr::options! { with_snippet: false };
        // A snippet, like the connection's own parser, may quote a password.
        let place: Place = serde_saphyr::from_str_with_options(&text, options)
            .map_err(|error| wrong(error.without_snippet().to_string()))?;
        let config: postgres::Config = place.connection.parse().map_err(|_| {
            wrong("`connection` isn't one; write it as libpq does: host=.. dbname=.. user=..".to_owned())
        })?;
        // An address stands in for the host of its place, so that each counts.
        let hosts = config.get_hosts().iter().filter_map(remote).map(str::to_owned);
        let addresses = config.get_hostaddrs().iter().filter(|address| !address.is_loopback());
        if let Some(host) = hosts.chain(addresses.map(ToString::to_string)).next() {
            return Err(wrong(format!(
                "{host} isn't this machine, and the connection has no TLS; use a socket or a tunnel that ends here"
            )));
        }
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            return Err(wrong(
                "`connection` names no host: a folder of sockets, or a loopback address".to_owned(),
            ));
        }
        let parts: Vec<&str> = place.table.split('.').collect();
        if parts.len() > 2 || parts.iter().any(|part| part.trim().is_empty()) {
            return Err(wrong("`table` must be a name, or schema.name".to_owned()));
        }
        Ok((config, parts.iter().map(|part| quoted(part)).collect::<Vec<_>>().join(".")))
    }

    fn session(&self) -> Result<Session, SourceError> {
        let (config, table) = self.place()?;
        let mut client = config.connect(NoTls).map_err(|error| self.refused(&error))?;
        let prepared = client
            .batch_execute(SETTINGS)
            .and_then(|()| client.prepare(&format!("SELECT * FROM {table}")))
            .map_err(|error| self.refused(&error))?;
        let columns = prepared.columns();
        let columns = columns.iter().map(|c| Found { name: c.name().to_owned(), kind: c.type_().clone() });
        Ok(Session { columns: columns.collect(), client, table })
    }

    fn stream<'a>(&'a self, contract: &'a Contract) -> Result<PostgresBatches<'a>, SourceError> {
        let mut session = self.session()?;
        let chosen = session.chosen(&self.path, contract)?;
        let texts: Vec<String> = chosen.iter().map(|at| session.text(*at)).collect();
        let begin = format!(
            "{BEGIN}; DECLARE tabmesh NO SCROLL CURSOR FOR SELECT {} FROM {}",
            texts.join(", "),
            session.table
        );
        session.client.batch_execute(&begin).map_err(|error| self.refused(&error))?;
        Ok(PostgresBatches { source: self, contract, session, rows: 0, ended: false })
    }
}

impl Session {
    /// Places of the declared columns among the table's.
    fn chosen(&self, path: &Path, contract: &Contract) -> Result<Vec<usize>, SourceError> {
        let names: Vec<String> = self.columns.iter().map(|column| column.name.clone()).collect();
        locate(path, &names, contract)
    }

    /// A column as text; null where it is null or empty.
    fn text(&self, at: usize) -> String {
        let Some(Found { name, kind }) = self.columns.get(at) else { return "NULL".to_owned() };
        let name = quoted(name);
        match *base(kind) {
            Type::TIMESTAMPTZ => format!("({name} AT TIME ZONE 'UTC')::text"),
            _ => format!("NULLIF({name}::text, '')"),
        }
    }

    fn kind(&self, at: usize) -> Option<&Type> {
        self.columns.get(at).map(|found| base(&found.kind))
    }
}

impl Source for PostgresSource {
    fn location(&self) -> &Path {
        &self.path
    }

    /// The file that names the table, and the table itself by server, database and name.
    fn places(&self) -> BTreeSet<String> {
        let mut places = places_of(&self.path);
        if let Ok((config, table)) = self.place() {
            // Sockets and addresses are all of this machine: the port tells its servers apart.
            let port = config.get_ports().first().copied().unwrap_or(POSTGRES_PORT);
            let database = config.get_dbname().or_else(|| config.get_user()).unwrap_or_default();
            let table = if table.contains('.') { table } else { format!("{}.{table}", quoted("public")) };
            places.insert(format!("table {table} of {database:?} at port {port}"));
        }
        places
    }

    fn schema_check(&self, contract: &Contract) -> Result<(), SourceError> {
        let mut session = self.session()?;
        let chosen = session.chosen(&self.path, contract)?;
        for (column, at) in contract.columns.iter().zip(&chosen) {
            let Some(kind) = session.kind(*at) else { continue };
            if let Err(expected) = RawColumn::fits(column, &arrow_type(kind)) {
                return Err(SourceError::WrongType {
                    file: self.path.clone(),
                    column: column.name.clone(),
                    expected,
                    found: kind.name().to_owned(),
                });
            }
        }
        let any = format!("SELECT EXISTS (SELECT FROM {})", session.table);
        let any: bool = session.client.query_one(&any, &[]).map_err(|error| self.refused(&error))?.get(0);
        if any { Ok(()) } else { Err(SourceError::NoRows { file: self.path.clone() }) }
    }

    fn batches<'a>(&'a self, contract: &'a Contract) -> Result<Batches<'a>, SourceError> {
        Ok(Box::new(self.stream(contract)?))
    }

    fn marginals(&self, request: &MarginalRequest<'_>) -> Result<Vec<i64>, MarginalError> {
        match count::in_server(self, request)? {
            Some(counts) => Ok(counts),
            None => request.stream(),
        }
    }
}

/// Rows of one snapshot, some at a time.
struct PostgresBatches<'a> {
    source: &'a PostgresSource,
    contract: &'a Contract,
    session: Session,
    rows: u64,
    ended: bool,
}

impl Iterator for PostgresBatches<'_> {
    type Item = Result<RawBatch, SourceError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let fetched = self.session.client.query(&format!("FETCH FORWARD {BATCH_ROWS} FROM tabmesh"), &[]);
        match fetched {
            Err(error) => {
                self.ended = true;
                let SourceError::Read { file, message } = self.source.refused(&error) else { return None };
                Some(Err(SourceError::Corrupt { file, rows: self.rows, message }))
            }
            Ok(rows) if rows.is_empty() => {
                self.ended = true;
                None
            }
            Ok(rows) => {
                let columns = self.contract.columns.iter().enumerate();
                let columns = columns.map(|(at, column)| cells(column, &rows, at)).collect();
                self.rows += rows.len() as u64;
                Some(Ok(RawBatch::new(columns, rows.len())))
            }
        }
    }
}

/// Texts of a fetched column, read as the declared type.
fn cells(column: &Column, rows: &[Row], at: usize) -> RawColumn {
    let texts = rows.iter().map(|row| row.try_get::<_, Option<&str>>(at).ok().flatten());
    RawColumn::from_text(column, &texts.collect::<StringArray>())
}

/// The host, if it isn't this machine.
fn remote(host: &Host) -> Option<&str> {
    let Host::Tcp(name) = host else { return None };
    let here = name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    (!here).then_some(name)
}

/// An identifier that means itself.
fn quoted(name: &str) -> String {
    format!("\"{}\"", name.trim().replace('"', "\"\""))
}

/// What a domain is a domain over.
fn base(kind: &Type) -> &Type {
    match kind.kind() {
        Kind::Domain(over) => base(over),
        _ => kind,
    }
}

/// The Arrow type whose values a type of the server has, as far as contracts know them.
fn arrow_type(kind: &Type) -> DataType {
    match *kind {
        Type::BOOL => DataType::Boolean,
        Type::INT2 | Type::INT4 | Type::INT8 => DataType::Int64,
        Type::FLOAT4 | Type::FLOAT8 | Type::NUMERIC => DataType::Float64,
        Type::DATE => DataType::Date32,
        Type::TIMESTAMP | Type::TIMESTAMPTZ => DataType::Timestamp(TimeUnit::Millisecond, None),
        _ if is_text(kind) => DataType::Utf8,
        _ => DataType::Binary,
    }
}

/// Whether the text of a value is the value.
fn is_text(kind: &Type) -> bool {
    matches!(*kind, Type::TEXT | Type::VARCHAR | Type::BPCHAR | Type::NAME | Type::UUID)
        || matches!(kind.kind(), Kind::Enum(_))
}

/// Texts that don't depend on the server's configuration, and scans that begin at the table's start: the cap's passes count a
/// unit's rows in one order.
const SETTINGS: &str =
    "SET TIME ZONE 'UTC'; SET extra_float_digits = 1; SET DateStyle = 'ISO'; SET synchronize_seqscans = off";
/// Where a server listens unless it is told otherwise.
const POSTGRES_PORT: u16 = 5432;
/// One state of the table, and nothing but temporary tables written.
const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY";

#[cfg(test)]
mod tests;
