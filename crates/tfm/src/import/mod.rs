//! Model files of the public package: safetensors, and torch checkpoints with `config` and `state_dict`.
//!
//! Files come from outside. Sizes, names, shapes, types and finiteness are checked before a model exists, pickles
//! are read as plain data and never run, and a switch that an old configuration leaves out is read off the tensors'
//! names. Values of other float types become f32.

pub(crate) mod pickle;
mod torch;

use std::collections::BTreeMap;

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Map, Value, json};

use crate::{
    checkpoint::{Floats, MAX_HEADER_BYTES, MAX_MODEL_BYTES, model_from_named},
    error::TfmError,
    model::{Model, config::ModelConfig},
};

/// A read model file of the public package: its configuration, if it holds one, and its tensors.
#[derive(Debug, Clone)]
pub struct PublicFile {
    /// The container it came in.
    pub container: Container,
    /// Text entries beside the tensors; `config` is the configuration as JSON.
    pub metadata: BTreeMap<String, String>,
    /// Named tensors, shape and values.
    pub tensors: Floats,
}

/// The container of a model file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// A safetensors file.
    Safetensors,
    /// A torch checkpoint: a zip archive with a pickle.
    Torch,
}

impl PublicFile {
    /// Reads a file of either container, told apart by its first bytes.
    ///
    /// # Errors
    /// [`TfmError::TooLarge`] beyond [`MAX_MODEL_BYTES`] or another limit; [`TfmError::Format`] for a broken
    /// container, an unknown type or an unreadable pickle; [`TfmError::NotFinite`] naming the tensor.
    pub fn read(bytes: &[u8]) -> Result<Self, TfmError> {
        if bytes.len() > MAX_MODEL_BYTES {
            let (got, limit) = (bytes.len(), MAX_MODEL_BYTES);
            return Err(TfmError::TooLarge { what: "model file", got, limit });
        }
        let file = if bytes.starts_with(ZIP_MAGIC) { torch::read(bytes)? } else { safetensors(bytes)? };
        for (name, (_, values)) in &file.tensors {
            if values.iter().any(|v| !v.is_finite()) {
                return Err(TfmError::NotFinite { name: name.clone() });
            }
        }
        Ok(file)
    }

    /// The model of this file, with `config` instead of the file's own configuration if given. Tensors whose name
    /// starts with [`ACTIVATION_PREFIX`] belong to comparisons and are left out.
    ///
    /// # Errors
    /// [`TfmError::Format`] if there is no usable configuration; [`TfmError::BadConfig`] if it is out of range;
    /// [`TfmError::MissingTensor`], [`TfmError::ExtraTensor`] and [`TfmError::WrongShape`] where the tensors aren't
    /// what it says.
    pub fn model(&self, config: Option<&str>) -> Result<Model, TfmError> {
        let text = config
            .or_else(|| self.metadata.get(CONFIG_KEY).map(String::as_str))
            .ok_or_else(|| TfmError::format("model file", "it holds no configuration, give one beside it"))?;
        let mut entries: Map<String, Value> =
            serde_json::from_str(text).map_err(|e| TfmError::format("configuration", e))?;
        complete(&mut entries, &self.tensors);
        let config: ModelConfig = serde_json::from_value(Value::Object(entries))
            .map_err(|e| TfmError::format("configuration", e))?;
        self.model_as(&config)
    }

    /// The model of this file under a configuration that leaves nothing out, as [`Model::config`] gives it.
    ///
    /// # Errors
    /// As [`Self::model`].
    pub fn model_as(&self, config: &ModelConfig) -> Result<Model, TfmError> {
        let weights = self.tensors.iter().filter(|(name, _)| !name.starts_with(ACTIVATION_PREFIX));
        model_from_named(config, weights.map(|(name, tensor)| (name.clone(), tensor.clone())).collect())
    }
}

/// Fills in what older configurations leave out: all switches of the first version if its tensors are there, and the
/// package's own default for rotary pairs.
fn complete(config: &mut Map<String, Value>, tensors: &Floats) {
    let affine = tensors.contains_key("col_embedder.out_w.weight");
    if affine && !config.contains_key("col_affine") {
        for (key, value) in [
            ("col_affine", json!(true)),
            ("col_feature_group", json!(false)),
            ("col_target_aware", json!(tensors.contains_key("col_embedder.y_encoder.weight"))),
            ("col_ssmax", json!(false)),
            ("icl_ssmax", json!(false)),
        ] {
            config.entry(key).or_insert(value);
        }
    }
    config.entry("row_rope_interleaved").or_insert(json!(true));
}

fn safetensors(bytes: &[u8]) -> Result<PublicFile, TfmError> {
    let what = "safetensors file";
    let length: [u8; 8] = bytes
        .get(..8)
        .and_then(|b| b.try_into().ok())
        .ok_or_else(|| TfmError::format(what, "shorter than its length field"))?;
    let length = usize::try_from(u64::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > MAX_HEADER_BYTES {
        return Err(TfmError::TooLarge { what: "header", got: length, limit: MAX_HEADER_BYTES });
    }
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| TfmError::format(what, e))?;
    let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
    let container = SafeTensors::deserialize(bytes).map_err(|e| TfmError::format(what, e))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in container.tensors() {
        let values = view_floats(&name, &view)?;
        tensors.insert(name, (view.shape().to_vec(), values));
    }
    Ok(PublicFile { container: Container::Safetensors, metadata, tensors })
}

