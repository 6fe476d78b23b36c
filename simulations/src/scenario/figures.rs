//! From answers on test rows to rows of results.

use std::collections::BTreeSet;

use tabmesh_tfm::metrics;

use super::document::Metric;
use super::results::{Noise, Row};
use crate::utility::measure::{self, Answers, counted};

/// Where figures belong: everything of a row but domain, method and figure.
#[derive(Debug, Clone)]
pub(crate) struct Where<'a> {
    pub(crate) set: &'a str,
    pub(crate) seed: u64,
    pub(crate) arm: &'a str,
    pub(crate) round: Option<u32>,
    /// Who adds the noise, where a method has any.
    pub(crate) noise: Noise,
}

impl Where<'_> {
    /// One row; none if the figure isn't defined.
    pub(crate) fn row(
        &self,
        method: &str,
        domain: &str,
        counted: bool,
        metric: &str,
        value: Option<f64>,
    ) -> Option<Row> {
        let value = value.filter(|v| v.is_finite())?;
        Some(Row {
            set: self.set.to_owned(),
            seed: self.seed,
            arm: self.arm.to_owned(),
            method: method.to_owned(),
            round: self.round,
            domain: domain.to_owned(),
            rows: None,
            counted,
            noise: if measure::RIVALS.contains(&method) { Noise::None } else { self.noise },
            metric: metric.to_owned(),
            value,
        })
    }

    /// All figures of one method on one domain.
    pub(crate) fn domain(
        &self,
        wanted: &[Metric],
        method: &str,
        domain: &str,
        answers: &[f64],
        labels: &[u8],
    ) -> Vec<Row> {
        let counts = counted(labels);
        let mut rows = Vec::new();
        let mut add = |metric, value| rows.extend(self.row(method, domain, counts, metric, value));
        for metric in wanted {
            match metric {
                Metric::Auc => add("auc", metrics::roc_auc(answers, labels)),
                Metric::LogLoss => add("log_loss", metrics::log_loss(answers, labels)),
                Metric::Brier => add("brier", metrics::brier(answers, labels)),
                Metric::Calibration => {
                    // Where nearly all answers are beyond what a logit is clamped to, the fit can't leave its start.
                    let calibration = metrics::calibration(answers, labels)
                        .filter(|c| (c.slope - 1.0).abs() + c.intercept.abs() > f64::EPSILON);
                    add("calibration_slope", calibration.map(|c| c.slope));
                    add("calibration_intercept", calibration.map(|c| c.intercept));
                }
                Metric::Reliability => {}
            }
        }
        rows
    }

    /// Figures of every method on every domain, and over all of them.
    pub(crate) fn all(&self, wanted: &[Metric], domains: &[(&str, &Answers, &[u8])]) -> Vec<Row> {
        let mut rows = Vec::new();
        for (domain, answers, labels) in domains {
            for (method, answers) in *answers {
                rows.extend(self.domain(wanted, method, domain, answers, labels));
            }
        }
        let methods: BTreeSet<&str> =
            domains.iter().flat_map(|(_, answers, _)| answers.keys().copied()).collect();
        for method in methods {
            let (mut tenths, mut pool) = (Tenths::default(), Pool::default());
            for (_, answers, labels) in domains {
                if let Some(answers) = answers.get(method) {
                    tenths.add(answers, labels);
                    pool.add(answers, labels);
                }
            }
            rows.extend(pool.rows(self, wanted, method));
            if wanted.contains(&Metric::Reliability) {
                rows.extend(tenths.rows(self, method));
            }
        }
        rows
    }
}

/// Answers of all domains together, for federations of domains too small for figures of their own.
///
/// A macro mean over domains is what is asked for; where no domain counts there is none, and all test rows are scored as if they
/// were one domain's, [`POOLED`]. Between domains such a figure also ranks label rates, so it isn't compared with a macro one.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Pool {
    answers: Vec<f64>,
    labels: Vec<u8>,
    any_counts: bool,
}

impl Pool {
    pub(crate) fn add(&mut self, answers: &[f64], labels: &[u8]) {
        self.any_counts |= counted(labels);
        self.answers.extend_from_slice(answers);
        self.labels.extend_from_slice(labels);
    }

