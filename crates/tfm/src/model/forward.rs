//! Inference on one table: class scores, also of more classes than one pass tells apart, or quantiles of a number.
//!
//! This path has no gradient and no cache; it is the one that is compared, stage by stage, with the public package.

use candle_core::{Device, Tensor};

use super::{
    Model,
    many::{Node, label_digits, radix_bases},
};
use crate::{error::TfmError, ops::math::softmax};

/// Sees an intermediate tensor under its name.
pub(crate) type Observe<'a> = &'a mut dyn FnMut(&str, &Tensor) -> Result<(), TfmError>;

/// Receives a stage's name, shape and values.
pub type Record<'a> = &'a mut dyn FnMut(&str, &[usize], Vec<f32>);

/// What the context rows are labelled with.
#[derive(Debug, Clone, PartialEq)]
pub enum Targets {
    /// Class indices below `classes`, one per context row. Indices without a row get probability 0.
    Classes {
        /// Number of classes, `K`; may exceed the model's `max_classes`.
        classes: usize,
        /// Class of each context row.
        labels: Vec<usize>,
    },
    /// Standardised numbers, one per context row.
    Values(Vec<f32>),
}

/// One table, context rows first.
#[derive(Debug, Clone, PartialEq)]
pub struct Task {
    /// Rows, `T = n + m`.
    pub rows: usize,
    /// Columns, `H`.
    pub columns: usize,
    /// Context rows, `n`.
    pub context: usize,
    /// Values `(T, H)`, preprocessed, finite.
    pub values: Vec<f32>,
    /// Labels of the context rows.
    pub targets: Targets,
}

impl Task {
    /// Query rows, `m`.
    #[must_use]
    pub fn queries(&self) -> usize {
        self.rows - self.context.min(self.rows)
    }

    fn check(&self, model: &Model) -> Result<(), TfmError> {
        let Self { rows, columns, context, .. } = *self;
        if columns == 0 || context == 0 || context >= rows {
            let got = format!("{columns} columns, {context} of {rows} rows as context");
            return Err(TfmError::mismatch("table sizes", "at least 1 of each and one query row", got));
        }
        let cells = rows.saturating_mul(columns);
        if cells > MAX_TASK_CELLS {
            return Err(TfmError::TooLarge { what: "table cells", got: cells, limit: MAX_TASK_CELLS });
        }
        if self.values.len() != cells {
            return Err(TfmError::mismatch("number of values", cells, self.values.len()));
        }
        if self.values.iter().any(|v| !v.is_finite()) {
            return Err(TfmError::mismatch("table values", "finite numbers", "a value that is not"));
        }
        let labels = match &self.targets {
            Targets::Classes { .. } if model.config().regression() => {
                return Err(TfmError::mismatch("targets", "numbers for a regression model", "classes"));
            }
            Targets::Values(_) if !model.config().regression() => {
                return Err(TfmError::mismatch("targets", "classes for a classifier", "numbers"));
            }
            Targets::Classes { classes, labels } => {
                if *classes > MAX_TASK_CLASSES {
                    let (got, limit) = (*classes, MAX_TASK_CLASSES);
                    return Err(TfmError::TooLarge { what: "classes", got, limit });
                }
                if let Some(label) = labels.iter().find(|label| *label >= classes) {
                    return Err(TfmError::mismatch("class index", format!("< {classes}"), label));
                }
                labels.len()
            }
            Targets::Values(values) => {
                if values.iter().any(|v| !v.is_finite()) {
                    return Err(TfmError::mismatch("targets", "finite numbers", "a value that is not"));
                }
                values.len()
            }
        };
        if labels == context { Ok(()) } else { Err(TfmError::mismatch("number of targets", context, labels)) }
    }
}

/// How much is computed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// What the outputs need.
    Outputs,
    /// All rows of all stages, at once.
    Everything,
}

impl Model {
    /// Outputs of the query rows, flattened: class scores `(m, K)` or quantiles `(m, Q)` as they come.
    ///
    /// With more classes than the model tells apart in one pass the scores are `0.9 * ln(p + 1e-6)` of the class
    /// tree's probabilities, so that a softmax at temperature 0.9 gives those probabilities back.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] or [`TfmError::TooLarge`] if the table doesn't fit the model.
    pub fn outputs(&self, task: &Task) -> Result<Vec<f32>, TfmError> {
        self.run(task, Extent::Outputs, &mut |_, _| Ok(()))
    }

