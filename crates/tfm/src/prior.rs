//! Synthetic prior: random structural models whose tables teach the base to predict in context.
//!
//! A table starts from random causes, runs through a few random layers (dense with mixed activations, or oblivious
//! trees), and shows some of the nodes as columns and one as the label. Columns then pass through what serving
//! does to them: categories become smoothed label log-odds from other rows (or from the context, each row without
//! itself), many-level ones also a log-frequency column, heavy tails are logged, missing cells become the mean.
//! Tables depend on (seed, index) alone, so training can resume anywhere.

use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha20Rng;
use serde::{Deserialize, Serialize};

use crate::{error::TfmError, model::Tables, model::params::normal, table::log_odds};

/// Ranges of the tables that the prior draws.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PriorConfig {
    /// Fewest columns of a table.
    pub min_columns: usize,
    /// Most columns of a table.
    pub max_columns: usize,
    /// Fewest context rows.
    pub min_context: usize,
    /// Most context rows of an ordinary table (context sizes are log-uniform).
    pub max_context: usize,
    /// Context rows of the largest tables, which are rare.
    pub large_context: usize,
    /// Share of slices with up to `large_context` context rows.
    pub large_share: f64,
    /// Query rows of a table.
    pub queries: usize,
}

impl Default for PriorConfig {
    fn default() -> Self {
        Self {
            min_columns: 2,
            max_columns: 20,
            min_context: 32,
            max_context: 256,
            large_context: 640,
            large_share: 0.2,
            queries: 64,
        }
    }
}

impl PriorConfig {
    /// Checks that ranges are ordered and within limits.
    ///
    /// # Errors
    /// [`TfmError::BadConfig`] naming the field.
    pub fn check(&self) -> Result<(), TfmError> {
        let bad = |field, expected, got: usize| TfmError::BadConfig { field, expected, got: got.to_string() };
        if self.min_columns < 1 || self.min_columns > self.max_columns || self.max_columns > MAX_COLUMNS {
            return Err(bad("max_columns", "from min_columns (at least 1) to 128", self.max_columns));
        }
        if self.min_context < 8 || self.min_context > self.max_context || self.max_context > MAX_CONTEXT {
            return Err(bad("max_context", "from min_context (at least 8) to 4096", self.max_context));
        }
        if self.large_context < self.min_context || self.large_context > MAX_CONTEXT {
            return Err(bad("large_context", "from min_context to 4096", self.large_context));
        }
        if self.queries < 1 || self.queries > MAX_CONTEXT {
            return Err(bad("queries", "from 1 to 4096", self.queries));
        }
        if !(0.0..=1.0).contains(&self.large_share) {
            return Err(TfmError::BadConfig {
                field: "large_share",
                expected: "within [0, 1]",
                got: self.large_share.to_string(),
            });
        }
        Ok(())
    }
}

/// The generator of slice `index` under `seed`.
pub(crate) fn generator(seed: u64, index: u64) -> ChaCha20Rng {
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    rng.set_stream(index);
    rng
}

/// Draws `tables` tables that share their sizes. Equal generators give equal tables.
pub fn draw(config: &PriorConfig, tables: usize, rng: &mut ChaCha20Rng) -> Tables {
    let columns = rng.random_range(config.min_columns..=config.max_columns);
    let most = if rng.random_bool(config.large_share) { config.large_context } else { config.max_context };
    let context = log_uniform(rng, config.min_context as f32, most as f32).round() as usize;
    draw_sized(tables, columns, context, config.queries, rng)
}

/// Draws tables of the given sizes.
pub(crate) fn draw_sized(
    tables: usize,
    columns: usize,
    context: usize,
    queries: usize,
    rng: &mut ChaCha20Rng,
) -> Tables {
    let rows = context + queries;
    let mut all = Tables {
        tables,
        rows,
        columns,
        context,
        values: Vec::with_capacity(tables * rows * columns),
        labels: Vec::with_capacity(tables * rows),
        texts: None,
    };
    while all.labels.len() < tables * rows {
        let Some((values, labels)) = table(columns, context, rows, rng) else { continue };
        all.values.extend(values);
        all.labels.extend(labels);
    }
    all
}

