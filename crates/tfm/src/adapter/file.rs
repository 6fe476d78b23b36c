//! Adapter files: safetensors with the layout and the digest of the base in the metadata.
//!
//! Equal adapters give equal bytes. The default kind isn't written, so its files are those of the first version of the
//! format, and a reader of that version refuses every other kind by its unknown field.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Adapter, Kind, Layout};
use crate::{
    checkpoint::{read_floats, write_floats},
    error::TfmError,
    model::Model,
};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: String,
    #[serde(default, skip_serializing_if = "is_default")]
    adapter: Kind,
    keys: Vec<String>,
    width: usize,
    /// SHA-256 (hex) of the base that the values belong to.
    base: String,
}

fn is_default(kind: &Kind) -> bool {
    *kind == Kind::default()
}

/// Name of the one tensor of a file.
pub(super) fn tensor_name(kind: Kind) -> &'static str {
    if is_default(&kind) { "feature_tokens.delta" } else { "adapter.values" }
}

impl Layout {
    /// An adapter of this layout as a safetensors file; `base` is the digest of its base.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for a wrong number of values, [`TfmError::NotFinite`] for one that isn't a number,
    /// [`TfmError::Format`] if serialisation fails.
    pub fn to_safetensors(&self, values: &[f32], base: &str) -> Result<Vec<u8>, TfmError> {
        self.check(values)?;
        let header = Header {
            format: FORMAT.to_owned(),
            adapter: self.kind,
            keys: self.keys.clone(),
            width: self.width,
            base: base.to_owned(),
        };
        let tensor = (vec![self.keys.len(), self.width], values.to_vec());
        write_floats(&header, &BTreeMap::from([(tensor_name(self.kind).to_owned(), tensor)]))
    }
}

impl Adapter {
    /// The adapter as a safetensors file; `base` is the digest of its base.
    ///
    /// # Errors
    /// As [`Layout::to_safetensors`].
    pub fn to_safetensors(&self, base: &str) -> Result<Vec<u8>, TfmError> {
        self.layout.to_safetensors(&self.values, base)
    }

    /// Reads an adapter file that must belong to `model`, whose digest is `base`.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for another base or for keys that the kind doesn't have on it; [`TfmError::TooLarge`],
    /// [`TfmError::Format`], [`TfmError::MissingTensor`], [`TfmError::ExtraTensor`], [`TfmError::WrongShape`] or
    /// [`TfmError::NotFinite`] for a file that isn't an adapter; as [`Layout::of`].
    pub fn from_safetensors(bytes: &[u8], base: &str, model: &Model) -> Result<Self, TfmError> {
        let (header, mut tensors): (Header, _) = read_floats("adapter file", bytes, MAX_ADAPTER_BYTES)?;
        if header.format != FORMAT {
            let reason = format!("expected format {FORMAT:?}, got {:?}", header.format);
            return Err(TfmError::format("adapter file", reason));
        }
        if header.base != base {
            return Err(TfmError::mismatch("base of the adapter", base, header.base));
        }
        let name = tensor_name(header.adapter);
        let (shape, values) =
            tensors.remove(name).ok_or_else(|| TfmError::MissingTensor { name: name.to_owned() })?;
        if let Some(name) = tensors.into_keys().next() {
            return Err(TfmError::ExtraTensor { name });
        }
        let expected = vec![header.keys.len(), header.width];
        if shape != expected {
            return Err(TfmError::WrongShape { name: name.to_owned(), expected, got: shape });
        }
        let initial = Self::initial(header.adapter, model, &header.keys)?;
        let layout = &initial.layout;
        if layout.width != header.width {
            return Err(TfmError::mismatch("adapter width", layout.width, header.width));
        }
        if layout.keys != header.keys {
            return Err(TfmError::mismatch("adapter keys", layout.keys.join(","), header.keys.join(",")));
        }
        initial.with_values(values)
    }
}

const FORMAT: &str = "tabmesh-adapter-1";
/// Largest adapter file, bytes.
pub const MAX_ADAPTER_BYTES: usize = 4 << 20;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::collections::BTreeMap;

    use super::MAX_ADAPTER_BYTES;
    use crate::{
        adapter::{Adapter, Kind},
        checkpoint::{read_floats, write_floats},
        context::tests::model,
        error::TfmError,
    };

    fn adapter(kind: Kind) -> Adapter {
        let columns = ["a".to_owned(), "b".to_owned()];
        let initial = Adapter::initial(kind, &model(), &columns).unwrap();
        let values = (0..initial.dimension()).map(|i| i as f32 * 0.25 - 1.0).collect();
        initial.with_values(values).unwrap()
    }

    /// Files of the first version have no kind and must stay readable, and unchanged in their bytes.
    #[test]
    fn feature_tokens_are_written_as_ever() {
        #[derive(serde::Serialize)]
        struct First {
            format: &'static str,
            keys: [&'static str; 2],
            width: usize,
            base: &'static str,
        }
        let header = First { format: "tabmesh-adapter-1", keys: ["a", "b"], width: 8, base: "digest" };
        let now = adapter(Kind::FeatureTokens);
        let tensor = (vec![2, 8], now.values().to_vec());
        let first =
            write_floats(&header, &BTreeMap::from([("feature_tokens.delta".into(), tensor)])).unwrap();
        assert_eq!(now.to_safetensors("digest").unwrap(), first);
        let read = Adapter::from_safetensors(&first, "digest", &model()).unwrap();
        assert_eq!((read.layout(), read.values()), (now.layout(), now.values()));
    }

    #[test]
    fn files_that_do_not_belong_to_the_base_are_refused_by_name() {
        let good = adapter(Kind::Lora { rank: 2 }).to_safetensors("digest").unwrap();
        let read = |bytes: &[u8], base: &str| Adapter::from_safetensors(bytes, base, &model()).unwrap_err();
        assert!(matches!(read(&good, "another"), TfmError::Mismatch { what: "base of the adapter", .. }));
        assert!(matches!(read(&good[..good.len() - 1], "digest"), TfmError::Format { .. }));
        let large = vec![0; MAX_ADAPTER_BYTES + 1];
        assert!(matches!(read(&large, "digest"), TfmError::TooLarge { limit: MAX_ADAPTER_BYTES, .. }));
        // The header says one thing, keys or values another.
        let (header, tensors): (serde_json::Value, _) =
            read_floats("adapter file", &good, good.len()).unwrap();
        let changed = |edit: &dyn Fn(&mut serde_json::Value)| {
            let mut header = header.clone();
            edit(&mut header);
            read(&write_floats(&header, &tensors).unwrap(), "digest")
        };
        assert!(matches!(
            changed(&|h| h["adapter"]["rank"] = 3.into()),
            TfmError::Mismatch { what: "adapter width", .. }
        ));
        assert!(matches!(
            changed(&|h| h["keys"][0] = "icl.0.side".into()),
            TfmError::Mismatch { what: "adapter keys", .. }
        ));
        assert!(matches!(changed(&|h| h["adapter"]["rank"] = 65.into()), TfmError::BadConfig { .. }));
        assert!(matches!(changed(&|h| h["adapter"]["kind"] = "other".into()), TfmError::Format { .. }));
        assert!(matches!(changed(&|h| h["width"] = 31.into()), TfmError::WrongShape { .. }));
        assert!(matches!(changed(&|h| h["format"] = "tabmesh-adapter-9".into()), TfmError::Format { .. }));
    }
}
