//! Sizes of a model, with the limits that a file from outside must keep.

use serde::{Deserialize, Serialize};

use super::variant::Variant;
use crate::error::TfmError;

/// Sizes and switches of an in-context tabular model. Field names are those of the public package.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Width of a cell, `E`.
    pub embed_dim: usize,
    /// Set-transformer blocks of the column stage.
    pub col_num_blocks: usize,
    /// Heads in the column stage; divides `embed_dim`.
    pub col_nhead: usize,
    /// Inducing points per column block.
    pub col_num_inds: usize,
    /// Blocks of the row stage; the last one is read by the row tokens only.
    pub row_num_blocks: usize,
    /// Heads in the row stage; `embed_dim / row_nhead` must be even.
    pub row_nhead: usize,
    /// Row tokens, `C`; a row's vector has width `D = C * E`.
    pub row_num_cls: usize,
    /// Base of the rotary position angles of the row stage.
    pub row_rope_base: f64,
    /// Blocks of the in-context stage.
    pub icl_num_blocks: usize,
    /// Heads in the in-context stage; divides `D`.
    pub icl_nhead: usize,
    /// Feed-forward width over block width.
    pub ff_factor: usize,
    /// Classes the model can tell apart in one pass; 0 = a regression model, which puts out quantiles.
    pub max_classes: usize,
    /// Hidden width of the softmax-scaling networks.
    #[serde(default = "public_ssmax_hidden")]
    pub ssmax_hidden: usize,
    /// Length of the hashed feature-text vector; 0 = the model reads no feature texts (imported weights).
    #[serde(default)]
    pub feature_text_dim: usize,
    /// Switches between the published variants; files that leave them out hold the second version's classifier.
    #[serde(flatten)]
    pub variant: Variant,
}

/// Hidden width of the softmax-scaling networks in the public package.
fn public_ssmax_hidden() -> usize {
    64
}

impl ModelConfig {
    /// The shipped configuration: about 0.8 million parameters, up to ten classes; trained on a CPU within hours.
    #[must_use]
    pub fn nano() -> Self {
        Self {
            embed_dim: 32,
            col_num_blocks: 2,
            col_nhead: 4,
            col_num_inds: 16,
            row_num_blocks: 2,
            row_nhead: 4,
            row_num_cls: 4,
            row_rope_base: 100_000.0,
            icl_num_blocks: 5,
            icl_nhead: 4,
            ff_factor: 2,
            max_classes: 10,
            ssmax_hidden: 32,
            feature_text_dim: 64,
            variant: Variant::default(),
        }
    }

    /// As [`Self::nano`] with one more in-context block: about one million parameters.
    #[must_use]
    pub fn small() -> Self {
        Self { icl_num_blocks: 6, ..Self::nano() }
    }

    /// The published second version's classifier: about 27 million parameters (TFM layout of Qu et al. 2025, arXiv
    /// 2502.05564, with the switches of the package's second checkpoint).
    #[must_use]
    pub fn published() -> Self {
        Self {
            embed_dim: 128,
            col_num_blocks: 3,
            col_nhead: 8,
            col_num_inds: 128,
            row_num_blocks: 3,
            row_nhead: 8,
            row_num_cls: 4,
            row_rope_base: 100_000.0,
            icl_num_blocks: 12,
            icl_nhead: 8,
            ff_factor: 2,
            max_classes: 10,
            ssmax_hidden: public_ssmax_hidden(),
            feature_text_dim: 0,
            variant: Variant::default(),
        }
    }

    /// A configuration of a few thousand parameters, for tests.
    #[must_use]
    pub fn tiny() -> Self {
        Self {
            embed_dim: 8,
            col_num_blocks: 1,
            col_nhead: 2,
            col_num_inds: 4,
            row_num_blocks: 2,
            row_nhead: 2,
            row_num_cls: 2,
            icl_num_blocks: 2,
            icl_nhead: 2,
            max_classes: 2,
            ssmax_hidden: 8,
            feature_text_dim: 16,
            ..Self::nano()
        }
    }

    /// Width of a row's vector, `D`.
    #[must_use]
    pub fn row_width(&self) -> usize {
        self.embed_dim * self.row_num_cls
    }

    /// Whether the model puts out quantiles of a number instead of class scores.
    #[must_use]
    pub fn regression(&self) -> bool {
        self.max_classes == 0
    }

    /// Width of an encoded label: one-hot over the classes, or one number.
    #[must_use]
    pub fn label_width(&self) -> usize {
        self.max_classes.max(1)
    }

