//! The scenario: what an experiment is, in one YAML document, checked before anything runs.
//!
//! Unknown keys, values out of range and combinations that can't be run are refused with file, line and column. What a
//! document may say is published as a JSON Schema ([`Scenario::json_schema`]); a key that nothing reads isn't in it.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tabmesh_federation::aggregate::Scheme;
use tabmesh_federation::aggregate::optimiser::OptimiserSpec;
use tabmesh_federation::aggregate::strategy::{FederatedStrategy, LocalWork, Pace};
use tabmesh_federation::plan::read_document;
use tabmesh_privacy::mechanism::MechanismName;

pub use super::flow::{Also, Flow, FlowFaults, Leaving};
pub use super::targets::{Aim, Targets};

/// A checked scenario.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Always `TabmeshScenario`.
    pub kind: ScenarioKind,
    /// Short name for people: 1 to 64 characters of a-z, 0-9, '_', '-'.
    pub name: String,
    /// Everything is run under seeds 0 to this number less one, 1 to 1000. Default 1.
    #[serde(default = "one")]
    pub seeds: u32,
    /// The tables.
    pub data: DataSpec,
    /// How rows and columns are divided among domains. Default: as the tables are.
    #[serde(default)]
    pub partition: Partition,
    /// Domains whose training rows aren't what they should be. Default none.
    #[serde(default)]
    pub tampering: Vec<Tampering>,
    /// Domains that take part in nothing and receive the result: each seed leaves another one out. Default none.
    #[serde(default)]
    pub newcomers: Option<Newcomers>,
    /// Whether it is measured first how many test rows and entities stand among training rows. Default no.
    #[serde(default)]
    pub duplicates: bool,
    /// Methods without a federation. Default none.
    #[serde(default)]
    pub rivals: Vec<Rival>,
    /// The product's own flow, from contract to what is served, each under its name. Default none.
    #[serde(default)]
    pub flows: Vec<Flow>,
    /// Federated rounds of a small model, each under its name. Default none.
    #[serde(default)]
    pub federations: Vec<Federation>,
    /// Figures taken on test rows. Default all.
    #[serde(default = "Metric::all")]
    pub metrics: Vec<Metric>,
    /// Whether answers on test rows are kept, so that `compare` and targets draw test entities too. Default no.
    #[serde(default)]
    pub keep_answers: bool,
    /// What is aimed at, printed as met or missed. Default nothing.
    #[serde(default)]
    pub targets: Option<Targets>,
}

/// The document kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ScenarioKind {
    /// The only kind there is.
    TabmeshScenario,
}

/// The tables: exactly one of `shipped`, `folder` and `contracts`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DataSpec {
    /// Tables that are part of the program.
    pub shipped: Option<Shipped>,
    /// Folder of domain-split tables (`dataset.json`, `train/DOMAIN.parquet`, `test/DOMAIN.parquet`), relative to the
    /// scenario; with `sets`, the folder that holds them. `--data` on the command line stands in for it.
    pub folder: Option<String>,
    /// Names of folders in `folder`, each a set of its own. Default: `folder` itself is the only set.
    pub sets: Vec<String>,
    /// Tables of your own, by contract.
    pub contracts: Vec<OwnTable>,
}

/// Tables that are part of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Shipped {
    /// The quickstart's: US census income survey by industry, five domains of 3000 rows and one of 64.
    CensusIncome,
}

/// One domain's own table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct OwnTable {
    /// Name of the domain.
    pub domain: String,
    /// Its contract, relative to the scenario; the contract's source, a Parquet file, holds the training rows.
    pub contract: String,
    /// Parquet file of test rows with the same columns, relative to the scenario.
    pub test: String,
}

/// How rows and columns are divided among domains.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Partition {
    /// As the tables are.
    #[default]
    Natural,
    /// All rows are pooled and dealt out anew; each class's shares over domains are drawn from a symmetric Dirichlet
    /// distribution (Hsu et al. 2019, arXiv 1909.06335). Needs `folder` or `shipped`.
    Dirichlet {
        /// Domains, 2 to 10,000.
        domains: u32,
        /// Concentration, in [0.01, 1000]: small values give domains of one class.
        alpha: f64,
    },
    /// Each domain keeps its rows and a part of the feature columns, drawn for each: schemas differ. Needs `folder` or
    /// `shipped`.
    Columns {
        /// Share of the feature columns that a domain keeps, in (0, 1].
        share: f64,
        /// Share of the feature columns that every domain keeps, part of `share`, drawn once; at least the first column.
        /// Default 0.
        #[serde(default)]
        core: f64,
    },
}

