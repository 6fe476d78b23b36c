//! ODCS document to [`Contract`]: values are checked here once, whichever form they were written in.
//!
//! Owns the defaults: a pii column is unused unless it is the privacy unit; numeric, boolean and categorical
//! columns are features; other types stay local; training is not allowed unless declared; no categories or
//! ranges are ever invented.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use serde_saphyr::{Location, Spanned};

use crate::contract::{
    Column, Contract, DomainAggregates, FeatureType, LogicalType, MAX_COLUMNS, MAX_NAME_BYTES,
    MAX_ROWS_PER_UNIT, Marks, Privacy, Purpose, Role, Sensitivity, Slo, SourceKind, SourceSpec,
    default_row_namespace,
};
use crate::error::{ContractError, Document, Warning};
use crate::odcs::{CustomProperty, Odcs, Property, QualityEntry, Server, SlaProperty};
use crate::quality::QualityRule;
use crate::schema::{FeatureId, PrivacyUnit, Scale};

/// Builds the domain type.
///
/// # Errors
/// See [`Contract::parse`].
pub(crate) fn contract(
    odcs: Odcs,
    document: Document,
    digest: [u8; 32],
    warnings: &mut Vec<Warning>,
) -> Result<Contract, ContractError> {
    let reader = Reader { document: &document };
    let name = odcs.name.as_ref().unwrap_or(&odcs.id);
    reader.check_name("name", name)?;
    reader.check_name("version", &odcs.version)?;
    let domain = match &odcs.domain {
        Some(domain) => reader.check_name("domain", domain)?.to_owned(),
        None => name.value.split('.').next().unwrap_or_default().to_owned(),
    };
    let [table] = odcs.schema.value.as_slice() else {
        return Err(reader.wrong(
            odcs.schema.referenced,
            "schema",
            "exactly one table (write a contract for each table)",
            format!("{} tables", odcs.schema.value.len()),
        ));
    };
    if table.properties.is_empty() || table.properties.len() > MAX_COLUMNS {
        let got = format!("{} columns", table.properties.len());
        return Err(reader.wrong(
            odcs.schema.referenced,
            "schema",
            &format!("1 to {MAX_COLUMNS} columns"),
            got,
        ));
    }
    let unit = reader.privacy_unit(&table.properties, warnings)?;
    let unit_column = match &unit {
        PrivacyUnit::Entity { column, .. } => Some(column.clone()),
        PrivacyUnit::Row => None,
    };
    let mut columns = Vec::new();
    let mut marks = Vec::new();
    let mut quality = Vec::new();
    for property in &table.properties {
        let is_unit = unit_column.as_ref() == Some(&property.name.value);
        let (column, mark) = reader.column(property, is_unit)?;
        if column.role == Role::Unused && !column.pii && property.custom("tfmRole").is_none() {
            warnings.push(Warning::new(
                document.place(mark.name),
                format!("column `{}` of type {} is not used", column.name, column.logical_type.as_str()),
            ));
        }
        quality.extend(QualityRule::implied(&column));
        for entry in &property.quality {
            quality.push(reader.quality(entry, Some(&column.name))?);
        }
        columns.push(column);
        marks.push(mark);
    }
    for entry in &table.quality {
        quality.push(reader.quality(entry, None)?);
    }
    quality.dedup();
    reader.check_distinct(&columns, &marks)?;
    let privacy = reader.privacy(&odcs, &domain, &name.value, unit, warnings)?;
    let slo = Slo {
        freshness_hours: reader.freshness(&odcs.sla_properties)?,
        row_completeness: reader.share(&odcs.custom_properties, "tfmRowCompleteness")?,
    };
    let source = odcs.servers.iter().find_map(|server| reader.source(server).transpose()).transpose()?;
    Ok(Contract {
        name: name.value.clone(),
        version: odcs.version.value.clone(),
        domain,
        tags: odcs.tags.iter().flatten().cloned().collect(),
        owner: owner(odcs.team.as_ref()),
        columns,
        privacy,
        slo,
        quality,
        source,
        digest,
        marks,
        schema_at: odcs.schema.referenced,
        document: document.clone(),
        odcs,
    })
}

struct Reader<'a> {
    document: &'a Document,
}

