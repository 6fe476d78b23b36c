//! Signed checkpoints of a log: what its owner publishes and witnesses confirm.
//!
//! The text is a C2SP tlog-checkpoint (origin, size, root, extension lines), carried in a C2SP signed note: the text, a
//! blank line, and a line for each signature, `— name base64(key id ‖ signature)`. The owner signs with Ed25519 (type
//! 0x01); a witness adds a tlog-cosignature/v1 (type 0x04), which also states when it saw the log. Signatures by keys
//! the reader doesn't know are ignored; one by a known key that doesn't verify refuses the note.
//!
//! A checkpoint commits its owner to a history. That nobody is shown another history follows only once independent
//! witnesses have cosigned it, each after checking a consistency proof ([`crate::merkle::verify_consistency`]).

use std::fmt;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};

use crate::Digest;

/// Why a note, checkpoint or key was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointError {
    /// The note is too long.
    #[error("note of {got} bytes refused: at most {MAX_NOTE_BYTES}")]
    TooLarge {
        /// Bytes given.
        got: usize,
    },
    /// The note isn't text, a blank line and signature lines.
    #[error("not a signed note: {what}")]
    Note {
        /// What is wrong.
        what: &'static str,
    },
    /// The signed text isn't a checkpoint.
    #[error("not a checkpoint: {what}")]
    Text {
        /// What is wrong.
        what: &'static str,
    },
    /// A key's text can't be read.
    #[error("not a verifier key: {what}")]
    Key {
        /// What is wrong.
        what: &'static str,
    },
    /// A signature by a known key doesn't verify.
    #[error("signature of {name:?} doesn't verify: other text, or another key")]
    Mismatch {
        /// The key's name.
        name: String,
    },
    /// The log's owner didn't sign.
    #[error("no signature by {name:?}")]
    Unsigned {
        /// The key's name.
        name: String,
    },
    /// The checkpoint is of another log.
    #[error("checkpoint is of {got:?}, expected {expected:?}")]
    Origin {
        /// The log asked for.
        expected: String,
        /// The origin in the text.
        got: String,
    },
    /// Fewer witnesses than asked for.
    #[error("{got} known witnesses cosigned, expected at least {expected}")]
    Witnesses {
        /// Witnesses asked for.
        expected: usize,
        /// Witnesses that cosigned.
        got: usize,
    },
}

/// Size and root of a log, under its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Name of the log, as its key is named.
    pub origin: String,
    /// Number of entries.
    pub size: u64,
    /// Root over them.
    pub root: Digest,
    /// Further lines, none of them empty.
    pub extensions: Vec<String>,
}

impl Checkpoint {
    /// The text to sign.
    ///
    /// # Errors
    /// [`CheckpointError::Text`] for an empty origin or extension, or a control character in one.
    pub fn to_text(&self) -> Result<String, CheckpointError> {
        let mut text = format!("{}\n{}\n{}\n", self.origin, self.size, STANDARD.encode(self.root.as_bytes()));
        for extension in &self.extensions {
            text.push_str(extension);
            text.push('\n');
        }
        // One reader for what is written and what is read.
        if Self::parse(&text)? == *self {
            Ok(text)
        } else {
            Err(CheckpointError::Text { what: "line break in a line" })
        }
    }