/// Domains whose training rows aren't what they should be: always the same ones under a seed. Test rows stay.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tampering {
    /// Share of the domains that take part, in (0, 0.5], at least one; kinds take turns over different domains.
    pub share: f64,
    /// What is wrong with them.
    pub kind: TamperingKind,
}

/// What is wrong with training rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum TamperingKind {
    /// Every label is the other one: an adversary, whose own figures don't count.
    FlippedLabels,
    /// Labels are dealt out anew among the rows: an adversary, whose own figures don't count.
    ShuffledLabels,
    /// Rows of the commoner or rarer class are left out at random until class 1 has this share.
    LabelShift {
        /// Share of class 1 afterwards, in [0.01, 0.99].
        rate: f64,
    },
    /// All rows of another domain that isn't tampered with stand here too, and its own don't.
    Duplicated,
}

impl TamperingKind {
    /// Whether who does it is an adversary.
    #[must_use]
    pub const fn hostile(self) -> bool {
        matches!(self, Self::FlippedLabels | Self::ShuffledLabels)
    }
}

/// Domains that only receive.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Newcomers {
    /// Numbers of own rows a newcomer is scored with, 1 to 8 numbers of 8 to 100,000. Default 64 and 256.
    pub rows: Vec<u32>,
    /// Draws of its rows, 1 to 1000. Default 20.
    pub draws: u16,
}

impl Default for Newcomers {
    fn default() -> Self {
        Self { rows: vec![64, 256], draws: 20 }
    }
}

/// A method without a federation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Rival {
    /// Boosted trees on a domain's own rows.
    LocalTrees,
    /// Logistic regression on a domain's own rows.
    LocalLogistic,
    /// The shipped base model with a domain's own rows in its context, coded by them.
    LocalBase,
    /// Boosted trees on the pooled rows of all domains, as nobody may.
    PooledTrees,
    /// Logistic regression on the pooled rows of all domains, as nobody may.
    PooledLogistic,
    /// The shipped base model with pooled rows in its context, coded by all of them, as nobody may.
    PooledBase,
}

impl Rival {
    /// Its name in results.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::LocalTrees => "local_trees",
            Self::LocalLogistic => "local_logistic",
            Self::LocalBase => "local_base",
            Self::PooledTrees => "pooled_trees",
            Self::PooledLogistic => "pooled_logistic",
            Self::PooledBase => "pooled_base",
        }
    }
}

/// Federated rounds of a small model on features coded from contracts alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Federation {
    /// Name in results: 1 to 64 characters of a-z, 0-9, '_', '-'.
    pub name: String,
    /// What is trained. Default logistic regression.
    #[serde(default)]
    pub model: ModelSpec,
    /// How updates are made and become a step.
    pub strategy: Scheme,
    /// Server optimiser; its kind must be the strategy's. Default: the strategy's.
    #[serde(default)]
    pub optimiser: Option<OptimiserSpec>,
    /// Rounds, or, for a buffered strategy, ticks in which every idle domain starts; 1 to 10,000. Default 20.
    #[serde(default = "twenty")]
    pub rounds: u32,
    /// Gradient steps an agent takes in a round, 1 to 1000; `fedsgd` takes one gradient and no step. Default 5.
    #[serde(default = "five")]
    pub local_steps: u32,
    /// Step size of an agent's own steps, in (0, 1000]. Default 0.5.
    #[serde(default = "half")]
    pub local_rate: f64,
    /// Norm a unit's gradient (unit `row`) or a domain's whole change (unit `domain`) is clipped to, in [0.0001, 10000].
    /// A row's own norm is about the root of the number of features, and a clip far below it drowns the rarer class.
    /// Default 1.
    #[serde(default = "unit_norm")]
    pub clip_norm: f64,
    /// Share of domains that each round asks, drawn anew, in (0, 1]; buys no amplification of privacy. Default 1.
    #[serde(default = "unit_norm")]
    pub participation: f64,
    /// Updates a round needs, 1 to 10,000; with fewer it is abandoned. Default 1.
    #[serde(default = "one")]
    pub quorum: u32,
    /// Noise. Default none: not private.
    #[serde(default)]
    pub privacy: Option<Privacy>,
    /// What goes wrong. Default nothing.
    #[serde(default)]
    pub faults: Faults,
    /// Rounds between two evaluations, 1 to 10,000; the last round is always evaluated. Default 1.
    #[serde(default = "one")]
    pub evaluate_every: u32,
}

