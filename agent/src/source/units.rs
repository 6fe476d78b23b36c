//! Privacy units: a keyed name for each, and the cap on the rows one unit contributes.
//!
//! Unit keys are HMAC-SHA256 under a key that never leaves the domain: a plain digest of an id could be found by
//! trying ids. The cap keeps at most k rows of a unit, chosen by keyed hash among the unit's own rows, without
//! looking at values or at any other unit: adding or removing one unit changes no other unit's choice, which is
//! what makes k the sensitivity.
//!
//! Up to [`MAX_EXACT_UNITS`] units are counted one by one. Beyond, rows are counted in the slots of a fixed sketch,
//! which never counts too few: a unit in a slot of at most k rows has at most k, and needs no more than its slot. Only
//! those in fuller slots are counted by themselves, in a second look at the unit column. The rows that stay are the
//! same either way.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};

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

/// First pass of the cap: counts the rows of each unit. Memory: about 50 bytes for each of up to
/// [`MAX_EXACT_UNITS`] units; beyond these [`SLOTS`] bytes, and about 50 for each unit in a slot of more than k rows.
#[derive(Debug, Clone)]
pub struct UnitCap {
    key: DomainKey,
    max_rows: u32,
    /// Of all units, or of those in full slots once there is a sketch.
    states: States,
    sketch: Option<Sketch>,
    exact_units: usize,
    slots: usize,
}

impl UnitCap {
    /// A cap of `max_rows` rows per unit.
    #[must_use]
    pub fn new(key: DomainKey, max_rows: u32) -> Self {
        Self::sized(key, max_rows, MAX_EXACT_UNITS, SLOTS)
    }

    fn sized(key: DomainKey, max_rows: u32, exact_units: usize, slots: usize) -> Self {
        Self { key, max_rows, states: States::default(), sketch: None, exact_units, slots }
    }

    /// Counts rows by their units.
    pub fn observe(&mut self, units: &[UnitKey]) {
        for unit in units {
            if let Some(sketch) = &mut self.sketch {
                sketch.add(unit, 1);
                continue;
            }
            self.states.entry(*unit).or_default().count();
            if self.states.len() > self.exact_units {
                let mut sketch = Sketch::new(self.slots, self.max_rows);
                self.states.drain().for_each(|(unit, state)| sketch.add(&unit, state.rows));
                self.states = States::default();
                self.sketch = Some(sketch);
            }
        }
    }

    /// Whether all rows have to be shown once more, to [`UnitCap::observe_again`], before the first pass ends.
    #[must_use]
    pub fn undecided(&self) -> bool {
        self.sketch.as_ref().is_some_and(Sketch::any_full)
    }

    /// Counts those rows by their units whose slots are too full to tell. Without this second look none of them stays.
    pub fn observe_again(&mut self, units: &[UnitKey]) {
        let Some(sketch) = &self.sketch else { return };
        for unit in units.iter().filter(|unit| sketch.full(unit)) {
            self.states.entry(*unit).or_default().count();
        }
    }

    /// Ends the first pass.
    #[must_use]
    pub fn finish(self) -> UnitFilter {
        UnitFilter {
            key: self.key,
            max_rows: self.max_rows,
            states: self.states,
            sketch: self.sketch,
            chosen: HashMap::new(),
        }
    }

    /// Both passes over a batch that holds the whole table.
    #[must_use]
    pub fn apply(key: DomainKey, max_rows: u32, table: &TypedBatch) -> TypedBatch {
        let mut cap = Self::new(key, max_rows);
        cap.observe(&table.units);
        if cap.undecided() {
            cap.observe_again(&table.units);
        }
        table.take(&cap.finish().keep(&table.units))
    }
}

/// Second pass of the cap: says which rows stay. Never lets through more than the cap, whatever it is fed.
#[derive(Debug, Clone)]
pub struct UnitFilter {
    key: DomainKey,
    max_rows: u32,
    states: States,
    sketch: Option<Sketch>,
    /// Positions kept, for units over the cap whose first row has passed.
    chosen: HashMap<UnitKey, Vec<u32>>,
}