impl Reader<'_> {
    fn column(&self, property: &Property, is_unit: bool) -> Result<(Column, Marks), ContractError> {
        let name = self.check_name("column name", &property.name)?.to_owned();
        let logical_type = self.logical_type(property)?;
        let tagged = |mark: &str| property.tags.iter().flatten().any(|t| t == mark);
        let pii = self.boolean(property.custom("pii"))?.unwrap_or(false)
            || property.classification.as_deref() == Some("pii")
            || tagged("pii");
        let sensitive =
            self.boolean(property.custom("tfmSensitive"))?.unwrap_or(false) || tagged("sensitive");
        let categories = self.categories(property, logical_type)?;
        let range = self.range(property, &name)?;
        let declared_role = self.one_of(property.custom("tfmRole"), Role::from_name, Role::NAMES)?;
        let feature_type = match self.one_of(
            property.custom("tfmFeatureType"),
            FeatureType::from_name,
            FeatureType::NAMES,
        )? {
            Some(declared) => Some(declared),
            None if categories.is_some() => Some(FeatureType::Categorical),
            None if declared_role == Some(Role::Target) => Some(FeatureType::Categorical),
            None => match logical_type {
                LogicalType::Integer | LogicalType::Number => Some(FeatureType::Numeric),
                LogicalType::String if declared_role == Some(Role::Feature) => Some(FeatureType::Categorical),
                _ => None,
            },
        };
        let role = match declared_role {
            Some(role) => role,
            None if is_unit => Role::Entity,
            None if property.primary_key == Some(true) => Role::Id,
            None if pii || feature_type.is_none() => Role::Unused,
            None => Role::Feature,
        };
        self.check_usable(property, role, feature_type, logical_type)?;
        let feature_at = property.custom("tfmFeature").map_or(property.name.referenced, |p| p.referenced);
        let feature = match self.text(property.custom("tfmFeature"))? {
            Some(id) => id.to_owned(),
            None => canonical(&name),
        };
        let feature = FeatureId::new(feature)
            .map_err(|source| ContractError::Schema { place: self.document.place(feature_at), source })?;
        let at = |key: &str| property.custom(key).map_or(property.name.referenced, |p| p.referenced);
        let marks = Marks { name: property.name.referenced, role: at("tfmRole"), feature: feature_at };
        let scale = match self.text(property.custom("tfmScale"))? {
            None | Some("linear") => Scale::Linear,
            Some("log1p") => Scale::Log1p,
            Some(other) => {
                return Err(self.wrong(at("tfmScale"), "scale", "linear or log1p", format!("`{other}`")));
            }
        };
        let column = Column {
            name,
            logical_type,
            role,
            feature,
            feature_type,
            pii,
            sensitive,
            required: property.required == Some(true),
            unique: property.unique == Some(true),
            range,
            scale,
            cut_points: self.numbers(property.custom("tfmCutPoints"))?,
            categories,
            unit: self.text(property.custom("tfmUnit"))?.map(str::to_owned),
            description: property.description.clone(),
        };
        Ok((column, marks))
    }

    fn logical_type(&self, property: &Property) -> Result<LogicalType, ContractError> {
        let Some(declared) = &property.logical_type else {
            return Ok(LogicalType::Other);
        };
        match declared.value.as_str() {
            "object" | "array" | "map" | "vector" => Ok(LogicalType::Other),
            "other" => Err(self.bad_type(declared)),
            name => LogicalType::from_name(name).ok_or_else(|| self.bad_type(declared)),
        }
    }

    fn bad_type(&self, declared: &Spanned<String>) -> ContractError {
        let expected = "one of string, integer, number, decimal, boolean, categorical, date, time, timestamp";
        self.wrong(declared.referenced, "type", expected, format!("`{}`", declared.value))
    }

    fn check_usable(
        &self,
        property: &Property,
        role: Role,
        feature_type: Option<FeatureType>,
        logical_type: LogicalType,
    ) -> Result<(), ContractError> {
        let at = property.logical_type.as_ref().map_or(property.name.referenced, |t| t.referenced);
        let got = || logical_type.as_str().to_owned();
        let model_input = matches!(role, Role::Feature | Role::Target);
        let temporal = matches!(
            logical_type,
            LogicalType::Date | LogicalType::Time | LogicalType::Timestamp | LogicalType::Other
        );
        if model_input && (feature_type.is_none() || temporal) {
            let expected = "integer, number, boolean, string or categorical";
            return Err(self.wrong(at, &format!("type of a {} column", role.as_str()), expected, got()));
        }
        let number = matches!(logical_type, LogicalType::Integer | LogicalType::Number);
        if model_input && feature_type == Some(FeatureType::Numeric) && !number {
            return Err(self.wrong(at, "type of a numeric feature", "integer or number", got()));
        }
        Ok(())
    }

    fn categories(
        &self,
        property: &Property,
        logical_type: LogicalType,
    ) -> Result<Option<Vec<String>>, ContractError> {
        let listed =
            |value: &Value| -> Option<Vec<String>> { value.as_array()?.iter().map(scalar_text).collect() };
        if let Some(declared) = property.custom("tfmCategories") {
            return match listed(&declared.value) {
                Some(levels) => Ok(Some(levels)),
                None => Err(self.wrong(
                    declared.referenced,
                    "categories",
                    "a list of texts",
                    kind(&declared.value),
                )),
            };
        }
        let valid_values = property.quality.iter().find_map(|entry| {
            let rule = &entry.value;
            let metric = rule.metric.as_deref().or(rule.rule.as_deref())?;
            if metric != "invalidValues" {
                return None;
            }
            listed(rule.arguments.as_ref()?.get("validValues")?)
        });
        if valid_values.is_none() && logical_type == LogicalType::Boolean {
            return Ok(Some(vec!["false".into(), "true".into()]));
        }
        Ok(valid_values)
    }

    /// The declared range: `tfmRange`, or `logicalTypeOptions` with both bounds; if both are there they agree.
    fn range(&self, property: &Property, name: &str) -> Result<Option<[f64; 2]>, ContractError> {
        let standard = property.logical_type_options.as_ref().and_then(|options| {
            let bound = |key: &str| options.value.get(key).and_then(Value::as_f64);
            Some(([bound("minimum")?, bound("maximum")?], options.referenced))
        });
        let own = match property.custom("tfmRange") {
            None => None,
            Some(declared) => {
                let bounds = declared.value.as_array().map(Vec::as_slice).unwrap_or_default();
                let bound = |v: &Value| v.as_f64().unwrap_or(f64::NAN);
                let [lower, upper] = bounds else {
                    let got = format!("{} of {} items", kind(&declared.value), bounds.len());
                    return Err(self.wrong(declared.referenced, "range", "a list [lower, upper]", got));
                };
                Some(([bound(lower), bound(upper)], declared.referenced))
            }
        };
        if let (Some((a, _)), Some((b, at))) = (&own, &standard)
            && a.iter().zip(b).any(|(x, y)| x.total_cmp(y).is_ne())
        {
            let place = self.document.place(*at);
            return Err(ContractError::DeclaredTwice { place, what: format!("range of `{name}`") });
        }
        let Some(([lower, upper], at)) = own.or(standard) else {
            return Ok(None);
        };
        if lower.is_finite() && upper.is_finite() && lower < upper {
            return Ok(Some([lower, upper]));
        }
        let place = self.document.place(at);
        Err(ContractError::ReversedRange { place, column: name.to_owned(), lower, upper })
    }

    /// The privacy unit: the column marked `tfmPrivacyUnit`, else the only entity column, else each row.
    fn privacy_unit(
        &self,
        properties: &[Property],
        warnings: &mut Vec<Warning>,
    ) -> Result<PrivacyUnit, ContractError> {
        let mut marked = Vec::new();
        let mut entities = Vec::new();
        for property in properties {
            if self.boolean(property.custom("tfmPrivacyUnit"))? == Some(true) {
                marked.push(property);
            }
            if self.text(property.custom("tfmRole"))? == Some("entity") {
                entities.push(property);
            }
        }
        let column = match (marked.as_slice(), entities.as_slice()) {
            ([column], _) => *column,
            ([], []) => return Ok(PrivacyUnit::Row),
            ([], [column]) => {
                warnings.push(Warning::new(
                    self.document.place(column.name.referenced),
                    format!("no privacy unit is declared; read as the entity column `{}`", column.name.value),
                ));
                *column
            }
            ([_, second, ..], _) | ([], [_, second, ..]) => {
                let place = self.document.place(second.name.referenced);
                return Err(ContractError::DeclaredTwice { place, what: "the privacy unit".into() });
            }
        };
        let Some(rows) = column.custom("tfmMaxRowsPerUnit") else {
            let place = self.document.place(column.name.referenced);
            return Err(ContractError::MissingKey { place, key: "max_rows_per_unit".into() });
        };
        match rows
            .value
            .as_u64()
            .filter(|n| (1..=MAX_ROWS_PER_UNIT).contains(n))
            .and_then(|n| u32::try_from(n).ok())
        {
            Some(max_rows) => Ok(PrivacyUnit::Entity { column: column.name.value.clone(), max_rows }),
            None => {
                let expected = format!("a whole number from 1 to {MAX_ROWS_PER_UNIT}");
                Err(self.wrong(rows.referenced, "max_rows_per_unit", &expected, rows.value.to_string()))
            }
        }
    }

    fn privacy(
        &self,
        odcs: &Odcs,
        domain: &str,
        product: &str,
        unit: PrivacyUnit,
        warnings: &mut Vec<Warning>,
    ) -> Result<Privacy, ContractError> {
        let custom = |key: &str| find(&odcs.custom_properties, key);
        let Some(sensitivity) =
            self.one_of(custom("tfmSensitivity"), Sensitivity::from_name, Sensitivity::NAMES)?
        else {
            let place = self.document.place(odcs.id.referenced);
            return Err(ContractError::MissingKey { place, key: "tfmSensitivity".into() });
        };
        let allow_training = self.boolean(custom("tfmAllowTraining"))?.unwrap_or(false);
        let allowed_purposes = self.purposes(custom("tfmAllowedPurposes"), allow_training)?;
        let max_units = match custom("tfmMaxUnits") {
            None => {
                warnings.push(Warning::new(
                    self.document
                        .place(custom("tfmSensitivity").map_or(odcs.id.referenced, |s| s.referenced)),
                    "privacy.max_units is not declared; policy assumes its default when it bounds δ",
                ));
                None
            }
            Some(declared) => match declared.value.as_u64().filter(|&n| n > 0) {
                Some(units) => Some(units),
                None => {
                    let got = declared.value.to_string();
                    return Err(self.wrong(
                        declared.referenced,
                        "max_units",
                        "a whole number of at least 1",
                        got,
                    ));
                }
            },
        };
        let namespace = match (custom("tfmEntityNamespace"), &unit) {
            (Some(declared), _) => {
                let text = Spanned::new(
                    self.text(Some(declared))?.unwrap_or_default().to_owned(),
                    declared.referenced,
                    declared.referenced,
                );
                self.check_name("entity_namespace", &text)?.to_owned()
            }
            (None, PrivacyUnit::Entity { column, .. }) => format!("{domain}/{column}"),
            (None, PrivacyUnit::Row) => default_row_namespace(product),
        };
        let aggregates =
            self.one_of(custom("tfmDomainAggregates"), DomainAggregates::from_name, DomainAggregates::NAMES)?;
        Ok(Privacy {
            sensitivity,
            allow_training,
            allowed_purposes,
            unit,
            max_units,
            domain_aggregates: aggregates.unwrap_or(DomainAggregates::Open),
            entity_namespace: namespace,
        })
    }

    /// Declared purposes; without a declaration all of them if training is allowed, else local models only.
    fn purposes(
        &self,
        declared: Option<&Spanned<Value>>,
        allow_training: bool,
    ) -> Result<BTreeSet<Purpose>, ContractError> {
        let Some(declared) = declared else {
            let mut purposes = BTreeSet::from([Purpose::LocalOnly]);
            if allow_training {
                purposes.extend([Purpose::CentralAggregate, Purpose::FederatedAdapter]);
            }
            return Ok(purposes);
        };
        let listed = declared.value.as_array().map(Vec::as_slice).unwrap_or_default();
        let purposes: Option<BTreeSet<Purpose>> =
            listed.iter().map(|v| Purpose::from_name(v.as_str()?)).collect();
        purposes.filter(|p| !p.is_empty()).ok_or_else(|| {
            let expected = format!("a list out of {}", Purpose::NAMES.join(", "));
            self.wrong(declared.referenced, "allowed_purposes", &expected, declared.value.to_string())
        })
    }

    fn freshness(&self, properties: &[SlaProperty]) -> Result<Option<f64>, ContractError> {
        let Some(latency) =
            properties.iter().find(|p| matches!(p.property.value.as_str(), "latency" | "ly" | "freshness"))
        else {
            return Ok(None);
        };
        let hours_per_unit = match latency.unit.as_ref().map(|u| u.value.as_str()) {
            Some("h" | "hour" | "hours") => 1.0,
            Some("d" | "day" | "days") => 24.0,
            Some("m" | "min" | "minute" | "minutes") => 1.0 / 60.0,
            Some("y" | "yr" | "year" | "years") => 24.0 * 365.25,
            other => {
                let at = latency.unit.as_ref().map_or(latency.property.referenced, |u| u.referenced);
                let got = other.map_or_else(|| "no unit".to_owned(), |u| format!("`{u}`"));
                return Err(self.wrong(at, "unit of latency", "m, h, d or y", got));
            }
        };
        match latency.value.value.as_f64().filter(|v| v.is_finite() && *v > 0.0) {
            Some(value) => Ok(Some(value * hours_per_unit)),
            None => {
                let got = latency.value.value.to_string();
                Err(self.wrong(latency.value.referenced, "freshness", "a number above 0", got))
            }
        }
    }

    fn share(&self, properties: &[CustomProperty], key: &str) -> Result<Option<f64>, ContractError> {
        let Some(declared) = find(properties, key) else {
            return Ok(None);
        };
        match declared.value.as_f64().filter(|v| (0.0..=1.0).contains(v)) {
            Some(value) => Ok(Some(value)),
            None => {
                let got = declared.value.to_string();
                Err(self.wrong(declared.referenced, "row_completeness", "a share from 0 to 1", got))
            }
        }
    }

    /// A server that is a file we read; other servers are the owner's business.
    fn source(&self, server: &Server) -> Result<Option<SourceSpec>, ContractError> {
        let (Some(path), Some(format)) = (&server.path, &server.format) else {
            return Ok(None);
        };
        if server.kind != "local" {
            return Ok(None);
        }
        let Some(kind) = SourceKind::from_name(&format.value) else {
            let expected = format!("one of {}", SourceKind::NAMES.join(", "));
            return Err(self.wrong(
                format.referenced,
                "source type",
                &expected,
                format!("`{}`", format.value),
            ));
        };
        if path.value.trim().is_empty() {
            return Err(self.wrong(path.referenced, "source path", "a file path", "an empty text".into()));
        }
        let declared = find(&server.custom_properties, "tfmDelimiter");
        let text = self.text(declared)?.or(server.delimiter.as_deref());
        let delimiter = match text.map(str::as_bytes) {
            None => None,
            Some(b"\\t") => Some(b'\t'),
            Some([byte]) if byte.is_ascii() => Some(*byte),
            Some(_) => {
                let at = declared.map_or(format.referenced, |d| d.referenced);
                let got = format!("`{}`", text.unwrap_or_default());
                return Err(self.wrong(at, "delimiter", "one ASCII character", got));
            }
        };
        Ok(Some(SourceSpec { kind, path: path.value.clone(), delimiter }))
    }

    fn quality(
        &self,
        entry: &Spanned<QualityEntry>,
        column: Option<&str>,
    ) -> Result<QualityRule, ContractError> {
        QualityRule::from_entry(&entry.value, column)
            .map_err(|(expected, got)| self.wrong(entry.referenced, "quality rule", &expected, got))
    }

    /// Refuses two columns of one name, and two model columns of one canonical id.
    fn check_distinct(&self, columns: &[Column], marks: &[Marks]) -> Result<(), ContractError> {
        let mut names = BTreeSet::new();
        let mut ids: BTreeMap<&FeatureId, &str> = BTreeMap::new();
        for (column, mark) in columns.iter().zip(marks) {
            if !names.insert(&column.name) {
                let place = self.document.place(mark.name);
                return Err(ContractError::DeclaredTwice {
                    place,
                    what: format!("column `{}`", column.name),
                });
            }
            if !matches!(column.role, Role::Feature | Role::Target) {
                continue;
            }
            if let Some(first) = ids.insert(&column.feature, &column.name) {
                return Err(ContractError::DuplicateFeature {
                    place: self.document.place(mark.feature),
                    id: column.feature.to_string(),
                    first: first.to_owned(),
                    second: column.name.clone(),
                });
            }
        }
        Ok(())
    }

    fn check_name<'v>(&self, what: &str, name: &'v Spanned<String>) -> Result<&'v str, ContractError> {
        let text = name.value.as_str();
        let printable = !text.chars().any(char::is_control) && text.trim() == text;
        if !text.is_empty() && text.len() <= MAX_NAME_BYTES && printable {
            return Ok(text);
        }
        let expected = format!("1 to {MAX_NAME_BYTES} bytes of printable text");
        Err(self.wrong(name.referenced, what, &expected, format!("{} bytes", text.len())))
    }

    fn boolean(&self, declared: Option<&Spanned<Value>>) -> Result<Option<bool>, ContractError> {
        let read = |v: &Spanned<Value>| {
            v.value
                .as_bool()
                .ok_or_else(|| self.wrong(v.referenced, "the value", "true or false", kind(&v.value)))
        };
        declared.map(read).transpose()
    }

    fn text<'v>(&self, declared: Option<&'v Spanned<Value>>) -> Result<Option<&'v str>, ContractError> {
        let read = |v: &'v Spanned<Value>| {
            v.value.as_str().ok_or_else(|| self.wrong(v.referenced, "the value", "a text", kind(&v.value)))
        };
        declared.map(read).transpose()
    }

    fn numbers(&self, declared: Option<&Spanned<Value>>) -> Result<Option<Vec<f64>>, ContractError> {
        let read = |v: &Spanned<Value>| {
            v.value
                .as_array()
                .and_then(|list| list.iter().map(Value::as_f64).collect::<Option<Vec<f64>>>())
                .ok_or_else(|| self.wrong(v.referenced, "cut points", "a list of numbers", kind(&v.value)))
        };
        declared.map(read).transpose()
    }

    fn one_of<T>(
        &self,
        declared: Option<&Spanned<Value>>,
        parse: impl Fn(&str) -> Option<T>,
        names: &[&str],
    ) -> Result<Option<T>, ContractError> {
        let Some(text) = self.text(declared)? else {
            return Ok(None);
        };
        let at = declared.map_or(Location::UNKNOWN, |d| d.referenced);
        match parse(text) {
            Some(value) => Ok(Some(value)),
            None => {
                let expected = format!("one of {}", names.join(", "));
                Err(self.wrong(at, "the value", &expected, format!("`{text}`")))
            }
        }
    }

    fn wrong(&self, at: Location, what: &str, expected: &str, got: String) -> ContractError {
        ContractError::WrongValue {
            place: self.document.place(at),
            what: what.to_owned(),
            expected: expected.to_owned(),
            got,
        }
    }
}