/// One table `(rows, columns)` with labels, or nothing if the draw came out degenerate.
fn table(columns: usize, context: usize, rows: usize, rng: &mut ChaCha20Rng) -> Option<(Vec<f32>, Vec<u8>)> {
    // Rows beyond the table stand for the release that category codes come from in serving.
    let release = if rng.random_bool(0.5) { rng.random_range(200..=900) } else { 0 };
    let total = rows + release;
    let mut nodes = structure(columns, total, rng);
    let target = label_node(&mut nodes, columns, rng);
    let labels = labels(&target, rng);
    let minority = |range: std::ops::Range<usize>| {
        let ones = labels.get(range.clone()).map_or(0, |l| l.iter().filter(|&&v| v == 1).count());
        ones.min(range.len() - ones)
    };
    if minority(0..context) < 2 {
        return None;
    }
    let fit = if release > 0 { rows..total } else { 0..context };
    let mut shown: Vec<Vec<f32>> = Vec::with_capacity(columns);
    let mut nodes = nodes.into_iter();
    while shown.len() < columns {
        let node = nodes.next().unwrap_or_else(|| (0..total).map(|_| normal(rng)).collect());
        for column in observe(node, &labels, fit.clone(), release == 0, rng) {
            if shown.len() < columns {
                shown.push(column);
            }
        }
    }
    shown.shuffle(rng);
    let mut values = vec![0f32; rows * columns];
    for (j, column) in shown.iter_mut().enumerate() {
        standardise(column, fit.clone());
        if rng.random_bool(0.15) {
            hide(column, rng);
        }
        for (i, v) in column.iter().take(rows).enumerate() {
            values[i * columns + j] = *v;
        }
    }
    values.iter().all(|v| v.is_finite()).then(|| (values, labels[..rows].to_vec()))
}

/// Nodes of a random structural model, each a vector over all rows, in random or causal order.
fn structure(columns: usize, total: usize, rng: &mut ChaCha20Rng) -> Vec<Vec<f32>> {
    let count = rng.random_range(1..=columns.max(2));
    let causes = causes(count, total, rng);
    let depth = rng.random_range(1..=4);
    let width = rng.random_range(count.max(4)..=(4 + 3 * columns).max(count + 4)).min(48);
    let noise = 10f32.powf(rng.random_range(-3.0..-0.3));
    let trees = rng.random_bool(0.35);
    let density = rng.random_range(0.15..1.0f64);
    let mut layer = causes.clone();
    let mut nodes = Vec::new();
    for _ in 0..depth {
        let activation = Activation::draw(rng);
        let gain = *pick(&[0.5, 1.0, 1.0, 2.0], rng);
        let mut next = Vec::with_capacity(width);
        for _ in 0..width {
            let mut node =
                if trees { tree(&layer, rng) } else { dense(&layer, density, activation, gain, rng) };
            node.iter_mut().for_each(|v| *v += noise * normal(rng));
            next.push(node);
        }
        nodes.extend(next.iter().cloned());
        layer = next;
    }
    if rng.random_bool(0.45) {
        nodes.splice(0..0, causes);
    }
    // Causal order keeps related nodes together; the label is the last node.
    let last = nodes.pop();
    if rng.random_bool(0.65) {
        nodes.shuffle(rng);
    } else {
        let by = rng.random_range(0..nodes.len().max(1));
        nodes.rotate_left(by);
    }
    nodes.extend(last);
    nodes
}