/// A small model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ModelSpec {
    /// Logistic regression.
    #[default]
    Logistic,
    /// Least squares from one noisy sum of second moments: the one-shot rival of rounds. With strategy `fedsgd` and one round.
    Ridge,
    /// One hidden layer of tanh units.
    Mlp {
        /// Hidden units, 1 to 1024.
        hidden: u32,
    },
}

/// Noise of a federation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Privacy {
    /// ε over all rounds and the release of totals, in (0, 20].
    pub epsilon: f64,
    /// δ, in (0, 0.001]. Default 1e-5.
    #[serde(default = "tiny")]
    pub delta: f64,
    /// What one unit is.
    pub unit: Unit,
    /// Who adds how much noise.
    pub placement: Placement,
    /// Which noise. Default `discrete_gaussian`, the only one that is drawn in shares.
    #[serde(default)]
    pub mechanism: MechanismName,
    /// Under `shared`: share of a round's domains that may be missing before its sum may not be opened, in [0, 0.9].
    /// Default 0.2.
    #[serde(default = "fifth")]
    pub missing: f64,
    /// Under `shared`: domains assumed to collude with each other and the server, 1 to 1000. Default 1.
    #[serde(default = "one")]
    pub colluders: u32,
}

/// What is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// A contract's privacy unit: a row, or an entity with at most k rows.
    Row,
    /// A whole domain, as for devices of one person each.
    Domain,
}

/// Who adds noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// Each agent all of it: nobody is trusted.
    Local,
    /// Each agent a share; only the sum is seen, as under secure aggregation (whose masks cancel and aren't computed).
    Shared,
}

/// What goes wrong, independently in each round and domain.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Faults {
    /// Probability that an asked domain never answers, in [0, 1). Default 0.
    pub dropout: f64,
    /// Answers that come late. Default none.
    pub stragglers: Option<Stragglers>,
    /// Domains that lie. Default none.
    pub byzantine: Option<Byzantine>,
    /// Domains whose budget runs out before the rounds do; needs `privacy`. Default none.
    pub exhausted: Option<Exhausted>,
    /// Share of domains that join when half of the rounds are over, in [0, 1). Default 0.
    pub late: f64,
    /// Share of domains that leave for good when half of the rounds are over, in [0, 1). Default 0.
    pub leaving: f64,
}

/// Budgets that run out: always the same domains under a seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Exhausted {
    /// Share of domains, in (0, 0.9], at least one.
    pub share: f64,
    /// Part of the rounds' budget that their owners granted, in (0, 1); their ledgers refuse what is beyond.
    pub granted: f64,
}

/// Late answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Stragglers {
    /// Probability that an answer is late, in [0, 1).
    pub share: f64,
    /// Rounds it is late by, 1 to 100: a synchronous round refuses it, a buffer takes it as stale. Default 1.
    #[serde(default = "one")]
    pub late_by: u32,
}

/// Domains that lie: always the same ones under a seed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Byzantine {
    /// Share of domains, in (0, 0.9], at least one.
    pub share: f64,
    /// What they send.
    pub attack: Attack,
}

/// What a lying domain sends.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Attack {
    /// Its honest update with the opposite sign.
    SignFlip,
    /// Its honest update times a factor.
    Scaling {
        /// The factor, in [-1,000,000, 1,000,000].
        factor: f64,
    },
    /// All liars send one vector against the mean of their honest updates, as long as the plausibility screen lets
    /// through.
    CollusionWithinBound,
}

