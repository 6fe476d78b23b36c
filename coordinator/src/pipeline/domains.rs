//! The domain as a column of the corpus, where a plan asks for one and domains differ: post-processing of each agent's own counts.

use std::collections::BTreeSet;

use serde::Serialize;
use tabmesh_federation::documents::DomainColumn;
use tabmesh_federation::id::AgentId;
use tabmesh_federation::job::Job;
use tabmesh_privacy::release::MarginalTable;
use tabmesh_synthesis::domains::{differing, stacked};
use tabmesh_synthesis::tree::{MAX_CLIQUE_CELLS, TreeStructure};

use super::contracts;
use super::release::{Released, StageSum};
use crate::error::CoordinatorError;
use crate::mesh::Mesh;

/// A corpus' model with the domain in it.
pub(super) struct Domains {
    /// The tree with the domain as last attribute.
    pub(super) tree: TreeStructure,
    /// What it is fitted to.
    pub(super) tables: Vec<MarginalTable>,
    /// Data product of each domain, in the order of its cells.
    products: Vec<String>,
    /// Attributes that differ between domains, the label's after the features.
    differing: Vec<usize>,
}

/// What is said about a domain column.
#[derive(Serialize)]
pub(super) struct DomainCard {
    products: Vec<String>,
    /// Features whose distribution differs between domains by more than noise and chance can have made.
    differing: Vec<String>,
    /// Whether the label's rate does.
    label_differs: bool,
}

impl Domains {
    /// Nothing where the plan asks for no column, fewer than two domains answered, or they differ by no more than noise can have made.
    pub(super) fn of(
        mesh: &Mesh,
        job: &Job,
        released: &Released,
        (wanted, tree): (bool, &TreeStructure),
    ) -> Result<Option<Self>, CoordinatorError> {
        let (second, fourth) = (released.stage(2)?, released.stage(4)?);
        if !wanted || second.by_agent.len() < 2 {
            return Ok(None);
        }
        let label = tree.label();
        let domain = tree.attributes();
        let mut tables = stacked(&own_tables(second)?, domain)?;
        let attributes: Vec<usize> = (0..=label).collect();
        let differing = differing(&tables, domain, &attributes)?;
        if differing.is_empty() {
            return Ok(None);
        }
        let mut cells: Vec<usize> = second.query.attributes.iter().map(|of| of.cells()).collect();
        cells.push(second.by_agent.len());
        let tree = tree.under(&differing, &cells)?;
        // Counts of the last stage by domain, where a feature of theirs depends on it and as many cells are manageable.
        let sums = fourth.tables()?;
        let alike = fourth.by_agent.keys().eq(second.by_agent.keys());
        let depends = |table: &MarginalTable| {
            table.attributes.iter().any(|&of| of != label && tree.above(of).contains(&domain))
                && table.values.len().saturating_mul(second.by_agent.len()) <= MAX_CLIQUE_CELLS
        };
        if alike {
            let (stacks, kept) = (stacked(&own_tables(fourth)?, domain)?, sums);
            let choose =
                |(stack, sum): (MarginalTable, MarginalTable)| if depends(&sum) { stack } else { sum };
            tables.extend(stacks.into_iter().zip(kept).map(choose));
        } else {
            tables.extend(sums);
        }
        let roster: BTreeSet<AgentId> =
            job.roster().iter().filter(|id| second.by_agent.contains_key(&id.to_string())).cloned().collect();
        let products: Vec<String> = contracts(mesh, &roster)?
            .into_iter()
            .map(|(_, admitted)| admitted.contract.name.clone())
            .collect();
        Ok(Some(Self { tree, tables, products, differing }))
    }

    /// The column of drawn cells; agents of one data product are one domain.
    pub(super) fn column(&self, cells: &[u32]) -> DomainColumn {
        let products: Vec<String> =
            self.products.iter().collect::<BTreeSet<_>>().into_iter().cloned().collect();
        let code = |cell: &u32| {
            let product = self.products.get(*cell as usize);
            let at = products.iter().position(|known| Some(known) == product);
            // A cohort has at most 1024 agents.
            at.and_then(|at| u16::try_from(at).ok()).unwrap_or(u16::MAX)
        };
        DomainColumn { rows: cells.iter().map(code).collect(), products }
    }

    pub(super) fn card(&self, features: &[String]) -> DomainCard {
        let named = |at: &usize| features.get(*at).cloned();
        DomainCard {
            products: self.products.clone(),
            differing: self.differing.iter().filter_map(named).collect(),
            label_differs: self.differing.contains(&features.len()),
        }
    }
}

/// Each agent's own tables of a stage, in the order of their ids.
fn own_tables(stage: &StageSum) -> Result<Vec<Vec<MarginalTable>>, CoordinatorError> {
    let own = |values: &Vec<i64>| stage.query.tables(values, 1);
    let tables = stage.by_agent.values().map(own).collect::<Result<_, _>>();
    tables.map_err(|error| CoordinatorError::Step(error.to_string()))
}
