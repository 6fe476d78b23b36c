//! Loss on query rows, and the fixed synthetic tables that runs are compared on.

use candle_core::{D, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::PretrainConfig;
use crate::{
    error::TfmError,
    metrics::roc_auc,
    model::{Model, Tables},
    prior::{self, PriorConfig},
};

/// Figures on the fixed synthetic validation tables.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Validation {
    /// Mean log loss over all query rows.
    pub loss: f64,
    /// Mean area under the ROC curve over two-class tables whose queries have both classes.
    pub auc: f64,
}
/// Mean cross-entropy over all query rows, among the classes that the tables have, as serving reads the scores.
pub(super) fn query_loss(model: &Model, tables: &Tables) -> Result<Tensor, TfmError> {
    let classes = usize::from(tables.labels.iter().copied().max().unwrap_or(0)).max(1) + 1;
    let scores = model.scores(tables)?.flatten(0, 1)?.narrow(1, 0, classes)?.contiguous()?;
    let targets: Vec<u32> = tables
        .labels
        .chunks_exact(tables.rows)
        .flat_map(|labels| labels[tables.context..].iter().map(|&l| u32::from(l)))
        .collect();
    let count = targets.len();
    let targets = Tensor::from_vec(targets, (count, 1), &Device::Cpu)?;
    let logs = candle_nn::ops::log_softmax(&scores, D::Minus1)?;
    Ok(logs.gather(&targets, 1)?.mean_all()?.neg()?)
}

/// The fixed validation tables of a run: the same for all seeds with equal prior ranges.
pub(super) fn tables(config: &PretrainConfig) -> Vec<Tables> {
    let prior = PriorConfig { large_share: 0.0, real_share: 0.0, ..config.prior.clone() };
    (0..VALIDATION_SLICES)
        .map(|i| prior::draw(&prior, 2, &mut prior::generator(VALIDATION_SEED, i)))
        .collect()
}

pub(super) fn validate(model: &Model, slices: &[Tables]) -> Result<Validation, TfmError> {
    let (mut loss, mut auc, mut scored) = (0f64, 0f64, 0f64);
    for tables in slices {
        loss += f64::from(query_loss(model, tables)?.to_scalar::<f32>()?) / slices.len() as f64;
        let queries = tables.rows - tables.context;
        let classes = model.config().max_classes;
        let scores = model.forward(tables)?;
        for (scores, labels) in
            scores.chunks_exact(queries * classes).zip(tables.labels.chunks_exact(tables.rows))
        {
            if labels.iter().any(|l| *l > 1) {
                continue;
            }
            let margin: Vec<f64> = scores.chunks_exact(classes).map(|s| f64::from(s[1] - s[0])).collect();
            if let Some(value) = roc_auc(&margin, &labels[tables.context..]) {
                auc += value;
                scored += 1.0;
            }
        }
    }
    Ok(Validation { loss, auc: if scored > 0.0 { auc / scored } else { 0.5 } })
}
const VALIDATION_SEED: u64 = 0x7461_626d_6573_6800;
const VALIDATION_SLICES: u64 = 32;
