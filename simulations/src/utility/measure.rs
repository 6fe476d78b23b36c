//! Figures of one federation: every rival and every step of ours on the test rows, member by member, and a newcomer.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha20Rng;
use serde::Serialize;
use tabmesh_agent::calibrate::Calibration;
use tabmesh_agent::choose::{Blend, Member as BlendMember, Promotion, choose};
use tabmesh_agent::config::PromotionSection;
use tabmesh_agent::gate::Gate;
use tabmesh_agent::promote::{Candidate, Loaded, Rows, SharedForest, Tokens, Weights};
use tabmesh_agent::serve::Predictor;
use tabmesh_agent::train::onto;
use tabmesh_contract::batch::{TypedBatch, TypedColumn};
use tabmesh_contract::schema::{Feature, FeatureId, FeatureKind, FeatureSchema};
use tabmesh_tfm::metrics;
use tabmesh_tfm::model::Model;

use super::federation::Federated;
use super::member::{Member, Tables};
use crate::bench::tables::in_context;
use crate::quickstart::deployed::BASE_MODEL;
use crate::quickstart::deployment::Layout;
use crate::quickstart::measure::{alone, loaded};
use crate::scenario::document::Also;
use crate::score::MIN_CLASS_ROWS;
use crate::{baseline, logistic};

/// Figures by the name of what predicted.
pub(crate) type Figures = BTreeMap<&'static str, f64>;

/// One domain under one seed.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct DomainLine {
    pub(crate) seed: u64,
    pub(crate) domain: String,
    pub(crate) train_rows: usize,
    pub(crate) test_rows: usize,
    /// Whether it has enough test rows of each class for the macro means.
    pub(crate) counted: bool,
    pub(crate) auc: Figures,
    pub(crate) log_loss: Figures,
    /// The labels' logit on the served logit; missing where the test rows have one class.
    pub(crate) served_calibration: Option<Calibrated>,
    /// What the agent serves: weights by member.
    pub(crate) served: BTreeMap<String, f64>,
}

/// Intercept and slope of a logistic regression of the label on the logit; 0 and 1 are calibrated.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Calibrated {
    pub(crate) intercept: f64,
    pub(crate) slope: f64,
}

/// A left-out domain under one seed: means over draws of its rows.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct NewcomerLine {
    pub(crate) seed: u64,
    pub(crate) domain: String,
    pub(crate) rows: usize,
    pub(crate) draws: usize,
    /// Draws in which every figure is defined.
    pub(crate) counted_draws: u32,
    /// What is served, by member: weights, averaged over draws.
    pub(crate) served: BTreeMap<String, f64>,
    pub(crate) auc: Figures,
    pub(crate) log_loss: Figures,
    /// What each method said about the test rows in each counted draw.
    #[serde(skip)]
    pub(crate) answers: Vec<Answers>,
    /// Of the test rows.
    #[serde(skip)]
    pub(crate) test: TypedBatch,
}

/// What each method said about one domain's test rows: probabilities of class 1.
pub(crate) type Answers = BTreeMap<&'static str, Vec<f64>>;

/// A federation that has ended, to be scored.
pub(crate) struct Scoring<'a> {
    pub(crate) federated: &'a Federated,
    pub(crate) members: &'a [Member],
    pub(crate) seed: u64,
    /// Rounds of the plan.
    pub(crate) rounds: u32,
    /// What is scored beside the steps.
    pub(crate) also: &'a [Also],
    /// Hears what is being done.
    pub(crate) tell: &'a dyn Fn(&str),
}

