//! Figures of one federation: every rival and every step of ours on the test rows, member by member, and a newcomer.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha20Rng;
use serde::Serialize;
use tabmesh_agent::choose::{Blend, choose};
use tabmesh_agent::config::PromotionSection;
use tabmesh_agent::gate::Gate;
use tabmesh_agent::promote::{Candidate, Rows, Tokens, Weights};
use tabmesh_agent::serve::Predictor;
use tabmesh_agent::train::onto;
use tabmesh_contract::batch::{TypedBatch, TypedColumn};
use tabmesh_contract::contract::Contract;
use tabmesh_contract::schema::{Feature, FeatureId, FeatureKind, FeatureSchema};
use tabmesh_tfm::metrics;

use super::contracts::Declared;
use super::federation::{Federated, name};
use super::set::Set;
use crate::quickstart::measure::{alone, loaded, rows};
use crate::score::MIN_CLASS_ROWS;
use crate::{baseline, logistic};

/// Figures by the name of what predicted.
pub(super) type Figures = BTreeMap<&'static str, f64>;

/// One domain under one seed.
#[derive(Debug, Clone, Serialize)]
pub(super) struct DomainLine {
    pub(super) seed: u64,
    pub(super) domain: String,
    pub(super) train_rows: usize,
    pub(super) test_rows: usize,
    /// Whether it has enough test rows of each class for the macro means.
    pub(super) counted: bool,
    pub(super) auc: Figures,
    pub(super) log_loss: Figures,
    /// The labels' logit on the served logit; missing where the test rows have one class.
    pub(super) served_calibration: Option<Calibrated>,
    /// What the agent serves: weights by member.
    pub(super) served: BTreeMap<String, f64>,
}

/// Intercept and slope of a logistic regression of the label on the logit; 0 and 1 are calibrated.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Calibrated {
    pub(super) intercept: f64,
    pub(super) slope: f64,
}

/// A left-out domain under one seed: means over draws of its rows.
#[derive(Debug, Clone, Serialize)]
pub(super) struct NewcomerLine {
    pub(super) seed: u64,
    pub(super) domain: String,
    pub(super) rows: usize,
    pub(super) draws: usize,
    /// Draws in which every figure is defined.
    pub(super) counted_draws: u32,
    /// What is served, by member: weights, averaged over draws.
    pub(super) served: BTreeMap<String, f64>,
    pub(super) auc: Figures,
    pub(super) log_loss: Figures,
}

/// Training and test rows of one domain in the declared terms.
struct Tables {
    train: TypedBatch,
    test: TypedBatch,
    labels: Vec<u8>,
}

impl Tables {
    fn read(set: &Set, declared: &Declared, domain: &str) -> Result<(Self, FeatureSchema)> {
        let text = declared.contract(&name(domain), &set.train(domain));
        let (contract, _) = Contract::parse("contract.yaml", &text)
            .map_err(|error| anyhow::anyhow!("contract of {domain}: {}", error.render()))?;
        let schema = contract.approved_schema().context("schema")?;
        let train = rows(&contract, &set.train(domain), &schema)?;
        let test = rows(&contract, &set.test(domain), &schema)?;
        let labels = test.labels.iter().map(|label| u8::from(*label == Some(1))).collect();
        Ok((Self { train, test, labels }, schema))
    }
}

/// A federation that has ended, to be scored.
pub(super) struct Scoring<'a> {
    pub(super) federated: &'a Federated,
    pub(super) set: &'a Set,
    pub(super) declared: &'a Declared,
    pub(super) members: &'a [String],
    pub(super) seed: u64,
    /// Hears what is being done.
    pub(super) tell: &'a dyn Fn(&str),
}

