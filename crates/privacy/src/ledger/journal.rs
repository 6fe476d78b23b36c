//! The seam to storage: an append-only, hash-chained sequence of payloads.
//!
//! `hash = SHA-256(prev ‖ payload)`, the first `prev` is 32 zero bytes. Files, fsync and locks live behind
//! [`Journal`]; here is only the chain and a journal in memory for simulations and tests.

use super::LedgerError;
use crate::private::Digest;
use ring::digest::{Context, SHA256};

/// `prev` of the first entry.
pub const GENESIS: Digest = [0; 32];

/// One payload with its place in the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainedEntry {
    /// Position, from 0.
    pub seq: u64,
    /// Hash of the entry before, or [`GENESIS`].
    pub prev: Digest,
    /// SHA-256 of `prev ‖ payload`.
    pub hash: Digest,
    /// The bytes as stored.
    pub payload: Vec<u8>,
}

impl ChainedEntry {
    /// The entry that follows `prev`.
    #[must_use]
    pub fn following(seq: u64, prev: Digest, payload: &[u8]) -> Self {
        Self { seq, prev, hash: chain_hash(&prev, payload), payload: payload.to_vec() }
    }
}

/// The journal couldn't do what was asked; whether an append took effect is then unknown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("journal: {reason}")]
pub struct JournalError {
    /// What went wrong, for the local log.
    pub reason: String,
}

/// Durable storage of a ledger's entries.
pub trait Journal {
    /// Appends a payload; it is durable (fsync) when this returns `Ok`.
    ///
    /// # Errors
    /// [`JournalError`] when durability isn't certain. The ledger then stops until it is opened again.
    fn append(&mut self, payload: &[u8]) -> Result<ChainedEntry, JournalError>;

    /// All entries from the first.
    ///
    /// # Errors
    /// [`JournalError`] when they can't be read whole.
    fn replay(&mut self) -> Result<Vec<ChainedEntry>, JournalError>;
}

impl<J: Journal + ?Sized> Journal for &mut J {
    fn append(&mut self, payload: &[u8]) -> Result<ChainedEntry, JournalError> {
        (**self).append(payload)
    }

    fn replay(&mut self) -> Result<Vec<ChainedEntry>, JournalError> {
        (**self).replay()
    }
}

impl<J: Journal + ?Sized> Journal for Box<J> {
    fn append(&mut self, payload: &[u8]) -> Result<ChainedEntry, JournalError> {
        (**self).append(payload)
    }

    fn replay(&mut self) -> Result<Vec<ChainedEntry>, JournalError> {
        (**self).replay()
    }
}

/// Checks that entries form one chain from genesis: positions, links and hashes.
///
/// # Errors
/// [`LedgerError::Chain`] names the first entry that doesn't follow.
pub fn verify_chain(entries: &[ChainedEntry]) -> Result<(), LedgerError> {
    let mut head = GENESIS;
    for (expected, entry) in (0u64..).zip(entries) {
        let follows =
            entry.seq == expected && entry.prev == head && entry.hash == chain_hash(&head, &entry.payload);
        if !follows {
            return Err(LedgerError::Chain { seq: expected });
        }
        head = entry.hash;
    }
    Ok(())
}

fn chain_hash(prev: &Digest, payload: &[u8]) -> Digest {
    let mut context = Context::new(&SHA256);
    context.update(prev);
    context.update(payload);
    let mut hash = [0; 32];
    hash.copy_from_slice(context.finish().as_ref());
    hash
}

/// A journal in memory: as durable as the process.
#[derive(Debug, Clone, Default)]
pub struct MemoryJournal {
    entries: Vec<ChainedEntry>,
}

impl Journal for MemoryJournal {
    fn append(&mut self, payload: &[u8]) -> Result<ChainedEntry, JournalError> {
        let prev = self.entries.last().map_or(GENESIS, |entry| entry.hash);
        let entry = ChainedEntry::following(self.entries.len() as u64, prev, payload);
        self.entries.push(entry.clone());
        Ok(entry)
    }

    fn replay(&mut self) -> Result<Vec<ChainedEntry>, JournalError> {
        Ok(self.entries.clone())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn chain(n: u8) -> Vec<ChainedEntry> {
        let mut journal = MemoryJournal::default();
        (0..n).for_each(|i| {
            journal.append(&[i; 3]).unwrap();
        });
        journal.replay().unwrap()
    }

    #[test]
    fn a_whole_chain_verifies() {
        assert_eq!(verify_chain(&chain(5)), Ok(()));
        assert_eq!(verify_chain(&[]), Ok(()));
        // SHA-256 of 32 zero bytes and an empty payload, computed with sha256sum.
        let first = ChainedEntry::following(0, GENESIS, b"");
        assert_eq!(
            hex::encode(first.hash),
            "66687aadf862bd776c8fc18b8e9f8e20089714856ee233b3902a591d0d5f2925"
        );
    }

    #[test]
    fn a_changed_dropped_or_reordered_entry_breaks_the_chain_where_it_stands() {
        let good = chain(5);
        let mut changed = good.clone();
        changed[2].payload[0] ^= 1;
        assert_eq!(verify_chain(&changed), Err(LedgerError::Chain { seq: 2 }));
        let mut dropped = good.clone();
        dropped.remove(1);
        assert_eq!(verify_chain(&dropped), Err(LedgerError::Chain { seq: 1 }));
        let mut swapped = good.clone();
        swapped.swap(3, 4);
        assert_eq!(verify_chain(&swapped), Err(LedgerError::Chain { seq: 3 }));
        let mut renumbered = good;
        renumbered[0].seq = 1;
        assert_eq!(verify_chain(&renumbered), Err(LedgerError::Chain { seq: 0 }));
    }
}
