//! The agent's own choice of what to serve: a blend of its trees and of the published model, weighed on the gate rows.
//!
//! Members of the blend are trees on own rows, trees on own and corpus rows, the base on own rows, one variant of the
//! published model, and the forest of the rounds where there is one. Their weights are learnt on gate rows, which no fit and no context has seen, and stay near shipped ones
//! while these rows are few;
//! below a least number of minority units at the gate the shipped weights are served as they are. The whole procedure,
//! choice of the variant included, is judged on held-out folds of the gate rows: what is served now is replaced only if
//! the paired log loss of units falls by at least one standard error. The blend is then calibrated on the same held-out
//! logits. Nothing about the choice leaves the domain: it stands in a local record.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tabmesh_contract::batch::{TypedBatch, UnitKey};
use tabmesh_federation::id::Digest;

use crate::blend;
use crate::calibrate::{Calibration, mean_and_error};
use crate::config::PromotionSection;
use crate::promote::{Candidate, Loaded, Offer, Rows, Tokens, Weights};
use crate::trees::Settings;
use crate::work::WorkError;

/// One model of a blend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Member {
    /// Trees on the domain's own rows.
    Trees,
    /// Trees on own and corpus rows.
    TreesAndCorpus,
    /// The base before the plan with own rows in its context, coded by own rows alone: nothing of a release is in it.
    OwnBase,
    /// The forest that the rounds learnt with every domain of the cohort.
    Forest,
    /// A variant of the published model.
    Model(Candidate),
}

impl std::fmt::Display for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Trees => f.write_str("trees on own rows"),
            Self::TreesAndCorpus => f.write_str("trees on own and corpus rows"),
            Self::OwnBase => f.write_str("base on own rows"),
            Self::Forest => f.write_str("forest of the rounds"),
            Self::Model(candidate) => candidate.fmt(f),
        }
    }
}

/// A member with its weight.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// Which model.
    pub member: Member,
    /// Factor of its logit, in `(0, 1]`; those of a blend sum to 1.
    pub weight: f64,
    /// What its trees are fitted with; found by cross-validation if none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<Settings>,
}

/// What is served: the weighted logit of some models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Blend {
    /// Its members, each of them once.
    pub shares: Vec<Share>,
}

impl Blend {
    /// One model alone.
    #[must_use]
    pub fn of(member: Member) -> Self {
        Self { shares: vec![Share { member, weight: 1.0, settings: None }] }
    }

    /// What is served without evidence for anything else, by the number of own labelled minority rows.
    ///
    /// With `m` of them, trees on own rows get [`MOST_TREES`]` · m² / (m² + `[`HALF_MINORITY`]`²)` and the base on own rows
    /// [`MOST_BASE`]` · m / (m + `[`HALF_BASE`]`)`: it learns from a handful. What they leave goes in two parts to trees that also
    /// see the corpus and in one to the published model, tuned, with own and corpus rows in its context and the adapter
    /// of the rounds where there is one. A forest of the rounds takes [`FOREST`] of everything before it is shared out, and then one of
    /// three equal parts of what is left. Without `local`, the published model alone, or beside the forest in equal parts.
    #[must_use]
    pub fn default_for(minority: usize, offer: Offer, local: bool) -> Self {
        let model = Member::Model(default_variant(offer.adapter));
        if !local {
            let both = [Member::Forest, model];
            let weights = if offer.forest { [0.5, 0.5] } else { [0.0, 1.0] };
            return Self::weighed(&both, &weights, &BTreeMap::new());
        }
        let m = minority as f64;
        let trees = MOST_TREES * m.powi(2) / (m.powi(2) + HALF_MINORITY.powi(2));
        let base = MOST_BASE * m / (m + HALF_BASE);
        let third = (1.0 - trees - base) / 3.0;
        let members = [Member::Trees, Member::TreesAndCorpus, Member::OwnBase, Member::Forest, model];
        let shared = |weight: f64| (1.0 - FOREST) * weight;
        let weights = if offer.forest {
            [shared(trees), shared(third), shared(base), FOREST + shared(third), shared(third)]
        } else {
            [trees, 2.0 * third, base, 0.0, third]
        };
        Self::weighed(&members, &weights, &BTreeMap::new())
    }

    /// The weight of a member, 0 if it has none.
    #[must_use]
    pub fn weight(&self, member: Member) -> f64 {
        self.shares.iter().find(|share| share.member == member).map_or(0.0, |share| share.weight)
    }

