//! Torch checkpoints: a zip archive with one pickle and one entry per tensor storage.
//!
//! The pickle is a dictionary with the configuration under `config` and named tensors under `state_dict`; each tensor
//! names its storage, offset, shape and strides. Entries are stored, not compressed.

use std::{
    collections::BTreeMap,
    io::{Cursor, Read},
};

use serde_json::{Map, Value, json};
use zip::ZipArchive;

use super::{
    CONFIG_KEY, Container, Float, PublicFile,
    pickle::{Id, MAX_PICKLE_BYTES, Object, Pickle},
};
use crate::{
    checkpoint::{Floats, MAX_MODEL_BYTES},
    error::TfmError,
};

type Archive<'a> = ZipArchive<Cursor<&'a [u8]>>;

/// Reads a checkpoint. Values may still not be finite.
pub(super) fn read(bytes: &[u8]) -> Result<PublicFile, TfmError> {
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(refused)?;
    if archive.len() > MAX_ENTRIES {
        let (got, limit) = (archive.len(), MAX_ENTRIES);
        return Err(TfmError::TooLarge { what: "checkpoint entries", got, limit });
    }
    let names: Vec<String> =
        archive.file_names().map(|n| n.map(|n| n.into_owned())).collect::<Result<_, _>>().map_err(refused)?;
    let mut folders =
        names.iter().filter_map(|n| n.strip_suffix(PICKLE)).filter(|f| f.is_empty() || f.ends_with('/'));
    let (Some(folder), None) = (folders.next(), folders.next()) else {
        return Err(refused(format!("it must hold one {PICKLE}")));
    };
    let order = format!("{folder}byteorder");
    if names.contains(&order) && entry(&mut archive, &order, MAX_PICKLE_BYTES)? != b"little" {
        return Err(refused("its byte order isn't little"));
    }
    let pickle = Pickle::read(&entry(&mut archive, &format!("{folder}{PICKLE}"), MAX_PICKLE_BYTES)?)?;
    let root = pickle.root();
    let state = pickle.entry(root, STATE_KEY).ok_or_else(|| refused(format!("it has no {STATE_KEY:?}")))?;
    let mut metadata = BTreeMap::new();
    if let Some(config) = pickle.entry(root, CONFIG_KEY) {
        metadata.insert(CONFIG_KEY.to_owned(), plain(&pickle, config, 0)?.to_string());
    }
    let tensors = tensors(&pickle, state, &mut archive, folder)?;
    Ok(PublicFile { container: Container::Torch, metadata, tensors })
}

/// The bytes of an entry.
fn entry(archive: &mut Archive<'_>, name: &str, limit: usize) -> Result<Vec<u8>, TfmError> {
    let file = archive.by_name(name).map_err(|e| refused(format!("entry {name}: {e}")))?;
    let mut bytes = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(|e| refused(format!("entry {name}: {e}")))?;
    if bytes.len() > limit {
        return Err(TfmError::TooLarge { what: "checkpoint entry", got: bytes.len(), limit });
    }
    Ok(bytes)
}

/// Plain data as JSON; other objects become their type's name in words.
fn plain(pickle: &Pickle, id: Id, depth: usize) -> Result<Value, TfmError> {
    if depth > MAX_CONFIG_DEPTH {
        let (got, limit) = (depth, MAX_CONFIG_DEPTH);
        return Err(TfmError::TooLarge { what: "depth of the configuration", got, limit });
    }
    Ok(match pickle.get(id) {
        Some(Object::Bool(value)) => json!(value),
        Some(Object::Int(value)) => json!(value),
        Some(Object::Float(value)) => json!(value),
        Some(Object::Text(value)) => json!(value),
        Some(Object::Sequence(members)) if members.len() <= MAX_CONFIG_ENTRIES => {
            Value::Array(members.iter().map(|m| plain(pickle, *m, depth + 1)).collect::<Result<_, _>>()?)
        }
        Some(Object::Dict(entries)) if entries.len() <= MAX_CONFIG_ENTRIES => {
            let mut object = Map::new();
            for (key, value) in entries {
                let key = pickle.text(*key).ok_or_else(|| refused("a configuration key is not a text"))?;
                // Only one level down, so that shared objects can't multiply.
                object.insert(key.to_owned(), plain(pickle, *value, depth + 1)?);
            }
            Value::Object(object)
        }
        Some(Object::None) => Value::Null,
        _ => return Err(refused("the configuration holds something that isn't plain data")),
    })
}

