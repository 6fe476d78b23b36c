//! Rounds that learn a forest: its trees from the released counts, and a Newton step where other kinds have an optimiser.

use tabmesh_federation::descriptor::RoundDescriptor;
use tabmesh_federation::job::Job;
use tabmesh_federation::plan::{AdapterSpec, ClipNorm, MAX_ROUND_TREES, MAX_ROUNDS, MAX_TREE_DEPTH};
use tabmesh_forest::{Cells, Column, Forest, Shape, Step};
use tabmesh_privacy::release::{Attribute, Binning};
use tabmesh_synthesis::marginal::{best_marginal, reconcile};
use tabmesh_tfm::adapter::{Kind, Layout};

use super::AdapterState;
use crate::error::CoordinatorError;
use crate::mesh::{Mesh, named, stored};
use crate::pipeline::release::Released;
use crate::plans::Submitted;

// No plan's forest is larger than a forest may be: it would fail when the release is paid for.
const _: () = assert!(
    MAX_ROUNDS as usize * MAX_ROUND_TREES as usize <= Shape::MAX_TREES
        && MAX_TREE_DEPTH as usize <= Shape::MAX_DEPTH
);

/// The plan's forest before its first round, every leaf at zero; one key a tree. Its trees are stored for the agents.
pub(super) fn initial(
    mesh: &Mesh,
    submitted: &Submitted,
    job: &Job,
) -> Result<AdapterState, CoordinatorError> {
    let rounds = &submitted.plan.rounds;
    let AdapterSpec::Forest { trees, depth } = rounds.adapter else {
        return Err(CoordinatorError::Step("rounds do not learn a forest".to_owned()));
    };
    let shape = Shape { trees: rounds.count as usize * trees as usize, depth: depth as usize };
    let columns = columns(&Released::load(mesh, submitted, job)?)?;
    let forest = Forest::grow(&columns, shape, *submitted.digest.0.as_bytes())?;
    let stored = mesh.put_json(&forest)?;
    mesh.share(&stored)?;
    let clip_norm = match rounds.clip_norm {
        ClipNorm::Fixed(norm) => Some(norm),
        ClipNorm::Auto(_) | ClipNorm::Adaptive(_) => rounds.adapter.row_norm(),
    };
    let clip_norm =
        clip_norm.ok_or_else(|| CoordinatorError::Step("a forest's rows have a norm".to_owned()))?;
    let keys = (0..shape.trees).map(|tree| format!("tree.{tree}")).collect();
    let layout = Layout { kind: Kind::default(), keys, width: shape.leaves() };
    let state = AdapterState::initial(layout, forest.values(), clip_norm, &submitted.plan);
    Ok(AdapterState { trees: Some(named(stored)), ..state })
}

/// The forest at a state's leaf values, as a file.
pub(super) fn artefact(mesh: &Mesh, state: &AdapterState) -> Result<Vec<u8>, CoordinatorError> {
    let trees =
        state.trees.ok_or_else(|| CoordinatorError::Step("the rounds learnt no forest".to_owned()))?;
    let forest: Forest = mesh.get_json(stored(trees), "forest")?;
    let forest = forest.with_values(state.values.iter().map(|value| *value as f32).collect())?;
    serde_json::to_vec(&forest).map_err(CoordinatorError::stored("forest"))
}

/// What the release says of each column by class.
fn columns(released: &Released) -> Result<Vec<Column>, CoordinatorError> {
    let label = released.schema.features().len();
    let attributes = &released.stage(4)?.query.attributes;
    let mut tables = released.stage(2)?.tables()?;
    tables.extend(released.stage(4)?.tables()?);
    reconcile(&mut tables)?;
    let counted = |at: usize, attribute: &Attribute| {
        let table = best_marginal(&tables, &[at, label])?;
        let classes = table.dims.last().copied().unwrap_or(2).max(1);
        let count =
            |cell: usize, class: usize| table.values.get(cell * classes + class).copied().unwrap_or(0.0);
        let counts = (0..attribute.cells()).map(|cell| [count(cell, 0), count(cell, 1)]).collect();
        let position = u32::try_from(at).unwrap_or(u32::MAX);
        Ok(Column { position, cells: cells(attribute), counts, variance: table.variance })
    };
    attributes.iter().take(label).enumerate().map(|(at, attribute)| counted(at, attribute)).collect()
}

/// What the counted cells of an attribute hold.
fn cells(attribute: &Attribute) -> Cells {
    let code = |member: usize| u32::try_from(member).unwrap_or(u32::MAX);
    match &attribute.binning {
        Binning::Edges { edges, .. } => {
            // The first fine bin of each counted one but the first begins at an edge; the last cell is that of missing values.
            let bins = 1..attribute.cells().saturating_sub(1);
            let begins = bins.filter_map(|cell| attribute.members(cell).first().copied());
            Cells::Bins(begins.filter_map(|fine| edges.get(fine.wrapping_sub(1)).copied()).collect())
        }
        Binning::Levels { .. } => Cells::Levels(
            (0..attribute.cells())
                .map(|cell| attribute.members(cell).into_iter().map(code).collect())
                .collect(),
        ),
    }
}