/// A figure on test rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Area under the ROC curve.
    Auc,
    /// Mean negative log-likelihood.
    LogLoss,
    /// Mean squared error of the probability.
    Brier,
    /// Slope and intercept of the labels' logit on the predicted one.
    Calibration,
    /// Observed shares by tenth of predicted probability, over all domains.
    Reliability,
}

impl Metric {
    fn all() -> Vec<Self> {
        vec![Self::Auc, Self::LogLoss, Self::Brier, Self::Calibration, Self::Reliability]
    }
}

impl Scenario {
    /// Parses and checks a document; `file` is the name shown in refusals.
    ///
    /// # Errors
    /// File, line, column and what was expected, of each fault.
    pub fn parse(text: &str, file: &str) -> Result<Self> {
        anyhow::ensure!(
            text.len() <= MAX_SCENARIO_BYTES,
            "{file}: a scenario has at most {MAX_SCENARIO_BYTES} bytes, got {}",
            text.len()
        );
        Ok(read_document(text, file, Self::faults)?)
    }

    /// Reads and checks a file; gives the text too.
    ///
    /// # Errors
    /// As [`Self::parse`], or the file can't be read.
    pub fn load(path: &Path) -> Result<(Self, String)> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        Ok((Self::parse(&text, &path.display().to_string())?, text))
    }

    /// JSON Schema of the document, for editors.
    #[must_use]
    pub fn json_schema() -> serde_json::Value {
        schemars::schema_for!(Self).to_value()
    }

    /// Path and message of everything that is out of range or can't be combined.
    fn faults(&self) -> Vec<(String, String)> {
        let mut found = Faulty::default();
        found.name("name", &self.name);
        found.whole("seeds", self.seeds, 1, MAX_SEEDS);
        self.data.faults(&mut found);
        match self.partition {
            Partition::Natural => {}
            Partition::Dirichlet { domains, alpha } => {
                found.whole("partition.domains", domains, 2, MAX_DOMAINS);
                found.within("partition.alpha", alpha, 0.01, 1000.0);
            }
            Partition::Columns { share, core } => {
                found.above("partition.share", share, 0.0, 1.0);
                found.within("partition.core", core, 0.0, share);
            }
        }
        if !self.data.contracts.is_empty() && self.partition != Partition::Natural {
            found.say("partition", "tables by contract stay as they are: kind natural only");
        }
        for (i, Tampering { share, kind }) in self.tampering.iter().enumerate() {
            found.above(&format!("tampering[{i}].share"), *share, 0.0, 0.5);
            if let TamperingKind::LabelShift { rate } = kind {
                found.within(&format!("tampering[{i}].kind.rate"), *rate, 0.01, 0.99);
            }
        }
        if !self.data.contracts.is_empty() && !self.tampering.is_empty() {
            found.say("tampering", "tables by contract stay as they are");
        }
        if let Some(targets) = &self.targets {
            targets.faults(self, &mut found);
        }
        if let Some(Newcomers { rows, draws }) = &self.newcomers {
            if rows.is_empty() || rows.len() > 8 || rows.iter().any(|r| !(8..=100_000).contains(r)) {
                found.say("newcomers.rows", "must be 1 to 8 numbers of 8 to 100000");
            }
            found.whole("newcomers.draws", u32::from(*draws), 1, 1000);
        }
        let none = self.rivals.is_empty() && self.flows.is_empty() && self.federations.is_empty();
        if none && !self.duplicates {
            found.say("", "nothing to run: name rivals, flows or federations");
        }
        if self.metrics.is_empty() {
            found.say("metrics", "must name at least one figure");
        }
        let mut names = BTreeSet::from(["rivals", "duplicates"]);
        for (i, flow) in self.flows.iter().enumerate() {
            let at = |key: &str| format!("flows[{i}].{key}");
            found.name(&at("name"), &flow.name);
            if !names.insert(&flow.name) {
                found.say(&at("name"), &format!("{} is taken", flow.name));
            } else {
                flow.faults(i, &mut found);
            }
        }
        for (i, federation) in self.federations.iter().enumerate() {
            if !names.insert(&federation.name) {
                found.say(&format!("federations[{i}].name"), &format!("{} is taken", federation.name));
            }
            federation.faults(i, &mut found);
        }
        found.0
    }
}