    /// Figures over all, if no domain has its own.
    pub(crate) fn rows(&self, place: &Where<'_>, wanted: &[Metric], method: &str) -> Vec<Row> {
        if self.any_counts || self.labels.is_empty() {
            return Vec::new();
        }
        place.domain(wanted, method, POOLED, &self.answers, &self.labels)
    }
}

/// Stands for all domains together where a row names a domain.
pub(crate) const POOLED: &str = "(pooled)";

/// Predictions by tenth of probability.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Tenths {
    rows: [f64; 10],
    predicted: [f64; 10],
    observed: [f64; 10],
}

impl Tenths {
    pub(crate) fn add(&mut self, answers: &[f64], labels: &[u8]) {
        for (answer, label) in answers.iter().zip(labels).filter(|(answer, _)| !answer.is_nan()) {
            // The cast saturates; 1 belongs to the last tenth.
            let tenth = ((answer * 10.0) as usize).min(9);
            self.rows[tenth] += 1.0;
            self.predicted[tenth] += answer;
            self.observed[tenth] += f64::from(*label);
        }
    }

    pub(crate) fn rows(&self, place: &Where<'_>, method: &str) -> Vec<Row> {
        let mut all = Vec::new();
        for tenth in (0..10).filter(|tenth| self.rows[*tenth] > 0.0) {
            let n = self.rows[tenth];
            for (name, value) in [
                ("rows", n),
                ("predicted", self.predicted[tenth] / n),
                ("observed", self.observed[tenth] / n),
            ] {
                let metric = format!("reliability_{tenth}_{name}");
                all.extend(place.row(method, "*", true, &metric, Some(value)));
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Where<'_> = Where { set: "s", seed: 1, arm: "a", round: None, noise: Noise::Local };

    #[test]
    fn rows_say_who_adds_the_noise() {
        let of = |method: &str| PLACE.row(method, "d", true, "auc", Some(0.5)).map(|row| row.noise);
        assert_eq!((of("served"), of("local_trees")), (Some(Noise::Local), Some(Noise::None)));
    }

    #[test]
    fn undefined_figures_have_no_row_and_small_domains_do_not_count() {
        let rows = PLACE.domain(&[Metric::Auc, Metric::LogLoss], "m", "d", &[0.5, 0.5], &[1, 1]);
        let names: Vec<&str> = rows.iter().map(|row| row.metric.as_str()).collect();
        assert_eq!(names, ["log_loss"]);
        assert!(rows.iter().all(|row| !row.counted));
    }

    #[test]
    fn tenths_hold_means_of_what_fell_into_them() {
        let mut tenths = Tenths::default();
        tenths.add(&[0.05, 0.01, 1.0, f64::NAN], &[1, 0, 1, 0]);
        let rows = tenths.rows(&PLACE, "m");
        let value = |metric: &str| rows.iter().find(|row| row.metric == metric).map(|row| row.value);
        assert_eq!(value("reliability_0_rows"), Some(2.0));
        assert_eq!(value("reliability_0_observed"), Some(0.5));
        assert!((value("reliability_0_predicted").unwrap_or(0.0) - 0.03).abs() < 1e-12);
        assert_eq!(value("reliability_9_observed"), Some(1.0));
        assert_eq!(rows.len(), 6);
    }

    /// Ten thousand domains of one row have no AUC each; together they have one, and where any domain counts there is none.
    #[test]
    fn domains_too_small_for_figures_are_scored_together() {
        let (answers, labels): (Vec<f64>, Vec<u8>) =
            (0..60_u8).map(|i| (f64::from(i) / 60.0, u8::from(i % 3 == 0))).unzip();
        let wanted = [Metric::Auc, Metric::LogLoss];
        let mut small = Pool::default();
        for (answer, label) in answers.iter().zip(&labels) {
            small.add(&[*answer], &[*label]);
        }
        let rows = small.rows(&PLACE, &wanted, "model");
        let of = |metric: &str| rows.iter().find(|row| row.metric == metric).map(|row| row.value);
        assert_eq!(of("auc"), metrics::roc_auc(&answers, &labels));
        assert_eq!(of("log_loss"), metrics::log_loss(&answers, &labels));
        assert!(rows.iter().all(|row| row.counted && row.domain == POOLED));
        small.add(&answers, &labels);
        assert!(small.rows(&PLACE, &wanted, "model").is_empty(), "one domain has figures of its own");
        assert!(Pool::default().rows(&PLACE, &wanted, "model").is_empty());
    }
}