/// Scores every member.
///
/// # Errors
/// A table or artefact can't be read, or a rival refuses its rows.
pub(super) fn members(scoring: &Scoring<'_>) -> Result<Vec<DomainLine>> {
    let Scoring { federated, set, declared, members, seed, tell } = *scoring;
    let mut all = Vec::new();
    let mut schema = None;
    for member in members {
        let (tables, own) = Tables::read(set, declared, member)?;
        all.push(tables);
        schema = Some(own);
    }
    let schema = schema.context("no member")?;
    let (mut pooled_train, mut pooled_test) = (TypedBatch::empty(&schema), TypedBatch::empty(&schema));
    let (mut train_domains, mut test_domains) = (Vec::new(), Vec::new());
    for (domain, tables) in (0_u32..).zip(&all) {
        pooled_train.append(&tables.train);
        pooled_test.append(&tables.test);
        train_domains.resize(pooled_train.rows(), domain);
        test_domains.resize(pooled_test.rows(), domain);
    }
    tell("scoring pooled rivals");
    let known = with_domain(&schema, members)?;
    let pooled_train = with_codes(&schema, &known, &pooled_train, train_domains)?;
    let pooled_test = with_codes(&schema, &known, &pooled_test, test_domains)?;
    let pooled = [
        ("pooled_trees", baseline::fit_predict(&pooled_train, None, &pooled_test, &known, seed)?),
        ("pooled_logistic", logistic::fit_predict(&pooled_train, &pooled_test, &known, seed)?),
    ];
    let mut first = 0;
    let mut lines = Vec::new();
    for ((member, tables), serving) in members.iter().zip(&all).zip(&federated.serving) {
        tell(&format!("scoring {member}"));
        let Tables { train, test, labels } = tables;
        let ours = loaded(&federated.layout, &federated.pki, &name(member), &schema, [0; 32], true)?;
        let candidate = |weights, rows| -> Result<Vec<f64>> {
            let candidate = Candidate { weights, rows, tokens: Tokens::Off };
            Ok(ones(&alone(&ours, candidate, train)?.predict(test)?))
        };
        let served = ones(&serving.predict(test)?);
        let mut by_name: BTreeMap<&'static str, Vec<f64>> = BTreeMap::from([
            ("local_trees", baseline::fit_predict(train, None, test, &schema, seed)?),
            ("local_logistic", logistic::fit_predict(train, test, &schema, seed)?),
            ("local_trees_corpus", baseline::fit_predict(train, Some(ours.corpus()), test, &schema, seed)?),
            ("base", candidate(Weights::Base, Rows::Local)?),
            ("base_mixed", candidate(Weights::Base, Rows::Mixed)?),
            ("corpus", candidate(Weights::Tuned, Rows::Mixed)?),
        ]);
        for (rival, answers) in &pooled {
            by_name.insert(rival, answers.iter().skip(first).take(test.rows()).copied().collect());
        }
        first += test.rows();
        let positive = labels.iter().filter(|label| **label == 1).count();
        let calibration = metrics::calibration(&served, labels)
            .map(|metrics::Calibration { intercept, slope }| Calibrated { intercept, slope });
        by_name.insert("served", served);
        lines.push(DomainLine {
            seed,
            domain: member.clone(),
            train_rows: train.rows(),
            test_rows: test.rows(),
            counted: positive.min(labels.len() - positive) >= MIN_CLASS_ROWS,
            auc: figures(&by_name, labels, metrics::roc_auc),
            log_loss: figures(&by_name, labels, metrics::log_loss),
            served_calibration: calibration,
            served: weights(&serving.blend().context("a member serves nothing")?),
        });
    }
    Ok(lines)
}