    /// What is done to its logits before anything is learnt at the gate: they are drawn away from the logit of the own label
    /// rate, by [`SHARPENING`] times the chance that two draws of a member differ.
    ///
    /// Errors of the members cancel in a mean and the evidence they share doesn't, so that a blend is surer than its
    /// mean logit says. One model alone is left as it is, and so is a domain of one class, whose rate says little.
    #[must_use]
    pub fn sharpened(&self, [zeros, ones]: [usize; 2]) -> Calibration {
        if zeros == 0 || ones == 0 {
            return Calibration::NONE;
        }
        let rate = (ones as f64 / zeros as f64).ln();
        let spread = 1.0 - self.shares.iter().map(|share| share.weight.powi(2)).sum::<f64>();
        let more = SHARPENING * spread.max(0.0);
        Calibration { slope: 1.0 + more, intercept: -more * rate }
    }

    fn weighed(members: &[Member], weights: &[f64], settings: &BTreeMap<Member, Settings>) -> Self {
        let shares = members.iter().zip(blend::without_small(weights)).filter(|(_, weight)| *weight > 0.0);
        let share = |(member, weight): (&Member, f64)| Share {
            member: *member,
            weight,
            settings: settings.get(member).copied(),
        };
        Self { shares: shares.map(share).collect() }
    }

    /// The model's variant in it, if one is.
    fn variant(&self) -> Option<Candidate> {
        self.shares.iter().find_map(|share| match share.member {
            Member::Model(candidate) => Some(candidate),
            _ => None,
        })
    }
}

impl std::fmt::Display for Blend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, Share { member, weight, .. }) in self.shares.iter().enumerate() {
            write!(f, "{}{weight:.2} {member}", if at == 0 { "" } else { " + " })?;
        }
        Ok(())
    }
}

fn default_variant(adapter: bool) -> Candidate {
    let tokens = if adapter { Tokens::On } else { Tokens::Off };
    Candidate { weights: Weights::Tuned, rows: Rows::Mixed, tokens }
}

/// What was served when a choice was made, and what came of it. Stays in the domain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Promotion {
    /// When, UTC milliseconds.
    pub time_ms: i64,
    /// The publication chosen from.
    pub manifest: Digest,
    /// What is served now.
    pub served: Blend,
    /// Slope and intercept on its logits.
    pub calibration: Calibration,
    /// Why, in words.
    pub reason: String,
    /// Rows at the gate.
    pub gate_rows: usize,
    /// Units of the rarer class at the gate.
    pub gate_minority: usize,
    /// How often a gate of this domain was used before: each use wears off some of its worth as evidence.
    pub gate_uses: usize,
    /// Log loss on the gate rows by member, before calibration; empty if there were too few.
    pub log_loss: Vec<(String, f64)>,
}

/// What came of a choice.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// What is to be served.
    pub served: Blend,
    /// How its logits are calibrated.
    pub calibration: Calibration,
    /// Why, in words.
    pub reason: String,
    /// Units of the rarer class at the gate.
    pub gate_minority: usize,
    /// Log loss on the gate rows by member, before calibration; empty if there were too few.
    pub log_loss: Vec<(String, f64)>,
}