/// Scores every member.
///
/// # Errors
/// A table or artefact can't be read, or a rival refuses its rows.
pub(super) fn members(scoring: &Scoring<'_>) -> Result<Vec<DomainLine>> {
    let Scoring { members, seed, tell, .. } = *scoring;
    let tables = members.iter().map(Member::tables).collect::<Result<Vec<_>>>()?;
    let rivals = rivals(members, &tables, &RIVALS, seed, tell)?;
    let ours = ours(scoring, &tables)?;
    let mut lines = Vec::new();
    for (((member, tables), rivals), Ours { answers, blend, .. }) in
        members.iter().zip(&tables).zip(rivals).zip(ours)
    {
        let labels = &tables.labels;
        let by_name: Answers = rivals.into_iter().chain(answers).collect();
        let served = by_name.get("served").context("a member serves nothing")?;
        let calibration = metrics::calibration(served, labels)
            .map(|metrics::Calibration { intercept, slope }| Calibrated { intercept, slope });
        lines.push(DomainLine {
            seed,
            domain: member.domain.clone(),
            train_rows: tables.train.rows(),
            test_rows: tables.test.rows(),
            counted: counted(labels),
            auc: figures(&by_name, labels, metrics::roc_auc),
            log_loss: figures(&by_name, labels, metrics::log_loss),
            served_calibration: calibration,
            served: blend,
        });
    }
    Ok(lines)
}

/// Whether test rows have enough of each class to count in means.
pub(crate) fn counted(labels: &[u8]) -> bool {
    let positive = labels.iter().filter(|label| **label == 1).count();
    positive.min(labels.len() - positive) >= MIN_CLASS_ROWS
}