impl DataSpec {
    fn faults(&self, found: &mut Faulty) {
        let Self { shipped, folder, sets, contracts } = self;
        let given = usize::from(shipped.is_some())
            + usize::from(folder.is_some())
            + usize::from(!contracts.is_empty());
        if given != 1 {
            found.say("data", "exactly one of shipped, folder and contracts is needed");
        }
        if !sets.is_empty() && folder.is_none() {
            found.say("data.sets", "sets are folders in `folder`");
        }
        if sets.iter().collect::<BTreeSet<_>>().len() != sets.len() {
            found.say("data.sets", "a set is named twice");
        }
        for (i, set) in sets.iter().enumerate() {
            found.name(&format!("data.sets[{i}]"), set);
        }
        let domains: BTreeSet<&String> = contracts.iter().map(|own| &own.domain).collect();
        if domains.len() != contracts.len() {
            found.say("data.contracts", "a domain is named twice");
        }
        for (i, own) in contracts.iter().enumerate() {
            found.name(&format!("data.contracts[{i}].domain"), &own.domain);
        }
    }
}

impl Federation {
    fn faults(&self, i: usize, found: &mut Faulty) {
        let at = |key: &str| format!("federations[{i}].{key}");
        found.name(&at("name"), &self.name);
        if let ModelSpec::Mlp { hidden } = self.model {
            found.whole(&at("model.hidden"), hidden, 1, 1024);
        }
        if self.model == ModelSpec::Ridge && (self.strategy.kind() != "fedsgd" || self.rounds != 1) {
            found.say(&at("model"), "ridge is solved from one sum: strategy fedsgd, one round");
        }
        if let Err(error) = self.strategy.check() {
            found.say(&at("strategy"), &error.to_string());
        }
        if let Some(optimiser) = &self.optimiser {
            let (expected, got) = (self.strategy.optimiser().name(), optimiser.name());
            if expected != got {
                let message =
                    format!("{} goes with optimiser {expected} only, got {got}", self.strategy.kind());
                found.say(&at("optimiser"), &message);
            }
            let (OptimiserSpec::Sgd { learning_rate: rate, .. }
            | OptimiserSpec::Adam { learning_rate: rate }
            | OptimiserSpec::Yogi { learning_rate: rate }
            | OptimiserSpec::Adagrad { learning_rate: rate }) = *optimiser;
            found.above(&at("optimiser.learning_rate"), rate, 0.0, 1000.0);
            if let OptimiserSpec::Sgd { momentum, .. } = *optimiser
                && !(0.0..1.0).contains(&momentum)
            {
                found.say(
                    &at("optimiser.momentum"),
                    &format!("must be at least 0 and below 1, got {momentum}"),
                );
            }
        }
        found.whole(&at("rounds"), self.rounds, 1, MAX_ROUNDS);
        found.whole(&at("local_steps"), self.local_steps, 1, 1000);
        found.above(&at("local_rate"), self.local_rate, 0.0, 1000.0);
        found.within(&at("clip_norm"), self.clip_norm, 1e-4, 1e4);
        found.above(&at("participation"), self.participation, 0.0, 1.0);
        found.whole(&at("quorum"), self.quorum, 1, MAX_DOMAINS);
        found.whole(&at("evaluate_every"), self.evaluate_every, 1, MAX_ROUNDS);
        if let Some(privacy) = &self.privacy {
            found.above(&at("privacy.epsilon"), privacy.epsilon, 0.0, 20.0);
            found.above(&at("privacy.delta"), privacy.delta, 0.0, 1e-3);
            found.within(&at("privacy.missing"), privacy.missing, 0.0, 0.9);
            found.whole(&at("privacy.colluders"), privacy.colluders, 1, 1000);
            if privacy.placement == Placement::Shared {
                if privacy.mechanism != MechanismName::DiscreteGaussian {
                    found.say(
                        &at("privacy.mechanism"),
                        "shares of noise add up to a discrete Gaussian only; other noise needs placement local",
                    );
                }
                if let Err(error) = self.strategy.check_sum_only() {
                    found.say(&at("privacy.placement"), &error.to_string());
                } else if privacy.unit == Unit::Row && self.strategy.local_work() == LocalWork::Steps {
                    let message = format!(
                        "{} under unit row noises every local step in the agent; shared noise needs unit domain or fedsgd",
                        self.strategy.kind()
                    );
                    found.say(&at("privacy.placement"), &message);
                }
            }
        }
        let Faults { dropout, stragglers, byzantine, exhausted, late, leaving } = &self.faults;
        found.share(&at("faults.dropout"), *dropout);
        found.share(&at("faults.late"), *late);
        found.share(&at("faults.leaving"), *leaving);
        if let Some(Exhausted { share, granted }) = exhausted {
            found.above(&at("faults.exhausted.share"), *share, 0.0, 0.9);
            if !(*granted > 0.0 && *granted < 1.0) {
                found.say(
                    &at("faults.exhausted.granted"),
                    &format!("must be above 0 and below 1, got {granted}"),
                );
            }
            if self.privacy.is_none() {
                found.say(&at("faults.exhausted"), "without privacy there is no budget that could run out");
            }
        }
        if let Some(stragglers) = stragglers {
            found.share(&at("faults.stragglers.share"), stragglers.share);
            found.whole(&at("faults.stragglers.late_by"), stragglers.late_by, 1, 100);
        }
        if let Some(Byzantine { share, attack }) = byzantine {
            found.liars(&at("faults.byzantine"), *share, *attack);
            if *attack == Attack::CollusionWithinBound && self.strategy.pace() != Pace::Rounds {
                found.say(&at("faults.byzantine.attack"), "liars collude within rounds; a buffer has none");
            }
        }
    }
}

