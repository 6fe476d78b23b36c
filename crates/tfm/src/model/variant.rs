//! The switches that tell the published variants of the model apart.
//!
//! First version: cells scaled by an affine map of the column's summary, one column per cell, labels unseen by the
//! column stage, plain softmax, rotary pairs side by side. Second version: groups of columns, labels in the column
//! stage, scalable softmax, rotary halves; its regressor has norms without bias. Names and values are those of the
//! public package's constructor (PyPI tabicl 2.2.0), so its configurations read unchanged.

use serde::{Deserialize, Serialize};

use crate::error::TfmError;

/// Switches of a model; the default is the second version's classifier.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Variant {
    /// A cell is `value * W + b` with `W` and `b` from the column stage, instead of the stage's output itself.
    #[serde(default, skip_serializing_if = "is_default")]
    pub col_affine: bool,
    /// How columns form cells.
    #[serde(default, skip_serializing_if = "is_default")]
    pub col_feature_group: FeatureGroup,
    /// Columns per cell where columns are grouped.
    #[serde(default = "three", skip_serializing_if = "is_three")]
    pub col_feature_group_size: usize,
    /// The column stage sees the labels of the context rows.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub col_target_aware: bool,
    /// Softmax scaling where inducing points read context rows.
    #[serde(default, skip_serializing_if = "is_default")]
    pub col_ssmax: Ssmax,
    /// Rotary pairs are neighbours `(2 i, 2 i + 1)` instead of halves `(i, i + head_dim / 2)`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub row_rope_interleaved: bool,
    /// Softmax scaling of the in-context stage.
    #[serde(default, skip_serializing_if = "is_default")]
    pub icl_ssmax: Ssmax,
    /// Layer norms have a gain only.
    #[serde(default, skip_serializing_if = "is_default")]
    pub bias_free_ln: bool,
    /// Quantiles that a regression model (`max_classes = 0`) puts out, at levels `i / (num_quantiles + 1)`.
    #[serde(default = "public_quantiles", skip_serializing_if = "is_public_quantiles")]
    pub num_quantiles: usize,
    /// Activation of the blocks' feed-forward part; `gelu` is the only one.
    #[serde(default, skip_serializing_if = "is_default")]
    pub activation: Activation,
    /// Norms stand before attention and feed-forward part; `true` is the only accepted value.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub norm_first: bool,
}

impl Default for Variant {
    fn default() -> Self {
        Self {
            col_affine: false,
            col_feature_group: FeatureGroup::Same,
            col_feature_group_size: three(),
            col_target_aware: true,
            col_ssmax: Ssmax::default(),
            row_rope_interleaved: false,
            icl_ssmax: Ssmax::default(),
            bias_free_ln: false,
            num_quantiles: public_quantiles(),
            activation: Activation::Gelu,
            norm_first: true,
        }
    }
}

impl Variant {
    /// The first version's classifier (arXiv 2502.05564).
    #[must_use]
    pub fn first() -> Self {
        Self {
            col_affine: true,
            col_feature_group: FeatureGroup::Single,
            col_target_aware: false,
            col_ssmax: Ssmax::None,
            row_rope_interleaved: true,
            icl_ssmax: Ssmax::None,
            ..Self::default()
        }
    }

    /// The second version's regressor.
    #[must_use]
    pub fn regressor() -> Self {
        Self { bias_free_ln: true, ..Self::default() }
    }

    /// How columns form cells.
    #[must_use]
    pub fn grouping(&self) -> Grouping {
        Grouping { kind: self.col_feature_group, size: self.col_feature_group_size }
    }

    /// Checks ranges and combinations.
    ///
    /// # Errors
    /// [`TfmError::BadConfig`] naming the first field that is out of range.
    pub fn check(&self) -> Result<(), TfmError> {
        let bad = |field, expected, got: String| Err(TfmError::BadConfig { field, expected, got });
        let size = self.col_feature_group_size;
        if size == 0 || size > MAX_GROUP_SIZE {
            return bad("col_feature_group_size", "within its limits", size.to_string());
        }
        if self.col_affine && self.grouping().width() != 1 {
            let got = format!("{:?} of {size}", self.col_feature_group);
            return bad("col_feature_group", "one column per cell where col_affine is set", got);
        }
        if self.num_quantiles < 2 || self.num_quantiles > MAX_QUANTILES {
            return bad("num_quantiles", "within its limits", self.num_quantiles.to_string());
        }
        if !self.norm_first {
            return bad("norm_first", "true", "false".to_owned());
        }
        Ok(())
    }
}

