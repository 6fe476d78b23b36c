//! The Open Data Contract Standard (ODCS) 3.0 to 3.2 document, as far as a federation reads it.
//!
//! Owns the document's shape and its canonical YAML (always written as v3.1.0). Every key of the standard is
//! accepted and kept; a key outside it is refused, except inside `customProperties`. Our own additions are
//! `tfm*` custom properties, named once here: an unknown `tfm*` name is refused, because a misspelt limit would
//! otherwise be no limit. Source: bitol-io/open-data-contract-standard, JSON Schemas 3.1.0 and 3.2.0.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_saphyr::{Location, Spanned};

use crate::error::{ContractError, Document};

/// An ODCS document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
#[serde(expecting = "an ODCS document (a mapping)")]
pub struct Odcs {
    pub(crate) api_version: Spanned<String>,
    pub(crate) kind: Spanned<String>,
    pub(crate) id: Spanned<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<Spanned<String>>,
    pub(crate) version: Spanned<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) domain: Option<Spanned<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) data_product: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tenant: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tags: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) description: Option<Value>,
    pub(crate) schema: Spanned<Vec<SchemaObject>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) team: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) support: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) price: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) roles: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) sla_default_element: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) sla_properties: Vec<SlaProperty>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) servers: Vec<Server>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) authoritative_definitions: Option<Value>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) custom_properties: Vec<CustomProperty>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) context: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) contract_created_ts: Option<String>,
}

/// A table.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct SchemaObject {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    pub(crate) name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) logical_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) physical_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) physical_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) description: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) business_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) deprecated: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) synonyms: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) authoritative_definitions: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tags: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) data_granularity_description: Option<String>,
    #[serde(default)]
    pub(crate) properties: Vec<Property>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) relationships: Option<Value>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) quality: Vec<Spanned<QualityEntry>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) custom_properties: Vec<CustomProperty>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) context: Option<Value>,
}

/// A column.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Property {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    pub(crate) name: Spanned<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) business_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) logical_type: Option<Spanned<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) physical_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) physical_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) description: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) deprecated: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) synonyms: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) logical_type_options: Option<Spanned<serde_json::Map<String, Value>>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) semantic_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) primary_key: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) primary_key_position: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) required: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) unique: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) partitioned: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) partition_key_position: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) classification: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) encrypted_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) transform_source_objects: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) transform_logic: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) transform_description: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) examples: Option<Value>,
    #[serde(default, rename = "enum", skip_serializing_if = "Option::is_none")]
    pub(crate) enum_values: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) critical_data_element: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) relationships: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) authoritative_definitions: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tags: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) quality: Vec<Spanned<QualityEntry>>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) custom_properties: Vec<CustomProperty>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) items: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) properties: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) map: Option<Value>,
}

impl Property {
    /// A column with a name and nothing declared.
    pub(crate) fn named(name: Spanned<String>) -> Self {
        Self {
            id: None,
            name,
            business_name: None,
            logical_type: None,
            physical_type: None,
            physical_name: None,
            description: None,
            deprecated: None,
            synonyms: None,
            logical_type_options: None,
            semantic_type: None,
            primary_key: None,
            primary_key_position: None,
            required: None,
            unique: None,
            partitioned: None,
            partition_key_position: None,
            classification: None,
            encrypted_name: None,
            transform_source_objects: None,
            transform_logic: None,
            transform_description: None,
            examples: None,
            enum_values: None,
            critical_data_element: None,
            relationships: None,
            authoritative_definitions: None,
            tags: None,
            quality: Vec::new(),
            custom_properties: Vec::new(),
            items: None,
            properties: None,
            map: None,
        }
    }
}

/// A data-quality rule.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct QualityEntry {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) metric: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rule: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) arguments: Option<serde_json::Map<String, Value>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) unit: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) must_be: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) must_not_be: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) must_be_greater_than: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) must_be_greater_or_equal_to: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) must_be_less_than: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) must_be_less_or_equal_to: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) must_be_between: Option<[f64; 2]>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) must_not_be_between: Option<[f64; 2]>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) severity: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) description: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) dimension: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) business_impact: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) method: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) schedule: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scheduler: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) tags: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) query: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) engine: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) implementation: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) authoritative_definitions: Option<Value>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) custom_properties: Vec<CustomProperty>,
}

/// A service-level property.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct SlaProperty {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    pub(crate) property: Spanned<String>,
    pub(crate) value: Spanned<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) value_ext: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) unit: Option<Spanned<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) element: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) driver: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) description: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) scheduler: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) schedule: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) authoritative_definitions: Option<Value>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) custom_properties: Vec<CustomProperty>,
}

