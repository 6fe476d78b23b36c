//! Corpus rows drawn toward the domain's own distribution: its exact counts with the pooled ones as their prior.
//!
//! For each column and class the shares of cells are the posterior mean of a Dirichlet prior with the corpus' shares and weight κ;
//! κ is the one under which held-out own rows are likeliest. A corpus row weighs the product of its cells' ratios of posterior
//! to prior, flattened until the rows of a class have no fewer than a quarter of their number in effect, so that what the corpus knows of
//! columns together stays. It reads the domain's rows and costs nothing: whatever is drawn stays in the domain.

use tabmesh_contract::batch::{TypedBatch, TypedColumn};

/// At most `most` rows of the corpus at the own label rate, drawn without repetition by their weights; of a domain of one class,
/// or of other columns, the first ones. Both in the shared columns, two classes. Equal rows give equal draws.
#[must_use]
pub fn like_own(corpus: &TypedBatch, own: &TypedBatch, most: usize) -> Vec<usize> {
    let most = most.min(corpus.rows());
    let [of_own, of_corpus] = [own, corpus].map(|rows| [0, 1].map(|class| of_class(rows, class)));
    let labelled: usize = of_own.iter().map(Vec::len).sum();
    if of_own.iter().chain(&of_corpus).any(Vec::is_empty) || corpus.columns.len() != own.columns.len() {
        return (0..most).collect();
    }
    let columns: Vec<Cells> =
        corpus.columns.iter().zip(&own.columns).map(|(corpus, own)| Cells::new(corpus, own)).collect();
    let mut drawn = Vec::with_capacity(most);
    for (own, corpus) in of_own.iter().zip(&of_corpus) {
        let prior: Vec<Vec<f64>> = columns.iter().map(|cells| cells.shares(&cells.corpus, corpus)).collect();
        let kappa = likeliest(&columns, &prior, own);
        let ratios: Vec<Vec<f64>> = columns
            .iter()
            .zip(&prior)
            .map(|(cells, prior)| {
                let posterior = cells.posterior(prior, own, kappa);
                posterior.iter().zip(prior).map(|(posterior, prior)| (posterior / prior).ln()).collect()
            })
            .collect();
        let logs: Vec<f64> = corpus
            .iter()
            .map(|&row| columns.iter().zip(&ratios).map(|(cells, ratio)| ratio[cells.corpus[row]]).sum())
            .collect();
        let wanted = (own.len() * most).div_ceil(labelled).min(corpus.len());
        drawn.extend(systematic(&flattened(&logs), wanted).into_iter().map(|at| corpus[at]));
    }
    drawn.sort_unstable();
    drawn.truncate(most);
    drawn
}

fn of_class(rows: &TypedBatch, class: u16) -> Vec<usize> {
    (0..rows.rows()).filter(|&row| rows.labels[row] == Some(class)).collect()
}

/// A column's cells by row, in corpus and own rows.
struct Cells {
    corpus: Vec<usize>,
    own: Vec<usize>,
    count: usize,
}

impl Cells {
    fn new(corpus: &TypedColumn, own: &TypedColumn) -> Self {
        match (corpus, own) {
            (TypedColumn::Numeric(corpus), TypedColumn::Numeric(own)) => {
                let mut sorted: Vec<f64> = corpus.iter().copied().filter(|value| !value.is_nan()).collect();
                sorted.sort_by(f64::total_cmp);
                let at = |part: usize| sorted.get(part * sorted.len() / NUMBER_CELLS).copied();
                let mut cuts: Vec<f64> = (1..NUMBER_CELLS).filter_map(at).collect();
                cuts.dedup();
                let missing = cuts.len() + 1;
                let code = |value: &f64| match value.is_nan() {
                    true => missing,
                    false => cuts.partition_point(|cut| cut <= value),
                };
                let [corpus, own] = [corpus, own].map(|values| values.iter().map(code).collect());
                Self { corpus, own, count: missing + 1 }
            }
            (TypedColumn::Categorical(corpus), TypedColumn::Categorical(own)) => {
                let count = corpus.iter().chain(own).max().map_or(0, |code| *code as usize) + 1;
                let [corpus, own] =
                    [corpus, own].map(|codes| codes.iter().map(|code| *code as usize).collect());
                Self { corpus, own, count }
            }
            // Of two kinds nothing can be said.
            (corpus, own) => Self { corpus: vec![0; corpus.len()], own: vec![0; own.len()], count: 1 },
        }
    }

