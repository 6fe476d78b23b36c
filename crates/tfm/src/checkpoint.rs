//! Model files: safetensors with the configuration and the base's provenance in the metadata.
//!
//! Equal weights give equal bytes: tensors are ordered by the format and all metadata sits in one JSON text. Files
//! come from outside, so header, sizes, names, shapes, types and finiteness are checked before a model exists.

use std::{collections::BTreeMap, io::Write, path::Path};

use candle_core::{DType, Device, Tensor};
use safetensors::{
    Dtype, SafeTensors,
    tensor::{TensorView, View},
};
use serde::{Deserialize, Serialize};

use crate::{
    error::TfmError,
    model::{Model, config::ModelConfig, trainable},
};

/// Where a model's weights come from, carried in the file.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct BaseInfo {
    /// Name of the base, e.g. `nano`.
    #[serde(default)]
    pub name: String,
    /// Licence of the weights, as an SPDX expression or a sentence.
    #[serde(default)]
    pub licence: String,
    /// SHA-256 (hex) of the model this one was continued from, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Training steps behind these weights in the last run.
    #[serde(default)]
    pub steps: u64,
    /// Seed of the last run.
    #[serde(default)]
    pub seed: u64,
}

#[derive(Serialize, Deserialize)]
struct Header {
    format: String,
    config: ModelConfig,
    #[serde(default)]
    base: BaseInfo,
}

impl Model {
    /// Writes the weights, the configuration and the provenance; equal inputs give equal bytes.
    ///
    /// # Errors
    /// [`TfmError::Tensor`] if a weight can't be read, [`TfmError::Format`] if serialisation fails.
    pub fn to_safetensors(&self, base: &BaseInfo) -> Result<Vec<u8>, TfmError> {
        let header = Header { format: FORMAT.to_owned(), config: self.config().clone(), base: base.clone() };
        let mut tensors = BTreeMap::new();
        for (name, tensor) in self.tensors() {
            tensors.insert(name.clone(), (tensor.dims().to_vec(), tensor.flatten_all()?.to_vec1::<f32>()?));
        }
        write_floats(&header, &tensors)
    }

    /// As [`Self::to_safetensors`] with trained weights rounded to 16 bits: half the bytes, about three digits. They
    /// are computed with in f32 once read.
    ///
    /// # Errors
    /// As [`Self::to_safetensors`]; [`TfmError::NotFinite`] naming a tensor with a value beyond the range of 16 bits.
    pub fn to_safetensors_f16(&self, base: &BaseInfo) -> Result<Vec<u8>, TfmError> {
        let header = Header { format: FORMAT.to_owned(), config: self.config().clone(), base: base.clone() };
        let mut tensors = BTreeMap::new();
        for (name, tensor) in self.tensors() {
            let rounded = if trainable(name) { tensor.to_dtype(DType::F16)? } else { tensor.clone() };
            if all_values(&rounded)?.iter().any(|v| !v.is_finite()) {
                return Err(TfmError::NotFinite { name: name.clone() });
            }
            let dtype = if trainable(name) { Dtype::F16 } else { Dtype::F32 };
            let bytes = rounded.contiguous()?.data().into_owned();
            tensors.insert(name.clone(), (dtype, tensor.dims().to_vec(), bytes));
        }
        write_views(&header, &tensors)
    }

    /// Reads a model file, of 32-bit or 16-bit weights.
    ///
    /// # Errors
    /// [`TfmError::TooLarge`] beyond [`MAX_MODEL_BYTES`]; [`TfmError::Format`] for a broken container or header;
    /// [`TfmError::MissingTensor`], [`TfmError::ExtraTensor`], [`TfmError::WrongShape`] and
    /// [`TfmError::NotFinite`] where the tensors aren't what the configuration says.
    pub fn from_safetensors(bytes: &[u8]) -> Result<(Self, BaseInfo), TfmError> {
        let (header, tensors): (Header, _) = read_floats("model file", bytes, MAX_MODEL_BYTES)?;
        if header.format != FORMAT {
            let reason = format!("expected format {FORMAT:?}, got {:?}", header.format);
            return Err(TfmError::format("model file", reason));
        }
        Ok((Self::from_floats(&header.config, tensors)?, header.base))
    }

    /// A model from named values.
    fn from_floats(
        config: &ModelConfig,
        tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    ) -> Result<Self, TfmError> {
        let mut loaded = BTreeMap::new();
        for (name, (shape, values)) in tensors {
            loaded.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
        }
        Self::from_tensors(config, loaded)
    }
}

/// A model from named tensors (shape and values) in the public package's naming, e.g. a converted state dict.
///
/// # Errors
/// [`TfmError::MissingTensor`], [`TfmError::ExtraTensor`], [`TfmError::WrongShape`], [`TfmError::BadConfig`].
pub fn model_from_named(config: &ModelConfig, tensors: Floats) -> Result<Model, TfmError> {
    Model::from_floats(config, tensors)
}

