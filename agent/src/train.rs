//! One domain's part in a round: per-unit gradients of the adapter on the query path, or sums in a forest's leaves, clipped and
//! summed.
//!
//! Context, coding and weights come from published artefacts, which are differentially private already; the domain's own
//! rows enter as queries only. Whatever the rows are, the result has the descriptor's length.

use std::collections::BTreeMap;

use rand::Rng;
use tabmesh_contract::batch::{TypedBatch, TypedColumn};
use tabmesh_contract::schema::FeatureSchema;
use tabmesh_federation::descriptor::RoundDescriptor;
use tabmesh_federation::id::Digest;
use tabmesh_federation::plan::{AdapterSpec, Plan};
use tabmesh_forest::{Rows, Shape};
use tabmesh_tfm::adapter::{Adapter, Kind};
use tabmesh_tfm::context::Context;
use tabmesh_tfm::error::TfmError;
use tabmesh_tfm::gradient::{Clip, PreparedRows, UnitGroup};
use tabmesh_tfm::table::Coding;

use crate::publication::Artefacts;
use crate::work::WorkError;

/// Everything of a plan's rounds that doesn't change from round to round.
pub struct Trainer {
    artefacts: [Digest; 3],
    learner: Learner,
    sampling_rate: f64,
}

/// What the plan's rounds train, with the domain's rows as it reads them.
enum Learner {
    Adapter(Box<Gradients>),
    Forest { rows: Rows, leaves: usize },
}

/// An adapter of the model.
struct Gradients {
    context: Context,
    /// The plan's kind of adapter on the frozen model; rounds differ in its values.
    adapter: Adapter,
    rows: PreparedRows,
    units: Vec<UnitGroup>,
}

impl Trainer {
    /// Encodes the domain's rows and computes the part of the model that no adapter touches; `coding` says whether the
    /// plan's release counted them.
    ///
    /// # Errors
    /// [`WorkError`] if an artefact is missing, damaged or doesn't fit.
    pub fn new(
        artefacts: &Artefacts,
        descriptor: &RoundDescriptor,
        plan: &Plan,
        shared: &FeatureSchema,
        rows: &TypedBatch,
        coding: Coding,
    ) -> Result<Self, WorkError> {
        let learner = match kind_of(plan.rounds.adapter) {
            Trained::Adapter(kind) => {
                let gradients = Gradients::new(artefacts, descriptor, plan, shared, rows, (kind, coding))?;
                Learner::Adapter(Box::new(gradients))
            }
            Trained::Forest(shape) => {
                let forest = artefacts.forest(&descriptor.context)?;
                let expected = Shape { trees: shape.trees * plan.rounds.count as usize, ..shape };
                if forest.shape() != expected {
                    let (expected, got) = (format!("{expected:?}"), format!("{:?}", forest.shape()));
                    return Err(TfmError::mismatch("forest of the plan", expected, got).into());
                }
                Learner::Forest { rows: Rows::new(&forest, rows)?, leaves: shape.leaves() }
            }
        };
        Ok(Self {
            artefacts: [descriptor.base, descriptor.context, descriptor.preprocessing],
            learner,
            sampling_rate: plan.rounds.sampling_rate,
        })
    }

    /// Whether it was made from a descriptor's artefacts.
    #[must_use]
    pub fn fits(&self, descriptor: &RoundDescriptor) -> bool {
        self.artefacts == [descriptor.base, descriptor.context, descriptor.preprocessing]
    }

    /// The sum over units of clipped, integer gradients at the descriptor's adapter, and the weighted counts of units within
    /// the clip norm and beyond where the descriptor has any; of a forest, the sums in the leaves of the round's trees. Under a plan
    /// that samples, over the units that `draws` picks for this round.
    ///
    /// # Errors
    /// [`WorkError::Model`] or [`WorkError::Forest`] if the descriptor's values aren't of the plan's kind.
    pub fn clipped_sum(
        &self,
        descriptor: &RoundDescriptor,
        draws: &mut impl Rng,
    ) -> Result<Vec<i64>, WorkError> {
        match &self.learner {
            Learner::Adapter(gradients) => gradients.clipped_sum(descriptor, self.sampling_rate, draws),
            Learner::Forest { rows, leaves } => {
                let each = descriptor.leaf_sums as usize / 2 / leaves;
                let first = descriptor.index as usize * each;
                // Nobody drawn is a sum like any other: zeros, which get the same noise.
                let drawn = || self.sampling_rate >= 1.0 || draws.random::<f64>() < self.sampling_rate;
                Ok(rows.sums(
                    &descriptor.adapter_values,
                    first..first + each,
                    (descriptor.clip_norm, descriptor.scale),
                    drawn,
                )?)
            }
        }
    }
}