/// Chooses what to serve; `champion` is what is served now.
///
/// `training` and `gate` are the domain's rows on either side of the gate.
///
/// # Errors
/// [`WorkError`] if a member can't be fitted or scored.
pub fn choose(
    loaded: &Loaded,
    training: &TypedBatch,
    gate: &TypedBatch,
    champion: Option<&Blend>,
    section: PromotionSection,
) -> Result<Choice, WorkError> {
    let counts = class_counts(&[training, gate]);
    let default = Blend::default_for(counts[0].min(counts[1]), loaded.offer(), section.trees);
    let labelled: Vec<usize> = (0..gate.rows()).filter(|&row| gate.labels[row].is_some()).collect();
    let gate = gate.take(&labelled);
    let gate_minority = rarer_units(&gate);
    if gate_minority < section.least_minority {
        let reason = format!(
            "{gate_minority} minority units at the gate, {} are needed: the shipped weights are served",
            section.least_minority
        );
        let calibration = default.sharpened(counts);
        return Ok(Choice { served: default, calibration, reason, gate_minority, log_loss: Vec::new() });
    }
    let mut settings = BTreeMap::new();
    let mut logits = BTreeMap::new();
    if section.trees {
        for member in [Member::Trees, Member::TreesAndCorpus] {
            let trees = loaded.trees(member == Member::TreesAndCorpus, training, None)?;
            settings.insert(member, trees.settings());
            logits.insert(member, trees.logits(&gate)?);
        }
        logits.insert(Member::OwnBase, loaded.own_base(training)?.logits(&gate)?);
    }
    if let Some(forest) = loaded.forest() {
        logits.insert(Member::Forest, forest.logits(&gate)?);
    }
    for candidate in loaded.candidates() {
        logits.insert(Member::Model(candidate), loaded.build(candidate, training)?.logits(&gate)?);
    }
    let evidence = Evidence::new(logits, &gate, section.folds);
    let log_loss = evidence.logits.iter().map(|(member, z)| (member.to_string(), evidence.mean(z))).collect();
    // What isn't offered any more can't be served on.
    let offered = |blend: &&Blend| blend.shares.iter().all(|s| evidence.logits.contains_key(&s.member));
    let champion = champion.filter(offered).unwrap_or(&default);
    let (served, held_out, reason) = decide(&evidence, &default, champion);
    let served = Blend {
        shares: served
            .shares
            .into_iter()
            .map(|share| Share { settings: settings.get(&share.member).copied(), ..share })
            .collect(),
    };
    let sharpened = served.sharpened(counts);
    let held_out: Vec<f64> = held_out.into_iter().map(|logit| sharpened.apply(logit)).collect();
    let calibration = sharpened.then(Calibration::fit(&held_out, &evidence.labels));
    Ok(Choice { served, calibration, reason, gate_minority, log_loss })
}

/// The members' logits on the labelled gate rows.
struct Evidence {
    logits: BTreeMap<Member, Vec<f64>>,
    labels: Vec<bool>,
    /// Unit of each row, counted from 0.
    units: Vec<usize>,
    /// Fold of each row; rows of a unit are in one.
    folds: Vec<usize>,
    count: usize,
}

impl Evidence {
    fn new(logits: BTreeMap<Member, Vec<f64>>, gate: &TypedBatch, count: usize) -> Self {
        let labels: Vec<bool> = gate.labels.iter().map(|label| *label == Some(1)).collect();
        // Units in the order of class and key, which is a hash, dealt out in turn: folds are stratified and the same
        // whatever the order of rows.
        let mut first: BTreeMap<UnitKey, bool> = BTreeMap::new();
        for (unit, label) in gate.units.iter().zip(&labels) {
            *first.entry(*unit).or_default() |= *label;
        }
        let mut order: Vec<(bool, UnitKey)> = first.into_iter().map(|(unit, label)| (label, unit)).collect();
        order.sort_unstable();
        let rank: BTreeMap<UnitKey, usize> =
            order.into_iter().enumerate().map(|(at, (_, unit))| (unit, at)).collect();
        let units: Vec<usize> =
            gate.units.iter().map(|unit| rank.get(unit).copied().unwrap_or_default()).collect();
        let folds = units.iter().map(|unit| unit % count).collect();
        Self { logits, labels, units, folds, count }
    }

    /// The blend's logit of every row.
    fn blended(&self, blend: &Blend) -> Vec<f64> {
        let mut sum = vec![0.0; self.labels.len()];
        for Share { member, weight, .. } in &blend.shares {
            for (to, from) in sum.iter_mut().zip(self.logits.get(member).into_iter().flatten()) {
                *to += weight * from;
            }
        }
        sum
    }

    fn losses(&self, logits: &[f64]) -> Vec<f64> {
        logits.iter().zip(&self.labels).map(|(logit, label)| blend::row_loss(*logit, *label)).collect()
    }

    fn mean(&self, logits: &[f64]) -> f64 {
        self.losses(logits).iter().sum::<f64>() / self.labels.len().max(1) as f64
    }

    /// Mean gain in log loss a unit over some rows, and its standard error.
    fn gain(&self, from: &[f64], to: &[f64], rows: &[usize]) -> (f64, f64) {
        let (from, to) = (self.losses(from), self.losses(to));
        let mut by_unit: BTreeMap<usize, f64> = BTreeMap::new();
        for &row in rows {
            *by_unit.entry(self.units[row]).or_default() += from[row] - to[row];
        }
        mean_and_error(&by_unit.into_values().collect::<Vec<_>>())
    }

