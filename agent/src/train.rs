//! One domain's part in a round: per-unit gradients of the adapter on the query path, clipped and summed.
//!
//! Context, coding and weights come from published artefacts, which are differentially private already; the domain's own
//! rows enter as queries only. Whatever the rows are, the result has the descriptor's length.

use std::collections::BTreeMap;

use tabmesh_contract::batch::{TypedBatch, TypedColumn};
use tabmesh_contract::schema::FeatureSchema;
use tabmesh_federation::descriptor::RoundDescriptor;
use tabmesh_federation::id::Digest;
use tabmesh_federation::plan::Plan;
use tabmesh_tfm::adapter::FeatureTokens;
use tabmesh_tfm::context::Context;
use tabmesh_tfm::error::TfmError;
use tabmesh_tfm::gradient::{Clip, PreparedRows, UnitGroup};
use tabmesh_tfm::table::Coding;

use crate::publication::Artefacts;
use crate::work::WorkError;

/// Everything of a plan's rounds that doesn't change from round to round.
pub struct Trainer {
    artefacts: [Digest; 3],
    context: Context,
    rows: PreparedRows,
    units: Vec<UnitGroup>,
}

impl Trainer {
    /// Encodes the domain's rows and computes the part of the model that no adapter touches.
    ///
    /// # Errors
    /// [`WorkError`] if an artefact is missing, damaged or doesn't fit.
    pub fn new(
        artefacts: &Artefacts,
        descriptor: &RoundDescriptor,
        plan: &Plan,
        shared: &FeatureSchema,
        rows: &TypedBatch,
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
        let rows = context.prepare(&preprocessing.encode(&rows, Coding::OwnRow)?)?;
        Ok(Self {
            artefacts: [descriptor.base, descriptor.context, descriptor.preprocessing],
            units: units.into_values().map(|rows| UnitGroup { rows }).collect(),
            context,
            rows,
        })
    }

    /// Whether it was made from a descriptor's artefacts.
    #[must_use]
    pub fn fits(&self, descriptor: &RoundDescriptor) -> bool {
        self.artefacts == [descriptor.base, descriptor.context, descriptor.preprocessing]
    }

    /// The sum over units of clipped, integer gradients at the descriptor's adapter.
    ///
    /// # Errors
    /// [`WorkError::Model`] if the adapter doesn't fit the model.
    pub fn clipped_sum(&self, descriptor: &RoundDescriptor) -> Result<Vec<i64>, WorkError> {
        let width = descriptor.width as usize;
        let tokens =
            FeatureTokens::new(descriptor.adapter_keys.clone(), width, descriptor.adapter_values.clone())?;
        if self.context.column_keys() != descriptor.adapter_keys {
            let (expected, got) = (self.context.column_keys().join(","), descriptor.adapter_keys.join(","));
            return Err(TfmError::mismatch("adapter columns", expected, got).into());
        }
        let clip = Clip::new(descriptor.clip_norm, descriptor.scale as f64)?;
        Ok(self.context.clipped_sum(&self.rows, &tokens, &self.units, clip)?)
    }
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
