//! A release of one agent, made by the code that coordinator and agent run, and read cell by cell.
//!
//! The four stages' queries follow from contract, plan and earlier noisy counts; counts come from the agent's counter, noise
//! from the mechanism of each query. All of it is what the coordinator of a cohort of one would see. A corpus is made from
//! nothing else, so an attack on it is an attack on this with less to see.

use anyhow::{Context, Result, bail, ensure};
use rand::{CryptoRng, RngCore};
use tabmesh_contract::batch::{TypedBatch, TypedColumn};
use tabmesh_contract::schema::FeatureSchema;
use tabmesh_federation::id::PlanDigest;
use tabmesh_federation::plan::Plan;
use tabmesh_federation::release_plan::Release;
use tabmesh_privacy::budget::{Delta, Rho};
use tabmesh_privacy::mechanism::{DiscreteGaussian, Noise};
use tabmesh_privacy::release::{Attribute, ColumnRef, MarginalTable, ReleaseQuery, count};
use tabmesh_synthesis::fit::fit;
use tabmesh_synthesis::sample::{CellRows, draw};
use tabmesh_synthesis::selection;
use tabmesh_synthesis::tree::{TreeStructure, Width};

use super::guess::{Claim, Subject};
use super::setting::{TARGET, column, schema};

/// A plan that spends all of its budget on the release.
pub(super) struct Setting {
    schema: FeatureSchema,
    plan: Plan,
    digest: PlanDigest,
}

/// All stages of a release, and what was decided between them.
pub(super) struct Released {
    pub(super) stages: Vec<Stage>,
    /// The structure that the last stage's counts are for.
    tree: TreeStructure,
}

/// What a stage brought.
pub(super) struct Stage {
    pub(super) query: ReleaseQuery,
    /// The vector that the agent sent.
    pub(super) seen: Vec<i64>,
    /// Variance of the noise in each value.
    variance: f64,
}

impl Setting {
    pub(super) fn new(epsilon: f64) -> Result<Self> {
        let text = format!(
            "kind: TabmeshPlan\nname: audit\ntarget: {TARGET}\nprivacy: {{epsilon: {epsilon}, delta: {DELTA}}}\n\
             rounds: {{count: 0}}\n"
        );
        let (plan, digest) = Plan::parse(text.as_bytes(), "plan.yaml")?;
        Ok(Self { schema: schema()?, plan, digest })
    }

    /// What the plan's stages cost, as the ledger counts it.
    pub(super) fn claim(&self, stages: &[Stage]) -> Result<Claim> {
        let mut rho = Rho::ZERO;
        for stage in stages {
            rho = rho.checked_add(stage.query.mechanism()?.rho()).context("cost of the stages")?;
        }
        Ok(Claim { rho, delta: Delta::new(DELTA)? })
    }

    /// All four stages over a table.
    pub(super) fn release<R: RngCore + CryptoRng>(
        &self,
        table: &TypedBatch,
        subject: Subject,
        rng: &mut R,
    ) -> Result<Released> {
        let (schema, plan, digest) = (&self.schema, &self.plan, self.digest);
        let budget = plan.budget()?;
        let release = Release { schema, plan, digest, budget, max_rows_per_unit: MAX_ROWS, agents: 1 };
        let mut answer = |query: ReleaseQuery| -> Result<Stage> {
            let counts = self.counted(&query, table)?;
            let Some(spent) = subject.spent(query.rho) else {
                return Ok(Stage { query, seen: counts, variance: 0.0 });
            };
            let mechanism = DiscreteGaussian::from_rho(query.l2_sensitivity_squared(), spent)?;
            let (seen, variance) = (mechanism.privatize(&counts, rng).into_inner(), mechanism.variance());
            Ok(Stage { query, seen, variance })
        };
        let first = answer(release.stage_one()?)?;
        let fine = first.tables()?;
        let (finals, coarse) = (release.final_attributes(&fine)?, release.coarse_attributes(&fine)?);
        let second = answer(release.stage_two(&finals)?)?;
        let third = answer(release.stage_three(&coarse)?)?;
        let coarse: Vec<Attribute> =
            self.schema.features().iter().filter_map(|feature| coarse.get(&feature.id).cloned()).collect();
        let cells: Vec<usize> = second.query.attributes.iter().map(Attribute::cells).collect();
        let width = Width::of(plan.release.parents as usize);
        let (asked, pairs) = (&first.query.attributes, third.tables()?);
        let tree = selection::structure(&fine, asked, &coarse, &pairs, (&cells, width))?;
        let total: f64 = fine.last().map_or(0.0, MarginalTable::total);
        let rho = budget.per_stage.last().map_or(0.0, |rho| rho.as_f64());
        let variance_each =
            second.variance * second.query.rho.as_f64() / (second.query.marginals.len() as f64 * rho);
        let marginals =
            selection::marginals(&tree, (&cells, &vec![true; tree.label()]), total, variance_each);
        let fourth = answer(release.stage_four(&finals, marginals)?)?;
        Ok(Released { stages: vec![first, second, third, fourth], tree })
    }

