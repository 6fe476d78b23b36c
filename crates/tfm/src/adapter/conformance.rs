//! What every kind of adapter must keep: tests over all kinds, on tiny models.
//!
//! The reference for a prediction is a model whose weights are changed by the textbook formula, entry by entry, and
//! that query rows alone go through; the references for gradients are central differences of the served loss and rows
//! taken one at a time.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use super::{Adapter, Kind, core::Core, frozen_lora::draws};
use crate::{
    context::{
        Context,
        tests::{adapter_of, model, model_of, table},
    },
    error::TfmError,
    gradient::{Clip, UnitGroup, log_loss},
    model::{
        Model,
        config::ModelConfig,
        variant::{FeatureGroup, Ssmax, Variant},
    },
    table::EncodedTable,
};

const KINDS: [Kind; 7] = [
    Kind::FeatureTokens,
    Kind::Head,
    Kind::Lora { rank: 1 },
    Kind::Lora { rank: 3 },
    Kind::FrozenLora { rank: 2, seed: 9 },
    Kind::Core { rank: 2 },
    Kind::Core { rank: 5 },
];

/// Models whose slots are several columns, blocks of columns, single columns, and one whose norms have no bias.
fn models() -> Vec<Model> {
    let blocks = Variant { col_feature_group: FeatureGroup::Valid, ..Variant::default() };
    [Variant::default(), blocks, Variant::first(), Variant::regressor()].map(model_of).into()
}

fn context(model: &Model, columns: usize) -> Context {
    Context::build(model, &table(40, columns, 3)).unwrap()
}

fn gradients(context: &Context, rows: &EncodedTable, at: &Adapter) -> Vec<f32> {
    let prepared = context.prepare(rows, at).unwrap();
    context.row_gradients(&prepared, at).unwrap().flat_map(|chunk| chunk.unwrap().gradients).collect()
}

fn worst(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
}

#[test]
fn as_it_starts_it_is_the_base_to_the_last_bit() {
    for (model, columns) in models().iter().zip([4, 5, 3, 6]) {
        let (context, queries) = (context(model, columns), table(20, columns, 4));
        let base = context.logits(&queries, None).unwrap();
        for kind in KINDS {
            let keys = context.column_keys();
            let initial = Adapter::initial(kind, model, keys).unwrap();
            assert_eq!(context.logits(&queries, Some(&initial)).unwrap(), base, "{kind:?}");
            let moved = adapter_of(model, kind, columns, 5);
            assert!(worst(&context.logits(&queries, Some(&moved)).unwrap(), &base) > 1e-3, "{kind:?}");
        }
    }
}

/// `left (n, k) . right (k, m)`.
fn product(left: &[f32], right: &[f32], inner: usize) -> Vec<f32> {
    let (n, m) = (left.len() / inner, right.len() / inner);
    let entry = |i: usize, j: usize| (0..inner).map(|k| left[i * inner + k] * right[k * m + j]).sum();
    (0..n * m).map(|at| entry(at / m, at % m)).collect()
}

/// The model with an adapter's change added to its own tensors.
fn merged(model: &Model, adapter: &Adapter) -> Model {
    let (config, values) = (model.config(), adapter.values());
    let width = config.row_width();
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)> = model
        .tensors()
        .iter()
        .map(|(name, t)| (name.clone(), (t.dims().to_vec(), t.flatten_all().unwrap().to_vec1().unwrap())))
        .collect();
    let mut add = |name: &str, first: usize, addend: &[f32]| {
        let tensor = &mut tensors.get_mut(name).unwrap().1;
        tensor[first..first + addend.len()].iter_mut().zip(addend).for_each(|(t, a)| *t += a);
    };
    let kind = adapter.layout().kind;
    let core = match kind {
        Kind::Core { rank } => Some(Core::new(model, rank).unwrap()),
        _ => None,
    };
    // Queries come first in the input projection; `up . down` is added to their weight.
    let mut add_queries = |block: usize, up: &[f32], down: &[f32], rank: usize| {
        let name = format!("icl_predictor.tf_icl.blocks.{block}.attn.in_proj_weight");
        add(&name, 0, &product(up, down, rank));
    };
    let part = |at: usize| &values[at * adapter.layout().width..][..adapter.layout().width];
    for block in 0..config.icl_num_blocks {
        match kind {
            Kind::Lora { rank } => add_queries(block, part(2 * block + 1), part(2 * block), rank),
            Kind::FrozenLora { rank, seed } => {
                add_queries(
                    block,
                    part(block),
                    &draws(seed, config.icl_num_blocks, rank, width)[block],
                    rank,
                );
            }
            Kind::Core { rank } => {
                let fixed = &core.as_ref().unwrap().directions()[block];
                add_queries(block, &product(&fixed.left, part(block), rank), &fixed.right, rank);
            }
            Kind::FeatureTokens | Kind::Head => {}
        }
    }
    if kind == Kind::Head {
        let biased = !config.variant.bias_free_ln;
        add("icl_predictor.ln.weight", 0, &values[..width]);
        if biased {
            add("icl_predictor.ln.bias", 0, &values[width..2 * width]);
        }
        let margin = &values[if biased { 2 * width } else { width }..];
        let half = |sign: f32| margin.iter().map(|v| sign * 0.5 * v).collect::<Vec<f32>>();
        add("icl_predictor.decoder.2.weight", 0, &half(-1.0));
        add("icl_predictor.decoder.2.weight", 2 * width, &half(1.0));
    }
    let tensors = tensors
        .into_iter()
        .map(|(name, (shape, values))| (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap()))
        .collect();
    Model::from_tensors(config, tensors).unwrap()
}

