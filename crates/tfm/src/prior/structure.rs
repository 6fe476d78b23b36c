//! Random structural models: causes, some of them categories, pass through dense or tree layers to many nodes.
//!
//! After the priors of TabPFN (arXiv 2207.01848, section 4) and TabICL (arXiv 2502.05564, section 4.2): dense layers
//! with mixed activations, or oblivious trees. Categorical causes have levels with frequencies by a power law and a
//! random effect per level, so that columns with many levels carry something.

use rand::{Rng, seq::SliceRandom};
use rand_chacha::ChaCha20Rng;

use super::random::{add_noise, log_uniform_count, normalise, normals, pick};

/// One quantity of a model over all rows.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    /// Its values; of a category, the effect of its level.
    pub(super) values: Vec<f32>,
    /// Level of each row and number of levels, if the quantity is a category.
    pub(super) levels: Option<(Vec<u16>, usize)>,
}

/// A drawn model.
pub(super) struct Structure {
    /// Nodes that columns show, at least `columns` of them.
    pub(super) nodes: Vec<Node>,
    /// The last node, which no column shows.
    pub(super) last: Vec<f32>,
}

/// Draws a model with nodes for `columns` columns over `total` rows.
pub(super) fn draw(columns: usize, total: usize, rng: &mut ChaCha20Rng) -> Structure {
    let count = rng.random_range(1..=columns.max(2));
    let causes = causes(count, total, rng);
    let depth = rng.random_range(1..=4);
    let width = rng.random_range(count.max(4)..=(4 + 3 * columns).max(count + 4)).min(MAX_WIDTH);
    // Noise much below a hundredth of a node's own spread wouldn't be seen.
    let noise = if rng.random_bool(0.5) { 10f32.powf(rng.random_range(-1.7..-0.2)) } else { 0.0 };
    let trees = rng.random_bool(0.4);
    let density = rng.random_range(0.1..1.0f64);
    let mut layer: Vec<Vec<f32>> = causes.iter().map(|c| c.values.clone()).collect();
    let mut nodes = Vec::new();
    for _ in 0..depth {
        let activation = Activation::draw(rng);
        let gain = *pick(&[0.5, 1.0, 1.0, 2.0], rng);
        let mut next = Vec::with_capacity(width);
        for _ in 0..width {
            let mut node =
                if trees { tree(&layer, rng) } else { dense(&layer, density, activation, gain, rng) };
            if noise > 0.0 {
                add_noise(&mut node, noise, rng);
            }
            next.push(node);
        }
        nodes.extend(next.iter().map(|values| Node { values: values.clone(), levels: None }));
        layer = next;
    }
    let last = nodes.pop().map(|node| node.values).unwrap_or_default();
    if rng.random_bool(0.65) {
        nodes.shuffle(rng);
    } else {
        // Causal order keeps related nodes together.
        let by = rng.random_range(0..nodes.len().max(1));
        nodes.rotate_left(by);
    }
    // Categorical causes are always among the columns, the others in about half of the models.
    let all = rng.random_bool(0.45);
    for cause in causes.into_iter().filter(|c| all || c.levels.is_some()) {
        let at = rng.random_range(0..=nodes.len().min(columns.saturating_sub(1)));
        nodes.insert(at, cause);
    }
    while nodes.len() < columns {
        nodes.push(Node { values: normals(total, rng), levels: None });
    }
    Structure { nodes, last }
}

fn causes(count: usize, total: usize, rng: &mut ChaCha20Rng) -> Vec<Node> {
    let kind = rng.random_range(0..10);
    let category = if rng.random_bool(0.5) { rng.random_range(0.0..0.7f64) } else { 0.0 };
    let mut causes: Vec<Node> = (0..count)
        .map(|_| {
            if rng.random_bool(category) {
                return level_cause(total, rng);
            }
            let mut values = match kind {
                4..7 => (0..total).map(|_| rng.random_range(-1.0..1.0)).collect(),
                _ => normals(total, rng),
            };
            if kind == 9 {
                // Heavy tails: a normal over the root of an exponential.
                for v in &mut values {
                    *v /= (0.1 - (1.0 - rng.random::<f32>()).ln()).sqrt();
                }
            }
            if kind >= 7 {
                let spread = rng.random_range(0.0f32..2.0).exp();
                values.iter_mut().for_each(|v| *v *= spread);
            }
            Node { values, levels: None }
        })
        .collect();
    if rng.random_bool(0.35) {
        let groups = rng.random_range(2..=6);
        let scale = rng.random_range(0.5..3.0f32);
        let centres: Vec<f32> = normals(groups * count, rng);
        let member: Vec<usize> = (0..total).map(|_| rng.random_range(0..groups)).collect();
        for (c, cause) in causes.iter_mut().enumerate().filter(|(_, cause)| cause.levels.is_none()) {
            for (v, g) in cause.values.iter_mut().zip(&member) {
                *v += scale * centres[g * count + c];
            }
        }
    }
    causes
}

/// A category with frequencies `1 / (rank + 1)^a` and a normal effect per level.
fn level_cause(total: usize, rng: &mut ChaCha20Rng) -> Node {
    let levels = log_uniform_count(rng, 2, MAX_CAUSE_LEVELS);
    let power = rng.random_range(0.0..1.5f32);
    let mut sums = Vec::with_capacity(levels);
    let mut sum = 0f32;
    for rank in 0..levels {
        sum += (rank as f32 + 1.0).powf(-power);
        sums.push(sum);
    }
    let effects = normals(levels, rng);
    let codes: Vec<u16> = (0..total)
        .map(|_| {
            let at = rng.random_range(0.0..sum);
            // Unwrap safety: there are at most MAX_CAUSE_LEVELS levels.
            u16::try_from(sums.partition_point(|s| *s <= at).min(levels - 1)).expect("few levels")
        })
        .collect();
    let values = codes.iter().map(|c| effects[usize::from(*c)]).collect();
    Node { values, levels: Some((codes, levels)) }
}

