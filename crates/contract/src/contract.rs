//! The contract in domain terms: what one data product promises, and which of its columns are approved features.
//!
//! Owns [`Contract`] and its parser for both written forms (ODCS 3.x and the short manifest). Parsing refuses
//! what can't be understood or contradicts itself; [`Contract::approved_schema`] refuses what can't be released
//! (pii features, undeclared ranges, no target). Every value is an owner's declaration; nothing here looks at
//! rows. The digest is SHA-256 of the bytes as stored, never of a re-serialisation.

use std::collections::BTreeSet;

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use serde_saphyr::Location;

use crate::error::{ContractError, Document, Warning};
use crate::manifest::Manifest;
use crate::odcs::Odcs;
use crate::quality::QualityRule;
use crate::schema::{
    Feature, FeatureId, FeatureKind, FeatureSchema, NumericDomain, PrivacyUnit, Scale, SchemaError, Target,
};
use crate::{read, yaml};

/// A parsed data-product contract.
#[derive(Debug, Clone)]
pub struct Contract {
    /// Dotted name of the data product, `domain.product`.
    pub name: String,
    /// Version, three-part where the owner wrote fewer parts.
    pub version: String,
    /// Domain that owns the product.
    pub domain: String,
    /// Labels that plans choose cohorts by.
    pub tags: BTreeSet<String>,
    /// Who answers for it.
    pub owner: String,
    /// Columns in the order declared.
    pub columns: Vec<Column>,
    /// What may be done with the rows.
    pub privacy: Privacy,
    /// Service levels promised.
    pub slo: Slo,
    /// Quality rules, declared and implied.
    pub quality: Vec<QualityRule>,
    /// Where the table is, if the contract says so.
    pub source: Option<SourceSpec>,
    /// SHA-256 of the bytes as stored.
    pub digest: [u8; 32],
    pub(crate) marks: Vec<Marks>,
    pub(crate) schema_at: Location,
    pub(crate) document: Document,
    pub(crate) odcs: Odcs,
}

/// Where the parts of one column's declaration stand.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Marks {
    pub(crate) name: Location,
    pub(crate) role: Location,
    pub(crate) feature: Location,
}

/// One declared column.
#[derive(Debug, Clone, PartialEq)]
pub struct Column {
    /// Name in the table.
    pub name: String,
    /// Declared type.
    pub logical_type: LogicalType,
    /// What the column is for.
    pub role: Role,
    /// Canonical feature id: declared, or the name in lower case.
    pub feature: FeatureId,
    /// How the column enters a model; none = it can't.
    pub feature_type: Option<FeatureType>,
    /// Holds personal data: stays in the domain.
    pub pii: bool,
    /// Protected or delicate attribute: allowed as a feature, shown in reports.
    pub sensitive: bool,
    /// Promised never to be null.
    pub required: bool,
    /// Promised to hold no value twice.
    pub unique: bool,
    /// Declared `[lower, upper]`; the clipping bounds of every release.
    pub range: Option<[f64; 2]>,
    /// Scale of binning and standardising.
    pub scale: Scale,
    /// Declared inner bin edges.
    pub cut_points: Option<Vec<f64>>,
    /// Declared categories, in declaration order.
    pub categories: Option<Vec<String>>,
    /// Unit of measure.
    pub unit: Option<String>,
    /// Description.
    pub description: Option<String>,
}

/// A column's declared type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LogicalType {
    /// Text.
    String,
    /// Whole numbers.
    Integer,
    /// Any numbers.
    Number,
    /// True or false.
    Boolean,
    /// Calendar day.
    Date,
    /// Time of day.
    Time,
    /// Point in time.
    Timestamp,
    /// A nested or otherwise unusable type.
    Other,
}

/// What a column is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Input of models, approved for release.
    Feature,
    /// The class to predict.
    Target,
    /// Identifies a row.
    Id,
    /// When the row happened.
    Time,
    /// Identifies the person or thing a row belongs to.
    Entity,
    /// Not used outside local checks.
    Unused,
}

/// How a column enters a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FeatureType {
    /// A number within a declared range.
    Numeric,
    /// One of declared categories.
    Categorical,
}

/// How delicate the product is; sets the largest ε of the default policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sensitivity {
    /// Little harm if disclosed.
    Low,
    /// Some harm.
    Medium,
    /// Grave harm.
    High,
}

/// What rows may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Noised aggregates for central pre-training.
    CentralAggregate,
    /// Noised adapter updates in federated rounds.
    FederatedAdapter,
    /// Models inside the domain.
    LocalOnly,
}

/// Whether the coordinator may see this domain's own noised aggregates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DomainAggregates {
    /// It may.
    Open,
    /// Only sums over several domains under secure aggregation.
    Confidential,
    /// It may, and the corpus may tell the other domains of the plan which of its rows stand for this one.
    Published,
}

/// The entity namespace of a product whose units are rows, where its contract declares none.
#[must_use]
pub fn default_row_namespace(product: &str) -> String {
    format!("{product}/row")
}

