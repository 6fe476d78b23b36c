//! The registry of base, corpus and adapter versions: which bytes exist, from which they descend, who signed them.
//!
//! A version is named by the digest of its bytes. Its facts never change once registered, its sequence number only
//! grows, and its parents must be registered before it. Registering the same facts again returns the first answer;
//! other facts for the same digest are refused. The bytes must be in the blob store, and are checked, before a version
//! gets its number. Signatures are opaque here: the verifier holds the keys and signs
//! [`NewVersion::signing_bytes`].

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fmt,
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{BlobStore, Digest, Op, Records, StoreError, format};

/// Most parents of one version.
pub const MAX_PARENTS: usize = 64;
/// Most attributes of one version.
pub const MAX_ATTRIBUTES: usize = 64;
/// Most bytes of an attribute's name or value, of an alias and of a signature.
pub const MAX_TEXT_BYTES: usize = 1024;

/// What a version's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Base model weights.
    Base,
    /// A synthetic corpus drawn from approved releases.
    Corpus,
    /// Adapter weights for one base.
    Adapter,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Base => "base",
            Self::Corpus => "corpus",
            Self::Adapter => "adapter",
        })
    }
}

/// The facts of a version before it has a number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewVersion {
    /// What the bytes are.
    pub kind: Kind,
    /// SHA-256 of the bytes.
    pub digest: Digest,
    /// Versions it was made from, in the order that matters to its maker.
    pub parents: Vec<Digest>,
    /// When it was made, UTC milliseconds since 1970.
    pub created_ms: i64,
    /// Facts that travel with it, such as a plan id or the mark "not private".
    pub attributes: BTreeMap<String, String>,
    /// Signature over [`NewVersion::signing_bytes`]; may be empty where nothing is signed.
    #[serde(with = "hex_text")]
    pub signature: Vec<u8>,
}

impl NewVersion {
    /// The bytes a signer signs: a context string, then every fact but the signature, each with its length.
    #[must_use]
    pub fn signing_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut field = |part: &[u8]| {
            bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
            bytes.extend_from_slice(part);
        };
        field(SIGNING_CONTEXT);
        field(self.kind.to_string().as_bytes());
        field(self.digest.as_bytes());
        field(&self.created_ms.to_be_bytes());
        field(&(self.parents.len() as u64).to_be_bytes());
        for parent in &self.parents {
            field(parent.as_bytes());
        }
        for (name, value) in &self.attributes {
            field(name.as_bytes());
            field(value.as_bytes());
        }
        bytes
    }

    fn check(&self) -> Result<(), StoreError> {
        let within = |field, got, max| {
            if got > max { Err(StoreError::VersionField { field, got, max }) } else { Ok(()) }
        };
        within("parents", self.parents.len(), MAX_PARENTS)?;
        within("attributes", self.attributes.len(), MAX_ATTRIBUTES)?;
        within("signature", self.signature.len(), MAX_TEXT_BYTES)?;
        for (name, value) in &self.attributes {
            within("attribute name", name.len(), MAX_TEXT_BYTES)?;
            within("attribute value", value.len(), MAX_TEXT_BYTES)?;
        }
        let mut seen = BTreeSet::new();
        match self.parents.iter().find(|parent| **parent == self.digest || !seen.insert(**parent)) {
            Some(parent) => Err(StoreError::ParentMissing { parent: *parent }),
            None => Ok(()),
        }
    }
}

/// A registered version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Position among all versions of all kinds, from 1.
    pub seq: u64,
    /// Its facts.
    #[serde(flatten)]
    pub facts: NewVersion,
}

/// The registry over a record store and a blob store.
#[derive(Clone)]
pub struct Registry {
    records: Arc<dyn Records>,
    blobs: Arc<BlobStore>,
}

impl Registry {
    /// Uses these stores; nothing is read yet.
    #[must_use]
    pub fn new(records: Arc<dyn Records>, blobs: Arc<BlobStore>) -> Self {
        Self { records, blobs }
    }

