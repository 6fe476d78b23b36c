//! The table of results: AUC and log loss of each variant on each domain's test rows, and the macro means.
//!
//! Figures come from the model crate's metrics, so that the table and the agents measure alike. The macro mean is
//! plain, over the domains that have at least [`MIN_CLASS_ROWS`] test rows of each class; a variant that lacks a
//! figure in one of them has no macro mean, because means over different domains can't be compared.

use std::collections::BTreeMap;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use tabmesh_tfm::metrics;

/// What made the predictions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Variant {
    /// Trees on the domain's own rows.
    LocalTrees,
    /// Trees on own rows and corpus rows.
    LocalTreesCorpus,
    /// The shipped base model with own rows in context.
    Base,
    /// The model pre-trained on the corpus, own and corpus rows in context, before rounds.
    Corpus,
    /// What the domain's agent serves.
    Served,
}

impl Variant {
    /// All variants in the order of columns.
    pub const ALL: [Self; 5] =
        [Self::LocalTrees, Self::LocalTreesCorpus, Self::Base, Self::Corpus, Self::Served];

    /// Heading for people.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::LocalTrees => "local trees",
            Self::LocalTreesCorpus => "local trees + corpus",
            Self::Base => "base",
            Self::Corpus => "corpus",
            Self::Served => "served",
        }
    }
}

/// One figure for each variant; none = not measured or not defined.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Scores {
    /// Of [`Variant::LocalTrees`].
    pub local_trees: Option<f64>,
    /// Of [`Variant::LocalTreesCorpus`].
    pub local_trees_corpus: Option<f64>,
    /// Of [`Variant::Base`].
    pub base: Option<f64>,
    /// Of [`Variant::Corpus`].
    pub corpus: Option<f64>,
    /// Of [`Variant::Served`].
    pub served: Option<f64>,
}

impl Scores {
    /// The figure of each variant that `figure` gives.
    #[must_use]
    pub fn from_fn(mut figure: impl FnMut(Variant) -> Option<f64>) -> Self {
        Self {
            local_trees: figure(Variant::LocalTrees),
            local_trees_corpus: figure(Variant::LocalTreesCorpus),
            base: figure(Variant::Base),
            corpus: figure(Variant::Corpus),
            served: figure(Variant::Served),
        }
    }

    /// The figure of one variant.
    #[must_use]
    pub fn get(&self, variant: Variant) -> Option<f64> {
        match variant {
            Variant::LocalTrees => self.local_trees,
            Variant::LocalTreesCorpus => self.local_trees_corpus,
            Variant::Base => self.base,
            Variant::Corpus => self.corpus,
            Variant::Served => self.served,
        }
    }

    fn mean(all: &[&Self]) -> Self {
        Self::from_fn(|variant| {
            let figures = all.iter().map(|scores| scores.get(variant)).collect::<Option<Vec<f64>>>()?;
            (!figures.is_empty()).then(|| figures.iter().sum::<f64>() / figures.len() as f64)
        })
    }
}

/// Predictions for one domain's test rows.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Predictions {
    /// The domain.
    pub domain: String,
    /// Rows the domain trained on.
    pub train_rows: usize,
    /// Labels of the test rows, 0 or 1.
    pub labels: Vec<u8>,
    /// Probability of class 1 for each test row, by variant.
    pub by_variant: BTreeMap<Variant, Vec<f64>>,
}

/// Figures of one domain.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DomainScores {
    /// The domain.
    pub domain: String,
    /// Rows the domain trained on.
    pub train_rows: usize,
    /// Area under the ROC curve.
    pub auc: Scores,
    /// Mean negative log-likelihood, in nats.
    pub log_loss: Scores,
    #[serde(skip)]
    counted: bool,
}

/// Means over domains.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct MacroScores {
    /// Area under the ROC curve.
    pub auc: Scores,
    /// Mean negative log-likelihood, in nats.
    pub log_loss: Scores,
}

/// The table of results.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ScoreTable {
    /// One entry a domain, in the order given.
    pub domains: Vec<DomainScores>,
    /// Plain means over the domains that count.
    #[serde(rename = "macro")]
    pub macro_mean: MacroScores,
}

impl ScoreTable {
    /// Measures predictions.
    #[must_use]
    pub fn measure(predictions: &[Predictions]) -> Self {
        let domains: Vec<DomainScores> = predictions.iter().map(DomainScores::measure).collect();
        let counted: Vec<&DomainScores> = domains.iter().filter(|d| d.counted).collect();
        let macro_mean = MacroScores {
            auc: Scores::mean(&counted.iter().map(|d| &d.auc).collect::<Vec<_>>()),
            log_loss: Scores::mean(&counted.iter().map(|d| &d.log_loss).collect::<Vec<_>>()),
        };
        Self { domains, macro_mean }
    }