/// What may be done with the rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Privacy {
    /// How delicate the product is.
    pub sensitivity: Sensitivity,
    /// Whether any training outside the domain is allowed; false unless declared.
    pub allow_training: bool,
    /// Purposes allowed.
    pub allowed_purposes: BTreeSet<Purpose>,
    /// Whose presence is hidden, and how many rows it may have.
    pub unit: PrivacyUnit,
    /// Declared largest number of units in the table; bounds δ.
    pub max_units: Option<u64>,
    /// Whether this domain's own aggregates may be seen.
    pub domain_aggregates: DomainAggregates,
    /// Namespace in which entity ids mean the same; half of the budget's key.
    pub entity_namespace: String,
}

/// Service levels promised.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Slo {
    /// Greatest age of the newest row, in hours.
    pub freshness_hours: Option<f64>,
    /// Least share of rows in which every required column has a value, 0 to 1.
    pub row_completeness: Option<f64>,
}

/// Where the table is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceSpec {
    /// File format.
    pub kind: SourceKind,
    /// Path, relative to the contract's folder unless absolute.
    pub path: String,
    /// Field delimiter of a CSV file, one ASCII character; comma unless declared.
    pub delimiter: Option<u8>,
}

/// A table's file format, or the kind of server that a file names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    /// Apache Parquet.
    Parquet,
    /// Delimited text with a header line.
    Csv,
    /// A table of a PostgreSQL server, which a file on the agent's machine names.
    Postgres,
}

impl Contract {
    /// Parses a contract in either form: ODCS if the document has `kind` or `apiVersion`, else the short form.
    /// `file_name` is what errors show.
    ///
    /// # Errors
    /// [`ContractError`] for text over [`MAX_CONTRACT_BYTES`], bad YAML, unknown or missing keys, values outside
    /// what is allowed, and declarations that contradict each other.
    pub fn parse(file_name: &str, text: &str) -> Result<(Self, Vec<Warning>), ContractError> {
        if text.len() > MAX_CONTRACT_BYTES {
            return Err(ContractError::TooLarge {
                file: file_name.to_owned(),
                got: text.len(),
                limit: MAX_CONTRACT_BYTES,
            });
        }
        let document = Document::new(file_name, text);
        let mut warnings = Vec::new();
        let probe: Probe = yaml::parse(&document)?;
        let odcs = if probe.kind.is_some() || probe.api_version.is_some() {
            yaml::parse::<Odcs>(&document)?
        } else {
            yaml::parse::<Manifest>(&document)?.into_odcs(&document, &mut warnings)?
        };
        odcs.check_names(&document)?;
        let mut digest_bytes = [0; 32];
        digest_bytes.copy_from_slice(digest(&SHA256, text.as_bytes()).as_ref());
        let contract = read::contract(odcs, document, digest_bytes, &mut warnings)?;
        Ok((contract, warnings))
    }

    /// The same contract as an ODCS document, for [`Odcs::to_yaml`].
    #[must_use]
    pub fn odcs(&self) -> &Odcs {
        &self.odcs
    }

    /// The digest in lower-case hexadecimal.
    #[must_use]
    pub fn digest_hex(&self) -> String {
        hex::encode(self.digest)
    }

    /// The column of a name.
    #[must_use]
    pub fn column(&self, name: &str) -> Option<&Column> {
        self.columns.iter().find(|c| c.name == name)
    }

    /// The first column with a role.
    #[must_use]
    pub fn column_with_role(&self, role: Role) -> Option<&Column> {
        self.columns.iter().find(|c| c.role == role)
    }

    /// Columns approved as features, in the order declared.
    pub fn features(&self) -> impl Iterator<Item = &Column> {
        self.columns.iter().filter(|c| c.role == Role::Feature)
    }

    /// The features and target that may leave the domain in noised form. Columns with the roles id, time, entity
    /// and unused are no part of it.
    ///
    /// # Errors
    /// [`ContractError::PiiFeature`], [`ContractError::UndeclaredRange`],
    /// [`ContractError::UndeclaredCategories`], [`ContractError::TargetCount`] or [`ContractError::Schema`], each
    /// at the column that causes it.
    pub fn approved_schema(&self) -> Result<FeatureSchema, ContractError> {
        let mut features = Vec::new();
        let mut targets = Vec::new();
        for (column, marks) in self.columns.iter().zip(&self.marks) {
            let role = match column.role {
                Role::Feature => "feature",
                Role::Target => "target",
                Role::Id | Role::Time | Role::Entity | Role::Unused => continue,
            };
            if column.pii {
                let place = self.document.place(marks.role);
                return Err(ContractError::PiiFeature { place, column: column.name.clone(), role });
            }
            if column.role == Role::Feature {
                features.push(self.feature(column, marks)?);
            } else {
                targets.push((self.target(column, marks)?, marks));
            }
        }
        let got = targets.len();
        let surplus = targets.get(1).map_or(self.schema_at, |(_, marks)| marks.role);
        let (Some((target, _)), true) = (targets.into_iter().next(), got == 1) else {
            return Err(ContractError::TargetCount { place: self.document.place(surplus), got });
        };
        FeatureSchema::new(features, target).map_err(|source| self.blame(source))
    }