impl Gradients {
    fn new(
        artefacts: &Artefacts,
        descriptor: &RoundDescriptor,
        plan: &Plan,
        shared: &FeatureSchema,
        rows: &TypedBatch,
        (kind, coding): (Kind, Coding),
    ) -> Result<Self, WorkError> {
        let model = artefacts.model(&descriptor.base)?;
        let preprocessing = artefacts.preprocessing(&descriptor.preprocessing)?;
        let corpus = artefacts.corpus(&descriptor.context, shared)?;
        let corpus = preprocessing.encode(&corpus, Coding::Foreign)?;
        let context_rows = (plan.rounds.context_rows as usize).min(corpus.rows / 2);
        let context = Context::build(&model, &corpus.take(&(0..context_rows).collect::<Vec<_>>()))?;
        let labelled: Vec<usize> = (0..rows.rows()).filter(|&row| rows.labels[row].is_some()).collect();
        let rows = rows.take(&labelled);
        let mut units: BTreeMap<_, Vec<usize>> = BTreeMap::new();
        for (row, unit) in rows.units.iter().enumerate() {
            units.entry(*unit).or_default().push(row);
        }
        let adapter = Adapter::initial(kind, &model, context.column_keys())?;
        let rows = context.prepare(&preprocessing.encode(&rows, coding)?, &adapter)?;
        let units = units.into_values().map(|rows| UnitGroup { rows }).collect();
        Ok(Self { context, adapter, rows, units })
    }

    fn clipped_sum(
        &self,
        descriptor: &RoundDescriptor,
        sampling_rate: f64,
        draws: &mut impl Rng,
    ) -> Result<Vec<i64>, WorkError> {
        let layout = self.adapter.layout();
        if layout.keys != descriptor.adapter_keys || layout.width != descriptor.width as usize {
            let shown = |keys: &[String], width: usize| format!("{} of width {width}", keys.join(","));
            let got = shown(&descriptor.adapter_keys, descriptor.width as usize);
            let expected = shown(&layout.keys, layout.width);
            return Err(TfmError::mismatch("adapter keys", expected, got).into());
        }
        let adapter = self.adapter.with_values(descriptor.adapter_values.clone())?;
        let clip = Clip::new(descriptor.clip_norm, descriptor.scale as f64)?;
        let sum = if sampling_rate < 1.0 {
            // Nobody drawn is a sum like any other: zeros, which get the same noise.
            let (rows, units) = self.rows.only(&poisson(&self.units, sampling_rate, draws));
            self.context.clipped_sum(&rows, &adapter, &units, clip)?
        } else {
            self.context.clipped_sum(&self.rows, &adapter, &self.units, clip)?
        };
        let mut vector = sum.values;
        if descriptor.count_weight > 0 {
            for units in [sum.within, sum.beyond] {
                // Saturates far beyond what any number of units comes to.
                let count = units.saturating_mul(descriptor.count_weight);
                vector.push(i64::try_from(count).unwrap_or(i64::MAX));
            }
        }
        Ok(vector)
    }
}

/// Each unit with the same probability, independently of the others.
fn poisson(units: &[UnitGroup], rate: f64, draws: &mut impl Rng) -> Vec<UnitGroup> {
    units.iter().filter(|_| draws.random::<f64>() < rate).cloned().collect()
}

/// What a plan trains, by the name of its crate; a forest with the trees of one round.
enum Trained {
    Adapter(Kind),
    Forest(Shape),
}

fn kind_of(spec: AdapterSpec) -> Trained {
    Trained::Adapter(match spec {
        AdapterSpec::FeatureTokens => Kind::FeatureTokens,
        AdapterSpec::Head => Kind::Head,
        AdapterSpec::Lora { rank } => Kind::Lora { rank: rank as usize },
        AdapterSpec::FrozenLora { rank, seed } => Kind::FrozenLora { rank: rank as usize, seed },
        AdapterSpec::Core { rank } => Kind::Core { rank: rank as usize },
        AdapterSpec::Forest { trees, depth } => {
            return Trained::Forest(Shape { trees: trees as usize, depth: depth as usize });
        }
    })
}

