//! A flow in a scenario: the product's own loop under a plan, what is scored beside it, and what goes wrong in it.

use anyhow::{Context, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tabmesh_federation::aggregate::Aggregation;
use tabmesh_federation::aggregate::optimiser::OptimiserSpec;
use tabmesh_federation::plan::{AdapterSpec, ClipNorm, LabelMarginals, NoisePlacement, Plan};

use super::document::{Attack, Byzantine, Faulty};

/// The product's own flow: release, corpus, pre-training, rounds, publication, each domain's choice.
///
/// Every step has figures of its own in the results: `base` (own rows in context, coded by the release), `base_mixed` (corpus
/// rows beside them), `corpus` (weights tuned on the corpus), `rounds` (with the adapter, or the forest in equal parts), `served`. Rivals that use the
/// release: `local_trees_corpus` (trees on own and corpus rows), `corpus_logistic` (logistic regression on corpus rows alone).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Flow {
    /// Name in results: 1 to 64 characters of a-z, 0-9, '_', '-'.
    pub name: String,
    /// ε of the whole plan, in (0, 20]. Default 3.
    #[serde(default = "three")]
    pub epsilon: f64,
    /// Share of the budget for the statistics, in (0, 1); the rest is for rounds. Default: the plan's.
    #[serde(default)]
    pub release_share: Option<f64>,
    /// Who adds the noise: `local` or `secure_sum`. Default: the plan's.
    #[serde(default)]
    pub noise_placement: Option<NoisePlacement>,
    /// Features that one may depend on in the corpus' model, 1 to 3, as in a plan. Default: the plan's.
    #[serde(default)]
    pub parents: Option<u32>,
    /// Features that the last stage of the release counts by label once more, `all` or those with `signal`, as in a plan. Default: the plan's.
    #[serde(default)]
    pub label_marginals: Option<LabelMarginals>,
    /// A corpus with a domain column where domains differ, as in a plan; contracts say `domain_aggregates: published` then. Default false.
    #[serde(default)]
    pub domain_column: bool,
    /// Rows of the synthetic corpus, 100 to 1,000,000. Default: the plan's.
    #[serde(default)]
    pub corpus_rows: Option<u32>,
    /// Steps of pre-training on the corpus, 0 to 100,000; 0 leaves the step out. Default: the plan's.
    #[serde(default)]
    pub pretrain_steps: Option<u32>,
    /// Federated rounds, 0 to 200; 0 leaves them out and gives the release all of the budget. Default: the plan's.
    #[serde(default)]
    pub rounds: Option<u32>,
    /// Share of units in a round, in [0.0001, 1], as in a plan. Default: the plan's.
    #[serde(default)]
    pub sampling_rate: Option<f64>,
    /// Norm that a unit's gradient is clipped to, as in a plan: `auto`, a number, or a map with the `quantile` that it follows.
    /// Default: the plan's.
    #[serde(default)]
    pub clip_norm: Option<ClipNorm>,
    /// What rounds train, as in a plan: a map with `kind` and its figures. Default: the plan's.
    #[serde(default)]
    pub adapter: Option<AdapterSpec>,
    /// How updates become one gradient, as in a plan. Default: the plan's.
    #[serde(default)]
    pub aggregation: Option<Aggregation>,
    /// Share that `trimmed_mean` cuts and that `krum` and `multi_krum` take for hostile, in [0, 0.5). Default: the plan's.
    #[serde(default)]
    pub trim: Option<f64>,
    /// Server optimiser, as in a plan. Default: the plan's.
    #[serde(default)]
    pub optimiser: Option<OptimiserSpec>,
    /// What is scored beside the steps, at no cost of privacy. Default nothing.
    #[serde(default)]
    pub also: Vec<Also>,
    /// What goes wrong. Default nothing.
    #[serde(default)]
    pub faults: FlowFaults,
}