    /// Variant and weights by the evidence of some rows, near the shipped ones.
    fn fitted(&self, rows: &[usize], default: &Blend) -> Blend {
        let mut variant = default.variant();
        let none = Vec::new();
        let of = |candidate: Candidate| self.logits.get(&Member::Model(candidate)).unwrap_or(&none);
        if let Some(held) = variant {
            let loss = |candidate: &Candidate| -> f64 {
                rows.iter().map(|&row| blend::row_loss(of(*candidate)[row], self.labels[row])).sum()
            };
            let all = self.logits.keys().filter_map(|member| match member {
                Member::Model(candidate) => Some(*candidate),
                _ => None,
            });
            let best = all.min_by(|a, b| loss(a).total_cmp(&loss(b)));
            if let Some(best) = best.filter(|best| *best != held) {
                let (gain, error) = self.gain(of(held), of(best), rows);
                if gain > 0.0 && gain >= error {
                    variant = Some(best);
                }
            }
        }
        let members: Vec<Member> = self
            .logits
            .keys()
            .copied()
            .filter(|member| match member {
                Member::Model(candidate) => variant == Some(*candidate),
                _ => true,
            })
            .collect();
        let near: Vec<f64> = members
            .iter()
            .map(|member| match (member, default.variant()) {
                // Another variant takes the shipped one's place.
                (Member::Model(_), Some(shipped)) => default.weight(Member::Model(shipped)),
                _ => default.weight(*member),
            })
            .collect();
        let parts: Vec<Vec<f64>> = members
            .iter()
            .filter_map(|member| self.logits.get(member))
            .map(|logits| rows.iter().map(|&row| logits[row]).collect())
            .collect();
        let parts: Vec<&[f64]> = parts.iter().map(Vec::as_slice).collect();
        let labels: Vec<bool> = rows.iter().map(|&row| self.labels[row]).collect();
        Blend::weighed(&members, &blend::fit(&parts, &labels, &near), &BTreeMap::new())
    }
}

/// What to serve, its logits on rows that its weights haven't seen, and why.
fn decide(evidence: &Evidence, default: &Blend, champion: &Blend) -> (Blend, Vec<f64>, String) {
    let rows: Vec<usize> = (0..evidence.labels.len()).collect();
    let mut held_out = vec![0.0; rows.len()];
    for fold in 0..evidence.count {
        let (held, rest): (Vec<usize>, Vec<usize>) =
            rows.iter().partition(|&&row| evidence.folds[row] == fold);
        let logits = evidence.blended(&evidence.fitted(&rest, default));
        held.into_iter().for_each(|row| held_out[row] = logits[row]);
    }
    let of_champion = evidence.blended(champion);
    let (gain, error) = evidence.gain(&of_champion, &held_out, &rows);
    if gain > 0.0 && gain >= error {
        let fitted = evidence.fitted(&rows, default);
        let reason = format!("weights learnt at the gate are better by {gain:.4} ± {error:.4} in log loss");
        return (fitted, held_out, reason);
    }
    let kept = if champion == default { "the shipped weights are" } else { "what was served is" };
    let reason = format!("{kept} kept: weights learnt at the gate gain {gain:.4} ± {error:.4} in log loss");
    (champion.clone(), of_champion, reason)
}

/// Labelled rows of class 0, and of class 1.
fn class_counts(batches: &[&TypedBatch]) -> [usize; 2] {
    let mut counts = [0; 2];
    for label in batches.iter().flat_map(|batch| &batch.labels).flatten() {
        counts[usize::from(*label == 1)] += 1;
    }
    counts
}

/// Units that have rows of the rarer of two classes.
fn rarer_units(gate: &TypedBatch) -> usize {
    let mut units = [std::collections::BTreeSet::new(), std::collections::BTreeSet::new()];
    for (unit, label) in gate.units.iter().zip(&gate.labels) {
        units[usize::from(*label == Some(1))].insert(*unit);
    }
    units.iter().map(std::collections::BTreeSet::len).min().unwrap_or(0)
}

/// Weight that trees on own rows come near, with many of them.
pub const MOST_TREES: f64 = 0.4;
/// Weight that the base on own rows comes near.
pub const MOST_BASE: f64 = 0.25;
/// Own minority rows at which trees get half of it.
pub const HALF_MINORITY: f64 = 40.0;
/// Own minority rows at which the base gets half of it.
pub const HALF_BASE: f64 = 2.0;

/// Weight of the rounds' forest before the rest is shared out.
pub const FOREST: f64 = 0.2;

/// How much further from the label rate a blend's logit goes, at most: members of equal weight come to a slope of 1.3.
pub const SHARPENING: f64 = 0.45;

#[cfg(test)]
mod tests;
