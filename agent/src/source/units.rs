//! Privacy units: a keyed name for each, and the cap on the rows one unit contributes.
//!
//! Unit keys are HMAC-SHA256 under a key that never leaves the domain: a plain digest of an id could be found by
//! trying ids. The cap keeps at most k rows of a unit, chosen by keyed hash among the unit's own rows, without
//! looking at values or at any other unit: adding or removing one unit changes no other unit's choice, which is
//! what makes k the sensitivity.

use std::collections::HashMap;
use std::fmt;

use ring::hmac;
use tabmesh_contract::batch::{TypedBatch, UnitKey};

/// The domain's secret for unit keys and row choices.
#[derive(Clone)]
pub struct DomainKey(hmac::Key);

impl DomainKey {
    /// A key of 32 secret bytes.
    #[must_use]
    pub fn new(secret: &[u8; 32]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, secret))
    }

    /// HMAC-SHA256 over a context and length-prefixed parts, cut to 16 bytes.
    pub(super) fn derive(&self, context: &str, parts: &[&[u8]]) -> UnitKey {
        let mut mac = hmac::Context::with_key(&self.0);
        for part in std::iter::once(context.as_bytes()).chain(parts.iter().copied()) {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part);
        }
        let mut key = UnitKey::default();
        for (to, from) in key.iter_mut().zip(mac.sign().as_ref()) {
            *to = *from;
        }
        key
    }
}

impl fmt::Debug for DomainKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DomainKey(secret)")
    }
}

/// First pass of the cap: counts the rows of each unit. 16 + 8 bytes a unit in memory.
#[derive(Debug, Clone)]
pub struct UnitCap {
    key: DomainKey,
    max_rows: u32,
    counts: HashMap<UnitKey, u32>,
}

impl UnitCap {
    /// A cap of `max_rows` rows per unit.
    #[must_use]
    pub fn new(key: DomainKey, max_rows: u32) -> Self {
        Self { key, max_rows, counts: HashMap::new() }
    }

    /// Counts rows by their units.
    pub fn observe(&mut self, units: &[UnitKey]) {
        for unit in units {
            let count = self.counts.entry(*unit).or_insert(0);
            *count = count.saturating_add(1);
        }
    }

    /// Ends the first pass.
    #[must_use]
    pub fn finish(self) -> UnitFilter {
        let states = self.counts.into_iter().map(|(unit, rows)| (unit, State { rows, seen: 0 })).collect();
        UnitFilter { key: self.key, max_rows: self.max_rows, states, chosen: HashMap::new() }
    }

    /// Both passes over a batch that holds the whole table.
    #[must_use]
    pub fn apply(key: DomainKey, max_rows: u32, table: &TypedBatch) -> TypedBatch {
        let mut cap = Self::new(key, max_rows);
        cap.observe(&table.units);
        table.take(&cap.finish().keep(&table.units))
    }
}

/// Second pass of the cap: says which rows stay. Never lets through more than the cap, whatever it is fed.
#[derive(Debug, Clone)]
pub struct UnitFilter {
    key: DomainKey,
    max_rows: u32,
    states: HashMap<UnitKey, State>,
    /// Positions kept, for units over the cap whose first row has passed.
    chosen: HashMap<UnitKey, Vec<u32>>,
}

#[derive(Debug, Clone, Copy)]
struct State {
    rows: u32,
    seen: u32,
}

impl UnitFilter {
    /// Number of units seen in the first pass. Private: never part of a message.
    #[must_use]
    pub fn units(&self) -> usize {
        self.states.len()
    }

    /// Indices of the rows that stay, for the next rows of the same table in the same order as in the first pass.
    #[must_use]
    pub fn keep(&mut self, units: &[UnitKey]) -> Vec<usize> {
        let mut kept = Vec::with_capacity(units.len());
        for (index, unit) in units.iter().enumerate() {
            // A unit or row that the first pass didn't see is dropped: the table changed in between.
            let Some(state) = self.states.get_mut(unit) else {
                continue;
            };
            let position = state.seen;
            let rows = state.rows;
            state.seen = state.seen.saturating_add(1);
            if position >= rows {
                continue;
            }
            if rows <= self.max_rows {
                kept.push(index);
                continue;
            }
            let (key, max_rows) = (&self.key, self.max_rows);
            let chosen = self.chosen.entry(*unit).or_insert_with(|| choose(key, unit, rows, max_rows));
            if chosen.binary_search(&position).is_ok() {
                kept.push(index);
            }
            if position + 1 == rows {
                self.chosen.remove(unit);
            }
        }
        kept
    }
}

