//! The domain that is attacked: a small made-up table under a contract, read as an agent reads it.
//!
//! People have five features and a label that depends on some of them. Each is a privacy unit; what the table holds of one
//! goes through the agent's view, which keeps as many rows of a unit as the contract says.

use std::collections::HashMap;
use std::fmt::Write as _;

use anyhow::{Context, Result, anyhow};
use rand::Rng;
use tabmesh_agent::source::{DomainKey, View, open_contract};
use tabmesh_contract::batch::{TypedBatch, TypedColumn};
use tabmesh_contract::contract::Contract;
use tabmesh_contract::schema::FeatureSchema;

/// One person: all of their rows are alike, which is the worst case for a claim.
#[derive(Debug, Clone, Copy)]
pub(super) struct Person {
    /// Age and spend, 0 to 100.
    pub(super) numbers: [f64; 2],
    /// Level of region, job and tariff.
    pub(super) levels: [usize; 3],
    /// Class, 0 or 1.
    pub(super) label: u16,
}

impl Person {
    /// Somebody, with a label that an age and a tariff make likelier.
    pub(super) fn random<R: Rng>(rng: &mut R) -> Self {
        let numbers = [rng.random_range(0.0..100.0), rng.random_range(0.0..100.0)];
        let levels = [0; 3].map(|_: usize| rng.random_range(0..LEVELS));
        let lean: f64 = 0.03 * (numbers[0] - 50.0) + if levels[2] < LEVELS / 2 { 1.0 } else { -1.0 };
        let label = u16::from(rng.random_bool(1.0 / (1.0 + (-lean).exp())));
        Self { numbers, levels, label }
    }
}

/// The contract's text with this many rows of a unit at most.
fn contract(max_rows: u32) -> Result<Contract> {
    let levels: Vec<String> = (0..LEVELS).map(|level| format!("v{level}")).collect();
    let levels = levels.join(", ");
    let text = format!(
        "name: audit.people\nversion: '1.0.0'\nowner: audit@example.com\nschema:\n\
         \x20 - {{name: person, type: string, pii: true, role: entity}}\n\
         \x20 - {{name: age, type: decimal, range: [0, 100], feature: person.age}}\n\
         \x20 - {{name: spend, type: decimal, range: [0, 100], feature: person.spend}}\n\
         \x20 - {{name: region, type: categorical, categories: [{levels}], feature: person.region}}\n\
         \x20 - {{name: job, type: categorical, categories: [{levels}], feature: person.job}}\n\
         \x20 - {{name: tariff, type: categorical, categories: [{levels}], feature: person.tariff}}\n\
         \x20 - {{name: label, type: integer, role: target, feature: {TARGET}, categories: ['0', '1']}}\n\
         privacy: {{sensitivity: low, allow_training: true, unit: person, max_rows_per_unit: {max_rows}, \
         max_units: 100000}}\nsource: {{type: csv, path: people.csv}}\n"
    );
    Ok(Contract::parse("contract.yaml", &text).map_err(|error| anyhow!(error.render()))?.0)
}

/// The features and the target.
pub(super) fn schema() -> Result<FeatureSchema> {
    contract(1)?.approved_schema().context("the schema of the audited table")
}

/// What an agent reads of a table with so many rows of each person, if its contract keeps `max_rows` of a unit.
pub(super) fn read(people: &[(Person, u32)], max_rows: u32) -> Result<TypedBatch> {
    let mut text = "person,age,spend,region,job,tariff,label\n".to_owned();
    for (at, (person, rows)) in people.iter().enumerate() {
        let ([age, spend], [region, job, tariff]) = (person.numbers, person.levels);
        for _ in 0..*rows {
            writeln!(text, "p{at},{age},{spend},v{region},v{job},v{tariff},{}", person.label)?;
        }
    }
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("people.csv"), text)?;
    let contract = contract(max_rows)?;
    let source = open_contract(&contract, folder.path())?;
    let view = View::new(&*source, &contract, &schema()?, DomainKey::new(&[7; 32]))?;
    Ok(view.load()?.batch)
}

/// One row of each person, each a unit of their own.
pub(super) fn one_row_each(people: &[Person]) -> Result<TypedBatch> {
    let rows: Vec<(Person, u32)> = people.iter().map(|person| (*person, 1)).collect();
    read(&rows, 1)
}

/// The place of each row's unit in the order in which units come first in the batch.
pub(super) fn owners(batch: &TypedBatch) -> Vec<usize> {
    let mut places = HashMap::new();
    batch
        .units
        .iter()
        .map(|unit| {
            let next = places.len();
            *places.entry(*unit).or_insert(next)
        })
        .collect()
}

/// The column of a feature.
pub(super) fn column<'a>(schema: &FeatureSchema, batch: &'a TypedBatch, id: &str) -> Result<&'a TypedColumn> {
    let at = schema.features().iter().position(|feature| feature.id.as_str() == id);
    at.and_then(|at| batch.columns.get(at)).with_context(|| format!("the table has no {id}"))
}

/// Levels of a categorical feature.
pub(super) const LEVELS: usize = 8;
/// Canonical id of the label.
pub(super) const TARGET: &str = "person.fraud";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;

    use super::*;

    #[test]
    fn the_view_keeps_as_many_rows_of_a_person_as_the_contract_says() {
        let mut rng = ChaCha20Rng::seed_from_u64(1);
        let people: Vec<(Person, u32)> = (0..5).map(|at| (Person::random(&mut rng), 2 * at + 1)).collect();
        let batch = read(&people, 4).unwrap();
        let owners = owners(&batch);
        let kept: Vec<usize> = (0..5).map(|who| owners.iter().filter(|o| **o == who).count()).collect();
        assert_eq!(kept, [1, 3, 4, 4, 4]);
        let TypedColumn::Numeric(ages) = column(&schema().unwrap(), &batch, "person.age").unwrap() else {
            panic!("ages are numbers")
        };
        assert_eq!(ages[1].to_bits(), people[1].0.numbers[0].to_bits());
        assert_eq!(batch.labels[0], Some(people[0].0.label));
    }
}