/// Something that a domain could serve instead, or a step with one part taken out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Also {
    /// `corpus`, with corpus rows drawn toward the domain's own distribution: its counts, with the pooled ones as their prior.
    CorpusPosterior,
    /// The tuned weights with own rows alone in the context: what the mixed context adds to `corpus`.
    CorpusLocal,
    /// `base_mixed`, but own rows in the context are coded by counts that hold their own label: what leaving it out is worth.
    OwnLabelKept,
    /// The base with the adapter of the rounds, without tuning.
    RoundsUntuned,
    /// The one member that is best at the gate, instead of a blend; without enough gate rows the largest of the shipped weights.
    Picked,
    /// The shipped weights of the blend, whatever the gate says.
    ShippedBlend,
}

impl Also {
    /// Its name in results.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::CorpusPosterior => "corpus_posterior",
            Self::CorpusLocal => "corpus_local",
            Self::OwnLabelKept => "own_label_kept",
            Self::RoundsUntuned => "rounds_untuned",
            Self::Picked => "picked",
            Self::ShippedBlend => "shipped_blend",
        }
    }
}

/// What goes wrong in a flow: always in the same domains under a seed, and in different ones for each kind.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FlowFaults {
    /// Domains whose agents start when the release is over: they are in no cohort and receive the result. Default 0.
    pub late: u32,
    /// Domains whose owners granted half of what the plan asks: their agents refuse the plan and receive the result. Default 0.
    pub short_budget: u32,
    /// Domains that leave for good during the rounds. Default none.
    pub leaving: Option<Leaving>,
    /// Agents that lie in the rounds; each lie is noised and debited like an update. Where they scale it up the screen may stop
    /// it, and each such round waits half a minute for them. Default none.
    pub byzantine: Option<Byzantine>,
}

/// Agents that stop for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Leaving {
    /// How many, 1 to 1000.
    pub domains: u32,
    /// After so many rounds, 1 to 199. Each later round waits half a minute for them.
    pub after_rounds: u32,
}

impl FlowFaults {
    /// Domains that aren't there at the end of the plan, or not in it.
    #[must_use]
    pub fn missing(&self) -> u32 {
        self.late + self.short_budget + self.leaving.map_or(0, |leaving| leaving.domains)
    }

    /// How many of so many domains lie.
    #[must_use]
    pub fn liars(&self, domains: u32) -> u32 {
        let share = |liars: &Byzantine| ((f64::from(domains) * liars.share).round() as u32).max(1);
        self.byzantine.as_ref().map_or(0, share)
    }

    /// Of so many domains, those whose updates may be missing in rounds: they have left, or a screen stops what they say.
    fn unheard(&self, domains: u32) -> u32 {
        match self.byzantine.as_ref().map(|liars| liars.attack) {
            Some(Attack::Scaling { factor }) if factor.abs() > 1.0 => self.liars(domains),
            _ => 0,
        }
    }

    /// Whether rounds go on at their deadline without some.
    #[must_use]
    pub fn goes_on_without_late(&self, domains: u32) -> bool {
        self.leaving.is_some() || self.unheard(domains) > 0
    }
}