/// Faults as they are found: path and message.
#[derive(Default)]
pub(super) struct Faulty(Vec<(String, String)>);

impl Faulty {
    pub(super) fn liars(&mut self, path: &str, share: f64, attack: Attack) {
        self.above(&format!("{path}.share"), share, 0.0, 0.9);
        if let Attack::Scaling { factor } = attack {
            self.within(&format!("{path}.attack.factor"), factor, -1e6, 1e6);
        }
    }

    pub(super) fn say(&mut self, path: &str, message: &str) {
        self.0.push((path.to_owned(), message.to_owned()));
    }

    pub(super) fn name(&mut self, path: &str, text: &str) {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-');
        if !(1..=64).contains(&text.len()) || !text.bytes().all(plain) {
            self.say(path, &format!("must be 1 to 64 characters of a-z, 0-9, '_', '-', got {text:?}"));
        }
    }

    pub(super) fn whole(&mut self, path: &str, value: u32, least: u32, most: u32) {
        if !(least..=most).contains(&value) {
            self.say(path, &format!("must be {least} to {most}, got {value}"));
        }
    }

    pub(super) fn within(&mut self, path: &str, value: f64, least: f64, most: f64) {
        if !(least..=most).contains(&value) {
            self.say(path, &format!("must be in [{least}, {most}], got {value}"));
        }
    }

    pub(super) fn above(&mut self, path: &str, value: f64, below: f64, most: f64) {
        if !(value > below && value <= most) {
            self.say(path, &format!("must be above {below} and at most {most}, got {value}"));
        }
    }

    pub(super) fn share(&mut self, path: &str, value: f64) {
        if !(0.0..1.0).contains(&value) {
            self.say(path, &format!("must be at least 0 and below 1, got {value}"));
        }
    }
}

fn one() -> u32 {
    1
}
fn five() -> u32 {
    5
}
fn twenty() -> u32 {
    20
}
fn half() -> f64 {
    0.5
}
fn unit_norm() -> f64 {
    1.0
}
fn tiny() -> f64 {
    1e-5
}
fn fifth() -> f64 {
    0.2
}