    /// Registers a version and returns it with its number; durable when it returns.
    ///
    /// # Errors
    /// - [`StoreError::VersionField`] if a field exceeds its limit
    /// - [`StoreError::BlobMissing`] or [`StoreError::BlobDamaged`] if its bytes are not stored whole
    /// - [`StoreError::ParentMissing`] if a parent is unknown, named twice or the version itself
    /// - [`StoreError::VersionConflict`] if the digest is registered with other facts
    pub fn register(&self, facts: NewVersion) -> Result<Version, StoreError> {
        facts.check()?;
        self.blobs.get(&facts.digest).map(drop)?;
        for parent in &facts.parents {
            if self.find(parent)?.is_none() {
                return Err(StoreError::ParentMissing { parent: *parent });
            }
        }
        loop {
            if let Some(known) = self.find(&facts.digest)? {
                let same = known.facts == facts;
                return if same {
                    Ok(known)
                } else {
                    Err(StoreError::VersionConflict { digest: facts.digest })
                };
            }
            let head = self.records.get(HEAD)?;
            let version = Version { seq: self.head_seq(head.as_deref())? + 1, facts: facts.clone() };
            let ops = [
                Op::Expect { key: HEAD.to_vec(), value: head },
                Op::put(HEAD, version.seq.to_be_bytes()),
                Op::put(seq_key(version.seq), encode(&version)?),
                Op::put(digest_key(&facts.digest), version.seq.to_be_bytes()),
            ];
            match self.records.commit(&ops) {
                Err(StoreError::Conflict { .. }) => {}
                other => return other.map(|()| version),
            }
        }
    }

    /// Returns the version with this digest.
    ///
    /// # Errors
    /// As [`Records::get`], and [`StoreError::VersionUnreadable`].
    pub fn find(&self, digest: &Digest) -> Result<Option<Version>, StoreError> {
        let key = digest_key(digest);
        let Some(seq) = self.records.get(&key)? else { return Ok(None) };
        let key = seq_key(read_seq(&key, &seq)?);
        let Some(bytes) = self.records.get(&key)? else { return Err(unreadable(&key, "missing")) };
        decode(&key, &bytes).map(Some)
    }

    /// Returns all versions, of one kind if given, oldest first.
    ///
    /// # Errors
    /// As [`Registry::find`].
    pub fn list(&self, kind: Option<Kind>) -> Result<Vec<Version>, StoreError> {
        let mut versions = Vec::new();
        for (key, bytes) in self.records.scan_all(SEQ_PREFIX)? {
            let version = decode(&key, &bytes)?;
            if kind.is_none_or(|kind| version.facts.kind == kind) {
                versions.push(version);
            }
        }
        Ok(versions)
    }

    /// Returns the newest version of a kind.
    ///
    /// # Errors
    /// As [`Registry::find`].
    pub fn latest(&self, kind: Kind) -> Result<Option<Version>, StoreError> {
        Ok(self.list(Some(kind))?.pop())
    }

    /// Returns a version and all its ancestors, newest first.
    ///
    /// # Errors
    /// [`StoreError::VersionMissing`] if the digest is unknown; else as [`Registry::find`].
    pub fn lineage(&self, digest: &Digest) -> Result<Vec<Version>, StoreError> {
        let mut found: BTreeMap<u64, Version> = BTreeMap::new();
        let mut wanted = vec![*digest];
        while let Some(digest) = wanted.pop() {
            let version = self.find(&digest)?.ok_or(StoreError::VersionMissing { digest })?;
            if let Entry::Vacant(place) = found.entry(version.seq) {
                wanted.extend(&version.facts.parents);
                place.insert(version);
            }
        }
        Ok(found.into_values().rev().collect())
    }

    /// Points a name such as `champion` at a registered version; durable when it returns.
    ///
    /// # Errors
    /// [`StoreError::VersionMissing`] if the digest is unknown; [`StoreError::VersionField`] if the name is empty or
    /// longer than a key allows.
    pub fn set_alias(&self, name: &str, digest: &Digest) -> Result<(), StoreError> {
        if name.is_empty() || name.len() > MAX_ALIAS_BYTES {
            return Err(StoreError::VersionField { field: "alias", got: name.len(), max: MAX_ALIAS_BYTES });
        }
        if self.find(digest)?.is_none() {
            return Err(StoreError::VersionMissing { digest: *digest });
        }
        self.records.put(&alias_key(name), digest.as_bytes())
    }