    /// Reads a checkpoint's text.
    ///
    /// # Errors
    /// [`CheckpointError::Text`] for anything but the one spelling of a checkpoint.
    pub fn parse(text: &str) -> Result<Self, CheckpointError> {
        let refused = |what| CheckpointError::Text { what };
        let body = text.strip_suffix('\n').ok_or_else(|| refused("expected a line break at the end"))?;
        if body.chars().any(|c| c < ' ' && c != '\n') {
            return Err(refused("control character"));
        }
        let mut lines = body.split('\n');
        let origin =
            lines.next().filter(|line| !line.is_empty()).ok_or_else(|| refused("expected an origin"))?;
        let size = lines.next().ok_or_else(|| refused("expected a size"))?;
        let digits = !size.is_empty() && size.bytes().all(|b| b.is_ascii_digit());
        if !digits || (size.len() > 1 && size.starts_with('0')) {
            return Err(refused("expected a decimal size without leading zeros"));
        }
        let size = size.parse().map_err(|_| refused("size above 2^64"))?;
        let root = lines.next().and_then(|line| STANDARD.decode(line).ok());
        let root: [u8; 32] = root
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(|| refused("expected a root of 32 bytes in base64"))?;
        let extensions: Vec<String> = lines.map(str::to_owned).collect();
        if extensions.iter().any(String::is_empty) {
            return Err(refused("empty extension line"));
        }
        Ok(Self { origin: origin.to_owned(), size, root: Digest::from_bytes(root), extensions })
    }
}

/// What a key signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    /// The text itself: owners of logs.
    Ed25519,
    /// A time and the text: witnesses (tlog-cosignature/v1).
    CosignatureV1,
}

impl KeyKind {
    fn byte(self) -> u8 {
        match self {
            Self::Ed25519 => 1,
            Self::CosignatureV1 => 4,
        }
    }
}

/// A public key with its name; written `name+id+base64`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifierKey {
    name: String,
    kind: KeyKind,
    key: [u8; 32],
}

impl VerifierKey {
    /// Names a public key.
    ///
    /// # Errors
    /// [`CheckpointError::Key`] for an empty name, or one with a space or plus sign.
    pub fn new(name: &str, kind: KeyKind, key: [u8; 32]) -> Result<Self, CheckpointError> {
        if name_is_valid(name) {
            Ok(Self { name: name.to_owned(), kind, key })
        } else {
            Err(CheckpointError::Key { what: "expected a name without spaces and plus signs" })
        }
    }

    /// Reads `name+id+base64(type ‖ key)`.
    ///
    /// # Errors
    /// [`CheckpointError::Key`] for another form, an unknown type, or an id that isn't the key's.
    pub fn parse(text: &str) -> Result<Self, CheckpointError> {
        let refused = |what| CheckpointError::Key { what };
        let mut parts = text.splitn(3, '+');
        let (Some(name), Some(id), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(refused("expected name+id+key"));
        };
        let bytes = STANDARD.decode(key).map_err(|_| refused("expected a key in base64"))?;
        let (kind, key) = bytes.split_first().ok_or_else(|| refused("empty key"))?;
        let kind = match kind {
            1 => KeyKind::Ed25519,
            4 => KeyKind::CosignatureV1,
            _ => return Err(refused("unknown type of key")),
        };
        let key = <[u8; 32]>::try_from(key).map_err(|_| refused("expected 32 bytes of key"))?;
        let verifier = Self::new(name, kind, key)?;
        if hex::encode(verifier.id()) == id {
            Ok(verifier)
        } else {
            Err(refused("id isn't that of name and key"))
        }
    }

    /// The key's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The first four bytes of SHA-256(name ‖ 0x0A ‖ type ‖ key).
    #[must_use]
    pub fn id(&self) -> [u8; 4] {
        let digest = Digest::of(&[self.name.as_bytes(), &[b'\n', self.kind.byte()], &self.key].concat());
        let [a, b, c, d, ..] = *digest.as_bytes();
        [a, b, c, d]
    }

    // The time a signature states, if it verifies; zero where its kind states none.
    fn verify(&self, text: &str, signature: &[u8]) -> Option<u64> {
        let (time, signature, covered) = match self.kind {
            KeyKind::Ed25519 => (0, signature, text.as_bytes().to_vec()),
            KeyKind::CosignatureV1 => {
                let (time, signature) = signature.split_first_chunk::<8>()?;
                let time = u64::from_be_bytes(*time);
                (time, signature, cosigned(time, text))
            }
        };
        UnparsedPublicKey::new(&ED25519, &self.key).verify(&covered, signature).ok().map(|()| time)
    }
}