    fn counts(&self, codes: &[usize], rows: &[usize]) -> Vec<f64> {
        let mut counts = vec![0.0; self.count];
        rows.iter().for_each(|&row| counts[codes[row]] += 1.0);
        counts
    }

    /// Shares of the cells, none of them 0.
    fn shares(&self, codes: &[usize], rows: &[usize]) -> Vec<f64> {
        let all = rows.len() as f64 + 0.5 * self.count as f64;
        self.counts(codes, rows).into_iter().map(|count| (count + 0.5) / all).collect()
    }

    fn posterior(&self, prior: &[f64], own: &[usize], kappa: f64) -> Vec<f64> {
        let all = own.len() as f64 + kappa;
        let counts = self.counts(&self.own, own);
        counts.iter().zip(prior).map(|(count, prior)| (count + kappa * prior) / all).collect()
    }
}

/// The weight of the prior under which own rows are likeliest, each fifth by the others.
fn likeliest(columns: &[Cells], prior: &[Vec<f64>], own: &[usize]) -> f64 {
    let folds = FOLDS.min(own.len());
    let likelihood = |kappa: f64| -> f64 {
        let mut sum = 0.0;
        for fold in 0..folds {
            let (held, kept): (Vec<_>, Vec<_>) =
                own.iter().enumerate().partition(|(at, _)| at % folds == fold);
            let kept: Vec<usize> = kept.into_iter().map(|(_, row)| *row).collect();
            for (cells, prior) in columns.iter().zip(prior) {
                let posterior = cells.posterior(prior, &kept, kappa);
                sum += held.iter().map(|(_, row)| posterior[cells.own[**row]].ln()).sum::<f64>();
            }
        }
        sum
    };
    let scored = KAPPAS.map(|kappa| (kappa, likelihood(kappa)));
    scored.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).map_or(KAPPAS[0], |(kappa, _)| kappa)
}

/// Weights from their logarithms, with the largest power up to 1 under which they are as good as [`LEAST_EFFECTIVE`] of their number.
fn flattened(logs: &[f64]) -> Vec<f64> {
    let most = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    // Never 0: a row that is next to impossible can still be the last one left to draw.
    let weight = |power: f64, log: &f64| (power * (log - most)).exp().max(f64::MIN_POSITIVE);
    let weights = |power: f64| -> Vec<f64> { logs.iter().map(|log| weight(power, log)).collect() };
    let effective = |weights: &[f64]| {
        let (sum, squares) = weights.iter().fold((0.0, 0.0), |(s, q), w| (s + w, q + w * w));
        sum * sum / squares
    };
    let least = LEAST_EFFECTIVE * logs.len() as f64;
    let (mut low, mut high) = (0.0, 1.0);
    if effective(&weights(1.0)) >= least {
        return weights(1.0);
    }
    for _ in 0..HALVINGS {
        let middle = f64::midpoint(low, high);
        if effective(&weights(middle)) >= least { low = middle } else { high = middle }
    }
    weights(low)
}

/// So many places drawn without repetition, each with a chance proportional to its weight up to certainty (systematic sampling; Madow
/// 1949).
fn systematic(weights: &[f64], wanted: usize) -> Vec<usize> {
    let mut certain = vec![false; weights.len()];
    loop {
        let left = wanted.saturating_sub(certain.iter().filter(|certain| **certain).count()) as f64;
        let open = |(at, weight): (usize, &f64)| if certain[at] { 0.0 } else { *weight };
        let sum: f64 = weights.iter().enumerate().map(open).sum();
        let chance = |at: usize| if certain[at] { 1.0 } else { (left * weights[at] / sum).min(1.0) };
        let full: Vec<usize> =
            (0..weights.len()).filter(|&at| !certain[at] && left * weights[at] >= sum).collect();
        if full.is_empty() || left < 1.0 {
            let mut passed = 0.5;
            return (0..weights.len())
                .filter(|&at| {
                    passed += if left < 1.0 && !certain[at] { 0.0 } else { chance(at) };
                    let taken = passed >= 1.0;
                    passed -= f64::from(u8::from(taken));
                    taken
                })
                .collect();
        }
        full.into_iter().for_each(|at| certain[at] = true);
    }
}