/// Where a tensor's values are.
struct Place {
    storage: String,
    kind: Float,
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

fn tensors(pickle: &Pickle, state: Id, archive: &mut Archive<'_>, folder: &str) -> Result<Floats, TfmError> {
    let entries = pickle.dict(state).ok_or_else(|| refused(format!("{STATE_KEY:?} isn't a dictionary")))?;
    let mut tensors = Floats::new();
    // Each storage is read once, however many tensors share it.
    let mut storages: BTreeMap<(String, Float), Vec<f32>> = BTreeMap::new();
    let mut total = 0usize;
    for (name, value) in entries {
        let name = pickle.text(*name).ok_or_else(|| refused("a tensor's name is not a text"))?;
        let wrong = || refused(format!("tensor {name} is not a dense float tensor"));
        let place = place(pickle, *value).ok_or_else(wrong)?;
        let count = place.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).unwrap_or(usize::MAX);
        total = total.saturating_add(count);
        if total > MAX_MODEL_BYTES / 4 {
            let (got, limit) = (total, MAX_MODEL_BYTES / 4);
            return Err(TfmError::TooLarge { what: "values of a checkpoint", got, limit });
        }
        let key = (place.storage.clone(), place.kind);
        if !storages.contains_key(&key) {
            let bytes = entry(archive, &format!("{folder}data/{}", place.storage), MAX_MODEL_BYTES)?;
            storages.insert(key.clone(), place.kind.decode(&bytes));
        }
        let stored = storages.get(&key).map_or(&[][..], Vec::as_slice);
        let values = gather(&place, stored, count).ok_or_else(|| {
            refused(format!("tensor {name} reaches beyond its storage of {} values", stored.len()))
        })?;
        tensors.insert(name.to_owned(), (place.shape, values));
    }
    Ok(tensors)
}

/// The place that `torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, ..)` names.
fn place(pickle: &Pickle, id: Id) -> Option<Place> {
    let (name, arguments) = pickle.call(id)?;
    let (name, arguments) = match name {
        "torch._utils._rebuild_parameter" => pickle.call(*arguments.first()?)?,
        _ => (name, arguments),
    };
    let [storage, offset, shape, strides, ..] = arguments else { return None };
    let Some(Object::Persistent(storage)) = pickle.get(*storage) else { return None };
    let [tag, class, key, ..] = pickle.sequence(*storage)? else { return None };
    if name != "torch._utils._rebuild_tensor_v2" || pickle.text(*tag) != Some("storage") {
        return None;
    }
    let Some(Object::Class(class)) = pickle.get(*class) else { return None };
    let kind = match class.as_str() {
        "torch.FloatStorage" => Float::Single,
        "torch.DoubleStorage" => Float::Double,
        "torch.HalfStorage" => Float::Half,
        "torch.BFloat16Storage" => Float::Brain,
        _ => return None,
    };
    let counts = |id: Id| -> Option<Vec<usize>> {
        let members = pickle.sequence(id)?;
        if members.len() > MAX_RANK { None } else { members.iter().map(|m| pickle.count(*m)).collect() }
    };
    let (shape, strides) = (counts(*shape)?, counts(*strides)?);
    let storage = pickle.text(*key)?.to_owned();
    let offset = pickle.count(*offset)?;
    (shape.len() == strides.len()).then_some(Place { storage, kind, offset, shape, strides })
}

/// Values in row-major order; `None` if one lies outside the storage.
fn gather(place: &Place, stored: &[f32], count: usize) -> Option<Vec<f32>> {
    let mut values = Vec::with_capacity(count);
    let mut index = vec![0usize; place.shape.len()];
    for _ in 0..count {
        let mut at = place.offset;
        for (i, stride) in index.iter().zip(&place.strides) {
            at = at.checked_add(i.checked_mul(*stride)?)?;
        }
        values.push(*stored.get(at)?);
        for (i, size) in index.iter_mut().zip(&place.shape).rev() {
            *i += 1;
            if *i < *size {
                break;
            }
            *i = 0;
        }
    }
    Some(values)
}

fn refused(reason: impl std::fmt::Display) -> TfmError {
    TfmError::format("checkpoint", reason)
}