impl fmt::Display for VerifierKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = STANDARD.encode([&[self.kind.byte()], &self.key[..]].concat());
        write!(f, "{}+{}+{key}", self.name, hex::encode(self.id()))
    }
}

/// A private key with its name; never printed.
pub struct Signer {
    pair: Arc<Ed25519KeyPair>,
    verifier: VerifierKey,
}

impl Signer {
    /// Names a key, given as PKCS#8 bytes.
    ///
    /// # Errors
    /// [`CheckpointError::Key`] for other bytes or an unusable name.
    pub fn from_pkcs8(name: &str, kind: KeyKind, bytes: &[u8]) -> Result<Self, CheckpointError> {
        let pair = Ed25519KeyPair::from_pkcs8(bytes);
        let pair = pair.map_err(|_| CheckpointError::Key { what: "expected PKCS#8 Ed25519" })?;
        Self::from_pair(name, kind, Arc::new(pair))
    }

    /// Names a key.
    ///
    /// # Errors
    /// [`CheckpointError::Key`] for an unusable name.
    pub fn from_pair(name: &str, kind: KeyKind, pair: Arc<Ed25519KeyPair>) -> Result<Self, CheckpointError> {
        let mut key = [0; 32];
        key.copy_from_slice(pair.public_key().as_ref());
        Ok(Self { pair, verifier: VerifierKey::new(name, kind, key)? })
    }

    /// The public half.
    #[must_use]
    pub fn verifier(&self) -> &VerifierKey {
        &self.verifier
    }

    // `time_s`, seconds since 1970, is stated by cosignatures only.
    fn sign(&self, text: &str, time_s: u64) -> NoteSignature {
        let bytes = match self.verifier.kind {
            KeyKind::Ed25519 => self.pair.sign(text.as_bytes()).as_ref().to_vec(),
            KeyKind::CosignatureV1 => {
                [&time_s.to_be_bytes(), self.pair.sign(&cosigned(time_s, text)).as_ref()].concat()
            }
        };
        NoteSignature { name: self.verifier.name.clone(), id: self.verifier.id(), bytes }
    }
}

impl fmt::Debug for Signer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({})", self.verifier)
    }
}

/// One signature line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct NoteSignature {
    name: String,
    id: [u8; 4],
    bytes: Vec<u8>,
}

/// A text with signatures, not yet checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    text: String,
    signatures: Vec<NoteSignature>,
}

/// A signature that verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed {
    /// The key's name.
    pub name: String,
    /// What it signed.
    pub kind: KeyKind,
    /// Seconds since 1970 as the witness states them; zero for an owner's signature.
    pub time_s: u64,
}

impl Note {
    /// Signs a checkpoint as its log's owner.
    ///
    /// # Errors
    /// [`CheckpointError::Text`] for a checkpoint without one spelling, [`CheckpointError::Origin`] if the key has another
    /// name, [`CheckpointError::Key`] for a witness's key.
    pub fn sign(checkpoint: &Checkpoint, owner: &Signer) -> Result<Self, CheckpointError> {
        if owner.verifier.kind != KeyKind::Ed25519 {
            return Err(CheckpointError::Key { what: "a log is signed with a key of type 1" });
        }
        if owner.verifier.name != checkpoint.origin {
            let (expected, got) = (owner.verifier.name.clone(), checkpoint.origin.clone());
            return Err(CheckpointError::Origin { expected, got });
        }
        let text = checkpoint.to_text()?;
        let signatures = vec![owner.sign(&text, 0)];
        Ok(Self { text, signatures })
    }