fn causes(count: usize, total: usize, rng: &mut ChaCha20Rng) -> Vec<Vec<f32>> {
    let kind = rng.random_range(0..10);
    let mut causes: Vec<Vec<f32>> =
        (0..count)
            .map(|_| {
                let spread = if kind >= 7 { rng.random_range(0.0f32..2.0).exp() } else { 1.0 };
                (0..total)
                    .map(|_| {
                        if (4..7).contains(&kind) {
                            rng.random_range(-1.0..1.0)
                        } else {
                            spread * normal(rng)
                        }
                    })
                    .collect()
            })
            .collect();
    if rng.random_bool(0.35) {
        let groups = rng.random_range(2..=6);
        let scale = rng.random_range(0.5..3.0);
        let centres: Vec<f32> = (0..groups * count).map(|_| scale * normal(rng)).collect();
        let member: Vec<usize> = (0..total).map(|_| rng.random_range(0..groups)).collect();
        for (c, cause) in causes.iter_mut().enumerate() {
            for (v, g) in cause.iter_mut().zip(&member) {
                *v += centres[g * count + c];
            }
        }
    }
    causes
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
    let mut used = false;
    for (k, input) in layer.iter().enumerate() {
        let forced = !used && k + 1 == layer.len();
        if rng.random_bool(density) || forced {
            used = true;
            let weight = normal(rng);
            for (o, v) in node.iter_mut().zip(input) {
                *o += weight * v;
            }
        }
    }
    normalise(&mut node);
    let shift = 0.5 * normal(rng);
    for v in &mut node {
        *v = activation.apply(*v * gain + shift);
    }
    node
}

/// An oblivious tree: the same random comparison per level for all rows.
fn tree(layer: &[Vec<f32>], rng: &mut ChaCha20Rng) -> Vec<f32> {
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
    let values: Vec<f32> = (0..1usize << depth).map(|_| normal(rng)).collect();
    leaf.iter().map(|&l| values[l]).collect()
}

/// Takes the label's node out, sometimes as a noisy sum of several nodes that stay visible.
fn label_node(nodes: &mut Vec<Vec<f32>>, columns: usize, rng: &mut ChaCha20Rng) -> Vec<f32> {
    let mut target = nodes.pop().unwrap_or_default();
    if rng.random_bool(0.4) {
        // A sum of some visible columns, as in many business tables.
        normalise(&mut target);
        let own = rng.random_range(0.0..1.0);
        target.iter_mut().for_each(|v| *v *= own);
        let visible = columns.min(nodes.len());
        for node in nodes.iter().take(visible) {
            if rng.random_bool(0.5) {
                let mut part = node.clone();
                normalise(&mut part);
                let weight = normal(rng);
                for (t, v) in target.iter_mut().zip(&part) {
                    *t += weight * v;
                }
            }
        }
    }
    normalise(&mut target);
    if rng.random_bool(0.7) {
        let noise = log_uniform(rng, 0.1, 3.0);
        target.iter_mut().for_each(|v| *v += noise * normal(rng));
    }
    target
}

/// Two classes by a threshold; the smaller one has a share log-uniform in [0.02, 0.5].
fn labels(target: &[f32], rng: &mut ChaCha20Rng) -> Vec<u8> {
    let share = log_uniform(rng, 0.02, 0.5);
    let mut sorted = target.to_vec();
    sorted.sort_by(f32::total_cmp);
    let at = ((1.0 - share) * sorted.len() as f32) as usize;
    let threshold = sorted.get(at.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0);
    let flip = rng.random_bool(0.5);
    let slip = if rng.random_bool(0.2) { rng.random_range(0.0..0.15) * f64::from(share) } else { 0.0 };
    target.iter().map(|v| u8::from(((*v >= threshold) ^ flip) ^ rng.random_bool(slip))).collect()
}