    fn feature(&self, column: &Column, marks: &Marks) -> Result<Feature, ContractError> {
        let kind = match (column.feature_type, column.range, &column.categories) {
            (Some(FeatureType::Numeric), Some([lower, upper]), _) => FeatureKind::Numeric(NumericDomain {
                lower,
                upper,
                scale: column.scale,
                cut_points: column.cut_points.clone(),
            }),
            (Some(FeatureType::Numeric), None, _) => {
                let place = self.document.place(marks.name);
                return Err(ContractError::UndeclaredRange { place, column: column.name.clone() });
            }
            (_, _, Some(levels)) => FeatureKind::Categorical { levels: levels.clone() },
            (_, _, None) => return Err(self.undeclared_categories(column, marks)),
        };
        Ok(Feature {
            id: column.feature.clone(),
            kind,
            unit: column.unit.clone(),
            description: column.description.clone(),
        })
    }

    fn target(&self, column: &Column, marks: &Marks) -> Result<Target, ContractError> {
        match &column.categories {
            Some(classes) => Ok(Target { id: column.feature.clone(), classes: classes.clone() }),
            None => Err(self.undeclared_categories(column, marks)),
        }
    }

    fn undeclared_categories(&self, column: &Column, marks: &Marks) -> ContractError {
        ContractError::UndeclaredCategories {
            place: self.document.place(marks.name),
            column: column.name.clone(),
        }
    }

    /// Puts a broken rule of the schema at the column it names.
    fn blame(&self, source: SchemaError) -> ContractError {
        let id = match &source {
            SchemaError::BadRange { feature, .. }
            | SchemaError::BadCutPoints { feature, .. }
            | SchemaError::NegativeLog { feature, .. }
            | SchemaError::BadLevels { feature, .. } => Some(feature.as_str()),
            SchemaError::DuplicateId { id } | SchemaError::BadId { got: id } => Some(id.as_str()),
            SchemaError::FeatureCount { .. } => None,
        };
        let blamed = self.columns.iter().zip(&self.marks).find(|(c, _)| Some(c.feature.as_str()) == id);
        let place = self.document.place(blamed.map_or(self.schema_at, |(_, marks)| marks.name));
        ContractError::Schema { place, source }
    }
}

/// Reads the two keys that tell the forms apart.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", expecting = "a contract (a mapping)")]
struct Probe {
    #[serde(default)]
    kind: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    api_version: Option<serde::de::IgnoredAny>,
}

macro_rules! names {
    ($type:ident { $($variant:ident = $name:literal),+ $(,)? }) => {
        impl $type {
            /// The names accepted, in order.
            pub const NAMES: &'static [&'static str] = &[$($name),+];

            /// The name as written in a contract.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $name),+
                }
            }

            /// The variant of a name.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$variant),)+
                    _ => None,
                }
            }
        }
    };
}
pub(crate) use names;

names!(Role {
    Feature = "feature",
    Target = "target",
    Id = "id",
    Time = "time",
    Entity = "entity",
    Unused = "unused",
});
names!(FeatureType { Numeric = "numeric", Categorical = "categorical" });
names!(Sensitivity { Low = "low", Medium = "medium", High = "high" });
names!(Purpose {
    CentralAggregate = "central_aggregate",
    FederatedAdapter = "federated_adapter",
    LocalOnly = "local_only",
});
names!(DomainAggregates { Open = "open", Confidential = "confidential", Published = "published" });
names!(SourceKind { Parquet = "parquet", Csv = "csv", Postgres = "postgres" });
names!(LogicalType {
    String = "string",
    Integer = "integer",
    Number = "number",
    Boolean = "boolean",
    Date = "date",
    Time = "time",
    Timestamp = "timestamp",
    Other = "other",
});

/// Largest contract, in bytes.
pub const MAX_CONTRACT_BYTES: usize = 1 << 20;
/// Longest name of a product, column or owner, in bytes.
pub const MAX_NAME_BYTES: usize = 256;
/// Most rows one unit may contribute.
pub const MAX_ROWS_PER_UNIT: u64 = 10_000;
/// Most columns of a table.
pub const MAX_COLUMNS: usize = 4096;

#[cfg(test)]
pub(crate) mod tests {
    /// The short form as documented.
    pub(crate) const SHORT: &str = "\
name: payments.transaction_product
version: \"1.2\"
owner: payments-domain@company.com
schema:
  - {name: transaction_id, type: string, pii: false, role: id}
  - {name: customer_id, type: string, pii: true, role: entity}
  - {name: amount, type: decimal, pii: false, feature: payment.amount, scale: log1p}
  - {name: merchant_category, type: categorical, pii: false, feature: merchant.category, categories: [grocery, travel, other]}
  - {name: is_fraud, type: categorical, pii: false, role: target, categories: [\"0\", \"1\"]}
metadata:
  cardinality: auto
  distribution_summary: required
  constraints:
    - non_null: transaction_id
    - numeric_range: {amount: [0, 1000000]}
privacy: {sensitivity: low, allow_training: true, unit: customer_id, max_rows_per_unit: 20}
quality_slo: {freshness_hours: 6, row_completeness: 0.98}
source: {type: parquet, path: transactions.parquet}
";
}