    /// As [`Self::outputs`], where `record` gets every stage's activations: name, shape, values.
    ///
    /// Names: `col_block.i (slots, T, E)`, `col (T, slots, E)`, `row_block.i (T, C + slots, E)` with `(T, C, E)` for
    /// the last, `row (T, D)`, `icl_block.i (T, D)`, `decoder (m, outputs)`. With several label digits there is no
    /// `col_block`, with a class tree neither `icl_block` nor `decoder`, as these run more than once.
    ///
    /// # Errors
    /// As [`Self::outputs`].
    pub fn observed_outputs(&self, task: &Task, record: Record<'_>) -> Result<Vec<f32>, TfmError> {
        self.run(task, Extent::Everything, &mut |name, tensor| {
            let dims = tensor.dims();
            // Stages after the first carry a batch of one table.
            let dims = if name.starts_with("icl") || name == "decoder" || name == "row" {
                dims.get(1..).unwrap_or_default()
            } else {
                dims
            };
            record(name, dims, tensor.flatten_all()?.to_vec1()?);
            Ok(())
        })
    }

    fn run(&self, task: &Task, extent: Extent, observe: Observe<'_>) -> Result<Vec<f32>, TfmError> {
        task.check(self)?;
        let cells = self.task_cells(task, observe)?;
        observe("col", &cells)?;
        let vectors = match extent {
            Extent::Everything => self.parts.row.observed(&cells, observe)?,
            Extent::Outputs => {
                let mut vectors = Vec::new();
                for first in (0..task.rows).step_by(CHUNK_ROWS) {
                    let count = CHUNK_ROWS.min(task.rows - first);
                    vectors.push(self.parts.row.rows(&cells.narrow(0, first, count)?)?);
                }
                Tensor::cat(&vectors, 0)?
            }
        };
        let vectors = vectors.unsqueeze(0)?;
        observe("row", &vectors)?;
        match &task.targets {
            Targets::Values(values) => {
                let encoded = Tensor::from_slice(values, (1, task.context, 1), &Device::Cpu)?;
                let out = self.decoded(&vectors, &encoded, extent, observe)?;
                Ok(out.flatten_all()?.to_vec1()?)
            }
            Targets::Classes { classes, labels } if *classes <= self.config().max_classes => {
                let encoded = self.one_hot_indices(labels)?;
                let out = self.decoded(&vectors, &encoded, extent, observe)?;
                Ok(out.narrow(2, 0, *classes)?.flatten_all()?.to_vec1()?)
            }
            Targets::Classes { classes, labels } => {
                let probabilities = self.tree(&vectors.squeeze(0)?, labels, *classes)?;
                Ok(probabilities.into_iter().map(|p| SOFTMAX_TEMPERATURE * (p + TREE_FLOOR).ln()).collect())
            }
        }
    }

    /// Cells `(rows, slots, E)` after the column stage.
    fn task_cells(&self, task: &Task, observe: Observe<'_>) -> Result<Tensor, TfmError> {
        let column = &self.parts.column;
        let groups = column.groups(&task.values, 1, task.rows, task.columns)?;
        let input = column.input(&groups)?;
        let encodings = match &task.targets {
            _ if !column.sees_labels() => Vec::new(),
            Targets::Values(values) => {
                vec![Tensor::from_slice(values, (1, task.context, 1), &Device::Cpu)?]
            }
            Targets::Classes { classes, labels } => {
                let bases = radix_bases(*classes, self.config().max_classes);
                let digits: Vec<Vec<usize>> =
                    labels.iter().map(|label| label_digits(*label, &bases)).collect();
                (0..bases.len())
                    .map(|i| {
                        let digit: Vec<usize> = digits.iter().filter_map(|d| d.get(i).copied()).collect();
                        self.one_hot_indices(&digit)
                    })
                    .collect::<Result<_, _>>()?
            }
        };
        let embedded = match encodings.as_slice() {
            [] => column.observed(input, task.context, observe)?,
            [one] => column.observed(column.add_labels(input, one)?, task.context, observe)?,
            several => {
                let mut sum: Option<Tensor> = None;
                for encoded in several {
                    let cells = column.embed(column.add_labels(input.clone(), encoded)?, task.context)?;
                    sum = Some(match sum {
                        Some(sum) => (sum + cells)?,
                        None => cells,
                    });
                }
                let count = several.len() as f64;
                (sum.ok_or_else(|| TfmError::mismatch("label digits", "at least 1", 0))? / count)?
            }
        };
        Ok(column.output(embedded, &groups)?.transpose(0, 1)?.contiguous()?)
    }

