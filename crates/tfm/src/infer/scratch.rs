//! Buffers that are used again: a pass takes dozens of them, and fresh memory costs more than what is written to it.
//!
//! Each thread keeps its own, up to a bound: little for serving, more once it has taken a pass forward and back.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    ops::{Deref, DerefMut},
};

/// Numbers whose memory goes back to the thread's store.
pub(super) struct Buffer {
    /// As many as are shown, or somewhat more.
    numbers: Vec<f32>,
    len: usize,
}

/// Memory not in use, by its size.
struct Store {
    sizes: BTreeMap<usize, Vec<Vec<f32>>>,
    numbers: usize,
    /// Most numbers kept.
    most: usize,
}

thread_local! {
    static STORE: RefCell<Store> =
        const { RefCell::new(Store { sizes: BTreeMap::new(), numbers: 0, most: FEW_NUMBERS }) };
}

/// Lets this thread keep what a pass forward and back takes, from now on.
pub(super) fn keep_many() {
    STORE.with_borrow_mut(|store| store.most = MOST_NUMBERS);
}

impl Buffer {
    /// `len` numbers with whatever was there before: who takes them writes all of them.
    pub(super) fn stale(len: usize) -> Self {
        // A few sizes, so that what is left by one use fits the next; at most an eighth is wasted.
        let size = len.next_multiple_of((len.next_power_of_two() / 16).max(LEAST)).max(LEAST);
        let kept = STORE.with_borrow_mut(|store| {
            let found = store.sizes.get_mut(&size).and_then(Vec::pop);
            store.numbers -= found.as_ref().map_or(0, Vec::len);
            found
        });
        Self { numbers: kept.unwrap_or_else(|| vec![0.0; size]), len }
    }

    /// A copy.
    pub(super) fn copy(values: &[f32]) -> Self {
        let mut buffer = Self::stale(values.len());
        buffer.copy_from_slice(values);
        buffer
    }

    /// Zeros.
    pub(super) fn zeros(len: usize) -> Self {
        let mut buffer = Self::stale(len);
        buffer.fill(0.0);
        buffer
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.numbers[..self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.numbers[..self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let numbers = std::mem::take(&mut self.numbers);
        // A thread that is ending has no store any more.
        let _ = STORE.try_with(|store| {
            let Ok(mut store) = store.try_borrow_mut() else { return };
            let total = store.numbers + numbers.len();
            if total > store.most {
                return;
            }
            store.numbers = total;
            store.sizes.entry(numbers.len()).or_default().push(numbers);
        });
    }
}

/// Smallest buffer: a kilobyte.
const LEAST: usize = 256;
/// Most numbers that a thread keeps for serving: a megabyte.
pub(super) const FEW_NUMBERS: usize = 1 << 18;
/// Most numbers that a thread keeps for passes forward and back: 32 megabytes.
const MOST_NUMBERS: usize = 8 << 20;

#[cfg(test)]
mod tests {
    use super::{Buffer, FEW_NUMBERS, MOST_NUMBERS, STORE, keep_many};

    #[test]
    fn memory_is_used_again_within_bounds() {
        let mut first = Buffer::stale(2000);
        first.fill(3.0);
        let place = first.as_ptr();
        drop(first);
        let second = Buffer::stale(1900);
        assert_eq!((second.as_ptr(), second.len(), second[7]), (place, 1900, 3.0));
        drop(second);
        assert_ne!(Buffer::stale(1000).as_ptr(), place);
        assert_ne!(Buffer::stale(2049).as_ptr(), place);
        let zeros = Buffer::zeros(2000);
        assert_eq!((zeros.as_ptr(), zeros[7]), (place, 0.0));
        assert_eq!(Buffer::copy(&[1.0, 2.0])[..], [1.0, 2.0]);
        let held = || {
            STORE.with_borrow(|store| {
                let held: usize = store.sizes.values().flatten().map(Vec::len).sum();
                assert_eq!(store.numbers, held);
                held
            })
        };
        for (most, allow) in [(FEW_NUMBERS, None), (MOST_NUMBERS, Some(keep_many as fn()))] {
            allow.into_iter().for_each(|allow| allow());
            drop((0..=8).map(|_| Buffer::stale(most / 8)).collect::<Vec<_>>());
            drop(Buffer::stale(most + 1));
            assert!(held() > most / 2 && held() <= most, "{} of {most}", held());
        }
    }
}