    /// Returns the version a name points at.
    ///
    /// # Errors
    /// As [`Registry::find`].
    pub fn alias(&self, name: &str) -> Result<Option<Version>, StoreError> {
        let key = alias_key(name);
        let Some(bytes) = self.records.get(&key)? else { return Ok(None) };
        let bytes: [u8; 32] = bytes.try_into().map_err(|_| unreadable(&key, "not a digest"))?;
        self.find(&Digest::from_bytes(bytes))
    }

    fn head_seq(&self, head: Option<&[u8]>) -> Result<u64, StoreError> {
        head.map_or(Ok(0), |bytes| read_seq(HEAD, bytes))
    }
}

/// Signature bytes as hexadecimal text in JSON.
mod hex_text {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        hex::decode(String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

fn encode(version: &Version) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(version).map_err(|error| unreadable(&seq_key(version.seq), &error.to_string()))
}

fn decode(key: &[u8], bytes: &[u8]) -> Result<Version, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| unreadable(key, &error.to_string()))
}

fn read_seq(key: &[u8], bytes: &[u8]) -> Result<u64, StoreError> {
    bytes.try_into().map(u64::from_be_bytes).map_err(|_| unreadable(key, "not a sequence number"))
}

fn unreadable(key: &[u8], reason: &str) -> StoreError {
    StoreError::VersionUnreadable { key: format::show_key(key), reason: reason.to_owned() }
}

fn seq_key(seq: u64) -> Vec<u8> {
    [SEQ_PREFIX, &seq.to_be_bytes()].concat()
}

fn digest_key(digest: &Digest) -> Vec<u8> {
    [DIGEST_PREFIX, digest.to_string().as_bytes()].concat()
}

fn alias_key(name: &str) -> Vec<u8> {
    [ALIAS_PREFIX, name.as_bytes()].concat()
}