fn dense(
    layer: &[Vec<f32>],
    density: f64,
    activation: Activation,
    gain: f32,
    rng: &mut ChaCha20Rng,
) -> Vec<f32> {
    let total = layer.first().map_or(0, Vec::len);
    let mut node = vec![0f32; total];
    let weights = normals(layer.len(), rng);
    let forced = rng.random_range(0..layer.len());
    for (k, (input, weight)) in layer.iter().zip(weights).enumerate() {
        if k == forced || rng.random_bool(density) {
            for (o, v) in node.iter_mut().zip(input) {
                *o += weight * v;
            }
        }
    }
    normalise(&mut node);
    let shift = rng.random_range(-0.8..0.8);
    for v in &mut node {
        *v = activation.apply(*v * gain + shift);
    }
    node
}

/// An oblivious tree: the same random comparison per level for all rows, a normal value per leaf.
pub(super) fn tree(layer: &[Vec<f32>], rng: &mut ChaCha20Rng) -> Vec<f32> {
    let total = layer.first().map_or(0, Vec::len);
    let depth = rng.random_range(1..=4);
    let mut leaf = vec![0usize; total];
    for _ in 0..depth {
        let input = &layer[rng.random_range(0..layer.len())];
        let threshold = input[rng.random_range(0..total)];
        for (l, v) in leaf.iter_mut().zip(input) {
            *l = 2 * *l + usize::from(*v > threshold);
        }
    }
    let values = normals(1 << depth, rng);
    leaf.iter().map(|&l| values[l]).collect()
}

#[derive(Debug, Clone, Copy)]
enum Activation {
    Tanh,
    Relu,
    Sine,
    FastSine,
    Identity,
    Absolute,
    Square,
    Sign,
    Bump,
    Leaky,
    Sigmoid,
    Log,
}

impl Activation {
    fn draw(rng: &mut ChaCha20Rng) -> Self {
        const ALL: [Activation; 13] = [
            Activation::Tanh,
            Activation::Relu,
            Activation::Sine,
            Activation::FastSine,
            Activation::Identity,
            Activation::Identity,
            Activation::Absolute,
            Activation::Square,
            Activation::Sign,
            Activation::Bump,
            Activation::Leaky,
            Activation::Sigmoid,
            Activation::Log,
        ];
        *pick(&ALL, rng)
    }

    fn apply(self, v: f32) -> f32 {
        match self {
            Self::Tanh => v.tanh(),
            Self::Relu => v.max(0.0),
            Self::Sine => v.sin(),
            Self::FastSine => (3.0 * v).sin(),
            Self::Identity => v,
            Self::Absolute => v.abs(),
            Self::Square => v * v,
            Self::Sign => v.signum(),
            Self::Bump => (-v * v).exp(),
            Self::Leaky => v.max(0.1 * v),
            Self::Sigmoid => 1.0 / (1.0 + (-v).exp()),
            Self::Log => v.abs().ln_1p(),
        }
    }
}

/// Most nodes of a layer.
const MAX_WIDTH: usize = 48;
/// Most levels of a categorical cause.
pub(super) const MAX_CAUSE_LEVELS: usize = 200;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{MAX_CAUSE_LEVELS, draw, level_cause};
    use crate::prior::generator;

    #[test]
    fn models_have_enough_finite_nodes_and_some_have_categories() {
        let (mut categorical, mut dependent) = (0, 0);
        for index in 0..60 {
            let mut rng = generator(21, index);
            let columns = 2 + usize::try_from(index % 9).unwrap();
            let s = draw(columns, 120, &mut rng);
            assert!(s.nodes.len() >= columns && s.last.len() == 120);
            assert!(s.nodes.iter().all(|n| n.values.len() == 120 && n.values.iter().all(|v| v.is_finite())));
            categorical += usize::from(s.nodes.iter().take(columns).any(|n| n.levels.is_some()));
            dependent += usize::from(s.nodes.iter().take(columns).any(|n| {
                let mut product: f32 = 0.0;
                let (mut a, mut b) = (n.values.clone(), s.last.clone());
                super::normalise(&mut a);
                super::normalise(&mut b);
                for (x, y) in a.iter().zip(&b) {
                    product += x * y / 120.0;
                }
                // Independent columns of 120 rows correlate with deviation .09.
                product.abs() > 0.36
            }));
        }
        assert!((10..55).contains(&categorical), "{categorical}");
        assert!(dependent > 25, "{dependent} of 60 models have a column that goes with the last node");
    }

    #[test]
    fn categories_reach_few_and_many_levels_and_uneven_frequencies() {
        let (mut few, mut many, mut uneven) = (0, 0, 0);
        for index in 0..200 {
            let node = level_cause(2000, &mut generator(22, index));
            let (codes, levels) = node.levels.unwrap();
            assert!((2..=MAX_CAUSE_LEVELS).contains(&levels));
            assert!(codes.iter().all(|c| usize::from(*c) < levels));
            let first = codes.iter().filter(|c| **c == 0).count();
            few += usize::from(levels <= 4);
            many += usize::from(levels > 100);
            uneven += usize::from(levels > 10 && first * levels > 4 * codes.len());
        }
        assert!(few > 10 && many > 10 && uneven > 20, "{few} {many} {uneven}");
    }
}
