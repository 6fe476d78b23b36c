//! Model files from outside: checked, decided on by policy, kept by digest with their licence and source.
//!
//! A folder of its own, apart from a running coordinator's store: `blobs` holds the files byte for byte, `records` the
//! registry of what they are. A file whose licence doesn't permit the declared purpose never enters. Files are read as
//! data only, and stay what was imported; [`ModelStore::converted`] writes this project's own container from them.

use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use serde::Serialize;
use tabmesh_contract::policy::{ModelImport, ModelPurpose, PolicyBundle};
use tabmesh_store::registry::{Kind, MAX_TEXT_BYTES, NewVersion, Registry, Version};
use tabmesh_store::{BlobStore, Digest, Sled};
use tabmesh_tfm::checkpoint::BaseInfo;
use tabmesh_tfm::import::{Container, PublicFile};
use tabmesh_tfm::{Model, ModelConfig};

use crate::error::CoordinatorError;

/// What an operator declares about a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Declaration {
    /// A name for lists and cards.
    pub name: String,
    /// SPDX identifier of the weights' licence, or one that the policy knows.
    pub licence: String,
    /// Where the file comes from, e.g. its address.
    pub source: String,
    /// What it is for.
    pub purpose: ModelPurpose,
}

/// A model of the store.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StoredModel {
    /// SHA-256 of the imported file.
    pub digest: String,
    /// Name given at import.
    pub name: String,
    /// Licence declared at import.
    pub licence: String,
    /// Source declared at import.
    pub source: String,
    /// Purpose declared at import.
    pub purpose: String,
    /// Container of the file: `safetensors`, `torch` or `tabmesh`.
    pub container: String,
    /// What the model predicts: `classes` or `quantiles`.
    pub predicts: String,
    /// Number of trained values.
    pub parameters: u64,
    /// Sizes and switches.
    pub config: ModelConfig,
    /// SHA-256 of the policy bundle that let it in.
    pub policy: String,
    /// When it was imported, UTC milliseconds since 1970.
    pub imported_ms: i64,
}

/// Models in a folder.
pub struct ModelStore {
    registry: Registry,
    blobs: Arc<BlobStore>,
}

impl ModelStore {
    /// Opens a folder that may not exist yet.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if it can't be made or opened, or another process has it open.
    pub fn create(dir: &Path) -> Result<Self, CoordinatorError> {
        let blobs = Arc::new(BlobStore::open(&dir.join("blobs"))?);
        let records = Arc::new(Sled::open(&dir.join("records"))?);
        Ok(Self { registry: Registry::new(records, Arc::clone(&blobs)), blobs })
    }

    /// Opens a folder that exists.
    ///
    /// # Errors
    /// [`CoordinatorError::NotFound`] if there is none; as [`Self::create`].
    pub fn open(dir: &Path) -> Result<Self, CoordinatorError> {
        if !dir.join("records").is_dir() {
            return Err(CoordinatorError::NotFound { what: "model folder", id: dir.display().to_string() });
        }
        Self::create(dir)
    }

    /// Checks a file, asks the policy and keeps it. `config` replaces the file's own configuration. A file that is
    /// there already with the same declaration gives its first entry.
    ///
    /// # Errors
    /// - [`CoordinatorError::Model`] if the file isn't a model
    /// - [`CoordinatorError::Policy`] with the rules that refused, before anything is written
    /// - [`CoordinatorError::Store`] for texts that are too long, or other facts for a file that is there
    pub fn import(
        &self,
        bytes: &[u8],
        config: Option<&str>,
        declaration: &Declaration,
        policy: &PolicyBundle,
        now_ms: i64,
    ) -> Result<StoredModel, CoordinatorError> {
        let (model, container) = load(bytes, config)?;
        let digest = Digest::of(bytes);
        let Declaration { name, licence, source, purpose } = declaration;
        let shown = digest.to_string();
        let decision =
            policy.decide_model(&ModelImport { digest: &shown, licence, source, purpose: *purpose });
        if !decision.allow {
            let rules: Vec<String> = decision
                .rules
                .iter()
                .zip(&decision.reasons)
                .map(|(rule, why)| format!("{rule} ({why})"))
                .collect();
            return Err(CoordinatorError::Policy { what: "model", rules: rules.join(", ") });
        }
        let predicts = if model.config().regression() { "quantiles" } else { "classes" };
        let config =
            serde_json::to_string(model.config()).map_err(CoordinatorError::stored("configuration"))?;
        let attributes: BTreeMap<String, String> = [
            (NAME, name.clone()),
            (LICENCE, licence.clone()),
            (SOURCE, source.clone()),
            (PURPOSE, purpose.as_str().to_owned()),
            (CONTAINER, container.to_owned()),
            (PREDICTS, predicts.to_owned()),
            (PARAMETERS, model.parameters().to_string()),
            (CONFIG, config),
            (POLICY, hex::encode(decision.bundle_digest)),
        ]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
        if let Some(known) = self.registry.find(&digest)? {
            // The first import stays the record; only another declaration is a conflict.
            let same = |key: &str| known.facts.attributes.get(key) == attributes.get(key);
            if [NAME, LICENCE, SOURCE, PURPOSE, CONFIG].into_iter().all(same) {
                return stored(&known);
            }
        }
        if let Some(long) = attributes.values().find(|value| value.len() > MAX_TEXT_BYTES) {
            return Err(tabmesh_store::StoreError::VersionField {
                field: "attribute value",
                got: long.len(),
                max: MAX_TEXT_BYTES,
            }
            .into());
        }
        self.blobs.put(bytes)?;
        let facts = NewVersion {
            kind: Kind::Base,
            digest,
            parents: Vec::new(),
            created_ms: now_ms,
            attributes,
            signature: Vec::new(),
        };
        stored(&self.registry.register(facts)?)
    }