const PICKLE: &str = "data.pkl";
const STATE_KEY: &str = "state_dict";
/// Most entries of an archive.
const MAX_ENTRIES: usize = 16_384;
/// Deepest nesting of a configuration.
const MAX_CONFIG_DEPTH: usize = 2;
/// Most entries of one object of a configuration.
const MAX_CONFIG_ENTRIES: usize = 256;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::io::{Cursor, Write};

    use proptest::prelude::*;
    use zip::{CompressionMethod, ZipWriter, write::SimpleFileOptions};

    use super::{Float, MAX_RANK, Place, gather, read};
    use crate::error::TfmError;

    const CHECKPOINT: &[u8] = include_bytes!("../../tests/fixtures/v2_clf_tiny.ckpt");

    fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        for (name, bytes) in entries {
            writer.start_file(*name, options).unwrap();
            writer.write_all(bytes).unwrap();
        }
        writer.finish().unwrap().into_inner()
    }

    /// `{"state_dict": {"w": _rebuild_tensor_v2(("storage", <class>, "0", "cpu", 4), 0, <shape>, <strides>)}}`.
    fn pickle(class: &str, shape: &[u8], strides: &[u8]) -> Vec<u8> {
        let mut bytes = b"}X\x0a\x00\x00\x00state_dict}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\n".to_vec();
        bytes.extend(class.as_bytes());
        bytes.extend(b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00(");
        shape.iter().for_each(|d| bytes.extend([b'K', *d]));
        bytes.extend(b"t(");
        strides.iter().for_each(|d| bytes.extend([b'K', *d]));
        bytes.extend(b"ttRss.");
        bytes
    }

    fn storage() -> Vec<u8> {
        [1f32, 2.0, 3.0, 4.0].iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn outcome(pickle: &[u8]) -> Result<Vec<f32>, String> {
        let file = archive(&[("m/data.pkl", pickle), ("m/data/0", &storage())]);
        read(&file).map(|f| f.tensors["w"].1.clone()).map_err(|e| e.to_string())
    }

    #[test]
    fn strided_tensors_are_read_and_unfit_ones_refused_by_name() {
        assert_eq!(outcome(&pickle("FloatStorage", &[2, 2], &[1, 2])).unwrap(), [1.0, 3.0, 2.0, 4.0]);
        assert_eq!(outcome(&pickle("FloatStorage", &[2], &[2])).unwrap(), [1.0, 3.0]);
        let refused = |pickle: &[u8]| outcome(pickle).unwrap_err();
        assert!(refused(&pickle("FloatStorage", &[5], &[1])).contains("beyond its storage of 4"));
        assert!(refused(&pickle("LongStorage", &[2], &[1])).contains("tensor w is not a dense float"));
        assert!(refused(&pickle("FloatStorage", &[2, 2], &[1])).contains("tensor w is not a dense float"));
        assert!(refused(&pickle("FloatStorage", &[1; MAX_RANK + 1], &[1; MAX_RANK + 1])).contains("dense"));
        assert!(outcome(&pickle("FloatStorage", &[1; MAX_RANK], &[1; MAX_RANK])).is_ok());
        // A storage that is stretched by strides of zero to more values than a model may have.
        assert!(refused(&pickle("FloatStorage", &[255; 4], &[0; 4])).contains("the limit is"));
    }

    #[test]
    fn archives_that_are_not_checkpoints_are_refused() {
        let refused = |entries: &[(&str, &[u8])]| read(&archive(entries)).unwrap_err().to_string();
        let good = pickle("FloatStorage", &[2], &[1]);
        assert!(refused(&[("m/other", b"")]).contains("must hold one data.pkl"));
        assert!(refused(&[("a/data.pkl", &good), ("b/data.pkl", &good)]).contains("must hold one data.pkl"));
        assert!(refused(&[("m/data.pkl", &good)]).contains("entry m/data/0"));
        assert!(refused(&[("m/data.pkl", b"}.")]).contains("no \"state_dict\""));
        assert!(refused(&[("m/data.pkl", &good), ("m/byteorder", b"big")]).contains("byte order"));
        // A configuration that holds itself.
        let cyclic = b"}X\x06\x00\x00\x00config}q\x00X\x01\x00\x00\x00ah\x00ssX\x0a\x00\x00\x00state_dict}s.";
        assert!(refused(&[("m/data.pkl", cyclic)]).contains("depth of the configuration"));
        assert!(matches!(read(b"PK\x03\x04"), Err(TfmError::Format { what: "checkpoint", .. })));
        let place = |strides| Place {
            storage: String::new(),
            kind: Float::Single,
            offset: usize::MAX,
            shape: vec![2],
            strides,
        };
        assert_eq!(gather(&place(vec![usize::MAX]), &[0.0], 2), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Cut and changed checkpoints give an error or a file, never a panic.
        #[test]
        fn damaged_checkpoints_never_panic(cut in 0..CHECKPOINT.len(), at in 0..CHECKPOINT.len(), to in any::<u8>()) {
            let _ = read(&CHECKPOINT[..cut]);
            let mut changed = CHECKPOINT.to_vec();
            changed[at] = to;
            let _ = read(&changed);
        }
    }
}