    /// Adds a witness's cosignature. The witness must have checked the owner's signature and consistency before.
    ///
    /// # Errors
    /// [`CheckpointError::Key`] for a key of another kind.
    pub fn cosign(&mut self, witness: &Signer, time_s: u64) -> Result<(), CheckpointError> {
        if witness.verifier.kind != KeyKind::CosignatureV1 {
            return Err(CheckpointError::Key { what: "a witness signs with a key of type 4" });
        }
        let signature = witness.sign(&self.text, time_s);
        self.signatures.retain(|known| (&known.name, known.id) != (&signature.name, signature.id));
        self.signatures.push(signature);
        Ok(())
    }

    /// Takes over one witness's cosignature from another copy of the note, in place of an earlier one; cosignatures stand
    /// in the order of their names behind the owner's signature, so that the order in which they came doesn't show.
    ///
    /// # Errors
    /// [`CheckpointError::Text`] for a note of another text, [`CheckpointError::Note`] beyond [`MAX_SIGNATURES`],
    /// [`CheckpointError::Unsigned`] or
    /// [`CheckpointError::Mismatch`] if the witness didn't sign it, [`CheckpointError::Key`] for a key of another kind.
    pub fn take(&mut self, witness: &VerifierKey, from: &Self) -> Result<Signed, CheckpointError> {
        if witness.kind != KeyKind::CosignatureV1 {
            return Err(CheckpointError::Key { what: "a witness signs with a key of type 4" });
        }
        if from.text != self.text {
            return Err(CheckpointError::Text { what: "the cosigned note has another text" });
        }
        let unsigned = || CheckpointError::Unsigned { name: witness.name.clone() };
        let same = |s: &&NoteSignature| s.name == witness.name && s.id == witness.id();
        let signature = from.signatures.iter().find(same).ok_or_else(unsigned)?.clone();
        let signed = from.verify(&[witness])?.pop().ok_or_else(unsigned)?;
        self.signatures.retain(|s| !same(&s));
        if self.signatures.len() == MAX_SIGNATURES {
            return Err(CheckpointError::Note { what: "too many signatures" });
        }
        let owners = usize::from(!self.signatures.is_empty());
        self.signatures.push(signature);
        self.signatures
            .get_mut(owners..)
            .unwrap_or_default()
            .sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
        Ok(signed)
    }

    /// Reads a note. Signatures aren't checked yet.
    ///
    /// # Errors
    /// [`CheckpointError::TooLarge`] or [`CheckpointError::Note`].
    pub fn parse(bytes: &[u8]) -> Result<Self, CheckpointError> {
        let refused = |what| CheckpointError::Note { what };
        if bytes.len() > MAX_NOTE_BYTES {
            return Err(CheckpointError::TooLarge { got: bytes.len() });
        }
        let note = std::str::from_utf8(bytes).map_err(|_| refused("expected UTF-8"))?;
        if note.chars().any(|c| c < ' ' && c != '\n') {
            return Err(refused("control character"));
        }
        let at = note.rfind("\n\n").ok_or_else(|| refused("no blank line before the signatures"))?;
        let (text, lines) = note.split_at(at + 1);
        let lines = lines.get(1..).unwrap_or_default();
        let lines = lines
            .strip_suffix('\n')
            .ok_or_else(|| refused("expected signature lines with a line break at the end"))?;
        let mut signatures = Vec::new();
        for line in lines.split('\n') {
            if signatures.len() == MAX_SIGNATURES {
                return Err(refused("too many signatures"));
            }
            let (name, encoded) = line
                .strip_prefix("— ")
                .and_then(|rest| rest.split_once(' '))
                .ok_or_else(|| refused("expected an em dash, a name and a signature"))?;
            let bytes = STANDARD.decode(encoded).map_err(|_| refused("signature isn't base64"))?;
            let (id, bytes) =
                bytes.split_first_chunk::<4>().ok_or_else(|| refused("signature without a key id"))?;
            if !name_is_valid(name) || bytes.is_empty() {
                return Err(refused("empty signature, or a name with spaces or plus signs"));
            }
            signatures.push(NoteSignature { name: name.to_owned(), id: *id, bytes: bytes.to_vec() });
        }
        Ok(Self { text: text.to_owned(), signatures })
    }