/// What a node looks like as one or two model columns.
fn observe(
    mut node: Vec<f32>,
    labels: &[u8],
    fit: std::ops::Range<usize>,
    own_context: bool,
    rng: &mut ChaCha20Rng,
) -> Vec<Vec<f32>> {
    let kind: f64 = rng.random();
    if kind < 0.06 {
        node = (0..node.len()).map(|_| normal(rng)).collect();
    }
    if kind < 0.30 {
        let levels = if rng.random_bool(0.25) { rng.random_range(9..=40) } else { rng.random_range(2..=8) };
        return categories(&node, levels, labels, fit, own_context, rng);
    }
    if kind < 0.42 {
        normalise(&mut node);
        let power = rng.random_range(0.3..1.5);
        let logged = rng.random_bool(0.6);
        for v in &mut node {
            let heavy = (v.clamp(-4.0, 4.0) * power).exp();
            *v = if logged { (10.0 * heavy).ln_1p() } else { heavy };
        }
    } else if kind < 0.52 {
        normalise(&mut node);
        let steps = rng.random_range(1.0..5.0f32);
        node.iter_mut().for_each(|v| *v = (*v * steps).round());
    }
    vec![node]
}

/// Cuts a node into levels and codes them by smoothed label log-odds; many levels add a log-frequency column.
fn categories(
    node: &[f32],
    levels: usize,
    labels: &[u8],
    fit: std::ops::Range<usize>,
    own_context: bool,
    rng: &mut ChaCha20Rng,
) -> Vec<Vec<f32>> {
    let mut cuts: Vec<f32> = (1..levels).map(|_| node[rng.random_range(0..node.len())]).collect();
    cuts.sort_by(f32::total_cmp);
    // Shuffled bins: levels have no order; several bins may share a level's name.
    let mut names: Vec<usize> = (0..levels).collect();
    names.shuffle(rng);
    let stray = if rng.random_bool(0.3) { rng.random_range(0.0..0.5) } else { 0.0 };
    let codes: Vec<usize> = node
        .iter()
        .map(|v| {
            if rng.random_bool(stray) {
                rng.random_range(0..levels)
            } else {
                names[cuts.partition_point(|c| c < v).min(levels - 1)]
            }
        })
        .collect();
    let mut counts = vec![[0f64; 2]; levels];
    for i in fit.clone() {
        counts[codes[i]][usize::from(labels[i])] += 1.0;
    }
    let totals = counts.iter().fold([0f64; 2], |sum, c| [sum[0] + c[0], sum[1] + c[1]]);
    let column = codes.iter().enumerate().map(|(i, &code)| {
        let [mut zero, mut one] = counts[code];
        if own_context && fit.contains(&i) {
            if labels[i] == 1 { one -= 1.0 } else { zero -= 1.0 }
        }
        log_odds(zero, one, totals[0], totals[1]) as f32
    });
    let mut columns = vec![column.collect::<Vec<_>>()];
    if levels > crate::table::FREQUENCY_ABOVE_LEVELS {
        let frequency = |code: &usize| (counts[*code][0] + counts[*code][1] + 1.0).ln() as f32;
        columns.push(codes.iter().map(frequency).collect());
    }
    columns
}

/// Centres and scales by the rows of `fit`, clips to [`crate::table::CLIP`].
fn standardise(column: &mut [f32], fit: std::ops::Range<usize>) {
    let sample = &column[fit];
    let n = sample.len() as f32;
    let mean = sample.iter().sum::<f32>() / n;
    let var = sample.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / n;
    let inverse = 1.0 / (var.sqrt() + 1e-6);
    for v in column.iter_mut() {
        *v = ((*v - mean) * inverse).clamp(-crate::table::CLIP, crate::table::CLIP);
    }
}

/// Replaces some cells by 0, the standardised mean: at random, or more often for large values.
fn hide(column: &mut [f32], rng: &mut ChaCha20Rng) {
    let share = rng.random_range(0.02..0.5f64);
    let by_value = rng.random_bool(0.3);
    for v in column.iter_mut() {
        let p = if by_value && *v > 0.5 { (2.0 * share).min(0.9) } else { share };
        if rng.random_bool(p) {
            *v = 0.0;
        }
    }
}

