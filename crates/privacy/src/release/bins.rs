//! Bins and merges chosen from released counts: post-processing, so it costs no privacy.
//!
//! A first step releases a fine histogram over the declared range; from its *noisy* counts about a dozen bins of
//! equal mass are cut, and rare levels are merged. No function here ever sees a row.

/// Inner edges of `n` fine bins over the declared range: equal width, or equal width in `ln(1 + value)`.
///
/// Edges that rounding would make equal are dropped, so the result can be shorter than `n - 1`; it is strictly
/// increasing and lies strictly between the bounds. Empty for an empty or unusable range.
#[must_use]
pub fn fine_edges(lower: f64, upper: f64, log1p: bool, n: usize) -> Vec<f64> {
    let usable = lower.is_finite() && upper.is_finite() && lower < upper && !(log1p && lower <= -1.0);
    if !usable {
        return Vec::new();
    }
    let (from, to) = if log1p { (lower.ln_1p(), upper.ln_1p()) } else { (lower, upper) };
    let mut edges: Vec<f64> = Vec::with_capacity(n.saturating_sub(1));
    for i in 1..n {
        let fraction = i as f64 / n as f64;
        // Weighted ends rather than from + fraction·(to − from): the difference of large bounds may overflow.
        let point = from * (1.0 - fraction) + to * fraction;
        let edge = if log1p { point.exp_m1() } else { point };
        if edge > edges.last().copied().unwrap_or(lower) && edge < upper {
            edges.push(edge);
        }
    }
    edges
}

/// Inner edges of about `bins` equal-mass bins, cut at the fine edges.
///
/// `noisy` holds one count per fine bin (`fine.len() + 1`; further values, such as the missing cell's, are ignored)
/// and `noise_sd` the standard deviation of their noise. Counts below two standard deviations are taken as zero. A
/// fine bin heavy enough to fill a bin alone (a spike at zero, say) keeps both its edges. At most `bins` bins come
/// out; with no visible mass they have equal numbers of fine bins.
#[must_use]
pub fn equal_mass_edges(noisy: &[f64], fine: &[f64], bins: usize, noise_sd: f64) -> Vec<f64> {
    let cells = fine.len() + 1;
    let threshold = NOISE_FLOOR_SD * noise_sd.max(0.0);
    let mut mass: Vec<f64> =
        noisy.iter().take(cells).map(|c| if *c > threshold { *c } else { 0.0 }).collect();
    mass.resize(cells, 0.0);
    if bins < 2 || fine.is_empty() {
        return Vec::new();
    }
    if mass.iter().sum::<f64>() <= 0.0 {
        mass.fill(1.0);
    }
    cuts(&mass, bins).into_iter().filter_map(|cut| fine.get(cut - 1).copied()).collect()
}

/// Merge map that groups the ordinary bins of a numeric attribute into at most `bins` runs of about equal mass and
/// keeps the missing cell (the last one) on its own.
///
/// `noisy` holds one count per fine cell, missing last.
#[must_use]
pub fn merge_adjacent(noisy: &[f64], bins: usize, noise_sd: f64) -> Vec<u16> {
    let Some((_, ordinary)) = noisy.split_last() else { return Vec::new() };
    let threshold = NOISE_FLOOR_SD * noise_sd.max(0.0);
    let mut mass: Vec<f64> = ordinary.iter().map(|c| if *c > threshold { *c } else { 0.0 }).collect();
    if mass.iter().sum::<f64>() <= 0.0 {
        mass.fill(1.0);
    }
    let cuts = if bins < 2 || mass.len() < 2 { Vec::new() } else { cuts(&mass, bins) };
    let group = |cell: usize| u16::try_from(cuts.partition_point(|cut| *cut <= cell)).unwrap_or(u16::MAX);
    let mut merge: Vec<u16> = (0..mass.len()).map(group).collect();
    merge.push(merge.last().map_or(0, |last| last.saturating_add(1)));
    merge
}