fn view_floats(name: &str, view: &TensorView<'_>) -> Result<Vec<f32>, TfmError> {
    let kind = match view.dtype() {
        Dtype::F32 => Float::Single,
        Dtype::F64 => Float::Double,
        Dtype::F16 => Float::Half,
        Dtype::BF16 => Float::Brain,
        other => {
            return Err(TfmError::format(
                "safetensors file",
                format!("tensor {name} is {other:?}, not a float"),
            ));
        }
    };
    Ok(kind.decode(view.data()))
}

/// Types of stored numbers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Float {
    Double,
    Single,
    Half,
    Brain,
}

impl Float {
    /// Little-endian values as f32; bytes that don't fill a value are left out.
    fn decode(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Self::Double => bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
            Self::Single => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Self::Half => bytes.as_chunks().0.iter().map(|b| half(u16::from_le_bytes(*b))).collect(),
            Self::Brain => {
                let wide = |b: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
                bytes.as_chunks().0.iter().map(wide).collect()
            }
        }
    }
}

/// A number in IEEE 754 half precision.
fn half(bits: u16) -> f32 {
    let sign = if bits & 0x8000 == 0 { 1.0 } else { -1.0 };
    let (exponent, fraction) = (i32::from((bits >> 10) & 0x1f), f32::from(bits & 0x3ff));
    sign * match exponent {
        0 => fraction * 2f32.powi(-24),
        31 if fraction > 0.0 => f32::NAN,
        31 => f32::INFINITY,
        _ => (1.0 + fraction / 1024.0) * 2f32.powi(exponent - 15),
    }
}

/// Start of the names of stored activations.
pub const ACTIVATION_PREFIX: &str = "__io.";
/// Metadata entry of the configuration.
pub const CONFIG_KEY: &str = "config";
const ZIP_MAGIC: &[u8] = b"PK\x03\x04";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{Container, Float, PublicFile, half};
    use crate::{checkpoint::MAX_HEADER_BYTES, error::TfmError};

    const V1: &[u8] = include_bytes!("../../tests/fixtures/v1_clf_tiny.safetensors");
    const V2: &[u8] = include_bytes!("../../tests/fixtures/v2_clf_tiny.safetensors");
    const CHECKPOINT: &[u8] = include_bytes!("../../tests/fixtures/v2_clf_tiny.ckpt");

    /// The checkpoint was written from the same weights as the safetensors file.
    #[test]
    fn both_containers_hold_the_same_model() {
        let (torch, plain) = (PublicFile::read(CHECKPOINT).unwrap(), PublicFile::read(V2).unwrap());
        assert_eq!((torch.container, plain.container), (Container::Torch, Container::Safetensors));
        let (a, b) = (torch.model(None).unwrap(), plain.model(None).unwrap());
        assert_eq!(a.config(), b.config());
        let bytes = |m: &crate::Model| m.to_safetensors(&crate::checkpoint::BaseInfo::default()).unwrap();
        assert!(bytes(&a) == bytes(&b));
    }

    #[test]
    fn switches_that_a_configuration_leaves_out_are_read_off_the_tensors() {
        let file = PublicFile::read(V1).unwrap();
        let full = file.model(None).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&file.metadata["config"]).unwrap();
        let entries = config.as_object_mut().unwrap();
        entries.retain(|key, _| !key.contains("affine") && !key.contains("ssmax") && !key.contains("target"));
        entries.retain(|key, _| !key.contains("group") && !key.contains("interleaved"));
        assert_eq!(file.model(Some(&config.to_string())).unwrap().config(), full.config());
    }

    #[test]
    fn broken_files_are_refused_by_name() {
        let file = PublicFile::read(V1).unwrap();
        let bare = PublicFile { metadata: [].into(), ..file.clone() };
        assert!(bare.model(None).unwrap_err().to_string().contains("no configuration"));
        assert!(matches!(bare.model(Some("{}")), Err(TfmError::Format { what: "configuration", .. })));
        let mut less = file.clone();
        less.tensors.remove("icl_predictor.ln.bias");
        assert!(
            matches!(less.model(None), Err(TfmError::MissingTensor { name }) if name == "icl_predictor.ln.bias")
        );
        let mut more = file;
        more.tensors.insert("extra".into(), (vec![1], vec![0.0]));
        assert!(matches!(more.model(None), Err(TfmError::ExtraTensor { name }) if name == "extra"));
        assert!(PublicFile::read(b"").is_err());
        assert!(PublicFile::read(&V1[..V1.len() - 1]).is_err());
        let mut huge = V1.to_vec();
        huge[..8].copy_from_slice(&(MAX_HEADER_BYTES as u64 + 1).to_le_bytes());
        assert!(matches!(PublicFile::read(&huge), Err(TfmError::TooLarge { what: "header", .. })));
        let mut wild = V1.to_vec();
        let end = wild.len();
        wild[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        assert!(matches!(PublicFile::read(&wild), Err(TfmError::NotFinite { .. })));
    }

    /// Values by hand from the definition of the formats.
    #[test]
    fn stored_numbers_of_every_type_become_singles() {
        for (bits, value) in [(0x3c00, 1.0), (0xc000, -2.0), (0x0001, 5.960_464_5e-8), (0x7bff, 65504.0)] {
            assert!((half(bits) - value).abs() <= value.abs() * 1e-6, "{bits:x}");
        }
        assert!(half(0x7c00).is_infinite() && half(0x7c01).is_nan());
        let one = |kind: Float, bytes: &[u8]| kind.decode(bytes);
        assert_eq!(one(Float::Brain, &[0x80, 0x3f]), [1.0]);
        assert_eq!(one(Float::Double, &1.5f64.to_le_bytes()), [1.5]);
        assert_eq!(one(Float::Single, &[0, 0, 0xc0, 0x3f, 1]), [1.5]);
    }
}