/// The `max_rows` positions with the smallest keyed hashes among a unit's `rows`, in order.
fn choose(key: &DomainKey, unit: &UnitKey, rows: u32, max_rows: u32) -> Vec<u32> {
    let mut ranked: Vec<(UnitKey, u32)> =
        (0..rows).map(|row| (key.derive("tabmesh cap v1", &[unit, &row.to_be_bytes()]), row)).collect();
    ranked.sort_unstable();
    let mut chosen: Vec<u32> = ranked.into_iter().take(max_rows as usize).map(|(_, row)| row).collect();
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> DomainKey {
        DomainKey::new(&[7; 32])
    }

    fn unit(n: u8) -> UnitKey {
        key().derive("test", &[&[n]])
    }

    fn kept(units: &[UnitKey], max_rows: u32) -> Vec<usize> {
        let mut cap = UnitCap::new(key(), max_rows);
        cap.observe(units);
        cap.finish().keep(units)
    }

    #[test]
    fn units_under_the_cap_keep_all_rows_and_others_exactly_the_cap() {
        let units: Vec<UnitKey> =
            (0..100u8).map(|i| if i % 4 == 0 { unit(1) } else { unit(2 + i % 3) }).collect();
        let kept = kept(&units, 10);
        for (unit_key, expected) in [(unit(1), 10), (unit(2), 10), (unit(3), 10), (unit(4), 10)] {
            assert_eq!(kept.iter().filter(|&&i| units[i] == unit_key).count(), expected);
        }
        let few: Vec<UnitKey> = (0..5u8).map(unit).collect();
        assert_eq!(self::kept(&few, 1), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn another_unit_does_not_change_the_choice() {
        let alone = vec![unit(1); 30];
        let mixed: Vec<UnitKey> = (0..60).map(|i| if i % 2 == 0 { unit(1) } else { unit(9) }).collect();
        let from_alone = kept(&alone, 5);
        let from_mixed: Vec<usize> =
            kept(&mixed, 5).into_iter().filter(|i| i % 2 == 0).map(|i| i / 2).collect();
        assert_eq!(from_alone, from_mixed);
    }

    #[test]
    fn batches_do_not_change_the_choice() {
        let units: Vec<UnitKey> = (0..90u8).map(|i| unit(i % 3)).collect();
        let whole = kept(&units, 4);
        let mut cap = UnitCap::new(key(), 4);
        for part in units.chunks(7) {
            cap.observe(part);
        }
        let mut filter = cap.finish();
        let mut parts = Vec::new();
        for (i, part) in units.chunks(7).enumerate() {
            parts.extend(filter.keep(part).into_iter().map(|row| row + i * 7));
        }
        assert_eq!(whole, parts);
    }

    /// Each position is chosen with probability k/n. Over 2000 units of 20 rows at k = 5, a position's count has
    /// mean 500 and standard deviation 19.4; 5 deviations over 20 positions: false alarm below 2e-5, fixed key.
    #[test]
    fn the_choice_is_not_by_position() {
        let mut counts = [0u32; 20];
        for n in 0..2000u32 {
            let unit = key().derive("test", &[&n.to_be_bytes()]);
            for row in choose(&key(), &unit, 20, 5) {
                counts[row as usize] += 1;
            }
        }
        for (position, count) in counts.iter().enumerate() {
            assert!((403..=597).contains(count), "position {position} was chosen {count} times");
        }
    }

    #[test]
    fn rows_added_between_the_passes_do_not_pass_the_cap() {
        let mut cap = UnitCap::new(key(), 2);
        cap.observe(&[unit(1); 2]);
        let mut filter = cap.finish();
        assert_eq!(filter.keep(&[unit(1); 9]), [0, 1]);
        assert!(filter.keep(&[unit(2); 3]).is_empty());
    }

    #[test]
    fn keys_depend_on_the_secret_and_are_not_shown() {
        let other = DomainKey::new(&[8; 32]);
        assert_ne!(key().derive("unit", &[b"alice"]), other.derive("unit", &[b"alice"]));
        assert_ne!(key().derive("unit", &[b"ab", b"c"]), key().derive("unit", &[b"a", b"bc"]));
        assert_eq!(format!("{:?}", key()), "DomainKey(secret)");
    }
}
