//! The canonical feature types a domain promises: declared ranges and levels, roles, the privacy unit.
//!
//! Every number here is an owner's declaration and never derived from rows: numeric ranges double as the
//! clipping bounds of the differentially private release. Columns are ordered by canonical feature id, so two
//! domains that promise the same features agree on positions whatever their tables look like.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why a declaration is refused.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum SchemaError {
    /// A canonical feature id has a character outside `[a-z0-9_.-]`, is empty or too long.
    #[error("canonical feature id {got:?} is not 1 to {MAX_ID_BYTES} characters of a-z, 0-9, '_', '.', '-'")]
    BadId {
        /// The text found.
        got: String,
    },
    /// A numeric range is missing a bound, reversed, empty or not finite.
    #[error("numeric range of {feature} must be finite with lower < upper, got [{lower}, {upper}]")]
    BadRange {
        /// The feature's canonical id.
        feature: String,
        /// Declared lower bound.
        lower: f64,
        /// Declared upper bound.
        upper: f64,
    },
    /// Cut points are not strictly increasing inside the declared range.
    #[error("cut points of {feature} must increase strictly inside ({lower}, {upper})")]
    BadCutPoints {
        /// The feature's canonical id.
        feature: String,
        /// Declared lower bound.
        lower: f64,
        /// Declared upper bound.
        upper: f64,
    },
    /// `log1p` needs a range that starts at or above zero.
    #[error("scale log1p of {feature} needs a lower bound of at least 0, got {lower}")]
    NegativeLog {
        /// The feature's canonical id.
        feature: String,
        /// Declared lower bound.
        lower: f64,
    },
    /// A categorical feature or target declares no level, too many, or one twice.
    #[error("{feature} must declare 1 to {MAX_LEVELS} distinct levels, got {got}")]
    BadLevels {
        /// The feature's canonical id.
        feature: String,
        /// What was found, in words.
        got: String,
    },
    /// Two columns claim one canonical id.
    #[error("canonical feature id {id} is declared by two columns")]
    DuplicateId {
        /// The id declared twice.
        id: String,
    },
    /// The schema has no feature, or more than the limit.
    #[error("a schema needs 1 to {MAX_FEATURES} features, got {got}")]
    FeatureCount {
        /// Number of features found.
        got: usize,
    },
}

/// A canonical feature id: what a column means across the mesh, e.g. `person.age`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FeatureId(String);

impl FeatureId {
    /// Parses an id of 1 to [`MAX_ID_BYTES`] characters out of `a-z`, `0-9`, `_`, `.`, `-`.
    ///
    /// # Errors
    /// [`SchemaError::BadId`] for anything else.
    pub fn new(text: impl Into<String>) -> Result<Self, SchemaError> {
        let text = text.into();
        let fits = !text.is_empty()
            && text.len() <= MAX_ID_BYTES
            && text
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'.' | b'-'));
        if fits { Ok(Self(text)) } else { Err(SchemaError::BadId { got: text }) }
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for FeatureId {
    type Error = SchemaError;

    fn try_from(text: String) -> Result<Self, SchemaError> {
        Self::new(text)
    }
}

impl From<FeatureId> for String {
    fn from(id: FeatureId) -> Self {
        id.0
    }
}

impl std::fmt::Display for FeatureId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The scale on which a numeric feature is binned and standardised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// As it stands.
    #[default]
    Linear,
    /// `ln(1 + x)`, for heavy right tails; needs a lower bound of at least 0.
    Log1p,
}

impl Scale {
    /// Maps a value to this scale.
    #[must_use]
    pub fn apply(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Log1p => value.ln_1p(),
        }
    }

    /// Maps a value on this scale back.
    #[must_use]
    pub fn invert(self, value: f64) -> f64 {
        match self {
            Self::Linear => value,
            Self::Log1p => value.exp_m1(),
        }
    }
}

/// The declared range of a numeric feature; values outside are clamped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NumericDomain {
    /// Declared lower bound, inclusive.
    pub lower: f64,
    /// Declared upper bound, inclusive.
    pub upper: f64,
    /// Scale for binning and standardising.
    #[serde(default)]
    pub scale: Scale,
    /// Declared inner bin edges, strictly increasing inside the range; none = the release finds them privately.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_points: Option<Vec<f64>>,
}

/// What values a feature may take.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum FeatureKind {
    /// A number within a declared range.
    Numeric(NumericDomain),
    /// One of the declared levels; anything else counts as "other".
    Categorical {
        /// Declared levels, in declaration order.
        levels: Vec<String>,
    },
}

