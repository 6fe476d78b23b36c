//! The gate rows: a fixed share of the training units, set apart before anything else sees them.
//!
//! Gate rows enter neither a release nor a gradient nor a context while the agent chooses what to serve; they are
//! what the choice is judged on. Membership is a keyed hash of the privacy unit, so all rows of an entity stand on
//! one side and nobody outside the domain can tell which.

use ring::hmac;
use tabmesh_contract::batch::{TypedBatch, UnitKey};

/// Row indices on either side of the gate.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GateSplit {
    /// Rows for release, gradients and context.
    pub training: Vec<usize>,
    /// Rows for choosing what to serve.
    pub gate: Vec<usize>,
}

/// Decides by a keyed hash which units stand at the gate.
#[derive(Clone)]
pub struct Gate {
    key: hmac::Key,
}

impl Gate {
    /// A gate keyed by the domain's secret.
    #[must_use]
    pub fn new(domain_key: &[u8]) -> Self {
        Self { key: hmac::Key::new(hmac::HMAC_SHA256, domain_key) }
    }

    /// Whether a unit's rows stand at the gate.
    #[must_use]
    pub fn holds(&self, unit: &UnitKey) -> bool {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(b"gate");
        context.update(unit);
        let tag = context.sign();
        let mut head = [0_u8; 4];
        head.iter_mut().zip(tag.as_ref()).for_each(|(to, from)| *to = *from);
        u32::from_be_bytes(head) < GATE_THRESHOLD
    }

    /// Splits the rows of a batch.
    #[must_use]
    pub fn split(&self, batch: &TypedBatch) -> GateSplit {
        let (gate, training) =
            (0..batch.rows()).partition(|&row| batch.units.get(row).is_some_and(|u| self.holds(u)));
        GateSplit { training, gate }
    }
}

/// Share of training units at the gate, in percent.
pub const GATE_PERCENT: u32 = 20;
/// A unit whose hash lies below stands at the gate.
const GATE_THRESHOLD: u32 = u32::MAX / 100 * GATE_PERCENT;

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(n: u32) -> UnitKey {
        let mut key = [0; 16];
        key[..4].copy_from_slice(&n.to_be_bytes());
        key
    }

    #[test]
    fn a_fifth_of_the_units_stands_at_the_gate() {
        let gate = Gate::new(b"secret");
        let held = (0..20_000).filter(|&n| gate.holds(&unit(n))).count();
        // Binomial(20000, .2): mean 4000, sd 57; five sds either way, false alarm below 1e-6.
        assert!((3_715..=4_285).contains(&held), "{held}");
    }

    #[test]
    fn rows_of_one_unit_stay_together_and_every_row_has_a_side() {
        let units: Vec<_> = (0..100).flat_map(|n| [unit(n), unit(n)]).collect();
        let batch = TypedBatch { columns: vec![], labels: vec![None; 200], units };
        let split = Gate::new(b"secret").split(&batch);
        assert_eq!(split.training.len() + split.gate.len(), 200);
        for pair in split.gate.chunks(2) {
            assert_eq!(pair[0] / 2, pair[1] / 2);
        }
    }

    #[test]
    fn another_domain_key_gives_another_gate() {
        let one: Vec<_> = (0..64).map(|n| Gate::new(b"a").holds(&unit(n))).collect();
        let two: Vec<_> = (0..64).map(|n| Gate::new(b"b").holds(&unit(n))).collect();
        assert_ne!(one, two);
    }
}
