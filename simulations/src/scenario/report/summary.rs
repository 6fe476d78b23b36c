//! Means over domains and seeds, for tables and pictures.

use std::collections::{BTreeMap, BTreeSet};

use super::super::duplicates::{TEST_POSITIVES, TEST_ROWS};
use super::super::results::Row;
use super::super::run::DUPLICATES;

/// Mean over seeds, and its standard error where there are several.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Mean {
    pub(crate) mean: f64,
    pub(crate) error: Option<f64>,
}

/// An arm's method.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Method {
    pub(crate) arm: String,
    pub(crate) method: String,
}

impl Method {
    /// For tables and legends.
    pub(crate) fn shown(&self) -> String {
        match self.arm.as_str() {
            super::super::run::RIVALS => self.method.replace('_', " "),
            _ if self.method == super::super::run::MODEL => self.arm.clone(),
            _ => format!("{}: {}", self.arm, self.method.replace('_', " ")),
        }
    }
}

/// Rows without a round, and where a method has none those of the last round of its arm: what a run came to.
pub(crate) fn last(rows: &[Row]) -> Vec<&Row> {
    let mut latest: BTreeMap<(&str, u64, &str), u32> = BTreeMap::new();
    let mut ended: BTreeSet<(&str, u64, &str, &str)> = BTreeSet::new();
    for row in rows {
        match row.round {
            Some(round) => {
                let at = latest.entry((&row.set, row.seed, &row.arm)).or_default();
                *at = (*at).max(round);
            }
            // Figures over all domains have no round either.
            None if row.domain != "*" => {
                ended.insert((&row.set, row.seed, &row.arm, &row.method));
            }
            None => {}
        }
    }
    let is_last = |row: &&Row| {
        row.round.is_none_or(|round| {
            latest.get(&(&*row.set, row.seed, &*row.arm)) == Some(&round)
                && !ended.contains(&(&*row.set, row.seed, &*row.arm, &*row.method))
        })
    };
    rows.iter().filter(is_last).collect()
}

/// Mean over counted domains, then over sets, for each seed; then over seeds.
pub(crate) fn mean<'a>(rows: impl IntoIterator<Item = &'a Row>, metric: &str) -> Option<Mean> {
    let mut by_seed: BTreeMap<u64, BTreeMap<&str, Vec<f64>>> = BTreeMap::new();
    for row in rows.into_iter().filter(|row| row.metric == metric && row.counted) {
        by_seed.entry(row.seed).or_default().entry(&row.set).or_default().push(row.value);
    }
    let plain = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let seeds: Vec<f64> = by_seed
        .values()
        .map(|sets| plain(&sets.values().map(|values| plain(values)).collect::<Vec<f64>>()))
        .collect();
    if seeds.is_empty() {
        return None;
    }
    let (n, mean) = (seeds.len() as f64, plain(&seeds));
    let error = (seeds.len() > 1)
        .then(|| (seeds.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / (n - 1.0) / n).sqrt());
    Some(Mean { mean, error })
}

/// Every method's means as comma-separated values, a line for each set and one for all of them (`*`): what tables are made of.
///
/// `auc_by_pairs` is the AUC over domains weighted by pairs of a positive and a negative test row (where these were counted); all
/// other figures are plain means over the domains that count.
pub(crate) fn csv(rows: &[Row]) -> String {
    let last = last(rows);
    let figures: Vec<&Row> =
        last.iter().copied().filter(|row| row.domain != "*" && row.arm != DUPLICATES).collect();
    let pairs = pairs(&last);
    let mut keys: BTreeSet<(Option<u32>, &str)> = BTreeSet::new();
    figures.iter().for_each(|row| {
        keys.insert((row.rows, row.metric.as_str()));
    });
    let mut text =
        String::from("arm,method,noise,newcomer_rows,set,metric,mean,standard_error,domains,seeds\n");
    for method in methods(figures.iter().copied()) {
        let own: Vec<&Row> = figures
            .iter()
            .copied()
            .filter(|row| row.arm == method.arm && row.method == method.method)
            .collect();
        let noise = own.first().map_or("", |row| row.noise.shown());
        for (newcomer, metric) in &keys {
            for set in sets(own.iter().copied()).into_iter().chain(["*"]) {
                let of = || {
                    own.iter().copied().filter(|row| {
                        row.rows == *newcomer
                            && row.metric == *metric
                            && row.counted
                            && (set == "*" || row.set == set)
                    })
                };
                let places: BTreeSet<(&str, &str)> =
                    of().map(|row| (row.set.as_str(), row.domain.as_str())).collect();
                let seeds = of().map(|row| row.seed).collect::<BTreeSet<_>>().len();
                let mut line = |metric: &str, mean: f64, error: Option<f64>| {
                    let newcomer = newcomer.map_or_else(String::new, |rows| rows.to_string());
                    let error = error.map_or_else(String::new, |error| format!("{error:.5}"));
                    let (arm, method, domains) = (&method.arm, &method.method, places.len());
                    // Names of members of a blend have commas.
                    text.push_str(&format!(
                        "{arm},{method},{noise},{newcomer},{set},\"{metric}\",{mean:.5},{error},{domains},{seeds}\n"
                    ));
                };
                let Some(found) = mean(of(), metric) else { continue };
                line(metric, found.mean, found.error);
                if *metric == "auc" && newcomer.is_none() {
                    let weighted: Option<Vec<(f64, f64)>> = of()
                        .map(|row| Some((row.value, *pairs.get(&(row.set.as_str(), row.domain.as_str()))?)))
                        .collect();
                    let total: f64 = weighted.iter().flatten().map(|(_, weight)| weight).sum();
                    if let Some(weighted) = weighted.filter(|_| total > 0.0) {
                        let sum: f64 = weighted.iter().map(|(auc, weight)| auc * weight).sum();
                        line("auc_by_pairs", sum / total, None);
                    }
                }
            }
        }
    }
    text
}