/// Scores a domain that took part in nothing, on draws of its own rows.
///
/// Draws are not stratified; one of a single class is kept, as the product would meet it.
///
/// # Errors
/// A table or artefact can't be read, or trees refuse their rows.
pub(super) fn newcomer(scoring: &Scoring<'_>, newcomer: &str, draws: usize) -> Result<Vec<NewcomerLine>> {
    let Scoring { federated, set, declared, members, seed, tell } = *scoring;
    let (tables, schema) = Tables::read(set, declared, newcomer)?;
    let kept: Vec<usize> = (0..tables.test.rows().min(NEWCOMER_TEST_ROWS)).collect();
    let (test, labels) = (tables.test.take(&kept), &tables.labels[..kept.len()]);
    let member = members.first().context("no member")?;
    let mut lines = Vec::new();
    for size in NEWCOMER_ROWS.into_iter().filter(|size| *size <= tables.train.rows()) {
        let (mut auc, mut log_loss, mut counted) = (Figures::new(), Figures::new(), 0_u32);
        let mut blends: BTreeMap<String, f64> = BTreeMap::new();
        for draw in 0..draws {
            tell(&format!("scoring newcomer {newcomer}, {size} rows, draw {} of {draws}", draw + 1));
            let mut rng = ChaCha20Rng::seed_from_u64(seed << 32 | draw as u64);
            let mut order: Vec<usize> = (0..tables.train.rows()).collect();
            order.shuffle(&mut rng);
            order.truncate(size);
            let own = tables.train.take(&order);
            let mut secret = [0; 32];
            secret[..8].copy_from_slice(&(draw as u64 + 1).to_le_bytes());
            let ours = loaded(&federated.layout, &federated.pki, &name(member), &schema, secret, false)?;
            let split = Gate::new(&secret).split(&own);
            let (training, gate) = (own.take(&split.training), own.take(&split.gate));
            let choice = choose(&ours, &training, &gate, None, PromotionSection::default())?;
            let served = ours.serve(choice.served, choice.calibration, &own)?;
            let base = Candidate { weights: Weights::Base, rows: Rows::Local, tokens: Tokens::Off };
            let by_name = BTreeMap::from([
                ("local_trees", baseline::fit_predict(&own, None, &test, &schema, seed)?),
                ("local_logistic", logistic::fit_predict(&own, &test, &schema, seed)?),
                (
                    "local_trees_corpus",
                    baseline::fit_predict(&own, Some(ours.corpus()), &test, &schema, seed)?,
                ),
                ("base", ones(&alone(&ours, base, &own)?.predict(&test)?)),
                ("served", ones(&served.predict(&test)?)),
            ]);
            let scored = figures(&by_name, labels, metrics::roc_auc);
            if scored.len() < by_name.len() {
                continue;
            }
            counted += 1;
            for (member, weight) in weights(served.blend()) {
                *blends.entry(member).or_default() += weight;
            }
            add(&mut auc, &scored);
            add(&mut log_loss, &figures(&by_name, labels, metrics::log_loss));
        }
        let n = f64::from(counted.max(1));
        let mean =
            |sums: Figures| -> Figures { sums.into_iter().map(|(name, sum)| (name, sum / n)).collect() };
        lines.push(NewcomerLine {
            seed,
            domain: newcomer.to_owned(),
            rows: size,
            draws,
            counted_draws: counted,
            served: blends.into_iter().map(|(member, sum)| (member, sum / n)).collect(),
            auc: mean(auc),
            log_loss: mean(log_loss),
        });
    }
    Ok(lines)
}

/// A schema with the domain as one more category, as a pooled rival would have it.
fn with_domain(schema: &FeatureSchema, members: &[String]) -> Result<FeatureSchema> {
    let kind = FeatureKind::Categorical { levels: members.to_vec() };
    let id = FeatureId::new(DOMAIN_FEATURE)?;
    let domain = Feature { id, kind, unit: None, description: None };
    let features = schema.features().iter().cloned().chain([domain]).collect();
    Ok(FeatureSchema::new(features, schema.target().clone())?)
}

/// Rows in the columns of [`with_domain`]'s schema.
fn with_codes(
    schema: &FeatureSchema,
    known: &FeatureSchema,
    rows: &TypedBatch,
    codes: Vec<u32>,
) -> Result<TypedBatch> {
    let mut all = onto(rows, schema, known);
    let at = known.position(&FeatureId::new(DOMAIN_FEATURE)?).context("the domain is no column")?;
    all.columns[at] = TypedColumn::Categorical(codes);
    Ok(all)
}

/// A blend's weights by member.
fn weights(blend: &Blend) -> BTreeMap<String, f64> {
    blend.shares.iter().map(|share| (share.member.to_string(), share.weight)).collect()
}

fn ones(answers: &[Vec<f32>]) -> Vec<f64> {
    answers.iter().map(|row| row.get(1).copied().map_or(f64::NAN, f64::from)).collect()
}

fn figures(
    by_name: &BTreeMap<&'static str, Vec<f64>>,
    labels: &[u8],
    metric: fn(&[f64], &[u8]) -> Option<f64>,
) -> Figures {
    by_name.iter().filter_map(|(name, answers)| Some((*name, metric(answers, labels)?))).collect()
}

fn add(sums: &mut Figures, figures: &Figures) {
    figures.iter().for_each(|(name, figure)| *sums.entry(name).or_default() += figure);
}

/// The column that tells a pooled rival whose row it is.
const DOMAIN_FEATURE: &str = "bench.domain";
/// Rows a newcomer has.
pub(super) const NEWCOMER_ROWS: [usize; 2] = [64, 256];
/// Test rows of a newcomer that are scored in each draw.
const NEWCOMER_TEST_ROWS: usize = 1000;