/// Largest scenario document, in bytes.
pub const MAX_SCENARIO_BYTES: usize = 256 * 1024;
/// Most seeds.
pub const MAX_SEEDS: u32 = 1000;
/// Most domains.
pub const MAX_DOMAINS: u32 = 10_000;
/// Most rounds of a small model.
pub const MAX_ROUNDS: u32 = 10_000;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const HEAD: &str = "kind: TabmeshScenario\nname: s\ndata: {shipped: census_income}\n";

    fn refusal(more: &str) -> String {
        format!("{:#}", Scenario::parse(&format!("{HEAD}{more}"), "s.yaml").unwrap_err())
    }

    #[test]
    fn a_short_document_gets_its_defaults() {
        let text = format!("{HEAD}federations:\n  - {{name: a, strategy: {{kind: fedavg}}}}\n");
        let scenario = Scenario::parse(&text, "s.yaml").unwrap();
        assert_eq!((scenario.seeds, scenario.partition.clone()), (1, Partition::Natural));
        assert_eq!(scenario.metrics, Metric::all());
        let federation = &scenario.federations[0];
        assert_eq!(
            (federation.rounds, federation.local_steps, federation.model),
            (20, 5, ModelSpec::Logistic)
        );
        let again = serde_json::to_string(&scenario).unwrap();
        assert_eq!(Scenario::parse(&again, "s.json").unwrap(), scenario);
    }

    #[test]
    fn unknown_keys_are_refused_with_place_and_expected_keys() {
        let text = refusal("federations:\n  - name: a\n    strategy: {kind: fedavg}\n    epochs: 3\n");
        assert!(text.contains("s.yaml:7:"), "{text}");
        assert!(text.contains("epochs") && text.contains("local_steps"), "{text}");
        let text = refusal("colour: red\n");
        assert!(text.contains("s.yaml:4:1") && text.contains("federations"), "{text}");
    }

    #[test]
    fn every_limit_is_refused_one_above() {
        let federation =
            |rest: &str| format!("federations:\n  - {{name: a, strategy: {{kind: fedsgd}}, {rest}}}\n");
        for (more, path) in [
            (format!("seeds: 1001\n{}", federation("rounds: 1")), "seeds"),
            (federation("rounds: 10001"), "federations[0].rounds"),
            (federation("local_steps: 1001"), "federations[0].local_steps"),
            (federation("clip_norm: 10001"), "federations[0].clip_norm"),
            (federation("participation: 1.01"), "federations[0].participation"),
            (federation("model: {kind: mlp, hidden: 1025}"), "federations[0].model.hidden"),
            (federation("faults: {dropout: 1.0}"), "federations[0].faults.dropout"),
            (
                federation("privacy: {epsilon: 20.5, unit: row, placement: local}"),
                "federations[0].privacy.epsilon",
            ),
            (
                format!(
                    "partition: {{kind: dirichlet, domains: 10001, alpha: 1}}\n{}",
                    federation("rounds: 1")
                ),
                "partition.domains",
            ),
            ("flows: [{name: f, epsilon: 21}]\n".to_owned(), "flows[0]"),
            ("rivals: []\n".to_owned(), "nothing to run"),
        ] {
            let text = refusal(&more);
            assert!(text.contains(path), "{more}: {text}");
        }
    }

    #[test]
    fn combinations_that_cannot_work_are_refused_by_name() {
        let with = |strategy: &str, unit: &str| {
            refusal(&format!(
                "federations:\n  - name: a\n    strategy: {strategy}\n    privacy: {{epsilon: 3, unit: {unit}, placement: shared}}\n"
            ))
        };
        for rule in ["krum", "multi_krum", "median", "geometric_median", "trimmed_mean", "fedbuff"] {
            let text = with(&format!("{{kind: {rule}}}"), "domain");
            assert!(text.contains(rule) && text.contains("own update"), "{text}");
        }
        assert!(with("{kind: fedprox}", "row").contains("unit domain or fedsgd"));
        let laplace = with("{kind: fedsgd}", "row, mechanism: discrete_laplace");
        assert!(laplace.contains("privacy.mechanism") && laplace.contains("placement local"), "{laplace}");
        let text =
            refusal("federations:\n  - {name: a, strategy: {kind: fedadam}, optimiser: {kind: sgd}}\n");
        assert!(text.contains("fedadam goes with optimiser adam only"), "{text}");
        let text = refusal("rivals: [local_trees]\npartition: {kind: columns, share: 0}\n");
        assert!(text.contains("partition.share"), "{text}");
        let twice = "federations:\n  - {name: a, strategy: {kind: fedavg}}\n  - {name: a, strategy: {kind: fedavg}}\n";
        assert!(refusal(twice).contains("a is taken"));
    }
}