/// Predictions with an adapter are those of changed weights, which the context doesn't go through.
#[test]
fn merged_weights_predict_as_base_and_adapter_do() {
    for (model, columns) in models().iter().zip([4, 5, 3, 6]) {
        let queries = table(30, columns, 4);
        for kind in KINDS.into_iter().filter(|kind| *kind != Kind::FeatureTokens) {
            let adapter = adapter_of(model, kind, columns, 5);
            let with = context(model, columns).logits(&queries, Some(&adapter)).unwrap();
            let twin = context(model, columns).with_query_weights(merged(model, &adapter)).unwrap();
            let gap = worst(&with, &twin.logits(&queries, None).unwrap());
            assert!(gap < 1e-4, "{kind:?}: {gap}");
        }
    }
}

/// Feature tokens change cells, not weights: here each cell gets the deltas of its columns, one by one.
#[test]
fn feature_tokens_predict_as_changed_cells_do() {
    for (model, columns) in models().iter().zip([4, 5, 2, 7]) {
        let (context, queries) = (context(model, columns), table(30, columns, 4));
        let adapter = adapter_of(model, Kind::FeatureTokens, columns, 5);
        let (width, grouping) = (model.config().embed_dim, model.config().variant.grouping());
        let initial = Adapter::initial(Kind::FeatureTokens, model, context.column_keys()).unwrap();
        let mut prepared = context.prepare(&queries, &initial).unwrap();
        let slots = grouping.slots(columns);
        for cells in prepared.views_mut() {
            assert_eq!(cells.len(), queries.rows * slots * width);
            for (at, cell) in cells.chunks_exact_mut(width).enumerate() {
                for column in grouping.members(at % slots, columns).flatten() {
                    let delta = &adapter.values()[column * width..][..width];
                    cell.iter_mut().zip(delta).for_each(|(c, d)| *c += d);
                }
            }
        }
        let expected = context.prepared_logits(&prepared, &initial);
        let gap = worst(&context.logits(&queries, Some(&adapter)).unwrap(), &expected);
        assert!(gap < 1e-4, "{gap}");
    }
}

#[test]
fn files_keep_adapter_and_digest() {
    for model in models() {
        for kind in KINDS {
            let adapter = adapter_of(&model, kind, 4, 5);
            let bytes = adapter.to_safetensors("digest").unwrap();
            let again = adapter_of(&model, kind, 4, 5).to_safetensors("digest").unwrap();
            assert_eq!(bytes, again, "{kind:?}");
            let read = Adapter::from_safetensors(&bytes, "digest", &model).unwrap();
            assert_eq!((read.layout(), read.values()), (adapter.layout(), adapter.values()));
            assert_eq!(read.to_safetensors("digest").unwrap(), bytes);
            let queries = table(7, 4, 4);
            let context = context(&model, 4);
            let logits = |adapter: &Adapter| context.logits(&queries, Some(adapter)).unwrap();
            assert_eq!(logits(&read), logits(&adapter), "{kind:?}");
            let another = adapter.with_values(vec![0.5; adapter.dimension()]).unwrap();
            assert_ne!(another.to_safetensors("digest").unwrap(), bytes);
        }
    }
}