/// Merge map that keeps the frequent cells of a categorical attribute and sends the rest to one last cell.
///
/// A cell is kept when its noisy count is at least `min_count` and it is among the `max_cells - 1` largest; kept
/// cells stay in their order. Equal counts are settled by position. When every cell is kept nothing is merged.
#[must_use]
pub fn merge_rare(noisy: &[f64], min_count: f64, max_cells: usize) -> Vec<u16> {
    let mut order: Vec<usize> = (0..noisy.len()).filter(|i| noisy[*i] >= min_count).collect();
    // Indices come from the range of `noisy`; NaN counts never pass the filter above.
    order.sort_by(|a, b| noisy[*b].total_cmp(&noisy[*a]).then(a.cmp(b)));
    if order.len() < noisy.len() || order.len() > max_cells {
        order.truncate(max_cells.saturating_sub(1));
    }
    order.sort_unstable();
    let rest = u16::try_from(order.len()).unwrap_or(u16::MAX);
    (0..noisy.len()).map(|cell| order.binary_search(&cell).map_or(rest, |at| at as u16)).collect()
}

/// Cut positions (a cut at c separates cell c-1 from cell c) that split `mass` into at most `bins ≥ 2` runs of about
/// equal mass; a cell that could fill a run alone becomes one.
fn cuts(mass: &[f64], bins: usize) -> Vec<usize> {
    let heavy = heavy_cells(mass, bins);
    let heavy_mass: f64 = mass.iter().zip(&heavy).filter(|(_, h)| **h).map(|(m, _)| m).sum();
    let left = bins.saturating_sub(heavy.iter().filter(|h| **h).count()).max(1);
    let target = (mass.iter().sum::<f64>() - heavy_mass) / left as f64;

    let mut cuts: Vec<usize> = Vec::new();
    let mut run = 0.0;
    for cell in 0..mass.len() {
        let start_new = heavy[cell] || (cell > 0 && heavy[cell - 1]);
        // Closing before this cell is better once its middle lies beyond the target.
        let full = run > 0.0 && run + mass[cell] / 2.0 > target;
        if cell > 0 && (start_new || full) {
            cuts.push(cell);
            run = 0.0;
        }
        run += mass[cell];
    }
    while cuts.len() >= bins {
        drop_weakest_cut(&mut cuts, mass);
    }
    cuts
}

// Marks cells with at least the mean mass of the runs that are left; each mark raises no other cell's share, so the
// loop ends after at most `bins` marks.
fn heavy_cells(mass: &[f64], bins: usize) -> Vec<bool> {
    let mut heavy = vec![false; mass.len()];
    let (mut rest, mut left) = (mass.iter().sum::<f64>(), bins);
    while left > 1 {
        let target = rest / left as f64;
        let largest = (0..mass.len()).filter(|i| !heavy[*i]).max_by(|a, b| mass[*a].total_cmp(&mass[*b]));
        match largest {
            Some(cell) if mass[cell] >= target && mass[cell] > 0.0 => {
                heavy[cell] = true;
                rest -= mass[cell];
                left -= 1;
            }
            _ => break,
        }
    }
    heavy
}

// Removes the cut whose two neighbouring runs have the least mass together.
fn drop_weakest_cut(cuts: &mut Vec<usize>, mass: &[f64]) {
    let joined = |i: usize| -> f64 {
        let from = i.checked_sub(1).map_or(0, |before| cuts[before]);
        let to = cuts.get(i + 1).copied().unwrap_or(mass.len());
        mass[from..to].iter().sum()
    };
    if let Some(weakest) = (0..cuts.len()).min_by(|a, b| joined(*a).total_cmp(&joined(*b))) {
        cuts.remove(weakest);
    }
}