/// How columns form cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "SwitchOrName", into = "SwitchOrName")]
pub enum FeatureGroup {
    /// One column per cell.
    Single,
    /// Cell `j` holds columns `j + 1`, `j + 2`, `j + 4`, .. counted in a circle; as many cells as columns.
    #[default]
    Same,
    /// Neighbouring columns, the last group filled up with zeros; fewer cells than columns.
    Valid,
}

/// Softmax scaling: what queries are multiplied by before the inner product, as the context grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "SwitchOrName", into = "SwitchOrName")]
pub enum Ssmax {
    /// Nothing.
    None,
    /// `s * ln n`, one learnt `s` per head.
    Heads,
    /// A network of `ln n`, one output per head.
    Mlp,
    /// A network of `ln n`, one output per feature.
    MlpElementwise,
    /// A network of `ln n` per head, times `1 + tanh` of a network of the query.
    QueryMlp,
    /// A network of `ln n` per feature, times `1 + tanh` of a network of the query per feature.
    #[default]
    QueryMlpElementwise,
}

/// Activation of the feed-forward part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// `x * Phi(x)`, by the error function.
    #[default]
    Gelu,
}

/// Columns of each cell. Copied around instead of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grouping {
    kind: FeatureGroup,
    size: usize,
}

impl Grouping {
    /// Values per cell.
    #[must_use]
    pub fn width(self) -> usize {
        if self.kind == FeatureGroup::Single { 1 } else { self.size }
    }

    /// Cells of a row with `columns` columns.
    #[must_use]
    pub fn slots(self, columns: usize) -> usize {
        if self.kind == FeatureGroup::Valid { columns.div_ceil(self.size) } else { columns }
    }

    /// Columns of cell `slot`, one per value; `None` where the group is filled up with a zero.
    pub fn members(self, slot: usize, columns: usize) -> impl Iterator<Item = Option<usize>> {
        (0..self.width()).map(move |i| {
            let column = match self.kind {
                FeatureGroup::Single => slot,
                FeatureGroup::Same => (slot + (1 << i)) % columns,
                FeatureGroup::Valid => slot * self.size + i,
            };
            (column < columns).then_some(column)
        })
    }
}

/// A value of the public package that is a switch or a name.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum SwitchOrName {
    Switch(bool),
    Name(String),
}

impl SwitchOrName {
    /// The value if it is one of `names`, where `true` stands for `on` and `false` for `off`.
    fn one_of<T: Copy>(&self, on: T, off: T, names: &[(&str, T)]) -> Result<T, String> {
        match self {
            Self::Switch(true) => Ok(on),
            Self::Switch(false) => Ok(off),
            Self::Name(name) => names
                .iter()
                .find(|(known, _)| known == name)
                .map(|(_, value)| *value)
                .ok_or_else(|| format!("unknown value {name:?}")),
        }
    }

    fn name(name: Option<&str>) -> Self {
        name.map_or(Self::Switch(false), |name| Self::Name(name.to_owned()))
    }
}

impl TryFrom<SwitchOrName> for FeatureGroup {
    type Error = String;

    fn try_from(value: SwitchOrName) -> Result<Self, String> {
        value.one_of(Self::Same, Self::Single, &[("same", Self::Same), ("valid", Self::Valid)])
    }
}

impl From<FeatureGroup> for SwitchOrName {
    fn from(value: FeatureGroup) -> Self {
        Self::name(match value {
            FeatureGroup::Single => None,
            FeatureGroup::Same => Some("same"),
            FeatureGroup::Valid => Some("valid"),
        })
    }
}

impl TryFrom<SwitchOrName> for Ssmax {
    type Error = String;

    fn try_from(value: SwitchOrName) -> Result<Self, String> {
        value.one_of(Self::QueryMlpElementwise, Self::None, &SSMAX_NAMES)
    }
}