type States = HashMap<UnitKey, State, BuildHasherDefault<KeyHasher>>;

#[derive(Debug, Clone, Copy, Default)]
struct State {
    rows: u32,
    seen: u32,
}

impl State {
    fn count(&mut self) {
        self.rows = self.rows.saturating_add(1);
    }
}

/// A unit key is a keyed hash already: its first bytes do.
#[derive(Debug, Clone, Copy, Default)]
struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(head) = bytes.first_chunk() {
            self.0 = u64::from_le_bytes(*head);
        }
    }

    /// The length, which is the same for all keys.
    fn write_usize(&mut self, _: usize) {}

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Rows by slot, one byte each; units share slots by the last bytes of their keys.
#[derive(Clone)]
struct Sketch {
    rows: Vec<u8>,
    /// A slot of more rows is full: k, or one less than a byte holds.
    most: u8,
}

impl Sketch {
    fn new(slots: usize, max_rows: u32) -> Self {
        Self { rows: vec![0; slots], most: u8::try_from(max_rows).unwrap_or(u8::MAX).min(u8::MAX - 1) }
    }

    fn slot(&self, unit: &UnitKey) -> usize {
        let tail = unit.last_chunk().map_or(0, |tail| u64::from_le_bytes(*tail));
        (tail % self.rows.len() as u64) as usize
    }

    fn add(&mut self, unit: &UnitKey, rows: u32) {
        let slot = self.slot(unit);
        let rows = u8::try_from(rows).unwrap_or(u8::MAX);
        self.rows[slot] = self.rows[slot].saturating_add(rows);
    }

    fn full(&self, unit: &UnitKey) -> bool {
        self.rows[self.slot(unit)] > self.most
    }

    fn any_full(&self) -> bool {
        self.rows.iter().any(|rows| *rows > self.most)
    }

    /// Takes a row out of a slot that isn't full; none if all its rows have been taken.
    fn take(&mut self, unit: &UnitKey) -> bool {
        let slot = self.slot(unit);
        let left = self.rows[slot].checked_sub(1);
        self.rows[slot] = left.unwrap_or(0);
        left.is_some()
    }
}

impl fmt::Debug for Sketch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sketch({} slots)", self.rows.len())
    }
}

impl UnitFilter {
    /// Indices of the rows that stay, for the next rows of the same table in the same order as in the first pass.
    #[must_use]
    pub fn keep(&mut self, units: &[UnitKey]) -> Vec<usize> {
        self.keep_or_pass(units, &[])
    }

    /// As [`UnitFilter::keep`]; rows marked as `alone` are units that no other row can belong to: they stay, and the first
    /// pass needn't have seen them.
    pub(super) fn keep_or_pass(&mut self, units: &[UnitKey], alone: &[bool]) -> Vec<usize> {
        let mut kept = Vec::with_capacity(units.len());
        for (index, unit) in units.iter().enumerate() {
            let stays = match &mut self.sketch {
                _ if alone.get(index).copied().unwrap_or(false) => true,
                Some(sketch) if !sketch.full(unit) => sketch.take(unit),
                _ => self.chosen(unit),
            };
            if stays {
                kept.push(index);
            }
        }
        kept
    }

