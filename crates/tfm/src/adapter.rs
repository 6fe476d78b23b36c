//! The default adapter: one delta per model column, added to the cells of query rows only.
//!
//! Because the context never sees it, one cached context serves all adapters and all rounds, and a zero adapter is
//! the base to the last bit. Deltas are keyed by column keys, not by position; a column without a delta gets zero.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{
    checkpoint::{read_floats, write_floats},
    error::TfmError,
};

/// Per-column deltas of the feature tokens, `(columns, width)`.
#[derive(Debug, Clone, PartialEq)]
pub struct FeatureTokens {
    keys: Vec<String>,
    width: usize,
    values: Vec<f32>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: String,
    keys: Vec<String>,
    width: usize,
    /// SHA-256 (hex) of the base that the deltas belong to.
    base: String,
}

impl FeatureTokens {
    /// All-zero deltas, which change nothing.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn zero(keys: Vec<String>, width: usize) -> Result<Self, TfmError> {
        let values = vec![0.0; keys.len().saturating_mul(width)];
        Self::new(keys, width, values)
    }

    /// Deltas `(keys, width)`, row by row.
    ///
    /// # Errors
    /// [`TfmError::TooLarge`] beyond [`MAX_COLUMNS`]; [`TfmError::Mismatch`] for a key given twice, a width of 0, a
    /// wrong number of values or one that isn't finite.
    pub fn new(keys: Vec<String>, width: usize, values: Vec<f32>) -> Result<Self, TfmError> {
        if keys.len() > MAX_COLUMNS {
            return Err(TfmError::TooLarge { what: "adapter columns", got: keys.len(), limit: MAX_COLUMNS });
        }
        let distinct: std::collections::BTreeSet<&String> = keys.iter().collect();
        if distinct.len() != keys.len() {
            return Err(TfmError::mismatch("distinct column keys", keys.len(), distinct.len()));
        }
        if width == 0 || values.len() != keys.len() * width {
            return Err(TfmError::mismatch("adapter values", keys.len() * width.max(1), values.len()));
        }
        if values.iter().any(|v| !v.is_finite()) {
            return Err(TfmError::NotFinite { name: TENSOR.to_owned() });
        }
        Ok(Self { keys, width, values })
    }

    /// Column keys.
    #[must_use]
    pub fn keys(&self) -> &[String] {
        &self.keys
    }

    /// Entries per column, the model's cell width.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Deltas `(keys, width)`, row by row.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Number of trained values, `D`.
    #[must_use]
    pub fn dimension(&self) -> usize {
        self.values.len()
    }

    /// Deltas in the order of `keys`; zero where this adapter has none.
    #[must_use]
    pub fn aligned(&self, keys: &[String]) -> Vec<f32> {
        let rows: BTreeMap<&String, &[f32]> =
            self.keys.iter().zip(self.values.chunks_exact(self.width)).collect();
        let mut aligned = vec![0f32; keys.len() * self.width];
        for (to, key) in aligned.chunks_exact_mut(self.width).zip(keys) {
            if let Some(row) = rows.get(key) {
                to.copy_from_slice(row);
            }
        }
        aligned
    }

    /// Adds `factor * step`, a vector in this adapter's own key order.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for another length, [`TfmError::NotFinite`] if a value stops being finite; then nothing
    /// is changed.
    pub fn add_scaled(&mut self, step: &[f64], factor: f64) -> Result<(), TfmError> {
        if step.len() != self.values.len() {
            return Err(TfmError::mismatch("adapter step", self.values.len(), step.len()));
        }
        let moved: Vec<f32> =
            self.values.iter().zip(step).map(|(v, s)| (f64::from(*v) + factor * s) as f32).collect();
        if moved.iter().any(|v| !v.is_finite()) {
            return Err(TfmError::NotFinite { name: TENSOR.to_owned() });
        }
        self.values = moved;
        Ok(())
    }

    /// Sum of two adapters over the union of their columns, keys in alphabetical order.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for different widths; as [`Self::new`] for the result.
    pub fn merge(&self, other: &Self) -> Result<Self, TfmError> {
        if self.width != other.width {
            return Err(TfmError::mismatch("adapter width", self.width, other.width));
        }
        let keys: std::collections::BTreeSet<String> = self.keys.iter().chain(&other.keys).cloned().collect();
        let keys: Vec<String> = keys.into_iter().collect();
        let values = self.aligned(&keys).iter().zip(other.aligned(&keys)).map(|(a, b)| a + b).collect();
        Self::new(keys, self.width, values)
    }

    /// The adapter as a safetensors file; equal adapters give equal bytes. `base` is the digest of its base.
    ///
    /// # Errors
    /// [`TfmError::Format`] if serialisation fails.
    pub fn to_safetensors(&self, base: &str) -> Result<Vec<u8>, TfmError> {
        let header = Header {
            format: FORMAT.to_owned(),
            keys: self.keys.clone(),
            width: self.width,
            base: base.to_owned(),
        };
        let tensor = (vec![self.keys.len(), self.width], self.values.clone());
        write_floats(&header, &BTreeMap::from([(TENSOR.to_owned(), tensor)]))
    }

    /// Reads an adapter file that must belong to the base with digest `base`.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for another base; [`TfmError::TooLarge`], [`TfmError::Format`],
    /// [`TfmError::MissingTensor`], [`TfmError::ExtraTensor`], [`TfmError::WrongShape`] or [`TfmError::NotFinite`]
    /// for a file that isn't an adapter; as [`Self::new`].
    pub fn from_safetensors(bytes: &[u8], base: &str) -> Result<Self, TfmError> {
        let (header, mut tensors): (Header, _) = read_floats("adapter file", bytes, MAX_ADAPTER_BYTES)?;
        if header.format != FORMAT {
            let reason = format!("expected format {FORMAT:?}, got {:?}", header.format);
            return Err(TfmError::format("adapter file", reason));
        }
        if header.base != base {
            return Err(TfmError::mismatch("base of the adapter", base, header.base));
        }
        let (shape, values) =
            tensors.remove(TENSOR).ok_or_else(|| TfmError::MissingTensor { name: TENSOR.to_owned() })?;
        if let Some(name) = tensors.into_keys().next() {
            return Err(TfmError::ExtraTensor { name });
        }
        let expected = vec![header.keys.len(), header.width];
        if shape != expected {
            return Err(TfmError::WrongShape { name: TENSOR.to_owned(), expected, got: shape });
        }
        Self::new(header.keys, header.width, values)
    }
}

