//! Where noise comes from, and the taint of noise that could be drawn again.
//!
//! In production every stream is a fresh ChaCha20 seeded by the operating system and never stored. Under a fixed
//! seed (demonstrations, tests) a stream is HKDF-SHA256 of the seed and four labels, so equal runs are equal byte
//! for byte; whoever knows the seed can subtract the noise, so [`NoiseSource::reproducible`] marks everything that
//! descends from it. There is no default and no hidden thread-local generator.

use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;
use ring::hkdf::{HKDF_SHA256, Salt};
use ring::rand::{SecureRandom, SystemRandom};
use std::fmt;
use std::sync::Arc;

/// The operating system gave no randomness; nothing may be released.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no entropy: the operating system's random generator failed, so no noise can be drawn")]
pub struct NoEntropy;

/// Something that fills a key with unpredictable bytes.
pub trait Entropy: Send + Sync {
    /// Fills the key.
    ///
    /// # Errors
    /// [`NoEntropy`] when the source failed; the key must not be used then.
    fn fill(&self, key: &mut [u8; 32]) -> Result<(), NoEntropy>;
}

impl Entropy for SystemRandom {
    fn fill(&self, key: &mut [u8; 32]) -> Result<(), NoEntropy> {
        SecureRandom::fill(self, key).map_err(|_| NoEntropy)
    }
}

/// What a noise or sampling stream is for; part of a seeded stream's derivation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Noise on marginal counts.
    Release,
    /// Noise on a round's adapter gradient.
    Round,
    /// Choices that are not noise, such as draws from a synthetic table.
    Sampling,
    /// Keys, seeds and shares of secrets of a secure sum.
    Keys,
}

impl Purpose {
    /// The label in the derivation and in logs.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Round => "round",
            Self::Sampling => "sampling",
            Self::Keys => "keys",
        }
    }
}

/// Source of noise streams.
#[derive(Clone)]
pub enum NoiseSource {
    /// Fresh entropy for every stream; the only source whose output is private.
    Os(Arc<dyn Entropy>),
    /// Streams derived from a known seed: reproducible, **not private**.
    Seeded {
        /// The known seed.
        seed: u64,
    },
}

impl NoiseSource {
    /// The operating system's randomness.
    #[must_use]
    pub fn os(random: SystemRandom) -> Self {
        Self::Os(Arc::new(random))
    }

    /// Whether somebody could draw the same noise again. Ledger, report and every descendant carry this taint.
    #[must_use]
    pub fn reproducible(&self) -> bool {
        matches!(self, Self::Seeded { .. })
    }

    /// A generator for one use.
    ///
    /// A seeded source gives equal streams for equal `(agent, product, sequence, purpose)` and unrelated streams
    /// otherwise; the OS source ignores the labels and never gives a stream twice.
    ///
    /// # Errors
    /// [`NoEntropy`] when the operating system's generator failed.
    pub fn stream(
        &self,
        agent: &str,
        product: &str,
        sequence: u64,
        purpose: Purpose,
    ) -> Result<ChaCha20Rng, NoEntropy> {
        let key = match self {
            Self::Os(entropy) => {
                let mut key = [0; 32];
                entropy.fill(&mut key)?;
                key
            }
            Self::Seeded { seed } => derive(*seed, agent, product, sequence, purpose),
        };
        Ok(ChaCha20Rng::from_seed(key))
    }
}

impl fmt::Debug for NoiseSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.reproducible() { "NoiseSource::Seeded(..)" } else { "NoiseSource::Os" })
    }
}

// Every label is preceded by its length, so ("ab", "c") and ("a", "bc") derive different keys.
fn derive(seed: u64, agent: &str, product: &str, sequence: u64, purpose: Purpose) -> [u8; 32] {
    let lengths = [agent, product, purpose.label()].map(|label| (label.len() as u64).to_le_bytes());
    let sequence = sequence.to_le_bytes();
    let info: [&[u8]; 8] = [
        HKDF_LABEL,
        &lengths[0],
        agent.as_bytes(),
        &lengths[1],
        product.as_bytes(),
        &sequence,
        &lengths[2],
        purpose.label().as_bytes(),
    ];
    let mut key = [0; 32];
    // Unwrap safety: 32 bytes is one SHA-256 block, far below HKDF's limit of 255 blocks, the only failure there is.
    Salt::new(HKDF_SHA256, HKDF_LABEL)
        .extract(&seed.to_le_bytes())
        .expand(&info, HKDF_SHA256)
        .and_then(|okm| okm.fill(&mut key))
        .expect("HKDF-SHA256 gives 32 bytes");
    key
}

const HKDF_LABEL: &[u8] = b"tabmesh noise stream v1";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use rand::RngCore;

    fn first(source: &NoiseSource, agent: &str, product: &str, sequence: u64, purpose: Purpose) -> u64 {
        source.stream(agent, product, sequence, purpose).unwrap().next_u64()
    }

    #[test]
    fn seeded_streams_depend_on_every_label_and_on_nothing_else() {
        let source = NoiseSource::Seeded { seed: 7 };
        let base = first(&source, "a", "p", 1, Purpose::Release);
        assert_eq!(base, first(&NoiseSource::Seeded { seed: 7 }, "a", "p", 1, Purpose::Release));
        for other in [
            first(&NoiseSource::Seeded { seed: 8 }, "a", "p", 1, Purpose::Release),
            first(&source, "b", "p", 1, Purpose::Release),
            first(&source, "a", "q", 1, Purpose::Release),
            first(&source, "a", "p", 2, Purpose::Release),
            first(&source, "a", "p", 1, Purpose::Round),
        ] {
            assert_ne!(base, other);
        }
        assert_ne!(
            first(&source, "ab", "c", 1, Purpose::Release),
            first(&source, "a", "bc", 1, Purpose::Release),
            "labels are length-prefixed"
        );
    }

    #[test]
    fn os_streams_differ_and_are_not_tainted() {
        let source = NoiseSource::os(SystemRandom::new());
        assert!(!source.reproducible() && NoiseSource::Seeded { seed: 0 }.reproducible());
        assert_ne!(
            first(&source, "a", "p", 1, Purpose::Release),
            first(&source, "a", "p", 1, Purpose::Release)
        );
    }

    #[test]
    fn a_failing_entropy_source_gives_no_stream() {
        struct Broken;
        impl Entropy for Broken {
            fn fill(&self, _: &mut [u8; 32]) -> Result<(), NoEntropy> {
                Err(NoEntropy)
            }
        }
        let source = NoiseSource::Os(Arc::new(Broken));
        assert!(matches!(source.stream("a", "p", 1, Purpose::Release), Err(NoEntropy)));
    }
}