/// Pairs of a positive and a negative test row of each domain, where they were counted.
fn pairs<'a>(rows: &[&'a Row]) -> BTreeMap<(&'a str, &'a str), f64> {
    let of = |metric: &str| -> BTreeMap<(&'a str, &'a str), f64> {
        let own = rows.iter().filter(|row| row.arm == DUPLICATES && row.metric == metric);
        own.map(|row| ((row.set.as_str(), row.domain.as_str()), row.value)).collect()
    };
    let positives = of(TEST_POSITIVES);
    of(TEST_ROWS)
        .into_iter()
        .filter_map(|(domain, rows)| {
            let positive = positives.get(&domain)?;
            Some((domain, positive * (rows - positive)))
        })
        .collect()
}

/// Methods in the order in which they appear.
pub(crate) fn methods<'a>(rows: impl IntoIterator<Item = &'a Row>) -> Vec<Method> {
    let mut seen = BTreeSet::new();
    let mut all = Vec::new();
    for row in rows {
        let method = Method { arm: row.arm.clone(), method: row.method.clone() };
        if seen.insert(method.clone()) {
            all.push(method);
        }
    }
    all
}

/// Names of sets, in order.
pub(crate) fn sets<'a>(rows: impl IntoIterator<Item = &'a Row>) -> Vec<&'a str> {
    rows.into_iter().map(|row| row.set.as_str()).collect::<BTreeSet<_>>().into_iter().collect()
}

/// Names of domains, in order, without the sum of all.
pub(crate) fn domains<'a>(rows: impl IntoIterator<Item = &'a Row>) -> Vec<&'a str> {
    let all: BTreeSet<&str> = rows.into_iter().map(|row| row.domain.as_str()).collect();
    all.into_iter().filter(|domain| *domain != "*").collect()
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::float_cmp,
        reason = "tests; exact equality is meant where it stands"
    )]
    use super::*;

    fn row(set: &str, seed: u64, domain: &str, round: Option<u32>, value: f64) -> Row {
        Row {
            set: set.into(),
            seed,
            arm: "f".into(),
            method: "model".into(),
            round,
            domain: domain.into(),
            rows: None,
            counted: domain != "few",
            noise: crate::scenario::results::Noise::None,
            metric: "auc".into(),
            value,
        }
    }

    #[test]
    fn means_are_over_domains_then_sets_then_seeds() {
        let rows = [
            row("a", 0, "d", None, 0.5),
            row("a", 0, "e", None, 0.7),
            row("b", 0, "d", None, 0.8),
            row("b", 0, "few", None, 0.0),
            row("a", 1, "d", None, 0.9),
        ];
        let found = mean(&rows, "auc").unwrap();
        // Seed 0: (0.6 + 0.8) / 2 = 0.7; seed 1: 0.9.
        assert!((found.mean - 0.8).abs() < 1e-12 && (found.error.unwrap() - 0.1).abs() < 1e-12, "{found:?}");
        assert_eq!(mean(&rows, "brier"), None);
        assert_eq!(mean(&rows[4..], "auc").unwrap().error, None);
    }

    #[test]
    fn the_table_has_a_line_for_every_set_and_for_all() {
        let counted = |domain: &str, metric: &str, value| Row {
            arm: DUPLICATES.into(),
            metric: metric.into(),
            ..row("a", 0, domain, None, value)
        };
        let rows = [
            row("a", 0, "d", None, 0.5),
            row("a", 0, "e", None, 0.7),
            // 10 of 20 and 1 of 11: 100 pairs and 10.
            counted("d", TEST_ROWS, 20.0),
            counted("d", TEST_POSITIVES, 10.0),
            counted("e", TEST_ROWS, 11.0),
            counted("e", TEST_POSITIVES, 1.0),
        ];
        let text = csv(&rows);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 5, "{text}");
        assert_eq!(lines[1], "f,model,none,,a,\"auc\",0.60000,,2,1");
        assert_eq!(lines[2], "f,model,none,,a,\"auc_by_pairs\",0.51818,,2,1");
        assert!(lines[3].starts_with("f,model,none,,*,\"auc\",0.60000"), "{text}");
    }

    #[test]
    fn the_last_round_is_each_arms_own() {
        let rows =
            [row("a", 0, "d", Some(1), 0.1), row("a", 0, "d", Some(3), 0.3), row("a", 1, "d", Some(2), 0.2)];
        let kept: Vec<f64> = last(&rows).iter().map(|row| row.value).collect();
        assert_eq!(kept, [0.3, 0.2]);
        // A method that has figures of its end shows its rounds as a curve alone.
        let of = |method: &str, round, value| Row { method: method.into(), ..row("a", 0, "d", round, value) };
        let rows = [of("x", Some(1), 0.1), of("x", Some(2), 0.2), of("x", None, 0.3), of("y", Some(2), 0.4)];
        let kept: Vec<f64> = last(&rows).iter().map(|row| row.value).collect();
        assert_eq!(kept, [0.3, 0.4]);
    }
}