const HEAD: &[u8] = b"registry/head";
const SEQ_PREFIX: &[u8] = b"registry/seq/";
const DIGEST_PREFIX: &[u8] = b"registry/digest/";
const ALIAS_PREFIX: &[u8] = b"registry/alias/";
const MAX_ALIAS_BYTES: usize = 128;
const SIGNING_CONTEXT: &[u8] = b"tabmesh version v1";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Memory;

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let blobs = BlobStore::open(dir.path()).unwrap();
        (dir, Registry::new(Arc::new(Memory::new()), Arc::new(blobs)))
    }

    fn facts(registry: &Registry, kind: Kind, bytes: &[u8], parents: &[Digest]) -> NewVersion {
        NewVersion {
            kind,
            digest: registry.blobs.put(bytes).unwrap(),
            parents: parents.to_vec(),
            created_ms: 1_700_000_000_000,
            attributes: BTreeMap::from([("plan".to_owned(), "p1".to_owned())]),
            signature: vec![1, 2, 3],
        }
    }

    #[test]
    fn numbers_grow_and_lineage_is_followed() {
        let (_dir, registry) = registry();
        let base = registry.register(facts(&registry, Kind::Base, b"base", &[])).unwrap();
        let corpus = registry.register(facts(&registry, Kind::Corpus, b"corpus", &[])).unwrap();
        let parents = [base.facts.digest, corpus.facts.digest];
        let tuned = registry.register(facts(&registry, Kind::Base, b"tuned", &parents)).unwrap();
        let adapter =
            registry.register(facts(&registry, Kind::Adapter, b"adapter", &[tuned.facts.digest])).unwrap();
        assert_eq!([base.seq, corpus.seq, tuned.seq, adapter.seq], [1, 2, 3, 4]);
        assert_eq!(registry.latest(Kind::Base).unwrap(), Some(tuned.clone()));
        assert_eq!(registry.list(Some(Kind::Base)).unwrap(), [base.clone(), tuned.clone()]);
        assert_eq!(
            registry.lineage(&adapter.facts.digest).unwrap(),
            [adapter.clone(), tuned, corpus, base.clone()]
        );
        registry.set_alias("champion", &adapter.facts.digest).unwrap();
        assert_eq!(registry.alias("champion").unwrap(), Some(adapter));
        registry.set_alias("champion", &base.facts.digest).unwrap();
        assert_eq!(registry.alias("champion").unwrap(), Some(base));
        assert_eq!(registry.alias("challenger").unwrap(), None);
    }

    #[test]
    fn facts_never_change() {
        let (_dir, registry) = registry();
        let facts = facts(&registry, Kind::Base, b"base", &[]);
        let first = registry.register(facts.clone()).unwrap();
        assert_eq!(registry.register(facts.clone()).unwrap(), first);
        let digest = facts.digest;
        let other = NewVersion { created_ms: 5, ..facts };
        assert_eq!(registry.register(other), Err(StoreError::VersionConflict { digest }));
        assert_eq!(registry.list(None).unwrap(), [first]);
    }

    #[test]
    fn unknown_parents_and_missing_bytes_are_refused() {
        let (_dir, registry) = registry();
        let unknown = Digest::of(b"nobody");
        let orphan = facts(&registry, Kind::Adapter, b"adapter", &[unknown]);
        assert_eq!(registry.register(orphan.clone()), Err(StoreError::ParentMissing { parent: unknown }));
        let itself = NewVersion { parents: vec![orphan.digest], ..orphan.clone() };
        assert_eq!(registry.register(itself), Err(StoreError::ParentMissing { parent: orphan.digest }));
        let absent = NewVersion { digest: unknown, parents: vec![], ..orphan };
        assert_eq!(registry.register(absent), Err(StoreError::BlobMissing { digest: unknown }));
        assert_eq!(registry.set_alias("x", &unknown), Err(StoreError::VersionMissing { digest: unknown }));
        assert!(registry.list(None).unwrap().is_empty());
    }

    #[test]
    fn limits_are_exact() {
        let (_dir, registry) = registry();
        let facts = facts(&registry, Kind::Base, b"base", &[]);
        let long = NewVersion { signature: vec![0; MAX_TEXT_BYTES + 1], ..facts.clone() };
        assert_eq!(
            registry.register(long),
            Err(StoreError::VersionField {
                field: "signature",
                got: MAX_TEXT_BYTES + 1,
                max: MAX_TEXT_BYTES
            })
        );
        let parents = (0..=MAX_PARENTS).map(|i| Digest::of(&i.to_be_bytes())).collect();
        let many = NewVersion { parents, ..facts.clone() };
        assert_eq!(
            registry.register(many),
            Err(StoreError::VersionField { field: "parents", got: MAX_PARENTS + 1, max: MAX_PARENTS })
        );
        registry.register(NewVersion { signature: vec![0; MAX_TEXT_BYTES], ..facts }).unwrap();
    }

    #[test]
    fn signing_bytes_cover_every_fact_and_no_two_readings_agree() {
        let (_dir, registry) = registry();
        let base = facts(&registry, Kind::Base, b"base", &[]);
        let mut seen = BTreeSet::from([base.signing_bytes()]);
        let mut distinct = |version: NewVersion| assert!(seen.insert(version.signing_bytes()));
        distinct(NewVersion { kind: Kind::Corpus, ..base.clone() });
        distinct(NewVersion { digest: Digest::of(b"x"), ..base.clone() });
        distinct(NewVersion { parents: vec![Digest::of(b"x")], ..base.clone() });
        distinct(NewVersion { created_ms: 1, ..base.clone() });
        distinct(NewVersion { attributes: BTreeMap::new(), ..base.clone() });
        let moved = BTreeMap::from([("planp".to_owned(), "1".to_owned())]);
        distinct(NewVersion { attributes: moved, ..base.clone() });
        assert!(!seen.insert(NewVersion { signature: vec![], ..base }.signing_bytes()));
    }

    #[test]
    fn concurrent_registrations_get_distinct_numbers() {
        let (_dir, registry) = registry();
        std::thread::scope(|scope| {
            for worker in 0..4u8 {
                let registry = &registry;
                scope.spawn(move || {
                    for i in 0..5u8 {
                        registry.register(facts(registry, Kind::Corpus, &[worker, i], &[])).unwrap();
                    }
                });
            }
        });
        let seqs: Vec<u64> = registry.list(None).unwrap().iter().map(|version| version.seq).collect();
        assert_eq!(seqs, (1..=20).collect::<Vec<_>>());
    }
}