    /// Whether the next row of a unit that was counted by itself stays.
    fn chosen(&mut self, unit: &UnitKey) -> bool {
        // A unit or row that the first pass didn't see is dropped: the table changed in between.
        let Some(state) = self.states.get_mut(unit) else { return false };
        let (position, rows) = (state.seen, state.rows);
        state.seen = state.seen.saturating_add(1);
        if position >= rows || rows <= self.max_rows {
            return position < rows;
        }
        let (key, max_rows) = (&self.key, self.max_rows);
        let chosen = self.chosen.entry(*unit).or_insert_with(|| choose(key, unit, rows, max_rows));
        let stays = chosen.binary_search(&position).is_ok();
        if position + 1 == rows {
            self.chosen.remove(unit);
        }
        stays
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

/// Units counted one by one at most.
pub const MAX_EXACT_UNITS: usize = 1 << 18;
/// Slots of the sketch, a byte each. Ten million units of one row leave a seventh of them in shared slots.
pub const SLOTS: usize = 1 << 26;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

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

    fn sketched(units: &[UnitKey], max_rows: u32, exact_units: usize, slots: usize) -> UnitFilter {
        let mut cap = UnitCap::sized(key(), max_rows, exact_units, slots);
        units.chunks(7).for_each(|part| cap.observe(part));
        assert_eq!(cap.sketch.is_some(), units.iter().collect::<HashSet<_>>().len() > exact_units);
        if cap.undecided() {
            units.chunks(11).for_each(|part| cap.observe_again(part));
        }
        cap.finish()
    }

    #[test]
    fn the_sketch_keeps_the_same_rows_whatever_its_size() {
        // Unit n has 1 + n % 9 rows, one has 300, more than a slot can tell.
        let mut units: Vec<UnitKey> = (0..90u8).flat_map(|n| vec![unit(n); 1 + usize::from(n % 9)]).collect();
        units.extend(vec![unit(200); 300]);
        units.sort_by_key(|unit| unit[3]);
        for max_rows in [1, 4, 8, 254, 255, 260, 1000] {
            let whole = kept(&units, max_rows);
            for (exact_units, slots) in [(91, 1), (90, 1), (10, 7), (10, 64), (10, 1 << 16), (0, 1 << 10)] {
                let kept = sketched(&units, max_rows, exact_units, slots).keep(&units);
                assert_eq!(kept, whole, "cap {max_rows}, {exact_units} units, {slots} slots");
            }
        }
    }

    #[test]
    fn exact_counting_ends_one_unit_above_its_limit() {
        let units: Vec<UnitKey> = (0..=MAX_EXACT_UNITS as u32)
            .map(|n| {
                let mut unit = UnitKey::default();
                unit[..4].copy_from_slice(&n.to_le_bytes());
                unit[8..12].copy_from_slice(&n.to_le_bytes());
                unit
            })
            .collect();
        let mut cap = UnitCap::new(key(), 1);
        cap.observe(&units[..MAX_EXACT_UNITS]);
        assert!(cap.sketch.is_none());
        cap.observe(&units[MAX_EXACT_UNITS..]);
        assert!(cap.sketch.is_some() && cap.states.is_empty() && !cap.undecided());
        assert_eq!(cap.finish().keep(&units).len(), units.len());
    }

    #[test]
    fn rows_added_between_the_passes_do_not_pass_the_sketch_either() {
        let units: Vec<UnitKey> = (0..100u8).flat_map(|n| [unit(n); 2]).collect();
        for slots in [16, 1 << 12] {
            let mut filter = sketched(&units, 2, 10, slots);
            let more: Vec<UnitKey> = (0..120u8).flat_map(|n| [unit(n); 9]).collect();
            let kept = filter.keep(&more);
            for n in 0..120u8 {
                let rows = kept.iter().filter(|at| more[**at] == unit(n)).count();
                assert!(rows <= 2, "unit {n} has {rows} rows");
            }
        }
    }

    #[test]
    fn keys_depend_on_the_secret_and_are_not_shown() {
        let other = DomainKey::new(&[8; 32]);
        assert_ne!(key().derive("unit", &[b"alice"]), other.derive("unit", &[b"alice"]));
        assert_ne!(key().derive("unit", &[b"ab", b"c"]), key().derive("unit", &[b"a", b"bc"]));
        assert_eq!(format!("{:?}", key()), "DomainKey(secret)");
    }
}