/// Serialises named f32 tensors with one JSON metadata text.
pub(crate) fn write_floats<H: Serialize>(
    header: &H,
    tensors: &BTreeMap<String, (Vec<usize>, Vec<f32>)>,
) -> Result<Vec<u8>, TfmError> {
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let tensors = tensors
        .iter()
        .map(|(name, (shape, values))| (name.clone(), (Dtype::F32, shape.clone(), bytes(values))))
        .collect();
    write_views(header, &tensors)
}

/// Serialises named tensors (type, shape, little-endian bytes) with one JSON metadata text.
fn write_views<H: Serialize>(
    header: &H,
    tensors: &BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
) -> Result<Vec<u8>, TfmError> {
    let text = serde_json::to_string(header).map_err(|e| TfmError::format("metadata", e))?;
    let mut views = BTreeMap::new();
    for (name, (dtype, shape, bytes)) in tensors {
        let view =
            TensorView::new(*dtype, shape.clone(), bytes).map_err(|e| TfmError::format("tensor", e))?;
        views.insert(name.clone(), view);
    }
    // One metadata entry, because the container's own map has no order.
    let metadata = Some([(METADATA_KEY.to_owned(), text)].into());
    safetensors::serialize(views, metadata).map_err(|e| TfmError::format("container", e))
}

/// Named tensors as shape and values.
pub type Floats = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Reads named f32 or f16 tensors, as f32, and the JSON metadata; refuses oversize, other types and values that aren't
/// finite.
pub(crate) fn read_floats<H: for<'de> Deserialize<'de>>(
    what: &'static str,
    bytes: &[u8],
    limit: usize,
) -> Result<(H, Floats), TfmError> {
    if bytes.len() > limit {
        return Err(TfmError::TooLarge { what, got: bytes.len(), limit });
    }
    let header_bytes: [u8; 8] = bytes
        .get(..8)
        .and_then(|b| b.try_into().ok())
        .ok_or_else(|| TfmError::format(what, "shorter than its length field"))?;
    let header_len = usize::try_from(u64::from_le_bytes(header_bytes)).unwrap_or(usize::MAX);
    if header_len > MAX_HEADER_BYTES {
        return Err(TfmError::TooLarge { what: "header", got: header_len, limit: MAX_HEADER_BYTES });
    }
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| TfmError::format(what, e))?;
    let text = metadata
        .metadata()
        .as_ref()
        .and_then(|m| m.get(METADATA_KEY))
        .ok_or_else(|| TfmError::format(what, format!("metadata entry {METADATA_KEY:?} is missing")))?;
    let header = serde_json::from_str(text).map_err(|e| TfmError::format(what, e))?;
    let container = SafeTensors::deserialize(bytes).map_err(|e| TfmError::format(what, e))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in container.tensors() {
        let values: Vec<f32> = match view.dtype() {
            Dtype::F32 => {
                let (quads, _) = view.data().as_chunks::<4>();
                quads.iter().map(|quad| f32::from_le_bytes(*quad)).collect()
            }
            Dtype::F16 => {
                all_values(&Tensor::from_raw_buffer(view.data(), DType::F16, view.shape(), &Device::Cpu)?)?
            }
            other => {
                let reason = format!("tensor {name} is {other:?}, expected F32 or F16");
                return Err(TfmError::format(what, reason));
            }
        };
        if values.iter().any(|v| !v.is_finite()) {
            return Err(TfmError::NotFinite { name });
        }
        tensors.insert(name, (view.shape().to_vec(), values));
    }
    Ok((header, tensors))
}

/// All values of a tensor of any float type, as f32.
fn all_values(tensor: &Tensor) -> Result<Vec<f32>, TfmError> {
    Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?)
}

/// Replaces a file so that a crash leaves either the old or the new content.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), TfmError> {
    let io = |action| move |source| TfmError::Io { action, path: path.display().to_string(), source };
    let mut staged = path.as_os_str().to_owned();
    staged.push(".tmp");
    let staged = std::path::PathBuf::from(staged);
    let mut file = std::fs::File::create(&staged).map_err(io("creating"))?;
    file.write_all(bytes).map_err(io("writing"))?;
    file.sync_all().map_err(io("syncing"))?;
    std::fs::rename(&staged, path).map_err(io("renaming"))?;
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        std::fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(io("syncing the directory of"))?;
    }
    Ok(())
}