    /// All models, oldest first.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] or [`CoordinatorError::Stored`] if the records can't be read.
    pub fn list(&self) -> Result<Vec<StoredModel>, CoordinatorError> {
        self.registry.list(Some(Kind::Base))?.iter().map(stored).collect()
    }

    /// The one model whose digest starts with `reference`, or whose name is `reference`.
    ///
    /// # Errors
    /// [`CoordinatorError::NotFound`] for none, [`CoordinatorError::Step`] for several; as [`Self::list`].
    pub fn find(&self, reference: &str) -> Result<StoredModel, CoordinatorError> {
        let matches = |model: &StoredModel| {
            model.name == reference
                || (reference.len() >= SHORTEST_REFERENCE && model.digest.starts_with(reference))
        };
        let mut found: Vec<StoredModel> = self.list()?.into_iter().filter(matches).collect();
        match (found.pop(), found.len()) {
            (Some(model), 0) => Ok(model),
            (Some(_), more) => Err(CoordinatorError::Step(format!(
                "{} models match {reference}; give more of the digest",
                more + 1
            ))),
            (None, _) => Err(CoordinatorError::NotFound { what: "model", id: reference.to_owned() }),
        }
    }

    /// The imported file, its digest checked.
    ///
    /// # Errors
    /// [`CoordinatorError::Store`] if it is missing or damaged.
    pub fn original(&self, model: &StoredModel) -> Result<Vec<u8>, CoordinatorError> {
        Ok(self.blobs.get(&Digest::from_str(&model.digest)?)?)
    }

    /// The model in this project's container, with name, licence and the imported file as its parent.
    ///
    /// # Errors
    /// As [`Self::original`]; [`CoordinatorError::Model`] if it can't be written.
    pub fn converted(&self, model: &StoredModel) -> Result<Vec<u8>, CoordinatorError> {
        let bytes = self.original(model)?;
        let file = PublicFile::read(&bytes)?;
        // What was recorded is complete: the package's own defaults must not fill it in again.
        let loaded = if file.metadata.contains_key(OWN_METADATA) {
            Model::from_safetensors(&bytes)?.0
        } else {
            file.model_as(&model.config)?
        };
        let base = BaseInfo {
            name: model.name.clone(),
            licence: model.licence.clone(),
            parent: Some(model.digest.clone()),
            ..BaseInfo::default()
        };
        Ok(loaded.to_safetensors(&base)?)
    }
}

/// The model of a file, and its container's name. This project's own files carry their configuration.
fn load(bytes: &[u8], config: Option<&str>) -> Result<(Model, &'static str), CoordinatorError> {
    let file = PublicFile::read(bytes)?;
    if file.metadata.contains_key(OWN_METADATA) {
        return Ok((Model::from_safetensors(bytes)?.0, "tabmesh"));
    }
    let container = match file.container {
        Container::Safetensors => "safetensors",
        Container::Torch => "torch",
    };
    Ok((file.model(config)?, container))
}

/// The facts of a registered version.
fn stored(version: &Version) -> Result<StoredModel, CoordinatorError> {
    let text = |key: &str| version.facts.attributes.get(key).cloned().unwrap_or_default();
    Ok(StoredModel {
        digest: version.facts.digest.to_string(),
        name: text(NAME),
        licence: text(LICENCE),
        source: text(SOURCE),
        purpose: text(PURPOSE),
        container: text(CONTAINER),
        predicts: text(PREDICTS),
        parameters: text(PARAMETERS).parse().unwrap_or_default(),
        config: serde_json::from_str(&text(CONFIG)).map_err(CoordinatorError::stored("configuration"))?,
        policy: text(POLICY),
        imported_ms: version.facts.created_ms,
    })
}