/// Rows of the domain's own schema in the columns of the shared one; features it lacks are missing.
#[must_use]
pub fn onto(rows: &TypedBatch, own: &FeatureSchema, shared: &FeatureSchema) -> TypedBatch {
    let columns = shared
        .features()
        .iter()
        .map(|feature| {
            let found = own.position(&feature.id).and_then(|at| rows.columns.get(at));
            found.cloned().unwrap_or_else(|| TypedColumn::missing(&feature.kind, rows.rows()))
        })
        .collect();
    TypedBatch { columns, labels: rows.labels.clone(), units: rows.units.clone() }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;
    use tabmesh_contract::contract::Contract;
    use tabmesh_tfm::model::Model;
    use tabmesh_tfm::model::config::ModelConfig;
    use tabmesh_tfm::table::Preprocessing;

    use super::*;
    use crate::source::{DomainKey, View, open_contract};

    const ROWS: [[&str; 4]; 6] = [
        ["31", "cash", "2.5", "1"],
        ["44", "card", "0", "0"],
        ["", "card", "11", "0"],
        ["18", "", "4", "1"],
        ["70", "cash", "", "0"],
        ["25", "card", "1.5", "1"],
    ];
    const FEATURES: [&str; 4] = [
        "type: decimal, range: [0, 99], feature: person.age",
        "type: categorical, categories: [cash, card], feature: sale.payment",
        "type: decimal, range: [0, 20], feature: sale.amount",
        "type: integer, role: target, feature: sale.fraud, categories: ['0', '1']",
    ];

    /// A domain whose table has the features under other names and in another order.
    fn domain(names: [&str; 4], order: [usize; 4], extra: &str) -> (Contract, TypedBatch) {
        let columns: String =
            order.iter().map(|at| format!("  - {{name: {}, {}}}\n", names[*at], FEATURES[*at])).collect();
        let contract = format!(
            "name: shop.sales
version: '1.0.0'
owner: shop@example.com
schema:
{columns}{extra}privacy: {{sensitivity: low, allow_training: true, max_units: 100}}
source: {{type: csv, path: sales.csv}}
"
        );
        let contract = Contract::parse("contract.yaml", &contract).unwrap().0;
        let line = |row: &[&str; 4]| order.map(|at| row[at]).join(",");
        let mut text = format!("{},own\n", line(&names));
        ROWS.iter().for_each(|row| text.push_str(&format!("{},7\n", line(row))));
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("sales.csv"), text).unwrap();
        let source = open_contract(&contract, folder.path()).unwrap();
        let schema = contract.approved_schema().unwrap();
        let view = View::new(&*source, &contract, &schema, DomainKey::new(&[3; 32])).unwrap();
        let rows = view.rows().unwrap().next().unwrap().unwrap().batch;
        (contract, rows)
    }

    /// Two domains with the same canonical features are one table to the model, whatever their tables look like; a
    /// feature that only one of them has is not in what they share.
    #[test]
    fn domains_with_the_same_features_in_another_order_get_the_same_prediction() {
        let (first, rows) = domain(["age", "payment", "amount", "label"], [0, 1, 2, 3], "");
        let (second, turned) = domain(
            ["fraud_a", "zahlart", "betrag", "betrug"],
            [3, 2, 0, 1],
            "  - {name: own, type: decimal, range: [0, 9], feature: shop.own}\n",
        );
        let shared = first.approved_schema().unwrap();
        let model = Model::random(&ModelConfig::tiny(), &mut ChaCha20Rng::seed_from_u64(3)).unwrap();
        let coding = Preprocessing::fit(&shared, &rows).unwrap();
        let predicted = |contract: &Contract, rows: &TypedBatch| {
            let rows = onto(rows, &contract.approved_schema().unwrap(), &shared);
            let rows = coding.encode(&rows, Coding::Foreign).unwrap();
            let context = Context::build(&model, &rows).unwrap();
            let initial = Adapter::initial(Kind::FeatureTokens, &model, context.column_keys()).unwrap();
            let mut rng = ChaCha20Rng::seed_from_u64(4);
            let values = (0..initial.dimension()).map(|_| rng.random_range(-0.5..0.5)).collect();
            let adapter = initial.with_values(values).unwrap();
            [None, Some(&adapter)].map(|adapter| context.logits(&rows, adapter).unwrap())
        };
        let expected = predicted(&first, &rows);
        assert_eq!(predicted(&second, &turned), expected);
        assert_ne!(expected[0], expected[1]);
    }

    /// 20,000 units in each of 100 draws: the number of a draw has mean 6000 and sd 64.8, its mean over the draws sd 6.5.
    #[test]
    fn units_are_drawn_independently_and_anew_each_time() {
        let units: Vec<UnitGroup> = (0..20_000).map(|row| UnitGroup { rows: vec![row] }).collect();
        let mut draws = ChaCha20Rng::seed_from_u64(8);
        let drawn: Vec<Vec<UnitGroup>> = (0..100).map(|_| poisson(&units, 0.3, &mut draws)).collect();
        let counts: Vec<f64> = drawn.iter().map(|units| units.len() as f64).collect();
        let mean = counts.iter().sum::<f64>() / 100.0;
        assert!((mean - 6_000.0).abs() < 33.0, "five sds: {mean}");
        // Poisson sampling, not batches of one size: the variance is 4200, its estimate's sd a seventh of that.
        let variance = counts.iter().map(|count| (count - mean) * (count - mean)).sum::<f64>() / 99.0;
        assert!((2_000.0..7_500.0).contains(&variance), "{variance}");
        // Two draws share a unit with probability 0.09: mean 1800, sd 40.
        let shared = drawn[0].iter().filter(|unit| drawn[1].contains(unit)).count();
        assert!((1_600..2_000).contains(&shared), "{shared}");
        assert!(poisson(&[], 0.3, &mut draws).is_empty());
    }
}