    /// The table as text: one block for AUC, one for log loss, three decimals.
    #[must_use]
    pub fn render(&self) -> String {
        let block = |heading: &str, of_domain: fn(&DomainScores) -> &Scores, mean: &Scores| {
            let mut table = Table::new();
            table.load_style(presets::ASCII_MARKDOWN);
            let titles = Variant::ALL.map(Variant::title);
            table.set_header([heading, "train rows"].into_iter().chain(titles));
            for domain in &self.domains {
                let mark = if domain.counted { "" } else { " *" };
                let name = format!("{}{mark}", domain.domain);
                table.add_row(row(name, domain.train_rows.to_string(), of_domain(domain)));
            }
            table.add_row(row("macro mean".to_owned(), String::new(), mean));
            for column in table.column_iter_mut().skip(1) {
                column.set_cell_alignment(CellAlignment::Right);
            }
            table.to_string()
        };
        let mut text = block("AUC (higher is better)", |d| &d.auc, &self.macro_mean.auc);
        text.push_str("\n\n");
        text.push_str(&block("log loss (lower is better)", |d| &d.log_loss, &self.macro_mean.log_loss));
        if self.domains.iter().any(|d| !d.counted) {
            text.push_str(&format!(
                "\n* fewer than {MIN_CLASS_ROWS} test rows of a class: not in the macro mean"
            ));
        }
        text
    }
}

impl DomainScores {
    fn measure(predictions: &Predictions) -> Self {
        let Predictions { domain, train_rows, labels, by_variant } = predictions;
        let of = |variant| by_variant.get(&variant);
        let positive = labels.iter().filter(|&&label| label == 1).count();
        Self {
            domain: domain.clone(),
            train_rows: *train_rows,
            auc: Scores::from_fn(|variant| metrics::roc_auc(of(variant)?, labels)),
            log_loss: Scores::from_fn(|variant| metrics::log_loss(of(variant)?, labels)),
            counted: positive >= MIN_CLASS_ROWS && labels.len() - positive >= MIN_CLASS_ROWS,
        }
    }
}

fn row(name: String, train_rows: String, scores: &Scores) -> Vec<String> {
    let figures =
        Variant::ALL.map(|variant| scores.get(variant).map_or_else(|| "–".to_owned(), |f| format!("{f:.3}")));
    [name, train_rows].into_iter().chain(figures).collect()
}

/// Test rows of each class a domain needs to count in the macro mean.
pub const MIN_CLASS_ROWS: usize = 10;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    /// 20 rows; `right` of the 10 positive ones are ranked above all others, the rest below.
    fn predictions(domain: &str, right: usize) -> Predictions {
        let labels: Vec<u8> = (0..20).map(|i| u8::from(i < 10)).collect();
        let scores: Vec<f64> = (0..20)
            .map(|i| {
                if i < right {
                    0.9
                } else if i < 10 {
                    0.1
                } else {
                    0.5
                }
            })
            .collect();
        let by_variant = Variant::ALL.map(|variant| (variant, scores.clone())).into();
        Predictions { domain: domain.into(), train_rows: 64, labels, by_variant }
    }

    #[test]
    fn macro_means_are_plain_means_over_domains() {
        let table = ScoreTable::measure(&[predictions("a", 10), predictions("b", 5)]);
        assert_eq!(table.domains[0].auc.served, Some(1.0));
        assert_eq!(table.domains[1].auc.served, Some(0.5));
        assert_eq!(table.macro_mean.auc.base, Some(0.75));
        // -ln .9 for the positive, -ln .5 for the negative half.
        let expected = (0.105_360_515_657_826_3 + std::f64::consts::LN_2) / 2.0;
        assert!((table.domains[0].log_loss.corpus.unwrap() - expected).abs() < 1e-12);
    }

    #[test]
    fn a_variant_without_predictions_has_no_figure_and_no_mean() {
        let mut second = predictions("b", 5);
        second.by_variant.remove(&Variant::Served);
        let table = ScoreTable::measure(&[predictions("a", 10), second]);
        assert_eq!(table.domains[1].auc.served, None);
        assert_eq!(table.macro_mean.auc.served, None);
        assert_eq!(table.macro_mean.auc.local_trees, Some(0.75));
    }

    #[test]
    fn domains_with_few_rows_of_a_class_are_shown_but_not_counted() {
        let mut few = predictions("few", 10);
        few.labels[9] = 0;
        let table = ScoreTable::measure(&[predictions("a", 5), few]);
        assert!(table.domains[1].auc.served.is_some());
        assert_eq!(table.macro_mean.auc.served, Some(0.5));
        let text = table.render();
        assert!(text.contains("few *") && text.contains("not in the macro mean"), "{text}");
        assert_eq!(ScoreTable::measure(&[]).macro_mean, MacroScores::default());
    }

    #[test]
    fn json_has_the_documented_shape() {
        let json = serde_json::to_value(ScoreTable::measure(&[predictions("a", 10)])).unwrap();
        let keys = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&json), ["domains", "macro"]);
        assert_eq!(keys(&json["domains"][0]), ["auc", "domain", "log_loss", "train_rows"]);
        let variants = ["base", "corpus", "local_trees", "local_trees_corpus", "served"];
        assert_eq!(keys(&json["domains"][0]["auc"]), variants);
        assert_eq!(keys(&json["macro"]["log_loss"]), variants);
    }

    #[test]
    fn text_shows_every_domain_variant_and_figure() {
        let text = ScoreTable::measure(&[predictions("retail", 5)]).render();
        for part in
            ["AUC", "log loss", "retail", "64", "0.500", "macro mean", "local trees + corpus", "served"]
        {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