/// One approved feature under its canonical id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Feature {
    /// Canonical id.
    pub id: FeatureId,
    /// Declared values.
    pub kind: FeatureKind,
    /// Unit of measure, if declared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// Description, if declared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
}

/// The classification target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Target {
    /// Canonical id.
    pub id: FeatureId,
    /// Declared classes in declaration order; class `k` is the `k`-th.
    pub classes: Vec<String>,
}

/// Whose presence differential privacy hides. Adjacency is always add or remove one unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum PrivacyUnit {
    /// One row.
    Row,
    /// All rows that share one value of a column; at most `max_rows` of them are used.
    Entity {
        /// Column that identifies the entity.
        column: String,
        /// Rows kept per entity in every private computation.
        max_rows: u32,
    },
}

impl PrivacyUnit {
    /// Rows one unit can contribute, `k` of the sensitivity formulas.
    #[must_use]
    pub fn max_rows(&self) -> u32 {
        match self {
            Self::Row => 1,
            Self::Entity { max_rows, .. } => *max_rows,
        }
    }
}

/// The features and the target that domains of one federation share, sorted by canonical id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FeatureSchema {
    features: Vec<Feature>,
    target: Target,
}

impl FeatureSchema {
    /// Sorts the features by canonical id and checks every declaration.
    ///
    /// # Errors
    /// The first [`SchemaError`] found.
    pub fn new(mut features: Vec<Feature>, target: Target) -> Result<Self, SchemaError> {
        if features.is_empty() || features.len() > MAX_FEATURES {
            return Err(SchemaError::FeatureCount { got: features.len() });
        }
        features.sort_by(|a, b| a.id.cmp(&b.id));
        let mut seen = std::collections::BTreeSet::from([&target.id]);
        for feature in &features {
            if !seen.insert(&feature.id) {
                return Err(SchemaError::DuplicateId { id: feature.id.to_string() });
            }
            check_kind(feature)?;
        }
        check_levels(&target.id, &target.classes)?;
        Ok(Self { features, target })
    }

    /// Features in canonical order.
    #[must_use]
    pub fn features(&self) -> &[Feature] {
        &self.features
    }

    /// The target.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Position of a feature in canonical order.
    #[must_use]
    pub fn position(&self, id: &FeatureId) -> Option<usize> {
        self.features.binary_search_by(|f| f.id.cmp(id)).ok()
    }
}

fn check_kind(feature: &Feature) -> Result<(), SchemaError> {
    match &feature.kind {
        FeatureKind::Categorical { levels } => check_levels(&feature.id, levels),
        FeatureKind::Numeric(domain) => {
            let NumericDomain { lower, upper, scale, cut_points } = domain;
            let name = || feature.id.to_string();
            if !(lower.is_finite() && upper.is_finite() && lower < upper) {
                return Err(SchemaError::BadRange { feature: name(), lower: *lower, upper: *upper });
            }
            if *scale == Scale::Log1p && *lower < 0.0 {
                return Err(SchemaError::NegativeLog { feature: name(), lower: *lower });
            }
            let cuts = cut_points.as_deref().unwrap_or_default();
            let inside = cuts.iter().all(|c| c > lower && c < upper);
            let rising = cuts.iter().zip(cuts.iter().skip(1)).all(|(a, b)| a < b);
            if inside && rising && cuts.len() <= MAX_CUT_POINTS {
                Ok(())
            } else {
                Err(SchemaError::BadCutPoints { feature: name(), lower: *lower, upper: *upper })
            }
        }
    }
}

fn check_levels(id: &FeatureId, levels: &[String]) -> Result<(), SchemaError> {
    let distinct: std::collections::BTreeSet<_> = levels.iter().collect();
    if levels.is_empty() || levels.len() > MAX_LEVELS {
        return Err(SchemaError::BadLevels {
            feature: id.to_string(),
            got: format!("{} levels", levels.len()),
        });
    }
    if distinct.len() != levels.len() {
        return Err(SchemaError::BadLevels { feature: id.to_string(), got: "a level declared twice".into() });
    }
    Ok(())
}

/// Longest canonical feature id, in bytes.
pub const MAX_ID_BYTES: usize = 128;
/// Most features in one schema.
pub const MAX_FEATURES: usize = 512;
/// Most levels of one categorical feature.
pub const MAX_LEVELS: usize = 1024;
/// Most declared cut points of one numeric feature.
pub const MAX_CUT_POINTS: usize = 255;