fn normalise(node: &mut [f32]) {
    let n = node.len() as f32;
    let mean = node.iter().sum::<f32>() / n;
    let var = node.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / n;
    let inverse = 1.0 / (var.sqrt() + 1e-6);
    for v in node.iter_mut() {
        *v = (*v - mean) * inverse;
    }
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
        use Activation::{
            Absolute, Bump, FastSine, Identity, Leaky, Log, Relu, Sigmoid, Sign, Sine, Square, Tanh,
        };
        *pick(
            &[
                Tanh, Relu, Sine, FastSine, Identity, Identity, Absolute, Square, Sign, Bump, Leaky, Sigmoid,
                Log,
            ],
            rng,
        )
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

fn pick<'a, T>(choices: &'a [T], rng: &mut ChaCha20Rng) -> &'a T {
    &choices[rng.random_range(0..choices.len())]
}

fn log_uniform(rng: &mut ChaCha20Rng, low: f32, high: f32) -> f32 {
    if high <= low { low } else { rng.random_range(low.ln()..=high.ln()).exp() }
}

/// Most columns the prior draws.
pub const MAX_COLUMNS: usize = 128;
/// Most context rows the prior draws.
pub const MAX_CONTEXT: usize = 4096;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{MAX_COLUMNS, PriorConfig, draw, generator};

    #[test]
    fn equal_seeds_give_equal_finite_tables_with_both_classes() {
        let config = PriorConfig::default();
        let mut minority = Vec::new();
        for index in 0..40 {
            let a = draw(&config, 2, &mut generator(5, index));
            assert_eq!(a, draw(&config, 2, &mut generator(5, index)));
            assert!(a.values.iter().all(|v| v.is_finite() && v.abs() <= crate::table::CLIP));
            for labels in a.labels.chunks_exact(a.rows) {
                let ones = labels[..a.context].iter().filter(|&&l| l == 1).count();
                assert!(ones >= 2 && a.context - ones >= 2);
                minority.push(ones.min(a.context - ones) as f64 / a.context as f64);
            }
        }
        assert_ne!(draw(&config, 1, &mut generator(5, 0)), draw(&config, 1, &mut generator(6, 0)));
        // Rare classes are part of the prior: over 80 tables some are below 8 % and some above 35 %.
        assert!(minority.iter().any(|&m| m < 0.08) && minority.iter().any(|&m| m > 0.35));
    }

    /// A nearest-neighbour vote predicts better than chance, so columns carry the label.
    #[test]
    fn columns_carry_the_label() {
        let (mut scores, mut tables) = (0.0, 0);
        for index in 0..60 {
            let t = draw(
                &PriorConfig { max_context: 200, ..PriorConfig::default() },
                1,
                &mut generator(7, index),
            );
            let row = |i: usize| &t.values[i * t.columns..(i + 1) * t.columns];
            let votes: Vec<f64> = (t.context..t.rows)
                .map(|q| {
                    let mut near: Vec<(f32, u8)> = (0..t.context)
                        .map(|c| {
                            let gap = row(q).iter().zip(row(c)).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
                            (gap, t.labels[c])
                        })
                        .collect();
                    near.sort_by(|a, b| a.0.total_cmp(&b.0));
                    near.iter().take(9).map(|n| f64::from(n.1)).sum()
                })
                .collect();
            if let Some(auc) = crate::metrics::roc_auc(&votes, &t.labels[t.context..]) {
                scores += auc;
                tables += 1;
            }
        }
        let mean = scores / f64::from(tables);
        assert!((0.58..0.9).contains(&mean), "mean AUC {mean}");
    }

    #[test]
    fn limits_hold_at_one_above() {
        let config = PriorConfig { max_columns: MAX_COLUMNS, ..PriorConfig::default() };
        assert!(config.check().is_ok());
        let config = PriorConfig { max_columns: MAX_COLUMNS + 1, ..PriorConfig::default() };
        assert!(config.check().is_err());
        assert!(PriorConfig { large_share: f64::NAN, ..PriorConfig::default() }.check().is_err());
    }
}