impl Flow {
    /// The plan that an operator would submit to a number of agents.
    ///
    /// # Errors
    /// The plan's refusal, or faults that leave too few agents.
    pub fn plan(&self, target: &str, agents: usize) -> Result<Plan> {
        let minimal = format!("kind: TabmeshPlan\nname: \"{}\"\ntarget: {target}\n", self.name);
        let (mut plan, _) = Plan::parse(minimal.as_bytes(), "plan")?;
        let agents = u32::try_from(agents).context("too many agents")?;
        let missing = self.faults.missing() + self.faults.unheard(agents);
        plan.cohort.min_agents = agents
            .checked_sub(missing)
            .filter(|left| *left > 0)
            .with_context(|| format!("{}: of {agents} domains {missing} are to be missing", self.name))?;
        plan.cohort.max_agents = agents;
        plan.privacy.epsilon = self.epsilon;
        plan.release.domain_column = self.domain_column;
        // Nobody waits for a deadline in a simulation: a slow machine is no straggler.
        plan.release.deadline_s = PATIENCE_S;
        let goes_on = self.faults.goes_on_without_late(agents);
        plan.rounds.deadline_s = if goes_on { LEAVING_S } else { PATIENCE_S };
        let Self {
            release_share,
            noise_placement,
            parents,
            label_marginals,
            corpus_rows,
            pretrain_steps,
            rounds,
            sampling_rate,
            clip_norm,
            adapter,
            aggregation,
            trim,
            optimiser,
            ..
        } = self;
        set(&mut plan.privacy.release_share, *release_share);
        set(&mut plan.privacy.noise_placement, *noise_placement);
        set(&mut plan.release.parents, *parents);
        set(&mut plan.release.label_marginals, *label_marginals);
        set(&mut plan.corpus.rows, *corpus_rows);
        set(&mut plan.pretrain.steps, *pretrain_steps);
        set(&mut plan.rounds.count, *rounds);
        set(&mut plan.rounds.sampling_rate, *sampling_rate);
        set(&mut plan.rounds.clip_norm, *clip_norm);
        set(&mut plan.rounds.adapter, *adapter);
        set(&mut plan.rounds.aggregation, *aggregation);
        set(&mut plan.rounds.trim, *trim);
        set(&mut plan.rounds.optimiser, *optimiser);
        let (plan, _) = Plan::parse(&serde_json::to_vec(&plan)?, "plan")?;
        Ok(plan)
    }

    pub(super) fn faults(&self, i: usize, found: &mut Faulty) {
        let at = |key: &str| format!("flows[{i}].{key}");
        let FlowFaults { leaving, byzantine, .. } = &self.faults;
        if let Some(Leaving { domains, after_rounds }) = leaving {
            found.whole(&at("faults.leaving.domains"), *domains, 1, 1000);
            found.whole(&at("faults.leaving.after_rounds"), *after_rounds, 1, 199);
        }
        if let Some(Byzantine { share, attack }) = byzantine {
            found.liars(&at("faults.byzantine"), *share, *attack);
            if self.noise_placement == Some(NoisePlacement::SecureSum) {
                found.say(&at("faults.byzantine"), "liars speak up in rounds with local noise");
            }
        }
        for (key, domains) in [("late", self.faults.late), ("short_budget", self.faults.short_budget)] {
            found.whole(&at(&format!("faults.{key}")), domains, 0, 1000);
        }
        // With so many domains no share of liars leaves too few.
        let agents = MANY_AGENTS + self.faults.missing() as usize;
        match self.plan("a.y", agents) {
            Ok(plan) => self.without_effect(&plan, &at, found),
            Err(error) => found.say(&format!("flows[{i}]"), &format!("{error:#}")),
        }
    }

    /// Keys that would change nothing under the flow's plan.
    fn without_effect(&self, plan: &Plan, at: &dyn Fn(&str) -> String, found: &mut Faulty) {
        let rounds = plan.rounds.count;
        if let Some(Leaving { after_rounds, .. }) = self.faults.leaving
            && after_rounds >= rounds
        {
            let text = format!("nobody would leave: the flow has {rounds} rounds, got {after_rounds}");
            found.say(&at("faults.leaving.after_rounds"), &text);
        }
        if self.faults.byzantine.is_some() && rounds == 0 {
            found.say(&at("faults.byzantine"), "liars speak up in rounds, and the flow has none");
        }
        let model_learns = rounds > 0 && !matches!(plan.rounds.adapter, AdapterSpec::Forest { .. });
        if self.also.contains(&Also::RoundsUntuned) && !model_learns {
            found.say(&at("also"), "rounds_untuned needs rounds whose adapter is the model's");
        }
    }
}

fn set<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn three() -> f64 {
    3.0
}

