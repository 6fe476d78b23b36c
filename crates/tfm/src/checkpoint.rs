//! Model files: safetensors with the configuration and the base's provenance in the metadata.
//!
//! Equal weights give equal bytes: tensors are ordered by the format and all metadata sits in one JSON text. Files
//! come from outside, so header, sizes, names, shapes, types and finiteness are checked before a model exists.

use std::{collections::BTreeMap, io::Write, path::Path};

use candle_core::{Device, Tensor};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::{
    error::TfmError,
    model::{Model, config::ModelConfig},
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

    /// Reads a model file.
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
    let text = serde_json::to_string(header).map_err(|e| TfmError::format("metadata", e))?;
    let bytes: BTreeMap<&String, Vec<u8>> = tensors
        .iter()
        .map(|(name, (_, values))| (name, values.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let mut views = BTreeMap::new();
    for (name, (shape, _)) in tensors {
        let data = bytes.get(name).map_or(&[][..], Vec::as_slice);
        let view =
            TensorView::new(Dtype::F32, shape.clone(), data).map_err(|e| TfmError::format("tensor", e))?;
        views.insert(name.clone(), view);
    }
    // One metadata entry, because the container's own map has no order.
    let metadata = Some([(METADATA_KEY.to_owned(), text)].into());
    safetensors::serialize(views, metadata).map_err(|e| TfmError::format("container", e))
}

/// Named tensors as shape and values.
pub type Floats = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Reads named f32 tensors and the JSON metadata, refusing oversize, other types and values that aren't finite.
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
        if view.dtype() != Dtype::F32 {
            return Err(TfmError::format(what, format!("tensor {name} is {:?}, expected F32", view.dtype())));
        }
        let (quads, _) = view.data().as_chunks::<4>();
        let values: Vec<f32> = quads.iter().map(|quad| f32::from_le_bytes(*quad)).collect();
        if values.iter().any(|v| !v.is_finite()) {
            return Err(TfmError::NotFinite { name });
        }
        tensors.insert(name, (view.shape().to_vec(), values));
    }
    Ok((header, tensors))
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
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::{BaseInfo, MAX_HEADER_BYTES, read_floats, write_floats};
    use crate::{
        error::TfmError,
        model::{Model, config::ModelConfig},
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