    /// The corpus that a coordinator draws from a release, in the cells of its last stage.
    pub(super) fn corpus<R: RngCore + CryptoRng>(
        &self,
        released: &Released,
        rng: &mut R,
    ) -> Result<CellRows> {
        let [_, second, _, fourth] = released.stages.as_slice() else { bail!("a release has four stages") };
        let mut tables = second.tables()?;
        tables.extend(fourth.tables()?);
        Ok(draw(&fit(&released.tree, &tables)?, self.plan.corpus.rows as usize, rng)?)
    }

    /// A row's cell of each attribute of a query.
    pub(super) fn cells(
        &self,
        query: &ReleaseQuery,
        table: &TypedBatch,
        row: usize,
        label: u16,
    ) -> Result<Vec<usize>> {
        let cell = |attribute: &Attribute| -> Result<usize> {
            if attribute.is_label() {
                return Ok(usize::from(label));
            }
            Ok(attribute.merged(match column(&self.schema, table, &attribute.id)? {
                TypedColumn::Numeric(values) => attribute.fine_cell_of(values[row]),
                TypedColumn::Categorical(codes) => attribute.fine_cell_of_code(codes[row]),
            }))
        };
        query.attributes.iter().map(cell).collect()
    }

    /// Exact counts of a query.
    pub(super) fn counted(&self, query: &ReleaseQuery, table: &TypedBatch) -> Result<Vec<i64>> {
        let features = query.attributes.iter().filter(|attribute| !attribute.is_label());
        let columns: Vec<ColumnRef<'_>> = features
            .map(|attribute| {
                Ok(match column(&self.schema, table, &attribute.id)? {
                    TypedColumn::Numeric(values) => ColumnRef::Numeric(values),
                    TypedColumn::Categorical(codes) => ColumnRef::Codes(codes),
                })
            })
            .collect::<Result<_>>()?;
        Ok(count(query, &columns, &table.labels)?)
    }

    /// The places of a query's vector that count a row with a label: one in each marginal.
    pub(super) fn places(
        &self,
        query: &ReleaseQuery,
        table: &TypedBatch,
        row: usize,
        label: u16,
    ) -> Result<Vec<usize>> {
        let cells = self.cells(query, table, row, label)?;
        let (mut start, mut places) = (0, Vec::with_capacity(query.marginals.len()));
        for marginal in &query.marginals {
            let (mut place, mut size) = (0, 1);
            for (attribute, cells_along) in marginal.attributes.iter().zip(query.dims(marginal)) {
                place = place * cells_along + cells[*attribute];
                size *= cells_along;
            }
            ensure!(place < size, "a row lies outside of a marginal");
            places.push(start + place);
            start += size;
        }
        Ok(places)
    }
}

impl Stage {
    /// One over the variance of a value; exact counts are taken as very precise.
    pub(super) fn precision(&self) -> f64 {
        1.0 / self.variance.max(NEXT_TO_NO_NOISE)
    }

    fn tables(&self) -> Result<Vec<MarginalTable>> {
        Ok(self.query.tables_of(&self.seen, self.variance)?)
    }
}

/// Rows of one person that the contract keeps.
pub(super) const MAX_ROWS: u32 = 16;
/// δ of the claim.
pub(super) const DELTA: f64 = 1e-5;
/// Variance that exact counts are taken to have.
const NEXT_TO_NO_NOISE: f64 = 1e-4;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::super::setting::{Person, read};
    use super::*;

    /// Places are where the shipped counter counts, in every stage; a release costs what the plan gives it at most.
    #[test]
    fn places_are_the_cells_that_the_counter_counts() {
        let mut rng = ChaCha20Rng::seed_from_u64(5);
        let people: Vec<(Person, u32)> = (0..20).map(|_| (Person::random(&mut rng), 3)).collect();
        let table = read(&people, MAX_ROWS).unwrap();
        let setting = Setting::new(3.0).unwrap();
        for subject in [Subject::Shipped, Subject::NoNoise] {
            let stages = setting.release(&table, subject, &mut rng).unwrap().stages;
            for stage in &stages {
                let mut summed = vec![0_i64; stage.seen.len()];
                for row in 0..table.rows() {
                    let label = table.labels[row].unwrap();
                    for place in setting.places(&stage.query, &table, row, label).unwrap() {
                        summed[place] += 1;
                    }
                }
                assert_eq!(summed, setting.counted(&stage.query, &table).unwrap());
                assert_eq!(summed == stage.seen, subject == Subject::NoNoise);
            }
            let claim = setting.claim(&stages).unwrap();
            assert!(claim.epsilon() <= 3.0 && claim.epsilon() > 2.9, "{}", claim.epsilon());
        }
    }
}