/// The leaf values of all rounds after one whose mean sums these are, over so many agents' noise.
pub(super) fn values(
    mean: &[f64],
    divisor: f64,
    agents: usize,
    descriptor: &RoundDescriptor,
    before: &AdapterState,
) -> Result<Vec<f64>, CoordinatorError> {
    let sums: Vec<f64> = mean.iter().map(|mean| mean * divisor).collect();
    let (width, scale) = (descriptor.width as usize, descriptor.scale as f64);
    let variance = descriptor.sigma_squared.num() as f64 / descriptor.sigma_squared.den() as f64;
    let leaves = sums.len() / 2;
    let step = Step { trees: leaves / width.max(1), noise: agents as f64 * variance / (scale * scale) };
    let learnt = step.values(&sums)?;
    let first = descriptor.index as usize * leaves;
    let mut values = before.values.clone();
    let part = values.get_mut(first..first + leaves).ok_or_else(|| {
        let what =
            format!("round {} has no trees among {} leaves", descriptor.index + 1, before.values.len());
        CoordinatorError::Step(what)
    })?;
    part.iter_mut().zip(learnt).for_each(|(value, learnt)| *value = f64::from(learnt));
    Ok(values)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
    use rand::SeedableRng;
    use tabmesh_federation::descriptor::RoundInputs;
    use tabmesh_federation::id::{AgentId, CollectionId, Digest};
    use tabmesh_federation::plan::Plan;

    use super::*;

    /// Merged bins begin where the first of their fine bins does; codes of a merged level are kept together; the last cell of numbers
    /// is that of missing ones.
    #[test]
    fn counted_cells_are_named_by_their_fine_ones() {
        let attribute = |binning, merge| Attribute { id: "a".to_owned(), binning, merge };
        let numbers = Binning::Edges { lower: 0.0, upper: 9.0, log1p: false, edges: vec![1.0, 2.0, 3.0] };
        assert_eq!(cells(&attribute(numbers.clone(), None)), Cells::Bins(vec![1.0, 2.0, 3.0]));
        let merged = attribute(numbers, Some(vec![0, 0, 1, 1, 2]));
        assert_eq!((cells(&merged), merged.cells()), (Cells::Bins(vec![2.0]), 3));
        let levels = attribute(Binning::Levels { levels: 2 }, Some(vec![0, 1, 1, 2]));
        assert_eq!(cells(&levels), Cells::Levels(vec![vec![0], vec![1, 2], vec![3]]));
    }

    /// Two rounds of one tree with two leaves: the second round's sums change the second tree alone, and more noise makes its values
    /// smaller.
    #[test]
    fn a_round_sets_its_own_trees_and_noise_makes_it_cautious() {
        let text = "kind: TabmeshPlan\nname: p\ntarget: a.y\n\
                    rounds: {count: 2, adapter: {kind: forest, trees: 1, depth: 1}}\n";
        let (plan, digest) = Plan::parse(text.as_bytes(), "p").unwrap();
        let keys = vec!["tree.0".to_owned(), "tree.1".to_owned()];
        let layout = Layout { kind: Kind::default(), keys: keys.clone(), width: 2 };
        let before = AdapterState::initial(layout, &[0.5, -0.5, 0.0, 0.0], 1.0, &plan);
        let mut rng = rand_chacha::ChaCha20Rng::seed_from_u64(1);
        let descriptor = RoundDescriptor::new(
            RoundInputs {
                id: CollectionId::new(1, &mut rng, None),
                index: 1,
                attempt: 1,
                base: Digest::of(b"base"),
                context: Digest::of(b"trees"),
                preprocessing: Digest::of(b"bins"),
                adapter_keys: keys,
                width: 2,
                adapter_values: before.values.iter().map(|value| *value as f32).collect(),
                clip_norm: 1.0,
                roster: ["a", "b", "c"].map(|name| AgentId::new(name).unwrap()).into(),
                opened_ms: 1,
                noisy_total: 1_000.0,
                noisy_total_sd: 0.0,
            },
            &plan,
            digest,
        )
        .unwrap();
        // Means over 1000 units of sums (100, 200) and (-100, 200).
        let mean = [0.1, 0.2, -0.1, 0.2];
        let after = |agents| values(&mean, 1_000.0, agents, &descriptor, &before).unwrap();
        let one = after(1);
        assert_eq!((one.len(), &one[..2]), (4, &[0.5, -0.5][..]));
        assert!(one[2] > 0.0 && (one[2] + one[3]).abs() < 1e-9, "{one:?}");
        // By the formula, with the noise that the descriptor states for each agent.
        let noise = descriptor.sigma_squared.as_f64() / (descriptor.scale as f64).powi(2);
        let expected = 100.0 * 200.0 / (200.0 * 200.0 + noise + 200.0);
        assert!((one[2] - expected).abs() < 1e-6, "{} {expected}", one[2]);
        assert!(after(100)[2] < one[2]);
        let short = AdapterState { values: vec![0.0; 2], ..before.clone() };
        assert!(values(&mean, 1_000.0, 1, &descriptor, &short).unwrap_err().to_string().contains("round 2"));
    }
}