const FORMAT: &str = "tabmesh-adapter-1";
const TENSOR: &str = "feature_tokens.delta";
/// Most columns of an adapter.
pub const MAX_COLUMNS: usize = 1024;
/// Largest adapter file, bytes.
pub const MAX_ADAPTER_BYTES: usize = 4 << 20;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{FeatureTokens, MAX_ADAPTER_BYTES, MAX_COLUMNS};
    use crate::error::TfmError;

    fn tokens(keys: &[&str], values: &[f32]) -> FeatureTokens {
        let keys = keys.iter().map(ToString::to_string).collect();
        FeatureTokens::new(keys, 2, values.to_vec()).unwrap()
    }

    #[test]
    fn merge_sums_by_key_and_alignment_fills_with_zero() {
        let merged = tokens(&["b", "a"], &[1.0, 2.0, 3.0, 4.0])
            .merge(&tokens(&["c", "b"], &[5.0, 6.0, 7.0, 8.0]))
            .unwrap();
        assert_eq!(merged.keys(), ["a", "b", "c"]);
        assert_eq!(merged.values(), [3.0, 4.0, 8.0, 10.0, 5.0, 6.0]);
        assert_eq!(merged.aligned(&["x".into(), "c".into()]), [0.0, 0.0, 5.0, 6.0]);
        assert_eq!(merged.merge(&FeatureTokens::zero(vec!["a".into()], 2).unwrap()).unwrap(), merged);
    }

    #[test]
    fn files_are_stable_and_bound_to_their_base() {
        let adapter = tokens(&["a", "b"], &[0.25, -1.0, 0.0, 3.0]);
        let bytes = adapter.to_safetensors("digest").unwrap();
        assert_eq!(bytes, adapter.to_safetensors("digest").unwrap());
        assert_eq!(FeatureTokens::from_safetensors(&bytes, "digest").unwrap(), adapter);
        let other = FeatureTokens::from_safetensors(&bytes, "another");
        assert!(matches!(other, Err(TfmError::Mismatch { what: "base of the adapter", .. })));
        let cut = FeatureTokens::from_safetensors(&bytes[..bytes.len() - 1], "digest");
        assert!(matches!(cut, Err(TfmError::Format { .. })));
        let large = FeatureTokens::from_safetensors(&vec![0; MAX_ADAPTER_BYTES + 1], "digest");
        assert!(matches!(large, Err(TfmError::TooLarge { limit: MAX_ADAPTER_BYTES, .. })));
    }

    #[test]
    fn steps_that_overflow_change_nothing_and_limits_hold_at_one_above() {
        let mut adapter = tokens(&["a"], &[1.0, 2.0]);
        adapter.add_scaled(&[1.0, -1.0], 0.5).unwrap();
        assert_eq!(adapter.values(), [1.5, 1.5]);
        assert!(matches!(adapter.add_scaled(&[1e300, 0.0], 1.0), Err(TfmError::NotFinite { .. })));
        assert_eq!(adapter.values(), [1.5, 1.5]);
        let keys = |n: usize| (0..n).map(|i| i.to_string()).collect();
        assert!(FeatureTokens::zero(keys(MAX_COLUMNS), 1).is_ok());
        assert!(matches!(FeatureTokens::zero(keys(MAX_COLUMNS + 1), 1), Err(TfmError::TooLarge { .. })));
        assert!(FeatureTokens::new(vec!["a".into(), "a".into()], 1, vec![0.0; 2]).is_err());
    }
}