    /// The signed text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Checks the signatures by known keys and returns them, one a key; at least one is there.
    ///
    /// # Errors
    /// [`CheckpointError::Mismatch`] if one of a known key doesn't verify, [`CheckpointError::Note`] if there is none.
    pub fn verify(&self, known: &[&VerifierKey]) -> Result<Vec<Signed>, CheckpointError> {
        let mut found: Vec<Signed> = Vec::new();
        for key in known {
            let id = key.id();
            let mut verified = None;
            for signature in self.signatures.iter().filter(|s| s.id == id && s.name == key.name) {
                let time = key.verify(&self.text, &signature.bytes);
                let time_s = time.ok_or_else(|| CheckpointError::Mismatch { name: key.name.clone() })?;
                verified = Some(Signed { name: key.name.clone(), kind: key.kind, time_s });
            }
            found.extend(verified);
        }
        if found.is_empty() {
            Err(CheckpointError::Note { what: "no signature by a known key" })
        } else {
            Ok(found)
        }
    }

    /// Checks a log's checkpoint: its owner's signature, its origin and enough known witnesses.
    ///
    /// Returns the checkpoint and the witnesses' cosignatures.
    ///
    /// # Errors
    /// Every [`CheckpointError`] but [`CheckpointError::Key`] and [`CheckpointError::TooLarge`].
    pub fn open(
        &self,
        owner: &VerifierKey,
        witnesses: &[&VerifierKey],
        least_witnesses: usize,
    ) -> Result<(Checkpoint, Vec<Signed>), CheckpointError> {
        let unsigned = || CheckpointError::Unsigned { name: owner.name.clone() };
        if !self.signatures.iter().any(|s| s.name == owner.name && s.id == owner.id()) {
            return Err(unsigned());
        }
        self.verify(&[owner])?;
        let checkpoint = Checkpoint::parse(&self.text)?;
        if checkpoint.origin != owner.name {
            let (expected, got) = (owner.name.clone(), checkpoint.origin);
            return Err(CheckpointError::Origin { expected, got });
        }
        // Two names for one key are one witness.
        let mut distinct: Vec<&VerifierKey> = Vec::new();
        for witness in witnesses.iter().filter(|witness| witness.kind == KeyKind::CosignatureV1) {
            if witness.key != owner.key && distinct.iter().all(|known| known.key != witness.key) {
                distinct.push(witness);
            }
        }
        let cosigned = match self.verify(&distinct) {
            Ok(cosigned) => cosigned,
            Err(CheckpointError::Note { .. }) => Vec::new(),
            Err(error) => return Err(error),
        };
        if cosigned.len() < least_witnesses {
            return Err(CheckpointError::Witnesses { expected: least_witnesses, got: cosigned.len() });
        }
        Ok((checkpoint, cosigned))
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.text)?;
        for NoteSignature { name, id, bytes } in &self.signatures {
            writeln!(f, "— {name} {}", STANDARD.encode([&id[..], bytes].concat()))?;
        }
        Ok(())
    }
}

fn cosigned(time: u64, text: &str) -> Vec<u8> {
    format!("cosignature/v1\ntime {time}\n{text}").into_bytes()
}

fn name_is_valid(name: &str) -> bool {
    !name.is_empty() && !name.contains(|c: char| c.is_whitespace() || c == '+' || c < ' ')
}

/// Name of a coordinator's audit log and of the key that signs its checkpoints: its SPIFFE id without the scheme.
#[must_use]
pub fn audit_origin(coordinator: &str) -> String {
    format!("{}/audit", coordinator.strip_prefix("spiffe://").unwrap_or(coordinator))
}

/// Bytes of a note at most.
pub const MAX_NOTE_BYTES: usize = 64 << 10;
/// Signatures of a note at most.
pub const MAX_SIGNATURES: usize = 100;

#[cfg(test)]
mod tests;