/// Compares gradients with central differences of the log loss of the served prediction; returns the largest compared.
fn check_gradients(context: &Context, columns: usize, at: &Adapter) -> f64 {
    let rows = table(3, columns, 8);
    let analytic = gradients(context, &rows, at);
    let size = at.dimension();
    let losses = |entry: usize, by: f64| -> Vec<f64> {
        let mut step = vec![0f64; size];
        step[entry] = by;
        let mut moved = at.clone();
        moved.add_scaled(&step, 1.0).unwrap();
        let logits = context.logits(&rows, Some(&moved)).unwrap();
        logits.iter().zip(&rows.labels).map(|(logit, label)| log_loss(*logit, label.unwrap())).collect()
    };
    let mut seen = 0f64;
    for entry in (0..size).step_by(1 + size / 40) {
        for (row, (up, down)) in losses(entry, 0.01).iter().zip(losses(entry, -0.01)).enumerate() {
            let numeric = (up - down) / 0.02;
            let exact = f64::from(analytic[row * size + entry]);
            assert!(
                (numeric - exact).abs() < 2e-4 + 0.01 * exact.abs(),
                "{:?} row {row} entry {entry}: {numeric} {exact}",
                at.layout().kind
            );
            seen = seen.max(exact.abs());
        }
    }
    seen
}

#[test]
fn gradients_match_central_differences_of_the_served_loss() {
    for (model, columns) in models().iter().zip([6, 5, 3, 2]) {
        let context = context(model, columns);
        for kind in KINDS {
            let seen = check_gradients(&context, columns, &adapter_of(model, kind, columns, 9));
            assert!(seen > 1e-3, "{kind:?}: all compared entries are near 0");
        }
    }
}

/// A gradient by cells goes through whatever scales the queries: a number a head, networks of the context's size and of the
/// query.
#[test]
fn gradients_go_through_every_scaling_of_queries() {
    for icl_ssmax in [Ssmax::None, Ssmax::Heads, Ssmax::Mlp, Ssmax::MlpElementwise, Ssmax::QueryMlp] {
        let model = model_of(Variant { icl_ssmax, ..Variant::default() });
        let at = adapter_of(&model, Kind::FeatureTokens, 4, 9);
        let seen = check_gradients(&context(&model, 4), 4, &at);
        assert!(seen > 1e-3, "{icl_ssmax:?}: all compared entries are near 0");
    }
}

/// A row's gradient is its own: alone, among others, and as its part of the plain sum.
#[test]
fn batched_gradients_equal_one_row_at_a_time() {
    let (model, columns) = (model(), 5);
    let (context, rows) = (context(&model, columns), table(200, columns, 6));
    for kind in KINDS {
        let at = adapter_of(&model, kind, columns, 7);
        let size = at.dimension();
        let all = gradients(&context, &rows, &at);
        for i in (0..rows.rows).step_by(23) {
            let one = gradients(&context, &rows.take(&[i]), &at);
            // To the last bit: what noise hides is one unit's gradient, and no rounding of other rows' beside it.
            assert_eq!(one, all[i * size..(i + 1) * size], "{kind:?} row {i}");
        }
        let prepared = context.prepare(&rows, &at).unwrap();
        let mut sum = vec![0f64; size];
        for row in all.chunks_exact(size) {
            sum.iter_mut().zip(row).for_each(|(s, g)| *s += f64::from(*g));
        }
        let gap = worst(&sum, &context.summed_gradient(&prepared, &at).unwrap());
        assert!(gap < 1e-3, "{kind:?}: {gap}");
        let losses = context.losses(&prepared, &at).unwrap();
        let logits = context.logits(&rows, Some(&at)).unwrap();
        let served: Vec<f64> =
            logits.iter().zip(&rows.labels).map(|(l, y)| log_loss(*l, y.unwrap())).collect();
        assert!(worst(&losses, &served) < 1e-5, "{kind:?}");
        // Clipped sums have the length of the adapter, with a bound that no unit exceeds.
        let units: Vec<UnitGroup> = (0..200).map(|row| UnitGroup { rows: vec![row] }).collect();
        let sum = context.clipped_sum(&prepared, &at, &units[..1], Clip::new(0.01, 1048576.0).unwrap());
        let square: i64 = sum.unwrap().values.iter().map(|v| v * v).sum();
        assert!((1..=10_485 * 10_485).contains(&square), "{kind:?}: {square}");
    }
}

/// Adapters refuse contexts of models with other sizes by name.
#[test]
fn another_base_is_refused() {
    use rand::SeedableRng;
    let wider = ModelConfig { embed_dim: 16, ..ModelConfig::tiny() };
    let other = Model::random(&wider, &mut rand_chacha::ChaCha20Rng::seed_from_u64(1)).unwrap();
    let context = Context::build(&other, &table(10, 4, 3)).unwrap();
    for kind in KINDS {
        let adapter = adapter_of(&model(), kind, 4, 5);
        let refused = context.logits(&table(2, 4, 4), Some(&adapter));
        assert!(matches!(refused, Err(TfmError::Mismatch { .. })), "{kind:?}");
    }
}
