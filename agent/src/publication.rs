//! Published artefacts: fetched by digest, checked against a signed manifest, kept for serving.
//!
//! Bytes get a name only after their digest holds, a manifest is parsed only after its signature holds, and the pointer to
//! the current publication moves only when every artefact of it is here. So a prediction always comes from a complete,
//! verified model, whatever was cut off when.

use std::path::{Path, PathBuf};

use tabmesh_contract::batch::TypedBatch;
use tabmesh_contract::schema::FeatureSchema;
use tabmesh_federation::documents::{
    self, CorpusDocument, DocumentError, MAX_CORPUS_BYTES, MAX_DOCUMENT_BYTES, Publication,
};
use tabmesh_federation::id::Digest;
use tabmesh_federation::manifest::{Manifest, ManifestError, SignedManifest, Trust};
use tabmesh_forest::{Forest, ForestError, MAX_FOREST_BYTES};
use tabmesh_privacy::signature::VerifyingKey;
use tabmesh_proto::client::{ClientError, MeshClient};
use tabmesh_store::{BlobStore, StoreError};
use tabmesh_tfm::adapter::Adapter;
use tabmesh_tfm::error::TfmError;
use tabmesh_tfm::model::Model;
use tabmesh_tfm::table::Preprocessing;
use thiserror::Error;