const FORMAT: &str = "tabmesh-tfm-1";
const METADATA_KEY: &str = "tabmesh";
/// Largest model file, bytes.
pub const MAX_MODEL_BYTES: usize = 512 << 20;
/// Largest container header, bytes.
pub const MAX_HEADER_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use candle_core::{Device, Tensor};
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::{BaseInfo, MAX_HEADER_BYTES, read_floats, write_floats};
    use crate::{
        error::TfmError,
        model::{Model, config::ModelConfig, trainable},
    };

    fn tiny() -> Model {
        Model::random(&ModelConfig::tiny(), &mut ChaCha20Rng::seed_from_u64(3)).unwrap()
    }

    #[test]
    fn round_trip_keeps_bytes_and_provenance() {
        let info = BaseInfo { name: "tiny".into(), steps: 7, ..BaseInfo::default() };
        let bytes = tiny().to_safetensors(&info).unwrap();
        let (model, read) = Model::from_safetensors(&bytes).unwrap();
        assert_eq!(read, info);
        assert_eq!(model.to_safetensors(&info).unwrap(), bytes);
    }

    /// 16-bit weights: half the bytes, each value within half a unit of its eleventh binary digit, and a second trip
    /// changes nothing. Rotary constants stay exact; values beyond 65,504 are refused.
    #[test]
    fn half_precision_rounds_once() {
        let info = BaseInfo { name: "tiny".into(), ..BaseInfo::default() };
        let whole = tiny();
        let bytes = whole.to_safetensors_f16(&info).unwrap();
        let (half, read) = Model::from_safetensors(&bytes).unwrap();
        assert_eq!(read, info);
        assert_eq!(half.to_safetensors_f16(&info).unwrap(), bytes);
        let headers = 2 * 16_000;
        assert!(2 * bytes.len() < whole.to_safetensors(&info).unwrap().len() + headers);
        let values = |model: &Model, name: &str| super::all_values(&model.tensors()[name]).unwrap();
        let mut moved = 0;
        for name in whole.tensors().keys() {
            for (a, b) in values(&whole, name).into_iter().zip(values(&half, name)) {
                // 2^-11 of the value, or half of the smallest step.
                let bound = if trainable(name) { (a.abs() / 2048.0).max(3e-8) } else { 0.0 };
                assert!((a - b).abs() <= bound, "{name}: {a} {b}");
                moved += usize::from(a.to_bits() != b.to_bits());
            }
        }
        assert!(moved > 1000, "{moved} values were rounded");
        let large = |value: f32| {
            let mut tensors = whole.tensors().clone();
            let gains = Tensor::full(value, 16, &Device::Cpu).unwrap();
            tensors.insert("icl_predictor.ln.bias".into(), gains);
            Model::from_tensors(whole.config(), tensors).unwrap().to_safetensors_f16(&info)
        };
        assert!(large(65_504.0).is_ok());
        assert!(
            matches!(large(65_600.0), Err(TfmError::NotFinite { name }) if name == "icl_predictor.ln.bias")
        );
    }

    /// Attack files: each changes one thing and must get its own refusal.
    #[test]
    fn broken_files_are_refused_by_name() {
        let bytes = tiny().to_safetensors(&BaseInfo::default()).unwrap();
        let (header, good): (serde_json::Value, _) = read_floats("model file", &bytes, bytes.len()).unwrap();
        let name = "icl_predictor.ln.bias";
        let change = |edit: &dyn Fn(&mut super::Floats)| {
            let mut tensors = good.clone();
            edit(&mut tensors);
            Model::from_safetensors(&write_floats(&header, &tensors).unwrap()).unwrap_err()
        };
        assert!(
            matches!(change(&|t| drop(t.remove(name))), TfmError::MissingTensor { name: n } if n == name)
        );
        assert!(matches!(
            change(&|t| drop(t.insert("extra".into(), (vec![1], vec![0.0])))),
            TfmError::ExtraTensor { name } if name == "extra"
        ));
        assert!(matches!(
            change(&|t| drop(t.insert(name.into(), (vec![2, 8], vec![0.0; 16])))),
            TfmError::WrongShape { expected, got, .. } if expected == [16] && got == [2, 8]
        ));
        assert!(matches!(
            change(&|t| t.get_mut(name).unwrap().1[3] = f32::NAN),
            TfmError::NotFinite { name: n } if n == name
        ));
        assert!(matches!(Model::from_safetensors(&bytes[..5]), Err(TfmError::Format { .. })));
        assert!(matches!(Model::from_safetensors(&bytes[..bytes.len() - 4]), Err(TfmError::Format { .. })));
        let mut huge = bytes.clone();
        huge[..8].copy_from_slice(&(MAX_HEADER_BYTES as u64 + 1).to_le_bytes());
        assert!(matches!(
            Model::from_safetensors(&huge),
            Err(TfmError::TooLarge { got, .. }) if got == MAX_HEADER_BYTES + 1
        ));
        let read: Result<(serde_json::Value, _), _> = read_floats("model file", &bytes, bytes.len() - 1);
        assert!(matches!(read, Err(TfmError::TooLarge { .. })));
    }
}