    /// Decoder outputs `(1, m, outputs)` from row vectors `(1, rows, D)` and encoded labels.
    fn decoded(
        &self,
        vectors: &Tensor,
        encoded: &Tensor,
        extent: Extent,
        observe: Observe<'_>,
    ) -> Result<Tensor, TfmError> {
        let icl = &self.parts.icl;
        let (rows, context) = (vectors.dim(1)?, encoded.dim(1)?);
        let labels = icl.labels(encoded)?.pad_with_zeros(1, 0, rows - context)?;
        let labelled = (vectors + labels)?;
        let queries = match extent {
            Extent::Outputs => icl.queries(labelled, context)?,
            Extent::Everything => {
                icl.observed(labelled, context, observe)?.narrow(1, context, rows - context)?
            }
        };
        let out = self.parts.decoder.scores(&queries)?;
        observe("decoder", &out)?;
        Ok(out)
    }

    /// One-hot labels `(1, n, max_classes)`.
    fn one_hot_indices(&self, labels: &[usize]) -> Result<Tensor, TfmError> {
        let classes = self.config().max_classes;
        let mut one_hot = vec![0f32; labels.len() * classes];
        for (row, &label) in one_hot.chunks_exact_mut(classes).zip(labels) {
            if let Some(cell) = row.get_mut(label) {
                *cell = 1.0;
            }
        }
        Ok(Tensor::from_vec(one_hot, (1, labels.len(), classes), &Device::Cpu)?)
    }

    /// Probabilities `(m, classes)` of the class tree, from row vectors `(rows, D)` with the context first.
    fn tree(&self, vectors: &Tensor, labels: &[usize], classes: usize) -> Result<Vec<f32>, TfmError> {
        let (context, rows) = (labels.len(), vectors.dim(0)?);
        let queries = vectors.narrow(0, context, rows - context)?;
        let mut probabilities = vec![0f32; (rows - context) * classes];
        let mut open = vec![((0..context).collect::<Vec<usize>>(), vec![1f32; rows - context])];
        while let Some((members, weights)) = open.pop() {
            let mut present: Vec<usize> =
                members.iter().filter_map(|row| labels.get(*row).copied()).collect();
            present.sort_unstable();
            present.dedup();
            let leaf = present.len() <= self.config().max_classes;
            let node = Node::new(&present, self.config().max_classes);
            let groups: Vec<usize> =
                members.iter().filter_map(|row| labels.get(*row).and_then(|l| node.group_of(*l))).collect();
            let index: Vec<u32> = members.iter().map(|row| *row as u32).collect();
            let index = Tensor::from_vec(index, members.len(), &Device::Cpu)?;
            let known = vectors.index_select(&index, 0)?;
            let both = Tensor::cat(&[&known, &queries], 0)?.unsqueeze(0)?;
            let encoded = self.one_hot_indices(&groups)?;
            let scores = self.decoded(&both, &encoded, Extent::Outputs, &mut |_, _| Ok(()))?;
            let mut scores: Vec<f32> = scores.narrow(2, 0, node.groups.len())?.flatten_all()?.to_vec1()?;
            for (row, weight) in scores.chunks_exact_mut(node.groups.len()).zip(&weights) {
                softmax::<false>(row, 1.0 / SOFTMAX_TEMPERATURE);
                row.iter_mut().for_each(|p| *p *= weight);
            }
            for (i, group) in node.groups.iter().enumerate() {
                let share: Vec<f32> = scores.iter().skip(i).step_by(node.groups.len()).copied().collect();
                match group.as_slice() {
                    [class] if leaf => {
                        for (row, p) in probabilities.chunks_exact_mut(classes).zip(share) {
                            if let Some(cell) = row.get_mut(*class) {
                                *cell = p;
                            }
                        }
                    }
                    _ => {
                        let within =
                            members.iter().zip(&groups).filter(|(_, g)| **g == i).map(|(row, _)| *row);
                        open.push((within.collect(), share));
                    }
                }
            }
        }
        Ok(probabilities)
    }
}