/// Where the data is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Server {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    pub(crate) server: String,
    #[serde(rename = "type")]
    pub(crate) kind: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) description: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) environment: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<Spanned<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) format: Option<Spanned<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) delimiter: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) encoding: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) location: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) endpoint_url: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) host: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) port: Option<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) database: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) schema: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) account: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) catalog: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) catalog_url: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) dataset: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) namespace: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) project: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) region: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) region_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) service_name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) staging_dir: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) stream: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) warehouse: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) workgroup: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) roles: Option<Value>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) custom_properties: Vec<CustomProperty>,
}

/// A named value outside the standard.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CustomProperty {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    pub(crate) property: Spanned<String>,
    pub(crate) value: Spanned<Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) description: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) vendor: Option<String>,
}

impl CustomProperty {
    /// A property that stands where a key of another format stands.
    pub(crate) fn new(location: Location, property: &str, value: Value) -> Self {
        Self {
            id: None,
            property: crate::yaml::at(location, property.to_owned()),
            value: crate::yaml::at(location, value),
            description: None,
            vendor: None,
        }
    }
}

impl Odcs {
    /// The canonical YAML: apiVersion v3.1.0, keys in the standard's order, nothing absent written.
    ///
    /// # Errors
    /// A message of the YAML writer; a parsed document doesn't cause one.
    pub fn to_yaml(&self) -> Result<String, String> {
        let mut canonical = self.clone();
        canonical.api_version.value = API_VERSION.into();
        serde_saphyr::to_string(&canonical).map_err(|error| error.to_string())
    }

    /// Refuses `tfm*` names that don't exist at their level, other versions and other kinds.
    pub(crate) fn check_names(&self, document: &Document) -> Result<(), ContractError> {
        let wrong = |value: &Spanned<String>, what: &str, expected: &str| ContractError::WrongValue {
            place: document.place(value.referenced),
            what: what.into(),
            expected: expected.into(),
            got: format!("`{}`", value.value),
        };
        if self.kind.value != KIND {
            return Err(wrong(&self.kind, "kind", KIND));
        }
        let version = self.api_version.value.trim_start_matches('v');
        if !["3.0.", "3.1.", "3.2."].iter().any(|line| version.starts_with(line)) {
            return Err(wrong(&self.api_version, "apiVersion", "v3.0.x, v3.1.x or v3.2.x"));
        }
        check_custom(document, &self.custom_properties, &CONTRACT_PROPERTIES)?;
        for server in &self.servers {
            check_custom(document, &server.custom_properties, &SERVER_PROPERTIES)?;
        }
        for table in &self.schema.value {
            check_custom(document, &table.custom_properties, &[])?;
            for column in &table.properties {
                check_custom(document, &column.custom_properties, &COLUMN_PROPERTIES)?;
            }
        }
        Ok(())
    }
}

fn check_custom(
    document: &Document,
    properties: &[CustomProperty],
    known: &[&str],
) -> Result<(), ContractError> {
    let mut seen = std::collections::BTreeSet::new();
    for entry in properties {
        let name = &entry.property.value;
        let place = || document.place(entry.property.referenced);
        if name.starts_with("tfm") && !known.contains(&name.as_str()) {
            let expected = known.iter().map(|&n| n.to_owned()).collect();
            return Err(ContractError::UnknownKey { place: place(), key: name.clone(), expected });
        }
        if !seen.insert(name) {
            return Err(ContractError::DeclaredTwice {
                place: place(),
                what: format!("custom property `{name}`"),
            });
        }
    }
    Ok(())
}

/// Version of the standard that we write.
pub const API_VERSION: &str = "v3.1.0";
/// `kind` of a data contract; its presence tells ODCS from the short form.
pub const KIND: &str = "DataContract";

/// `tfm*` custom properties of a contract.
pub const CONTRACT_PROPERTIES: [&str; 9] = [
    "tfmSensitivity",
    "tfmAllowTraining",
    "tfmAllowedPurposes",
    "tfmDomainAggregates",
    "tfmEntityNamespace",
    "tfmMaxUnits",
    "tfmRowCompleteness",
    "tfmCardinality",
    "tfmDistributionSummary",
];

/// `tfm*` custom properties of a column.
pub const COLUMN_PROPERTIES: [&str; 12] = [
    "tfmFeature",
    "tfmFeatureType",
    "tfmRole",
    "tfmRange",
    "tfmScale",
    "tfmCutPoints",
    "tfmCategories",
    "tfmUnit",
    "tfmSensitive",
    "tfmPrivacyUnit",
    "tfmMaxRowsPerUnit",
    "tfmCardinality",
];

/// `tfm*` custom properties of a server.
pub const SERVER_PROPERTIES: [&str; 1] = ["tfmDelimiter"];