impl Property {
    /// The value of a custom property.
    fn custom(&self, name: &str) -> Option<&Spanned<Value>> {
        find(&self.custom_properties, name)
    }
}

fn find<'a>(properties: &'a [CustomProperty], name: &str) -> Option<&'a Spanned<Value>> {
    properties.iter().find(|p| p.property.value == name).map(|p| &p.value)
}

/// The owner in `team`: the member with role owner, else the first; both the object and the list form.
fn owner(team: Option<&Value>) -> String {
    let members = team.and_then(|t| t.get("members").or(Some(t))).and_then(Value::as_array);
    let named = |member: &Value| {
        ["username", "name"].iter().find_map(|&key| member.get(key)?.as_str().map(str::to_owned))
    };
    let members = members.map(Vec::as_slice).unwrap_or_default();
    let by_role = members.iter().find(|m| {
        m.get("role").and_then(Value::as_str).is_some_and(|role| role.to_lowercase().contains("owner"))
    });
    by_role.or_else(|| members.first()).and_then(named).unwrap_or_default()
}

/// A column name as a canonical id: lower case, anything unusual as `_`.
fn canonical(name: &str) -> String {
    let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '.' | '-');
    name.chars().map(|c| c.to_ascii_lowercase()).map(|c| if fits(c) { c } else { '_' }).collect()
}

fn scalar_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// What kind of value was found, without the value.
fn kind(value: &Value) -> String {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a mapping",
    }
    .to_owned()
}
