//! The clip norm that corpus rows ask for: few rows are clipped, and of no class most.
//!
//! Rows of a rare class have the largest gradients. A norm that only the commoner class fits under counts every clipped row as one
//! vote, and so turns the model towards the commoner class; with five in a hundred clipped that happens where a class is
//! as rare as that. Post-processing of the corpus: it costs no privacy.

/// The larger of the percentile [`PERCENTILE`] of all norms and the median of each class that has [`LEAST_OF_CLASS`] rows.
///
/// `labels` are those of the rows with these norms; 0 without rows.
pub(super) fn balanced(norms: &[f64], labels: &[Option<u8>]) -> f64 {
    let mut classes: Vec<u8> = labels.iter().flatten().copied().collect();
    classes.sort_unstable();
    classes.dedup();
    let of_class = |class: u8| -> Vec<f64> {
        let own = norms.iter().zip(labels).filter(|(_, label)| **label == Some(class));
        own.map(|(norm, _)| *norm).collect()
    };
    let medians = classes
        .into_iter()
        .map(of_class)
        .filter(|norms| norms.len() >= LEAST_OF_CLASS)
        .map(|norms| quantile(norms, 0.5));
    medians.fold(quantile(norms.to_vec(), PERCENTILE), f64::max)
}

/// The norm with this share of the others below it; 0 without any.
pub(super) fn quantile(mut norms: Vec<f64>, share: f64) -> f64 {
    norms.sort_by(f64::total_cmp);
    let at = (share.clamp(0.0, 1.0) * norms.len().saturating_sub(1) as f64).round() as usize;
    norms.get(at).copied().unwrap_or(0.0)
}

/// Percentile of all norms.
const PERCENTILE: f64 = 0.95;
/// Rows of a class below which its median says little.
const LEAST_OF_CLASS: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    /// So many rows in a hundred of class 1, with norms from 1 to 2; those of class 0 go up to 0.1.
    fn rows(rare: usize) -> (Vec<f64>, Vec<Option<u8>>) {
        (0..400)
            .map(|row| {
                let part = (row * 37 % 100) as f64 / 100.0;
                let is_rare = row % 100 < rare;
                (if is_rare { 1.0 + part } else { 0.1 * part }, Some(u8::from(is_rare)))
            })
            .unzip()
    }

    fn clipped(norms: &[f64], labels: &[Option<u8>], class: u8, at: f64) -> f64 {
        let of_class = || norms.iter().zip(labels).filter(|(_, label)| **label == Some(class));
        of_class().filter(|(norm, _)| **norm > at).count() as f64 / of_class().count() as f64
    }

    #[test]
    fn of_no_class_more_than_half_is_clipped_however_rare_it_is() {
        for rare in [2, 3, 4, 10, 30, 50] {
            let (norms, labels) = rows(rare);
            let at = balanced(&norms, &labels);
            assert!(clipped(&norms, &labels, 1, at) <= 0.5, "{rare} %: {at}");
            assert!(clipped(&norms, &labels, 0, at) <= 0.05, "{rare} %: {at}");
        }
        // What the percentile alone does: every row of a class of four in a hundred is clipped.
        let (norms, labels) = rows(4);
        let at = quantile(norms.clone(), PERCENTILE);
        assert!(clipped(&norms, &labels, 1, at) >= 1.0, "{at}");
    }

    #[test]
    fn where_no_class_is_rare_it_is_the_percentile() {
        let (norms, labels) = rows(30);
        assert!((balanced(&norms, &labels) - quantile(norms, PERCENTILE)).abs() < 1e-12);
    }

    #[test]
    fn a_handful_of_rows_and_none_decide_nothing() {
        let (mut norms, mut labels) = rows(0);
        norms.extend([50.0; LEAST_OF_CLASS - 1]);
        labels.extend([Some(1); LEAST_OF_CLASS - 1]);
        assert!(balanced(&norms, &labels) < 0.1);
        norms.push(50.0);
        labels.push(Some(1));
        assert!((balanced(&norms, &labels) - 50.0).abs() < 1e-12);
        assert!(balanced(&[], &[]).abs() < f64::EPSILON);
        assert!((balanced(&[1.0, 2.0], &[None, None]) - 2.0).abs() < f64::EPSILON);
    }
}
