//! Which domain of a federation is left out as the newcomer: every one in turn that figures can be had for.

use crate::score::MIN_CLASS_ROWS;

/// What of a domain can be scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    /// Training rows.
    pub(crate) train: usize,
    /// Test rows of class 0 and 1.
    pub(crate) test: [usize; 2],
}

/// The domain left out under a seed, where newcomers are scored with `rows` own rows.
///
/// Domains take turns that have the largest of these numbers in training rows, and [`MIN_CLASS_ROWS`] test rows of each
/// class; where none has, those that have the next smaller number; where no domain can be scored at all, every one.
/// The rule sees counts alone and was fixed before any figure.
pub(crate) fn newcomer(domains: &[Size], rows: &[usize], seed: u64) -> usize {
    let mut rows = rows.to_vec();
    rows.sort_unstable_by(|a, b| b.cmp(a));
    let scored = |size: &Size| size.test.iter().all(|rows| *rows >= MIN_CLASS_ROWS);
    let reaching = |least: usize| -> Vec<usize> {
        let fits = domains.iter().enumerate().filter(|(_, size)| size.train >= least && scored(size));
        fits.map(|(at, _)| at).collect()
    };
    let fit = rows.into_iter().map(reaching).find(|fit| !fit.is_empty());
    let fit = fit.unwrap_or_else(|| (0..domains.len()).collect());
    let turn = usize::try_from(seed % fit.len().max(1) as u64).unwrap_or(0);
    fit.get(turn).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn size(train: usize, zeros: usize, ones: usize) -> Size {
        Size { train, test: [zeros, ones] }
    }

    #[test]
    fn domains_that_can_be_scored_take_turns() {
        let few_rows = size(40, 90, 90);
        let few_ones = size(900, 90, MIN_CLASS_ROWS - 1);
        let domains = [few_rows, size(256, 10, 10), few_ones, size(300, 50, 20), size(100, 50, 20)];
        let chosen: Vec<usize> = (0..4).map(|seed| newcomer(&domains, &[64, 256], seed)).collect();
        assert_eq!(chosen, [1, 3, 1, 3]);
        // With fewer rows asked for, one more takes part.
        let chosen: Vec<usize> = (0..3).map(|seed| newcomer(&domains, &[64], seed)).collect();
        assert_eq!(chosen, [1, 3, 4]);
    }

    #[test]
    fn smaller_numbers_are_scored_where_no_domain_has_the_largest() {
        let domains = [size(40, 90, 90), size(100, 50, 20), size(64, 10, 10)];
        let chosen: Vec<usize> = (0..3).map(|seed| newcomer(&domains, &[256, 64], seed)).collect();
        assert_eq!(chosen, [1, 2, 1]);
        let none = [size(5, 1, 1), size(6, 1, 1)];
        assert_eq!([newcomer(&none, &[64], 0), newcomer(&none, &[64], 3)], [0, 1]);
    }
}
