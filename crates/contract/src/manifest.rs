//! The short manifest: the contract an owner writes by hand, converted to an ODCS document.
//!
//! Owns the short form's keys and the mapping to ODCS; it checks only what the conversion itself needs (keys,
//! the shape of constraints, references to columns). Values are checked once for both forms, in
//! [`crate::contract`]. Locations travel with the values, so a refusal points into the file the owner wrote.

use serde::Deserialize;
use serde_json::{Value, json};
use serde_saphyr::{Location, Spanned};

use crate::error::{ContractError, Document, Warning};
use crate::odcs::{self, CustomProperty, Odcs, Property, QualityEntry, SchemaObject, Server, SlaProperty};
use crate::yaml::{Pairs, at};

/// The short form.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a contract (a mapping)")]
pub(crate) struct Manifest {
    name: Spanned<String>,
    version: Spanned<String>,
    owner: Spanned<String>,
    #[serde(default)]
    domain: Option<Spanned<String>>,
    #[serde(default)]
    tags: Option<Vec<String>>,
    #[serde(default)]
    description: Option<String>,
    schema: Spanned<Vec<Column>>,
    #[serde(default)]
    metadata: Metadata,
    privacy: Privacy,
    #[serde(default)]
    quality_slo: Slo,
    #[serde(default)]
    source: Option<Source>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Column {
    name: Spanned<String>,
    #[serde(rename = "type")]
    kind: Spanned<String>,
    #[serde(default)]
    pii: Option<Spanned<bool>>,
    #[serde(default, alias = "tfmSensitive")]
    sensitive: Option<Spanned<bool>>,
    #[serde(default)]
    required: Option<bool>,
    #[serde(default)]
    unique: Option<bool>,
    #[serde(default)]
    description: Option<String>,
    #[serde(default, alias = "tfmUnit")]
    unit: Option<Spanned<String>>,
    #[serde(default, alias = "tfmRole")]
    role: Option<Spanned<String>>,
    #[serde(default, alias = "tfmFeature")]
    feature: Option<Spanned<String>>,
    #[serde(default, rename = "tfmFeatureType", alias = "feature_type")]
    feature_type: Option<Spanned<String>>,
    #[serde(default, alias = "tfmRange")]
    range: Option<Spanned<Vec<f64>>>,
    #[serde(default, alias = "tfmScale")]
    scale: Option<Spanned<String>>,
    #[serde(default, alias = "tfmCutPoints")]
    cut_points: Option<Spanned<Vec<f64>>>,
    #[serde(default, alias = "tfmCategories")]
    categories: Option<Spanned<Vec<String>>>,
    #[serde(default, alias = "tfmCardinality")]
    cardinality: Option<Spanned<Value>>,
    #[serde(default, rename = "tfmPrivacyUnit", alias = "privacy_unit")]
    privacy_unit: Option<Spanned<bool>>,
    #[serde(default, rename = "tfmMaxRowsPerUnit", alias = "max_rows_per_unit")]
    max_rows_per_unit: Option<Spanned<u64>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Metadata {
    #[serde(default)]
    cardinality: Option<Spanned<Value>>,
    #[serde(default)]
    distribution_summary: Option<Spanned<Value>>,
    #[serde(default)]
    constraints: Vec<Constraint>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Constraint {
    #[serde(default)]
    non_null: Option<Names>,
    #[serde(default)]
    unique: Option<Names>,
    #[serde(default)]
    numeric_range: Option<Pairs<Spanned<Vec<f64>>>>,
}

/// One column name or a list of them.
#[derive(Debug)]
struct Names(Vec<Spanned<String>>);

impl<'de> Deserialize<'de> for Names {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum OneOrMany {
            One(String),
            Many(Vec<String>),
        }
        let value = Spanned::<OneOrMany>::deserialize(deserializer)?;
        let names = match value.value {
            OneOrMany::One(name) => vec![name],
            OneOrMany::Many(names) => names,
        };
        Ok(Self(names.into_iter().map(|name| at(value.referenced, name)).collect()))
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Privacy {
    sensitivity: Spanned<String>,
    #[serde(default)]
    allow_training: Option<Spanned<bool>>,
    #[serde(default)]
    allowed_purposes: Option<Spanned<Vec<String>>>,
    #[serde(default)]
    unit: Option<Spanned<String>>,
    #[serde(default)]
    max_rows_per_unit: Option<Spanned<u64>>,
    #[serde(default)]
    max_units: Option<Spanned<u64>>,
    #[serde(default)]
    domain_aggregates: Option<Spanned<String>>,
    #[serde(default)]
    entity_namespace: Option<Spanned<String>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Slo {
    #[serde(default)]
    freshness_hours: Option<Spanned<f64>>,
    #[serde(default)]
    row_completeness: Option<Spanned<f64>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Source {
    #[serde(rename = "type")]
    kind: Spanned<String>,
    path: Spanned<String>,
    #[serde(default)]
    delimiter: Option<Spanned<String>>,
}

impl Manifest {
    /// Converts to an ODCS document; `warnings` says what was normalised.
    ///
    /// # Errors
    /// [`ContractError`] for a constraint or privacy unit that names no column, or for one that contradicts the
    /// column's own declaration.
    pub(crate) fn into_odcs(
        self,
        document: &Document,
        warnings: &mut Vec<Warning>,
    ) -> Result<Odcs, ContractError> {
        let version = normalise_version(&self.version, document, warnings);
        let custom_properties = self.contract_properties();
        let mut columns: Vec<Property> = self.schema.value.into_iter().map(Column::into_property).collect();
        for constraint in self.metadata.constraints {
            constraint.apply(&mut columns, document)?;
        }
        self.privacy.mark_unit(&mut columns, document)?;
        columns.iter_mut().for_each(write_standard_range);
        let table = self.name.value.rsplit('.').next().unwrap_or_default().to_owned();
        let table = SchemaObject {
            name: table,
            logical_type: Some("object".into()),
            properties: columns,
            ..<_>::default()
        };
        let sla_properties = self.quality_slo.freshness_hours.map(|hours| SlaProperty {
            id: None,
            property: at(hours.referenced, "latency".into()),
            value: at(hours.referenced, number(hours.value)),
            value_ext: None,
            unit: Some(at(hours.referenced, "h".into())),
            element: None,
            driver: None,
            description: None,
            scheduler: None,
            schedule: None,
            authoritative_definitions: None,
            custom_properties: Vec::new(),
        });
        let servers = self.source.map(Source::into_server);
        Ok(Odcs {
            api_version: at(self.name.referenced, odcs::API_VERSION.into()),
            kind: at(self.name.referenced, odcs::KIND.into()),
            id: self.name.clone(),
            version,
            status: Some("active".into()),
            domain: self.domain,
            data_product: Some(self.name.value.clone()),
            name: Some(self.name),
            tenant: None,
            tags: self.tags,
            description: self.description.map(|purpose| json!({ "purpose": purpose })),
            schema: at(self.schema.referenced, vec![table]),
            team: Some(json!({ "members": [{ "username": self.owner.value, "role": "owner" }] })),
            support: None,
            price: None,
            roles: None,
            sla_default_element: None,
            sla_properties: sla_properties.into_iter().collect(),
            servers: servers.into_iter().collect(),
            authoritative_definitions: None,
            custom_properties,
            context: None,
            contract_created_ts: None,
        })
    }

    fn contract_properties(&self) -> Vec<CustomProperty> {
        let Privacy {
            sensitivity,
            allow_training,
            allowed_purposes,
            domain_aggregates,
            entity_namespace,
            max_units,
            ..
        } = &self.privacy;
        let mut properties = Vec::new();
        let mut add = |name, value: Option<(Location, Value)>| {
            if let Some((location, value)) = value {
                properties.push(CustomProperty::new(location, name, value));
            }
        };
        add("tfmSensitivity", Some((sensitivity.referenced, json!(sensitivity.value))));
        add("tfmAllowTraining", as_json(allow_training.as_ref()));
        add("tfmAllowedPurposes", as_json(allowed_purposes.as_ref()));
        add("tfmDomainAggregates", as_json(domain_aggregates.as_ref()));
        add("tfmEntityNamespace", as_json(entity_namespace.as_ref()));
        add("tfmMaxUnits", as_json(max_units.as_ref()));
        let completeness = self.quality_slo.row_completeness.as_ref();
        add("tfmRowCompleteness", completeness.map(|v| (v.referenced, number(v.value))));
        add("tfmCardinality", as_json(self.metadata.cardinality.as_ref()));
        add("tfmDistributionSummary", as_json(self.metadata.distribution_summary.as_ref()));
        properties
    }
}

impl Column {
    fn into_property(self) -> Property {
        let mut property = Property::named(self.name);
        let logical = match self.kind.value.as_str() {
            "categorical" | "text" => "string",
            "decimal" | "float" | "double" => "number",
            "int" | "long" | "bigint" => "integer",
            "bool" => "boolean",
            "datetime" => "timestamp",
            other => other,
        };
        property.logical_type = Some(at(self.kind.referenced, logical.to_owned()));
        property.physical_type = Some(self.kind.value.clone());
        property.description = self.description;
        property.required = self.required;
        property.unique = self.unique;
        if self.pii.as_ref().is_some_and(|pii| pii.value) {
            property.classification = Some("pii".into());
            property.tags = Some(vec!["pii".into()]);
        }
        let feature_type = match &self.feature_type {
            None if self.kind.value == "categorical" => Some((self.kind.referenced, json!("categorical"))),
            declared => as_json(declared.as_ref()),
        };
        let numbers = |list: Option<Spanned<Vec<f64>>>| {
            list.map(|l| (l.referenced, Value::Array(l.value.into_iter().map(number).collect())))
        };
        let declared = [
            ("pii", as_json(self.pii.as_ref())),
            ("tfmSensitive", as_json(self.sensitive.as_ref())),
            ("tfmRole", as_json(self.role.as_ref())),
            ("tfmFeature", as_json(self.feature.as_ref())),
            ("tfmFeatureType", feature_type),
            ("tfmRange", numbers(self.range)),
            ("tfmScale", as_json(self.scale.as_ref())),
            ("tfmCutPoints", numbers(self.cut_points)),
            ("tfmCategories", as_json(self.categories.as_ref())),
            ("tfmUnit", as_json(self.unit.as_ref())),
            ("tfmCardinality", as_json(self.cardinality.as_ref())),
            ("tfmPrivacyUnit", as_json(self.privacy_unit.as_ref())),
            ("tfmMaxRowsPerUnit", as_json(self.max_rows_per_unit.as_ref())),
        ];
        property.custom_properties = declared
            .into_iter()
            .filter_map(|(name, value)| value.map(|(location, v)| CustomProperty::new(location, name, v)))
            .collect();
        property
    }
}

impl Source {
    fn into_server(self) -> Server {
        // The standard has no delimiter for local files.
        let delimiter =
            self.delimiter.map(|d| CustomProperty::new(d.referenced, "tfmDelimiter", json!(d.value)));
        Server {
            server: "default".into(),
            kind: "local".into(),
            path: Some(self.path),
            format: Some(self.kind),
            custom_properties: delimiter.into_iter().collect(),
            ..<_>::default()
        }
    }
}

impl Constraint {
    fn apply(self, columns: &mut [Property], document: &Document) -> Result<(), ContractError> {
        for name in self.non_null.map(|n| n.0).unwrap_or_default() {
            let column = find(columns, &name, "non_null", document)?;
            column.required = Some(true);
            if column.quality.is_empty() {
                let rule = QualityEntry {
                    kind: Some("library".into()),
                    metric: Some("nullValues".into()),
                    must_be: Some(json!(0)),
                    ..<_>::default()
                };
                column.quality.push(at(name.referenced, rule));
            }
        }
        for name in self.unique.map(|n| n.0).unwrap_or_default() {
            find(columns, &name, "unique", document)?.unique = Some(true);
        }
        for (name, bounds) in self.numeric_range.map(|pairs| pairs.0).unwrap_or_default() {
            let column = find(columns, &name, "numeric_range", document)?;
            let value = Value::Array(bounds.value.iter().copied().map(number).collect());
            match column.custom_properties.iter().find(|p| p.property.value == "tfmRange") {
                Some(declared) if declared.value.value == value => {}
                Some(_) => {
                    let place = document.place(bounds.referenced);
                    return Err(ContractError::DeclaredTwice {
                        place,
                        what: format!("range of `{}`", name.value),
                    });
                }
                None => {
                    column.custom_properties.push(CustomProperty::new(bounds.referenced, "tfmRange", value));
                }
            }
        }
        Ok(())
    }
}

impl Privacy {
    /// Writes the privacy unit to the column it names; `row` means each row is a unit of its own.
    fn mark_unit(self, columns: &mut [Property], document: &Document) -> Result<(), ContractError> {
        let Some(unit) = self.unit else {
            return Ok(());
        };
        if unit.value == "row" && !columns.iter().any(|c| c.name.value == "row") {
            return Ok(());
        }
        let column = find(columns, &unit, "unit", document)?;
        column.custom_properties.retain(|p| p.property.value != "tfmPrivacyUnit");
        column.custom_properties.push(CustomProperty::new(unit.referenced, "tfmPrivacyUnit", json!(true)));
        if let Some(rows) = self.max_rows_per_unit {
            if column.custom_properties.iter().any(|p| p.property.value == "tfmMaxRowsPerUnit") {
                let place = document.place(rows.referenced);
                return Err(ContractError::DeclaredTwice { place, what: "max_rows_per_unit".into() });
            }
            let rows = CustomProperty::new(rows.referenced, "tfmMaxRowsPerUnit", json!(rows.value));
            column.custom_properties.push(rows);
        }
        Ok(())
    }
}

fn find<'a>(
    columns: &'a mut [Property],
    name: &Spanned<String>,
    what: &'static str,
    document: &Document,
) -> Result<&'a mut Property, ContractError> {
    let Some(index) = columns.iter().position(|c| c.name.value == name.value) else {
        return Err(ContractError::UnknownColumn {
            place: document.place(name.referenced),
            what,
            column: name.value.clone(),
            declared: columns.iter().map(|c| c.name.value.clone()).collect(),
        });
    };
    // Indexing safety: `position` returned an index of this very slice.
    Ok(&mut columns[index])
}

/// Repeats a declared range where other readers of the standard look for it.
fn write_standard_range(column: &mut Property) {
    let Some(range) = column.custom_properties.iter().find(|p| p.property.value == "tfmRange") else {
        return;
    };
    if let Some([lower, upper]) = range.value.value.as_array().map(Vec::as_slice) {
        let options = [("minimum", lower), ("maximum", upper)].map(|(key, v)| (key.to_owned(), v.clone()));
        column.logical_type_options = Some(at(range.value.referenced, options.into_iter().collect()));
    }
}

/// Pads `1` and `1.2` to three parts, with a warning where other readers of the file would see a number.
fn normalise_version(
    version: &Spanned<String>,
    document: &Document,
    warnings: &mut Vec<Warning>,
) -> Spanned<String> {
    let text = version.value.trim();
    let parts = text.split('.').count();
    let numeric = text.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
    let padded = match parts {
        1 if numeric => format!("{text}.0.0"),
        2 if numeric => format!("{text}.0"),
        _ => text.to_owned(),
    };
    if numeric && parts <= 2 && !document.covered(version.referenced).starts_with(['"', '\'']) {
        warnings.push(Warning::new(
            document.place(version.referenced),
            format!("version {text} is a YAML number, other readers may drop digits; read as \"{padded}\""),
        ));
    }
    at(version.referenced, padded)
}

/// A value with its location as JSON.
fn as_json<T: serde::Serialize>(value: Option<&Spanned<T>>) -> Option<(Location, Value)> {
    value.map(|v| (v.referenced, json!(v.value)))
}

/// A number as JSON: whole numbers without a fraction, so that `6` and `6.0` are one value.
pub(crate) fn number(value: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    #[allow(clippy::float_cmp, reason = "trunc returns the same float for a whole number")]
    let whole = value.trunc() == value && value.abs() < EXACT;
    #[allow(clippy::cast_possible_truncation, reason = "whole and below 2^53 in size")]
    if whole { json!(value as i64) } else { json!(value) }
}
