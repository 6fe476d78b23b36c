//! A sum that is built update by update: memory doesn't grow with the cohort.
//!
//! For linear rules ([`super::Aggregate::needs_separate_updates`] is false) the sum is all that is needed; its result goes into
//! [`super::Contributions::SumOnly`]. Who has been counted is the caller's to know. Sums over threads are merged; integers
//! add to the same result in every order.

use crate::aggregate::AggregateError;

/// The sum so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    sum: Vec<i64>,
    updates: u64,
}

impl Running {
    /// Nothing yet, for vectors of `len` integers.
    #[must_use]
    pub fn new(len: usize) -> Self {
        Self { sum: vec![0; len], updates: 0 }
    }

    /// Adds one update.
    ///
    /// # Errors
    /// [`AggregateError::Length`] for another length; [`AggregateError::Overflow`] if a position leaves the range of `i64`.
    /// The sum must not be used after an overflow.
    pub fn add(&mut self, update: &[i64]) -> Result<(), AggregateError> {
        if update.len() != self.sum.len() {
            return Err(AggregateError::Length { expected: self.sum.len(), got: update.len() });
        }
        // One flag for the whole vector keeps the loop free of branches: the sign bit is set where both operands have
        // one sign and the result the other.
        let mut overflow = 0_i64;
        for (total, value) in self.sum.iter_mut().zip(update) {
            let sum = total.wrapping_add(*value);
            overflow |= (*total ^ sum) & (*value ^ sum);
            *total = sum;
        }
        if overflow < 0 {
            return Err(AggregateError::Overflow);
        }
        self.updates += 1;
        Ok(())
    }

    /// Adds what another sum holds.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn merge(&mut self, other: &Self) -> Result<(), AggregateError> {
        self.add(&other.sum)?;
        self.updates = self.updates - 1 + other.updates;
        Ok(())
    }

    /// Updates added.
    #[must_use]
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The sum.
    #[must_use]
    pub fn sum(&self) -> &[i64] {
        &self.sum
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_running_sum_is_the_sum_or_an_overflow(
            rows in (1_usize..6).prop_flat_map(|len| prop::collection::vec(prop::collection::vec(any::<i64>(), len), 1..5)),
        ) {
            let naive: Option<Vec<i64>> = (0..rows[0].len())
                .map(|j| rows.iter().try_fold(0_i64, |s, r| s.checked_add(r[j])))
                .collect();
            let mut running = Running::new(rows[0].len());
            let added: Result<(), AggregateError> = rows.iter().try_for_each(|row| running.add(row));
            match naive {
                Some(sum) => {
                    prop_assert_eq!(added, Ok(()));
                    prop_assert_eq!(running.sum(), &sum[..]);
                    prop_assert_eq!(running.updates(), rows.len() as u64);
                }
                None => prop_assert_eq!(added, Err(AggregateError::Overflow)),
            }
        }
    }

    #[test]
    fn halves_merge_to_the_whole() {
        let (mut left, mut right) = (Running::new(2), Running::new(2));
        left.add(&[1, 2]).unwrap();
        left.add(&[3, 4]).unwrap();
        right.add(&[10, -20]).unwrap();
        left.merge(&right).unwrap();
        assert_eq!((left.sum(), left.updates()), (&[14_i64, -14][..], 3));
        assert_eq!(left.add(&[1]), Err(AggregateError::Length { expected: 2, got: 1 }));
    }
}