/// Cells of a number column, of equal mass in the corpus; missing values have one more.
const NUMBER_CELLS: usize = 8;
/// Weights of the prior that are tried, in rows.
const KAPPAS: [f64; 6] = [3.0, 10.0, 30.0, 100.0, 300.0, 1_000.0];
/// Parts of own rows for κ.
const FOLDS: usize = 5;
/// Share of a class' rows that their weights must be worth.
const LEAST_EFFECTIVE: f64 = 0.25;
/// Halvings in search of a power.
const HALVINGS: u32 = 30;

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows with a category of share `a` for code 1, and a number around its label; every third row is of class 1.
    fn rows(n: usize, a: f64) -> TypedBatch {
        let code = |row: usize| u32::from((row * 37 % 100) as f64 / 100.0 < a);
        TypedBatch {
            columns: vec![
                TypedColumn::Categorical((0..n).map(code).collect()),
                TypedColumn::Numeric(
                    (0..n).map(|row| (row % 3 == 0) as u8 as f64 + (row % 17) as f64).collect(),
                ),
            ],
            labels: (0..n).map(|row| Some(u16::from(row % 3 == 0))).collect(),
            units: vec![[0; 16]; n],
        }
    }

    fn share(rows: &TypedBatch, chosen: &[usize]) -> f64 {
        let TypedColumn::Categorical(codes) = &rows.columns[0] else { return f64::NAN };
        chosen.iter().filter(|&&row| codes[row] == 1).count() as f64 / chosen.len() as f64
    }

    #[test]
    fn drawn_rows_lie_between_corpus_and_own_and_nearer_with_more_rows() {
        let corpus = rows(3_000, 0.3);
        let drawn = |own: usize| like_own(&corpus, &rows(own, 0.8), 400);
        let (few, many) = (drawn(12), drawn(600));
        for chosen in [&few, &many] {
            assert!(
                chosen.len() == 400 && chosen.windows(2).all(|pair| pair[0] < pair[1]),
                "{}",
                chosen.len()
            );
            let ones = chosen.iter().filter(|&&row| corpus.labels[row] == Some(1)).count();
            assert!(ones.abs_diff(133) <= 1, "{ones}");
        }
        let (few, many) = (share(&corpus, &few), share(&corpus, &many));
        assert!(0.3 < few && few < many && many < 0.85 && many > 0.6, "{few} {many}");
        // A domain like the corpus changes next to nothing.
        let alike = share(&corpus, &like_own(&corpus, &rows(600, 0.3), 400));
        assert!((alike - 0.3).abs() < 0.05, "{alike}");
        assert_eq!(drawn(600), drawn(600));
    }

    #[test]
    fn a_domain_of_one_class_or_of_other_columns_gets_the_first_rows() {
        let corpus = rows(300, 0.3);
        let mut own = rows(30, 0.8);
        own.labels.fill(Some(0));
        assert_eq!(like_own(&corpus, &own, 5), [0, 1, 2, 3, 4]);
        let mut narrow = rows(30, 0.8);
        narrow.columns.pop();
        assert_eq!(like_own(&corpus, &narrow, 2), [0, 1]);
        assert_eq!(like_own(&corpus, &rows(30, 0.8), 1_000).len(), 300, "no more than there are");
    }

    /// However heavy a row, it is drawn once, and the rest by their weights.
    #[test]
    fn draws_are_as_many_as_asked_for_without_repetition() {
        let drawn = systematic(&[1_000.0, 1.0, 1.0, 1.0, 1.0], 3);
        assert!(
            drawn.len() == 3 && drawn[0] == 0 && drawn.windows(2).all(|pair| pair[0] < pair[1]),
            "{drawn:?}"
        );
        assert_eq!(systematic(&[1.0; 4], 4), [0, 1, 2, 3]);
        assert!(systematic(&[1.0; 4], 0).is_empty());
        let skewed: Vec<f64> = (0..100).map(f64::from).collect();
        let weights = flattened(&skewed);
        let (sum, squares) = weights.iter().fold((0.0, 0.0), |(s, q), w| (s + w, q + w * w));
        assert!((sum * sum / squares / 25.0 - 1.0).abs() < 0.01, "{}", sum * sum / squares);
    }
}