    /// Outputs per query row: class scores or quantiles.
    #[must_use]
    pub fn outputs(&self) -> usize {
        if self.regression() { self.variant.num_quantiles } else { self.max_classes }
    }

    /// Checks every size against its limit and the divisibility rules.
    ///
    /// # Errors
    /// [`TfmError::BadConfig`] naming the first field that is out of range.
    pub fn check(&self) -> Result<(), TfmError> {
        let limits = [
            ("embed_dim", self.embed_dim, 2, MAX_EMBED_DIM),
            ("col_num_blocks", self.col_num_blocks, 1, MAX_BLOCKS),
            ("col_nhead", self.col_nhead, 1, MAX_HEADS),
            ("col_num_inds", self.col_num_inds, 1, MAX_INDUCING),
            ("row_num_blocks", self.row_num_blocks, 1, MAX_BLOCKS),
            ("row_nhead", self.row_nhead, 1, MAX_HEADS),
            ("row_num_cls", self.row_num_cls, 1, MAX_CLS),
            ("icl_num_blocks", self.icl_num_blocks, 1, MAX_BLOCKS),
            ("icl_nhead", self.icl_nhead, 1, MAX_HEADS),
            ("ff_factor", self.ff_factor, 1, MAX_FF_FACTOR),
            ("max_classes", self.max_classes, 0, MAX_CLASSES),
            ("ssmax_hidden", self.ssmax_hidden, 1, MAX_SSMAX_HIDDEN),
            ("feature_text_dim", self.feature_text_dim, 0, MAX_TEXT_DIM),
        ];
        for (field, got, least, most) in limits {
            if got < least || got > most {
                return Err(bad(field, "within its limits", got));
            }
        }
        if self.max_classes == 1 {
            return Err(bad("max_classes", "0 or at least 2", self.max_classes));
        }
        self.variant.check()?;
        if !self.embed_dim.is_multiple_of(self.col_nhead) {
            return Err(bad("col_nhead", "a divisor of embed_dim", self.col_nhead));
        }
        if !self.embed_dim.is_multiple_of(2 * self.row_nhead) {
            return Err(bad("row_nhead", "a divisor of half of embed_dim", self.row_nhead));
        }
        if !self.row_width().is_multiple_of(self.icl_nhead) {
            return Err(bad("icl_nhead", "a divisor of embed_dim * row_num_cls", self.icl_nhead));
        }
        if !(self.row_rope_base.is_finite() && self.row_rope_base > 1.0) {
            return Err(bad("row_rope_base", "a finite number above 1", self.row_rope_base));
        }
        Ok(())
    }
}

fn bad(field: &'static str, expected: &'static str, got: impl std::fmt::Display) -> TfmError {
    TfmError::BadConfig { field, expected, got: got.to_string() }
}

/// Largest cell width.
pub const MAX_EMBED_DIM: usize = 512;
/// Most blocks of one stage.
pub const MAX_BLOCKS: usize = 48;
/// Most attention heads.
pub const MAX_HEADS: usize = 64;
/// Most inducing points.
pub const MAX_INDUCING: usize = 1024;
/// Most row tokens.
pub const MAX_CLS: usize = 16;
/// Largest feed-forward factor.
pub const MAX_FF_FACTOR: usize = 8;
/// Most classes in one pass.
pub const MAX_CLASSES: usize = 64;
/// Largest hidden width of the softmax-scaling networks.
pub const MAX_SSMAX_HIDDEN: usize = 1024;
/// Longest hashed feature-text vector.
pub const MAX_TEXT_DIM: usize = 4096;

#[cfg(test)]
mod tests {
    use super::{MAX_BLOCKS, MAX_EMBED_DIM, ModelConfig};

    #[test]
    fn limits_hold_at_one_above() {
        assert!(ModelConfig::nano().check().is_ok());
        let wide = ModelConfig { embed_dim: MAX_EMBED_DIM, ..ModelConfig::nano() };
        assert!(wide.check().is_ok());
        let wider = ModelConfig { embed_dim: MAX_EMBED_DIM + 1, ..ModelConfig::nano() };
        assert_eq!(
            wider.check().err().map(|e| e.to_string()),
            Some("embed_dim must be within its limits, got 513".into())
        );
        assert!(ModelConfig { icl_num_blocks: MAX_BLOCKS + 1, ..ModelConfig::nano() }.check().is_err());
        assert!(ModelConfig { row_nhead: 32, ..ModelConfig::nano() }.check().is_err());
        assert!(ModelConfig { row_rope_base: f64::NAN, ..ModelConfig::nano() }.check().is_err());
    }
}