/// Counts below this many standard deviations of noise are taken as zero when bins are cut.
const NOISE_FLOOR_SD: f64 = 2.0;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fine_edges_are_even_on_their_scale() {
        assert_eq!(fine_edges(0.0, 10.0, false, 5), vec![2.0, 4.0, 6.0, 8.0]);
        let log = fine_edges(0.0, (8f64).exp_m1(), true, 4);
        for (edge, want) in log.iter().zip([2.0, 4.0, 6.0]) {
            assert!((edge.ln_1p() - want).abs() < 1e-12);
        }
        assert!(fine_edges(1.0, 1.0, false, 4).is_empty());
        assert!(fine_edges(-1.0, 1.0, true, 4).is_empty());
        assert!(fine_edges(0.0, f64::INFINITY, false, 4).is_empty());
        assert_eq!(fine_edges(-f64::MAX, f64::MAX, false, 2), vec![0.0]);
        assert!(fine_edges(1.0, 1.0 + f64::EPSILON, false, 64).is_empty(), "no room between the bounds");
    }

    #[test]
    fn even_mass_gives_even_bins() {
        let fine = fine_edges(0.0, 100.0, false, 100);
        let edges = equal_mass_edges(&[50.0; 101], &fine, 10, 1.0);
        assert_eq!(edges, vec![10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0]);
    }

    #[test]
    fn a_spike_keeps_its_own_bin() {
        let fine = fine_edges(0.0, 64.0, false, 64);
        let mut noisy = vec![10.0; 64];
        noisy[0] = 2_000.0;
        noisy[30] = 1_000.0;
        let edges = equal_mass_edges(&noisy, &fine, 8, 1.0);
        for edge in [1.0, 30.0, 31.0] {
            assert!(edges.iter().any(|e| (e - edge).abs() < 1e-9), "{edge} in {edges:?}");
        }
        assert!(edges.len() < 8);
    }

    #[test]
    fn noise_alone_gives_no_edges_of_its_own() {
        let fine = fine_edges(0.0, 64.0, false, 64);
        let mut noisy: Vec<f64> = (0..64).map(|i| if i % 2 == 0 { 19.0 } else { -15.0 }).collect();
        noisy.iter_mut().take(8).for_each(|c| *c = 5_000.0);
        let edges = equal_mass_edges(&noisy, &fine, 8, 10.0);
        assert!(edges.iter().all(|e| *e <= 8.0), "{edges:?}");
        let flat = equal_mass_edges(&[0.0; 64], &fine, 8, 10.0);
        assert_eq!(flat.len(), 7);
    }

    #[test]
    fn rare_levels_go_to_one_last_cell() {
        assert_eq!(merge_rare(&[100.0, 1.0, 50.0, -3.0, 80.0], 5.0, 10), vec![0, 3, 1, 3, 2]);
        assert_eq!(merge_rare(&[100.0, 60.0, 50.0, 70.0], 5.0, 3), vec![0, 2, 2, 1]);
        assert_eq!(merge_rare(&[9.0, 8.0, 7.0], 5.0, 3), vec![0, 1, 2], "nothing rare, nothing merged");
        assert_eq!(merge_rare(&[f64::NAN, 1.0], 5.0, 3), vec![0, 0]);
        assert_eq!(merge_rare(&[], 5.0, 3), Vec::<u16>::new());
    }

    #[test]
    fn coarse_bins_keep_the_missing_cell_apart() {
        assert_eq!(merge_adjacent(&[10.0, 10.0, 10.0, 10.0, 3.0], 2, 0.1), vec![0, 0, 1, 1, 2]);
        assert_eq!(merge_adjacent(&[10.0, 10.0, 10.0, 3.0], 1, 0.1), vec![0, 0, 0, 1]);
        assert_eq!(merge_adjacent(&[], 2, 0.1), Vec::<u16>::new());
    }

    proptest! {
        #[test]
        fn edges_are_usable_whatever_the_counts(
            noisy in prop::collection::vec(prop_oneof![-50.0..50.0f64, 0.0..1e6f64, Just(0.0)], 0..300),
            n in 1usize..256,
            bins in 0usize..20,
            log1p: bool,
        ) {
            let fine = fine_edges(0.0, 1e4, log1p, n);
            let edges = equal_mass_edges(&noisy, &fine, bins, 3.0);
            prop_assert!(edges.len() < bins.max(1));
            prop_assert!(edges.windows(2).all(|w| w[0] < w[1]));
            prop_assert!(edges.iter().all(|e| *e > 0.0 && *e < 1e4));
        }

        #[test]
        fn merges_are_onto_without_gaps(
            noisy in prop::collection::vec(-50.0..500.0f64, 1..80), min in 0.0..100.0f64, cells in 1usize..20,
        ) {
            for merge in [merge_rare(&noisy, min, cells), merge_adjacent(&noisy, cells, 3.0)] {
                prop_assert_eq!(merge.len(), noisy.len());
                let used: std::collections::BTreeSet<u16> = merge.iter().copied().collect();
                prop_assert!(used.iter().enumerate().all(|(i, c)| i == usize::from(*c)), "{:?}", merge);
            }
            prop_assert!(merge_rare(&noisy, min, cells).iter().all(|c| usize::from(*c) < cells));
        }
    }
}