const NAME: &str = "name";
const LICENCE: &str = "licence";
const SOURCE: &str = "source";
const PURPOSE: &str = "purpose";
const CONTAINER: &str = "container";
const PREDICTS: &str = "predicts";
const PARAMETERS: &str = "parameters";
const CONFIG: &str = "config";
const POLICY: &str = "policy_sha256";
/// Metadata entry of this project's own model files.
const OWN_METADATA: &str = "tabmesh";
/// Fewest characters of a digest that name a model.
const SHORTEST_REFERENCE: usize = 6;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use tabmesh_contract::policy::{ModelPurpose, PolicyBundle};

    use super::{Declaration, ModelStore};
    use crate::error::CoordinatorError;

    const CHECKPOINT: &[u8] = include_bytes!("../../crates/tfm/tests/fixtures/v2_clf_tiny.ckpt");
    const REGRESSOR: &[u8] = include_bytes!("../../crates/tfm/tests/fixtures/v2_reg_tiny.safetensors");

    fn declaration(licence: &str, purpose: ModelPurpose) -> Declaration {
        let (name, source) = ("tiny".to_owned(), "https://example.org/tiny".to_owned());
        Declaration { name, licence: licence.to_owned(), source, purpose }
    }

    #[test]
    fn imported_models_keep_their_facts_and_convert() {
        let dir = tempfile::tempdir().unwrap();
        let store = ModelStore::create(dir.path()).unwrap();
        let policy = PolicyBundle::default();
        let declared = declaration("BSD-3-Clause", ModelPurpose::Commercial);
        let first = store.import(CHECKPOINT, None, &declared, &policy, 5).unwrap();
        assert_eq!(
            (first.container.as_str(), first.predicts.as_str(), first.imported_ms),
            ("torch", "classes", 5)
        );
        // Again is the same entry; under another licence it is a conflict.
        assert_eq!(store.import(CHECKPOINT, None, &declared, &policy, 9).unwrap(), first);
        let other = declaration("MIT", ModelPurpose::Commercial);
        assert!(matches!(
            store.import(CHECKPOINT, None, &other, &policy, 9),
            Err(CoordinatorError::Store(_))
        ));
        let named = Declaration { name: "numbers".into(), ..declared };
        let second = store.import(REGRESSOR, None, &named, &policy, 6).unwrap();
        assert_eq!((second.container.as_str(), second.predicts.as_str()), ("safetensors", "quantiles"));
        drop(store);

        let store = ModelStore::open(dir.path()).unwrap();
        assert_eq!(store.list().unwrap(), [first.clone(), second.clone()]);
        assert_eq!(store.find(&first.digest[..8]).unwrap(), first);
        assert_eq!(store.find("numbers").unwrap(), second);
        assert!(matches!(store.find("absent"), Err(CoordinatorError::NotFound { .. })));
        assert!(store.original(&first).unwrap() == CHECKPOINT);
        let converted = store.converted(&first).unwrap();
        let (model, base) = tabmesh_tfm::Model::from_safetensors(&converted).unwrap();
        assert_eq!(model.config(), &first.config);
        assert_eq!((base.licence.as_str(), base.parent), ("BSD-3-Clause", Some(first.digest)));
        // The converted file is a model file, too.
        let own = Declaration { name: "own".into(), ..named };
        assert_eq!(store.import(&converted, None, &own, &policy, 7).unwrap().container, "tabmesh");
    }

    #[test]
    fn forbidden_and_broken_files_leave_no_trace() {
        let dir = tempfile::tempdir().unwrap();
        let store = ModelStore::create(dir.path()).unwrap();
        let policy = PolicyBundle::default();
        let refused = |declared: &Declaration| match store.import(CHECKPOINT, None, declared, &policy, 0) {
            Err(CoordinatorError::Policy { what: "model", rules }) => rules,
            other => panic!("{other:?}"),
        };
        let rules = refused(&declaration("CC-BY-NC-4.0", ModelPurpose::Commercial));
        assert!(rules.starts_with("licence_forbids_purpose"), "{rules}");
        assert!(refused(&declaration("unheard of", ModelPurpose::Research)).contains("licence_unknown"));
        let unsourced = Declaration { source: String::new(), ..declaration("MIT", ModelPurpose::Research) };
        assert!(refused(&unsourced).starts_with("source_undeclared"));
        let declared = declaration("MIT", ModelPurpose::Research);
        let broken = store.import(&CHECKPOINT[..1000], None, &declared, &policy, 0);
        assert!(matches!(broken, Err(CoordinatorError::Model(_))));
        assert!(store.list().unwrap().is_empty() && store.blobs.list().unwrap().is_empty());
        let nowhere = ModelStore::open(&dir.path().join("nowhere"));
        assert!(matches!(nowhere, Err(CoordinatorError::NotFound { what: "model folder", .. })));
    }
}