/// Agents that every kind of plan is content with, to check a flow before its tables are read.
const MANY_AGENTS: usize = 60;
/// Seconds a stage or round of a flow may take.
const PATIENCE_S: u32 = 3600;
/// Seconds a round may take where somebody isn't heard.
const LEAVING_S: u32 = 30;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::super::document::Scenario;
    use super::*;

    fn flow(text: &str) -> Result<Flow> {
        let document =
            format!("kind: TabmeshScenario\nname: s\ndata: {{shipped: census_income}}\nflows: [{text}]\n");
        Ok(Scenario::parse(&document, "s.yaml")?.flows.remove(0))
    }

    #[test]
    fn a_flow_becomes_the_plan_it_names() {
        let text = "{name: f, epsilon: 8, rounds: 7, pretrain_steps: 0, aggregation: median}";
        let plan = flow(text).unwrap().plan("target.label", 5).unwrap();
        assert_eq!((plan.rounds.count, plan.pretrain.steps, plan.cohort.min_agents), (7, 0, 5));
        assert_eq!(plan.rounds.aggregation, Aggregation::Median);
        assert!((plan.privacy.epsilon - 8.0).abs() < f64::EPSILON);
        let plan = flow("{name: f, rounds: 0}").unwrap().plan("target.label", 5).unwrap();
        assert_eq!(plan.budget().unwrap().release, plan.budget().unwrap().total);
        let plan = flow("{name: f, noise_placement: secure_sum}").unwrap().plan("a.y", 6).unwrap();
        assert!(plan.secure_sum().is_some());
    }

    #[test]
    fn who_is_missing_is_not_waited_for() {
        let text = "{name: f, faults: {late: 1, short_budget: 1, leaving: {domains: 1, after_rounds: 2}}}";
        let flow = flow(text).unwrap();
        let plan = flow.plan("a.y", 8).unwrap();
        assert_eq!((plan.cohort.min_agents, plan.cohort.max_agents), (5, 8));
        assert!(flow.plan("a.y", 3).unwrap_err().to_string().contains("3 are to be missing"));
    }

    #[test]
    fn faults_that_cannot_be_are_refused_by_name() {
        let refusal = |text: &str| format!("{:#}", flow(text).unwrap_err());
        let liars = "faults: {byzantine: {share: 0.2, attack: {kind: sign_flip}}}";
        let text = refusal(&format!("{{name: f, noise_placement: secure_sum, {liars}}}"));
        assert!(text.contains("flows[0].faults.byzantine"), "{text}");
        assert!(refusal("{name: f, faults: {leaving: {domains: 0, after_rounds: 1}}}").contains("domains"));
        assert!(refusal("{name: f, faults: {late: 1001}}").contains("flows[0].faults.late"));
    }

    #[test]
    fn what_would_change_nothing_is_refused_by_name() {
        let leaving = |after: u32| {
            format!("{{name: f, rounds: 3, faults: {{leaving: {{domains: 1, after_rounds: {after}}}}}}}")
        };
        assert!(flow(&leaving(2)).is_ok());
        let liars = "byzantine: {share: 0.2, attack: {kind: sign_flip}}";
        for (text, key) in [
            (leaving(3), "faults.leaving.after_rounds"),
            (format!("{{name: f, rounds: 0, faults: {{{liars}}}}}"), "faults.byzantine"),
            ("{name: f, also: [rounds_untuned]}".to_owned(), "also"),
            (
                "{name: f, rounds: 0, adapter: {kind: feature_tokens}, also: [rounds_untuned]}".to_owned(),
                "also",
            ),
        ] {
            let error = format!("{:#}", flow(&text).unwrap_err());
            assert!(error.contains(&format!("flows[0].{key}: ")), "{text}: {error}");
        }
        assert!(flow("{name: f, adapter: {kind: feature_tokens}, also: [rounds_untuned]}").is_ok());
    }
}