/// Methods that use no federation, member by member.
///
/// # Errors
/// A rival refuses its rows.
pub(crate) fn rivals(
    members: &[Member],
    tables: &[Tables],
    wanted: &[&'static str],
    seed: u64,
    tell: &dyn Fn(&str),
) -> Result<Vec<Answers>> {
    let has = |name: &str| wanted.contains(&name);
    let mut all: Vec<Answers> = Vec::new();
    for (member, Tables { schema, train, test, .. }) in members.iter().zip(tables) {
        tell(&format!("local rivals of {}", member.domain));
        let mut answers = Answers::new();
        if has("local_trees") {
            answers.insert("local_trees", baseline::fit_predict(train, None, test, schema, seed)?);
        }
        if has("local_logistic") {
            answers.insert("local_logistic", logistic::fit_predict(train, test, schema, seed)?);
        }
        if has("local_base") {
            answers.insert("local_base", by_base(train, test, schema, seed)?);
        }
        all.push(answers);
    }
    if !wanted.iter().any(|name| name.starts_with("pooled_")) {
        return Ok(all);
    }
    tell("pooled rivals");
    let schema = union(tables)?;
    let (mut pooled_train, mut pooled_test) = (TypedBatch::empty(&schema), TypedBatch::empty(&schema));
    let (mut train_domains, mut test_domains) = (Vec::new(), Vec::new());
    for (domain, tables) in (0_u32..).zip(tables) {
        pooled_train.append(&onto(&tables.train, &tables.schema, &schema));
        pooled_test.append(&onto(&tables.test, &tables.schema, &schema));
        train_domains.resize(pooled_train.rows(), domain);
        test_domains.resize(pooled_test.rows(), domain);
    }
    let known = with_domain(&schema, members)?;
    let pooled_train = with_codes(&schema, &known, &pooled_train, train_domains)?;
    let pooled_test = with_codes(&schema, &known, &pooled_test, test_domains)?;
    let mut pooled: Vec<(&'static str, Vec<f64>)> = Vec::new();
    if has("pooled_trees") {
        pooled
            .push(("pooled_trees", baseline::fit_predict(&pooled_train, None, &pooled_test, &known, seed)?));
    }
    if has("pooled_logistic") {
        pooled.push(("pooled_logistic", logistic::fit_predict(&pooled_train, &pooled_test, &known, seed)?));
    }
    if has("pooled_base") {
        pooled.push(("pooled_base", by_base(&pooled_train, &pooled_test, &known, seed)?));
    }
    let mut first = 0;
    for (answers, tables) in all.iter_mut().zip(tables) {
        let rows = tables.test.rows();
        for (name, predicted) in &pooled {
            answers.insert(*name, predicted.iter().skip(first).take(rows).copied().collect());
        }
        first += rows;
    }
    Ok(all)
}

/// What one member's agent can do after a federation, step by step, and what it chose.
pub(crate) struct Ours {
    /// Its number among the members.
    pub(crate) member: usize,
    pub(crate) answers: Answers,
    /// What the forest of the rounds said after some of them.
    pub(crate) by_round: Vec<(u32, Vec<f64>)>,
    /// Weights of what is served, by member of the blend.
    pub(crate) blend: BTreeMap<String, f64>,
}

/// Every step of the product's own flow, for every member whose agent is there at the end.
///
/// # Errors
/// An artefact can't be read, or a model refuses.
pub(crate) fn ours(scoring: &Scoring<'_>, tables: &[Tables]) -> Result<Vec<Ours>> {
    let Scoring { federated, members, seed, tell, .. } = *scoring;
    let mut all = Vec::new();
    let mut by_corpus = None;
    for (at, ((member, own), end)) in members.iter().zip(tables).zip(&federated.ends).enumerate() {
        let Some(serving) = &end.serving else { continue };
        tell(&format!("scoring {}", member.domain));
        let Tables { schema, train, test, .. } = own;
        let published = || serving.published()?.context("nothing was published");
        let (ours, context) = (published()?, serving.rows()?);
        if by_corpus.is_none() {
            by_corpus = Some(by_corpus_alone(&ours, tables, seed)?);
        }
        let alone_as =
            |candidate| -> Result<Vec<f64>> { Ok(ones(&alone(&ours, candidate, &context)?.predict(test)?)) };
        let as_is = |weights, rows, tokens| alone_as(Candidate { weights, rows, tokens });
        let corpus = ours.in_own_columns(ours.corpus());
        let mut answers = BTreeMap::from([
            ("local_trees_corpus", baseline::fit_predict(train, Some(&corpus), test, schema, seed)?),
            ("base", as_is(Weights::Base, Rows::Local, Tokens::Off)?),
            ("base_mixed", as_is(Weights::Base, Rows::Mixed, Tokens::Off)?),
            ("corpus", as_is(Weights::Tuned, Rows::Mixed, Tokens::Off)?),
            ("served", ones(&serving.predict(test)?)),
        ]);
        if let Some(of_all) = by_corpus.as_ref().and_then(|all| all.get(at)) {
            answers.insert("corpus_logistic", of_all.clone());
        }
        let mut by_round = Vec::new();
        if let Some(forest) = ours.forest() {
            let said = |forest: &SharedForest| -> Result<Vec<f64>> {
                Ok(forest.logits(test)?.into_iter().map(probability).collect())
            };
            for round in shown_rounds(scoring.rounds) {
                let trees = forest.trees() * round as usize / scoring.rounds as usize;
                by_round.push((round, said(&forest.after(trees))?));
            }
            let forest = said(&forest)?;
            // The rounds' step by itself, before any choice: the tuned model beside the forest, as a domain without a word of its own
            // is served.
            if let Some(model) = answers.get("corpus") {
                let half =
                    |(model, forest): (&f64, &f64)| probability((logit(*model) + logit(*forest)) / 2.0);
                let both = model.iter().zip(&forest).map(half).collect();
                answers.insert("rounds", both);
            }
            answers.insert("forest", forest);
        }
        if ours.has_adapter() {
            answers.insert("rounds", as_is(Weights::Tuned, Rows::Mixed, Tokens::On)?);
        }
        for also in scoring.also {
            let also_answers = match also {
                Also::CorpusPosterior => {
                    let tuned = Candidate { weights: Weights::Tuned, rows: Rows::Mixed, tokens: Tokens::Off };
                    let drawn = ours.build_by_posterior(tuned, &context)?;
                    drawn.logits(test)?.into_iter().map(probability).collect()
                }
                Also::CorpusLocal => as_is(Weights::Tuned, Rows::Local, Tokens::Off)?,
                Also::OwnLabelKept => {
                    let kept = published()?.own_labels_kept();
                    let candidate =
                        Candidate { weights: Weights::Base, rows: Rows::Mixed, tokens: Tokens::Off };
                    ones(&alone(&kept, candidate, &context)?.predict(test)?)
                }
                Also::RoundsUntuned if ours.has_adapter() => as_is(Weights::Base, Rows::Mixed, Tokens::On)?,
                Also::RoundsUntuned => continue,
                Also::Picked => {
                    let picked = picked(&federated.layout, member, &ours, train)?;
                    ones(&ours.serve(Blend::of(picked), Calibration::NONE, &context)?.predict(test)?)
                }
                Also::ShippedBlend => {
                    let counts = class_counts(train);
                    let shipped = Blend::default_for(counts[0].min(counts[1]), ours.offer(), true);
                    let sharpened = shipped.sharpened(counts);
                    ones(&ours.serve(shipped, sharpened, &context)?.predict(test)?)
                }
            };
            answers.insert(also.name(), also_answers);
        }
        let blend = weights(&serving.blend().context("a member serves nothing")?);
        all.push(Ours { member: at, answers, by_round, blend });
    }
    Ok(all)
}

/// Rounds after which a forest is shown: each twice the one before, and the last.
fn shown_rounds(rounds: u32) -> Vec<u32> {
    let mut shown: Vec<u32> = std::iter::successors(Some(1_u32), |round| round.checked_mul(2))
        .take_while(|at| *at < rounds)
        .collect();
    shown.extend((rounds > 0).then_some(rounds));
    shown
}

/// Logistic regression on corpus rows alone, for the test rows of each member: it reads the release and nothing else.
fn by_corpus_alone(ours: &Loaded, tables: &[Tables], seed: u64) -> Result<Vec<Vec<f64>>> {
    let shared = ours.schema();
    let mut test = TypedBatch::empty(shared);
    tables.iter().for_each(|tables| test.append(&onto(&tables.test, &tables.schema, shared)));
    let shown: Vec<usize> = (0..ours.corpus().rows().min(MOST_CORPUS_ROWS)).collect();
    let all = logistic::fit_predict(&ours.corpus().take(&shown), &test, shared, seed)?;
    let mut rest = all.as_slice();
    let mut parts = Vec::with_capacity(tables.len());
    for tables in tables {
        let (own, more) = rest.split_at_checked(tables.test.rows()).context("too few answers")?;
        parts.push(own.to_vec());
        rest = more;
    }
    Ok(parts)
}

/// The member of the blend that was best at the gate; the one with the largest shipped weight where the gate had too few rows.
fn picked(layout: &Layout, member: &Member, ours: &Loaded, train: &TypedBatch) -> Result<BlendMember> {
    let path = layout.domain(&member.name()).join("data").join(PROMOTIONS);
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let last = text.lines().next_back().context("no promotion")?;
    let promotion: Promotion = serde_json::from_str(last).context("a promotion")?;
    let best = promotion.log_loss.iter().min_by(|a, b| a.1.total_cmp(&b.1)).map(|(name, _)| name);
    let models = Candidate::all(ours.has_adapter()).into_iter().map(BlendMember::Model);
    let named = [BlendMember::Trees, BlendMember::TreesAndCorpus, BlendMember::OwnBase, BlendMember::Forest]
        .into_iter()
        .chain(models)
        .find(|known| best == Some(&known.to_string()));
    if let Some(named) = named {
        return Ok(named);
    }
    let counts = class_counts(train);
    let shipped = Blend::default_for(counts[0].min(counts[1]), ours.offer(), true);
    let largest = shipped.shares.iter().max_by(|a, b| a.weight.total_cmp(&b.weight));
    Ok(largest.context("an empty blend")?.member)
}

fn class_counts(rows: &TypedBatch) -> [usize; 2] {
    let mut counts = [0; 2];
    rows.labels.iter().flatten().for_each(|label| counts[usize::from(*label == 1)] += 1);
    counts
}

/// All features that any member has.
///
/// # Errors
/// No member, or members that disagree.
pub(crate) fn union(tables: &[Tables]) -> Result<FeatureSchema> {
    let first = tables.first().context("no member")?;
    let mut features: BTreeMap<FeatureId, Feature> = BTreeMap::new();
    for feature in tables.iter().flat_map(|tables| tables.schema.features()) {
        features.entry(feature.id.clone()).or_insert_with(|| feature.clone());
    }
    Ok(FeatureSchema::new(features.into_values().collect(), first.schema.target().clone())?)
}

/// The shipped base model with rows in its context, coded by them alone.
fn by_base(train: &TypedBatch, test: &TypedBatch, schema: &FeatureSchema, seed: u64) -> Result<Vec<f64>> {
    let (model, _) = Model::from_safetensors(BASE_MODEL)?;
    let mut order: Vec<usize> = (0..train.rows()).filter(|row| train.labels[*row].is_some()).collect();
    order.shuffle(&mut ChaCha20Rng::seed_from_u64(seed));
    in_context(&model, schema, &train.take(&order), test, MOST_CONTEXT_ROWS)
}

/// Scores a domain that took part in nothing, on draws of its own rows.
///
/// Draws are not stratified; one of a single class is kept, as the product would meet it.
///
/// # Errors
/// A table or artefact can't be read, or trees refuse their rows.
pub(crate) fn newcomer(
    scoring: &Scoring<'_>,
    newcomer: &Member,
    sizes: &[usize],
    draws: usize,
) -> Result<Vec<NewcomerLine>> {
    let Scoring { federated, members, seed, tell, .. } = *scoring;
    let tables = newcomer.tables()?;
    let newcomer = &newcomer.domain;
    let kept: Vec<usize> = (0..tables.test.rows().min(NEWCOMER_TEST_ROWS)).collect();
    let schema = &tables.schema;
    let test = tables.test.take(&kept);
    let labels = &tables.labels[..kept.len()];
    let there = members.iter().zip(&federated.ends).find(|(_, end)| end.serving.is_some());
    let (member, _) = there.context("no member is there")?;
    let mut by_corpus: Option<Vec<f64>> = None;
    let mut lines = Vec::new();
    for size in sizes.iter().copied().filter(|size| *size <= tables.train.rows()) {
        let (mut auc, mut log_loss, mut counted) = (Figures::new(), Figures::new(), 0_u32);
        let mut blends: BTreeMap<String, f64> = BTreeMap::new();
        let mut answers = Vec::new();
        for draw in 0..draws {
            tell(&format!("scoring newcomer {newcomer}, {size} rows, draw {} of {draws}", draw + 1));
            let mut rng = ChaCha20Rng::seed_from_u64(seed << 32 | draw as u64);
            let mut order: Vec<usize> = (0..tables.train.rows()).collect();
            order.shuffle(&mut rng);
            order.truncate(size);
            let own = tables.train.take(&order);
            let mut secret = [0; 32];
            secret[..8].copy_from_slice(&(draw as u64 + 1).to_le_bytes());
            let ours = loaded(&federated.layout, &federated.pki, &member.name(), schema, secret)?;
            let split = Gate::new(&secret).split(&own);
            let (training, gate) = (own.take(&split.training), own.take(&split.gate));
            let mut choice = choose(&ours, &training, &gate, None, PromotionSection::default())?;
            // The rivals are the agent's own trees: what cross-validation finds for them needn't be looked for twice.
            let (own_trees, corpus_trees) = (ours.trees(false, &own, None)?, ours.trees(true, &own, None)?);
            for share in &mut choice.served.shares {
                let settings = match share.member {
                    BlendMember::Trees => Some(own_trees.settings()),
                    BlendMember::TreesAndCorpus => Some(corpus_trees.settings()),
                    BlendMember::OwnBase | BlendMember::Forest | BlendMember::Model(_) => None,
                };
                share.settings = share.settings.or(settings);
            }
            let served = ours.serve(choice.served, choice.calibration, &own)?;
            let base = Candidate { weights: Weights::Base, rows: Rows::Local, tokens: Tokens::Off };
            if by_corpus.is_none() {
                let of_all = by_corpus_alone(&ours, std::slice::from_ref(&tables), seed)?;
                by_corpus = of_all.into_iter().next().map(|all| all[..kept.len()].to_vec());
            }
            let mut by_name = BTreeMap::from([
                ("local_trees", own_trees.probabilities(&test)?),
                ("local_logistic", logistic::fit_predict(&own, &test, schema, seed)?),
                ("local_trees_corpus", corpus_trees.probabilities(&test)?),
                ("local_base", by_base(&own, &test, schema, seed)?),
                ("corpus_logistic", by_corpus.clone().context("no answers by the corpus")?),
                ("base", ones(&alone(&ours, base, &own)?.predict(&test)?)),
                ("served", ones(&served.predict(&test)?)),
            ]);
            if let Some(forest) = ours.forest() {
                by_name.insert("forest", forest.logits(&test)?.into_iter().map(probability).collect());
            }
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
            answers.push(by_name);
        }
        let n = f64::from(counted.max(1));
        let mean =
            |sums: Figures| -> Figures { sums.into_iter().map(|(name, sum)| (name, sum / n)).collect() };
        lines.push(NewcomerLine {
            seed,
            domain: newcomer.clone(),
            rows: size,
            draws,
            counted_draws: counted,
            served: blends.into_iter().map(|(member, sum)| (member, sum / n)).collect(),
            auc: mean(auc),
            log_loss: mean(log_loss),
            answers,
            test: test.clone(),
        });
    }
    Ok(lines)
}

/// A schema with the domain as one more category, as a pooled rival would have it.
fn with_domain(schema: &FeatureSchema, members: &[Member]) -> Result<FeatureSchema> {
    let kind =
        FeatureKind::Categorical { levels: members.iter().map(|member| member.domain.clone()).collect() };
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

/// Its inverse, of probabilities that no rounding has made certain.
fn logit(probability: f64) -> f64 {
    let p = probability.clamp(LEAST_PROBABILITY, 1.0 - LEAST_PROBABILITY);
    (p / (1.0 - p)).ln()
}

fn probability(logit: f64) -> f64 {
    1.0 / (1.0 + (-logit).exp())
}

fn ones(answers: &[Vec<f32>]) -> Vec<f64> {
    answers.iter().map(|row| row.get(1).copied().map_or(f64::NAN, f64::from)).collect()
}

fn figures(by_name: &Answers, labels: &[u8], metric: fn(&[f64], &[u8]) -> Option<f64>) -> Figures {
    by_name.iter().filter_map(|(name, answers)| Some((*name, metric(answers, labels)?))).collect()
}

fn add(sums: &mut Figures, figures: &Figures) {
    figures.iter().for_each(|(name, figure)| *sums.entry(name).or_default() += figure);
}

/// Bound on probabilities whose logits are mixed.
const LEAST_PROBABILITY: f64 = 1e-7;
/// The column that tells a pooled rival whose row it is.
const DOMAIN_FEATURE: &str = "bench.domain";
/// Every method that uses no federation.
pub(crate) const RIVALS: [&str; 6] =
    ["local_trees", "local_logistic", "local_base", "pooled_trees", "pooled_logistic", "pooled_base"];
/// Rows that stand in the context of the base as a rival: twice what an agent shows it of its own.
const MOST_CONTEXT_ROWS: usize = 1024;
/// Corpus rows that logistic regression is fitted on.
const MOST_CORPUS_ROWS: usize = 4000;
/// Every promotion of an agent, a line each, in its data folder.
const PROMOTIONS: &str = "promotions.jsonl";
/// Rows a newcomer has.
pub(super) const NEWCOMER_ROWS: [usize; 2] = [64, 256];
/// Test rows of a newcomer that are scored in each draw.
const NEWCOMER_TEST_ROWS: usize = 1000;