/// Why an artefact can't be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ArtefactError {
    /// Missing or damaged in the agent's store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The coordinator doesn't give it.
    #[error(transparent)]
    Fetch(#[from] ClientError),
    /// The manifest isn't signed, isn't one, or is tainted.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The announcement or the corpus doesn't parse or doesn't fit.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// The model or adapter file is refused.
    #[error(transparent)]
    Model(#[from] TfmError),
    /// The forest is refused.
    #[error(transparent)]
    Forest(#[from] ForestError),
    /// The signature's text is no signature.
    #[error("signature of the publication does not parse: {reason}")]
    Signature {
        /// What is wrong.
        reason: String,
    },
    /// The pointer can't be written or read.
    #[error("{path}: {reason}")]
    Pointer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// The agent's store of artefacts.
pub struct Artefacts {
    blobs: BlobStore,
    pointer: PathBuf,
    pinned: VerifyingKey,
    trust: Trust,
}

impl Artefacts {
    /// Opens the store of a data folder.
    ///
    /// # Errors
    /// [`ArtefactError::Store`] if it can't be opened.
    pub fn open(data_dir: &Path, pinned: VerifyingKey, trust: Trust) -> Result<Self, ArtefactError> {
        let blobs = BlobStore::open(&data_dir.join("artefacts"))?;
        Ok(Self { blobs, pointer: data_dir.join("publication.json"), pinned, trust })
    }

    /// Whether an artefact is here.
    #[must_use]
    pub fn has(&self, digest: &Digest) -> bool {
        self.blobs.contains(&named(digest))
    }

    /// Fetches an artefact unless it is here; an interrupted transfer goes on where it stopped.
    ///
    /// # Errors
    /// [`ArtefactError`] if it can't be fetched or its digest doesn't hold.
    pub async fn fetch(&self, client: &MeshClient, digest: &Digest) -> Result<(), ArtefactError> {
        if self.has(digest) {
            return Ok(());
        }
        let mut bytes = Vec::new();
        let mut sink = |chunk: &tabmesh_proto::message::BlobChunk| {
            bytes.extend_from_slice(&chunk.data);
            Ok::<(), StoreError>(())
        };
        // From offset 0 the client checks the digest itself and resumes interrupted transfers.
        client.fetch_blob(digest.as_bytes(), 0, &mut sink).await?;
        self.blobs.put(&bytes)?;
        Ok(())
    }

    /// Fetches everything a publication names, verifies it, and makes it the current one.
    ///
    /// # Errors
    /// [`ArtefactError`]; the current publication stays as it was then.
    pub async fn take(&self, client: &MeshClient, document: &[u8]) -> Result<Manifest, ArtefactError> {
        let publication: Publication = documents::read("publication", document, MAX_DOCUMENT_BYTES)?;
        self.fetch(client, &publication.manifest).await?;
        let manifest = self.verified(&publication)?;
        let artefacts = [manifest.base, manifest.tuned, manifest.preprocessing, manifest.corpus];
        for digest in artefacts.iter().chain(&manifest.adapter).chain(&manifest.forest) {
            self.fetch(client, digest).await?;
        }
        // Parsed once before it counts as current: what can't be loaded is never pointed at.
        self.model(&manifest.base)?;
        let tuned = self.model(&manifest.tuned)?;
        self.preprocessing(&manifest.preprocessing)?;
        let corpus = self.corpus(&manifest.corpus, &manifest.schema)?;
        if let Some(digest) = &manifest.forest {
            // A forest of other columns would fail at the first prediction only.
            self.forest(digest)?.logits(&corpus.take(&[0]))?;
        }
        manifest.adapter.map(|digest| self.adapter(&digest, &manifest.tuned, &tuned)).transpose()?;
        crate::files::replace(&self.pointer, document).map_err(|error| self.broken(&error))?;
        Ok(manifest)
    }

    /// The current publication, verified anew; nothing before the first.
    ///
    /// # Errors
    /// [`ArtefactError`] if the pointer or what it points at was changed.
    pub fn current(&self) -> Result<Option<(Digest, Manifest)>, ArtefactError> {
        let document = match std::fs::read(&self.pointer) {
            Ok(document) => document,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.broken(&error)),
        };
        let publication: Publication = documents::read("publication", &document, MAX_DOCUMENT_BYTES)?;
        Ok(Some((publication.manifest, self.verified(&publication)?)))
    }

    fn verified(&self, publication: &Publication) -> Result<Manifest, ArtefactError> {
        let bytes = self.blobs.get(&named(&publication.manifest))?;
        let refused = |reason: String| ArtefactError::Signature { reason };
        let signature =
            publication.signature.parse().map_err(|error: hex::FromHexError| refused(error.to_string()))?;
        Ok(SignedManifest { bytes, signature }.verify(&self.pinned, self.trust, None)?)
    }

    /// A model.
    ///
    /// # Errors
    /// [`ArtefactError`] if it is missing, damaged or no model.
    pub fn model(&self, digest: &Digest) -> Result<Model, ArtefactError> {
        Ok(Model::from_safetensors(&self.blobs.get(&named(digest))?)?.0)
    }

    /// Bins, codes and scaling.
    ///
    /// # Errors
    /// [`ArtefactError`] if it is missing, damaged or no such document.
    pub fn preprocessing(&self, digest: &Digest) -> Result<Preprocessing, ArtefactError> {
        let bytes = self.blobs.get(&named(digest))?;
        Ok(documents::read("preprocessing", &bytes, MAX_DOCUMENT_BYTES)?)
    }

    /// The synthetic corpus in the contract's terms.
    ///
    /// # Errors
    /// [`ArtefactError`] if it is missing, damaged or doesn't fit the schema.
    pub fn corpus(&self, digest: &Digest, schema: &FeatureSchema) -> Result<TypedBatch, ArtefactError> {
        Ok(self.corpus_document(digest)?.batch(schema)?)
    }

    /// As [`Self::corpus`], with the rows that stand for a data product first where the corpus says which they are.
    ///
    /// # Errors
    /// As [`Self::corpus`].
    pub fn corpus_for(
        &self,
        digest: &Digest,
        schema: &FeatureSchema,
        product: &str,
    ) -> Result<TypedBatch, ArtefactError> {
        let document = self.corpus_document(digest)?;
        let rows = document.batch(schema)?;
        let mut order = document.rows_of(product);
        if order.is_empty() {
            return Ok(rows);
        }
        let mut own = vec![false; rows.rows()];
        order.iter().for_each(|&row| own[row] = true);
        order.extend((0..rows.rows()).filter(|&row| !own[row]));
        Ok(rows.take(&order))
    }

    fn corpus_document(&self, digest: &Digest) -> Result<CorpusDocument, ArtefactError> {
        let bytes = self.blobs.get(&named(digest))?;
        Ok(documents::read("corpus", &bytes, MAX_CORPUS_BYTES)?)
    }

    /// An adapter that belongs to a base, given by digest and loaded.
    ///
    /// # Errors
    /// [`ArtefactError`] if it is missing, damaged or no adapter of this base.
    pub fn adapter(&self, digest: &Digest, base: &Digest, model: &Model) -> Result<Adapter, ArtefactError> {
        Ok(Adapter::from_safetensors(&self.blobs.get(&named(digest))?, &base.to_string(), model)?)
    }

    /// The forest of the rounds.
    ///
    /// # Errors
    /// [`ArtefactError`] if it is missing, damaged or no forest.
    pub fn forest(&self, digest: &Digest) -> Result<Forest, ArtefactError> {
        let bytes = self.blobs.get(&named(digest))?;
        let forest: Forest = documents::read("forest", &bytes, MAX_FOREST_BYTES)?;
        forest.check()?;
        Ok(forest)
    }

    fn broken(&self, error: &std::io::Error) -> ArtefactError {
        ArtefactError::Pointer { path: self.pointer.clone(), reason: error.to_string() }
    }
}

fn named(digest: &Digest) -> tabmesh_store::Digest {
    tabmesh_store::Digest::from_bytes(*digest.as_bytes())
}