/// Temperature that the published classifiers are used at.
pub const SOFTMAX_TEMPERATURE: f32 = 0.9;
/// Added to a tree's probability before its logarithm.
pub const TREE_FLOOR: f32 = 1e-6;
/// Most cells (rows times columns) of one table.
pub const MAX_TASK_CELLS: usize = 1 << 24;
/// Most classes of one table.
pub const MAX_TASK_CLASSES: usize = 4096;
/// Rows that the row stage computes together, which bounds memory.
const CHUNK_ROWS: usize = 256;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha20Rng;

    use super::{MAX_TASK_CELLS, MAX_TASK_CLASSES, Targets, Task};
    use crate::{
        error::TfmError,
        model::{
            Model, Tables,
            config::ModelConfig,
            variant::{FeatureGroup, Ssmax, Variant},
        },
    };

    fn model(variant: Variant, max_classes: usize) -> Model {
        let config = ModelConfig { max_classes, feature_text_dim: 0, variant, ..ModelConfig::tiny() };
        Model::random(&config, &mut ChaCha20Rng::seed_from_u64(5)).unwrap()
    }

    fn task(rows: usize, columns: usize, context: usize, classes: usize) -> Task {
        let mut rng = ChaCha20Rng::seed_from_u64(6);
        Task {
            rows,
            columns,
            context,
            values: (0..rows * columns).map(|_| rng.random_range(-2.0..2.0)).collect(),
            targets: Targets::Classes { classes, labels: (0..context).map(|i| i % classes).collect() },
        }
    }

    /// The observed and the plain path, and the training path where it applies, agree for every switch.
    #[test]
    fn paths_agree_for_every_variant() {
        let mut variants = vec![Variant::default(), Variant::first(), Variant::regressor()];
        for ssmax in [Ssmax::Heads, Ssmax::Mlp, Ssmax::MlpElementwise, Ssmax::QueryMlp] {
            let col_feature_group = FeatureGroup::Valid;
            variants.push(Variant {
                col_ssmax: ssmax,
                icl_ssmax: ssmax,
                col_feature_group,
                ..Variant::default()
            });
        }
        for variant in variants {
            let (model, task) = (model(variant, 3), task(300, 5, 20, 3));
            let plain = model.outputs(&task).unwrap();
            let observed = model.observed_outputs(&task, &mut |_, _, _| ()).unwrap();
            let Targets::Classes { labels, .. } = &task.targets else { panic!("classes") };
            let mut padded: Vec<u8> = labels.iter().map(|l| *l as u8).collect();
            padded.resize(task.rows, 0);
            let (rows, columns, context) = (task.rows, task.columns, task.context);
            let values = task.values.clone();
            let tables = Tables { tables: 1, rows, columns, context, values, labels: padded, texts: None };
            let trained = model.forward(&tables).unwrap();
            let apart =
                |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert_eq!((plain.len(), observed.len()), (trained.len(), 280 * 3));
            assert!(apart(&plain, &observed) < 1e-5, "{variant:?}");
            assert!(apart(&plain, &trained) < 1e-5, "{variant:?}");
            assert!(plain.iter().any(|v| v.abs() > 1e-3));
        }
    }

    #[test]
    fn a_class_tree_gives_a_distribution_over_all_classes() {
        let model = model(Variant::default(), 3);
        let scores = model.outputs(&task(60, 4, 50, 11)).unwrap();
        assert_eq!(scores.len(), 10 * 11);
        for row in scores.chunks_exact(11) {
            let total: f32 = row.iter().map(|s| (s / 0.9).exp()).sum();
            assert!((total - 1.0).abs() < 1e-4, "{total}");
        }
    }

    #[test]
    fn unfit_tables_are_refused() {
        let model = model(Variant::default(), 3);
        let refused = |task: &Task| model.outputs(task).unwrap_err();
        let good = task(9, 2, 6, 3);
        assert!(model.outputs(&good).is_ok());
        let numbers = Task { targets: Targets::Values(vec![0.0; 6]), ..good.clone() };
        assert!(matches!(refused(&numbers), TfmError::Mismatch { what: "targets", .. }));
        let short = Task { targets: Targets::Classes { classes: 3, labels: vec![0; 5] }, ..good.clone() };
        assert!(matches!(refused(&short), TfmError::Mismatch { what: "number of targets", .. }));
        let outside = Task { targets: Targets::Classes { classes: 3, labels: vec![3; 6] }, ..good.clone() };
        assert!(matches!(refused(&outside), TfmError::Mismatch { what: "class index", .. }));
        let many = Targets::Classes { classes: MAX_TASK_CLASSES + 1, labels: vec![3; 6] };
        assert!(matches!(refused(&Task { targets: many, ..good.clone() }), TfmError::TooLarge { .. }));
        let large = Task { rows: MAX_TASK_CELLS + 1, columns: 1, ..good.clone() };
        assert!(matches!(refused(&large), TfmError::TooLarge { what: "table cells", .. }));
        let mut infinite = good.clone();
        infinite.values[3] = f32::INFINITY;
        assert!(matches!(refused(&infinite), TfmError::Mismatch { what: "table values", .. }));
        assert!(refused(&Task { context: 9, ..good }).to_string().contains("query row"));
    }
}