impl From<Ssmax> for SwitchOrName {
    fn from(value: Ssmax) -> Self {
        Self::name(SSMAX_NAMES.iter().find(|(_, v)| *v == value).map(|(name, _)| *name))
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn yes() -> bool {
    true
}

fn is_yes(value: &bool) -> bool {
    *value
}

fn three() -> usize {
    3
}

fn is_three(value: &usize) -> bool {
    *value == three()
}

fn public_quantiles() -> usize {
    999
}

fn is_public_quantiles(value: &usize) -> bool {
    *value == public_quantiles()
}

const SSMAX_NAMES: [(&str, Ssmax); 6] = [
    ("none", Ssmax::None),
    ("ssmax", Ssmax::Heads),
    ("ssmax-mlp", Ssmax::Mlp),
    ("ssmax-mlp-elementwise", Ssmax::MlpElementwise),
    ("qassmax-mlp", Ssmax::QueryMlp),
    ("qassmax-mlp-elementwise", Ssmax::QueryMlpElementwise),
];
/// Most columns per cell.
pub const MAX_GROUP_SIZE: usize = 16;
/// Most quantiles.
pub const MAX_QUANTILES: usize = 9_999;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{FeatureGroup, MAX_GROUP_SIZE, MAX_QUANTILES, Ssmax, Variant};

    #[test]
    fn switches_read_as_the_package_writes_them_and_defaults_are_not_written() {
        let text = r#"{"col_affine":true,"col_feature_group":false,"col_target_aware":false,"col_ssmax":false,
            "row_rope_interleaved":true,"icl_ssmax":"none","dropout":0.0,"zero_init":true}"#;
        let read: Variant = serde_json::from_str(text).unwrap();
        assert_eq!(read, Variant::first());
        assert_eq!(serde_json::from_str::<Variant>(&serde_json::to_string(&read).unwrap()).unwrap(), read);
        assert_eq!(serde_json::to_string(&Variant::default()).unwrap(), "{}");
        let on: Variant = serde_json::from_str(r#"{"col_ssmax":true,"col_feature_group":true}"#).unwrap();
        assert_eq!(on, Variant::default());
        for bad in [r#"{"col_ssmax":"sparse"}"#, r#"{"col_feature_group":3}"#, r#"{"activation":"relu"}"#] {
            assert!(serde_json::from_str::<Variant>(bad).is_err(), "{bad}");
        }
        for ssmax in [Ssmax::None, Ssmax::Heads, Ssmax::QueryMlp] {
            let back: Ssmax = serde_json::from_str(&serde_json::to_string(&ssmax).unwrap()).unwrap();
            assert_eq!(back, ssmax);
        }
    }

    #[test]
    fn limits_hold_at_one_above() {
        let check = |variant: Variant| variant.check().is_ok();
        let plain = Variant::default;
        assert!(check(Variant { col_feature_group_size: MAX_GROUP_SIZE, ..plain() }));
        assert!(!check(Variant { col_feature_group_size: MAX_GROUP_SIZE + 1, ..plain() }));
        assert!(check(Variant { num_quantiles: MAX_QUANTILES, ..plain() }));
        assert!(!check(Variant { num_quantiles: MAX_QUANTILES + 1, ..plain() }));
        assert!(!check(Variant { norm_first: false, ..plain() }));
        assert!(!check(Variant { col_affine: true, ..plain() }));
    }

    #[test]
    fn groups_hold_the_columns_that_their_kind_says() {
        let grouping = |kind| Variant { col_feature_group: kind, ..Variant::default() }.grouping();
        let members = |kind, slot, columns| grouping(kind).members(slot, columns).collect::<Vec<_>>();
        assert_eq!(members(FeatureGroup::Same, 5, 7), [Some(6), Some(0), Some(2)]);
        assert_eq!(members(FeatureGroup::Same, 0, 1), [Some(0), Some(0), Some(0)]);
        assert_eq!(members(FeatureGroup::Valid, 2, 7), [Some(6), None, None]);
        assert_eq!(members(FeatureGroup::Single, 4, 7), [Some(4)]);
        assert_eq!((grouping(FeatureGroup::Valid).slots(7), grouping(FeatureGroup::Same).slots(7)), (3, 7));
    }
}
