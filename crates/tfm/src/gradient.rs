//! Per-row gradients of the log loss by an adapter's values, and their clipped integer sum.
//!
//! Private rows go through the query path only: with a context of corpus rows a row's gradient is a function of that
//! row alone, so adding or removing a unit moves the sum by that unit's clipped gradient and nothing else. What comes
//! before the first point that the adapter changes is computed once per context; each round runs the rest of the query
//! path forward and back. The gradient is that of the served prediction, both views averaged, before clipping.

mod clip;

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

pub use self::clip::Clip;
use self::clip::{add_integers, square};
use crate::{
    adapter::{
        Adapter, Entry,
        path::{Applied, Played},
    },
    context::Context,
    error::TfmError,
    infer::back::{Entering, Passes, Readable, Trail},
    table::EncodedTable,
};

/// Rows with the part of their computation that no adapter of a kind changes. Holds private data; has no wire form.
pub struct PreparedRows {
    rows: usize,
    columns: usize,
    entry: Entry,
    labels: Vec<u8>,
    /// What enters at `entry`, row by row, of each view.
    views: Vec<Vec<f32>>,
    /// The context, as rows that enter there read it.
    readable: Arc<Readable>,
}

#[cfg(test)]
impl PreparedRows {
    /// What enters, view by view.
    pub(crate) fn views_mut(&mut self) -> &mut [Vec<f32>] {
        &mut self.views
    }
}

impl std::fmt::Debug for PreparedRows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PreparedRows").field("columns", &self.columns).finish_non_exhaustive()
    }
}

/// Gradients of some consecutive rows.
#[derive(Debug, Clone, PartialEq)]
pub struct GradientChunk {
    /// Index of the first row.
    pub first_row: usize,
    /// Gradients `(rows of the chunk, D)` in the order of the adapter's values.
    pub gradients: Vec<f32>,
    /// Log loss of each row.
    pub losses: Vec<f64>,
}

/// Rows of one privacy unit, as indices into the prepared rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitGroup {
    /// Row indices; at most the declared number per unit, chosen without looking at values.
    pub rows: Vec<usize>,
}

/// The sum of clipped gradients over units.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClippedSum {
    /// One integer for each of the adapter's values.
    pub values: Vec<i64>,
    /// Units whose gradient was within the clip norm. As private as the rows: it may leave with noise alone.
    pub within: u64,
    /// Units whose gradient was beyond it, or had an entry that isn't finite. As private.
    pub beyond: u64,
}

impl PreparedRows {
    /// The rows of some units alone, and those units by their indices there. A sum over them is the same, for less work.
    #[must_use]
    pub fn only(&self, units: &[UnitGroup]) -> (Self, Vec<UnitGroup>) {
        let mut kept: Vec<usize> = units.iter().flat_map(|unit| &unit.rows).copied().collect();
        kept.retain(|row| *row < self.rows);
        kept.sort_unstable();
        kept.dedup();
        let place = |row: &usize| kept.binary_search(row).ok();
        let units = units.iter().map(|unit| UnitGroup { rows: unit.rows.iter().filter_map(place).collect() });
        let taken = |all: &Vec<f32>| {
            let width = all.len() / self.rows.max(1);
            kept.iter().flat_map(|row| &all[row * width..(row + 1) * width]).copied().collect()
        };
        let rows = Self {
            rows: kept.len(),
            columns: self.columns,
            entry: self.entry,
            labels: kept.iter().map(|row| self.labels[*row]).collect(),
            views: self.views.iter().map(taken).collect(),
            readable: Arc::clone(&self.readable),
        };
        (rows, units.collect())
    }
}

impl Context {
    /// Computes what adapters of this one's kind leave as it is, of labelled rows, once for many rounds.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] if columns differ from the context's, a row has no label or there are more than two classes.
    pub fn prepare(&self, rows: &EncodedTable, adapter: &Adapter) -> Result<PreparedRows, TfmError> {
        self.check_queries(rows)?;
        let (entry, readable) = (adapter.entry(), Arc::new(self.readable()));
        let passes = self.passes(&Applied::default(), &readable)?;
        let mut views = Vec::with_capacity(self.views());
        for view in 0..self.views() {
            let cells = self.cells(view, &rows.values)?;
            views.push(match entry {
                Entry::Cells => cells,
                Entry::Vectors => passes.row_vectors(&cells),
                Entry::Read => passes.read_rows(view, &passes.row_vectors(&cells)),
            });
        }
        let (columns, labels) = (rows.columns, rows.known_labels()?);
        Ok(PreparedRows { rows: rows.rows, columns, entry, labels, views, readable })
    }

    /// Gradients of all prepared rows at the adapter's values, chunk by chunk.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] if the adapter belongs to a base of other sizes, or the rows to another context or kind.
    pub fn row_gradients<'a>(
        &'a self,
        rows: &'a PreparedRows,
        adapter: &'a Adapter,
    ) -> Result<RowGradients<'a>, TfmError> {
        Ok(RowGradients { pass: Pass::new(self, rows, adapter)?, next: 0 })
    }

    /// Log loss of each prepared row at the adapter's values.
    ///
    /// # Errors
    /// As [`Self::row_gradients`].
    pub fn losses(&self, rows: &PreparedRows, adapter: &Adapter) -> Result<Vec<f64>, TfmError> {
        let logits = Pass::new(self, rows, adapter)?.logits();
        Ok(logits.iter().zip(&rows.labels).map(|(v, y)| log_loss(*v, *y)).collect())
    }

    /// Logits of prepared rows as their gradients see them.
    #[cfg(test)]
    pub(crate) fn prepared_logits(&self, rows: &PreparedRows, adapter: &Adapter) -> Vec<f64> {
        #[allow(clippy::unwrap_used, reason = "tests")]
        Pass::new(self, rows, adapter).unwrap().logits()
    }

    /// The plain sum of all prepared rows' gradients: one step without privacy. It costs what per-row gradients cost,
    /// since a row is an outer product or a copy away from what the backward pass computes anyway.
    ///
    /// # Errors
    /// As [`Self::row_gradients`].
    pub fn summed_gradient(&self, rows: &PreparedRows, adapter: &Adapter) -> Result<Vec<f64>, TfmError> {
        let pass = Pass::new(self, rows, adapter)?;
        let mut sum = vec![0f64; adapter.dimension()];
        for taken in pass.all() {
            let mut part = vec![0f32; adapter.dimension()];
            for row in 0..taken.rows.len() {
                pass.add_row(&taken, row, &mut part);
            }
            sum.iter_mut().zip(&part).for_each(|(s, p)| *s += f64::from(*p));
        }
        Ok(sum)
    }

    /// Sum over units of clipped integer gradients, in the order of the adapter's values.
    ///
    /// No units or no rows give zeros. Row indices out of range are skipped, one that a unit names twice counts once.
    ///
    /// # Errors
    /// As [`Self::row_gradients`]; [`TfmError::TooLarge`] for so many units that a sum could leave 64 bits.
    pub fn clipped_sum(
        &self,
        rows: &PreparedRows,
        adapter: &Adapter,
        units: &[UnitGroup],
        clip: Clip,
    ) -> Result<ClippedSum, TfmError> {
        if !clip.sums_fit(units.len()) {
            let limit = (i64::MAX as u64 / clip.integer_norm()) as usize;
            return Err(TfmError::TooLarge { what: "units of a sum", got: units.len(), limit });
        }
        let mut sum = ClippedSum { values: vec![0i64; adapter.dimension()], within: 0, beyond: 0 };
        let mut integers = vec![0i64; adapter.dimension()];
        self.for_each_unit(rows, adapter, units, &mut |gradient| {
            let side =
                if clip.integers_into(gradient, &mut integers) { &mut sum.within } else { &mut sum.beyond };
            *side += 1;
            add_integers(&mut sum.values, &integers);
            Ok(())
        })?;
        Ok(sum)
    }

    /// The `quantile` (0 to 1) of the unit gradient norms: on corpus rows it tells where to clip, at no privacy cost.
    ///
    /// 0 without units.
    ///
    /// # Errors
    /// As [`Self::row_gradients`].
    pub fn norm_quantile(
        &self,
        rows: &PreparedRows,
        adapter: &Adapter,
        units: &[UnitGroup],
        quantile: f64,
    ) -> Result<f64, TfmError> {
        let mut norms = self.norms(rows, adapter, units)?;
        norms.sort_by(f64::total_cmp);
        let at = (quantile.clamp(0.0, 1.0) * norms.len().saturating_sub(1) as f64).round() as usize;
        Ok(norms.get(at).copied().unwrap_or(0.0))
    }

    /// The norm of each unit's gradient, in the order of the units' last rows.
    ///
    /// # Errors
    /// As [`Self::row_gradients`].
    pub fn norms(
        &self,
        rows: &PreparedRows,
        adapter: &Adapter,
        units: &[UnitGroup],
    ) -> Result<Vec<f64>, TfmError> {
        let mut norms = Vec::with_capacity(units.len());
        self.for_each_unit(rows, adapter, units, &mut |gradient| {
            norms.push(square(gradient).sqrt());
            Ok(())
        })?;
        Ok(norms)
    }

    /// Calls `f` with each unit's summed gradient, in an order that depends on row indices only.
    fn for_each_unit(
        &self,
        rows: &PreparedRows,
        adapter: &Adapter,
        units: &[UnitGroup],
        f: &mut dyn FnMut(&[f64]) -> Result<(), TfmError>,
    ) -> Result<(), TfmError> {
        let size = adapter.dimension();
        let pass = Pass::new(self, rows, adapter)?;
        // Units end with their last row; what is open at a time is bounded by rows that units spread apart.
        let mut last_row = vec![None; units.len()];
        let mut owners: Vec<Vec<usize>> = vec![Vec::new(); rows.rows];
        for (unit, group) in units.iter().enumerate() {
            for &row in group.rows.iter().filter(|r| **r < rows.rows) {
                // A row that a unit names twice is one row of it.
                if owners[row].last() != Some(&unit) {
                    owners[row].push(unit);
                }
                last_row[unit] = last_row[unit].max(Some(row));
            }
        }
        let mut open: std::collections::BTreeMap<usize, Vec<f64>> = std::collections::BTreeMap::new();
        let (mut gradient, mut alone) = (vec![0f32; size], vec![0f64; size]);
        for taken in pass.all() {
            for row in taken.rows.clone() {
                gradient.fill(0.0);
                pass.add_row(&taken, row - taken.rows.start, &mut gradient);
                for &unit in &owners[row] {
                    let last = last_row[unit] == Some(row);
                    match (open.remove(&unit), last) {
                        (None, true) => {
                            alone.iter_mut().zip(&gradient).for_each(|(a, g)| *a = f64::from(*g));
                            f(&alone)?;
                        }
                        (held, last) => {
                            let mut sum = held.unwrap_or_else(|| vec![0.0; size]);
                            sum.iter_mut().zip(&gradient).for_each(|(s, g)| *s += f64::from(*g));
                            if last {
                                f(&sum)?;
                            } else {
                                open.insert(unit, sum);
                            }
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

/// Iterator over the gradients of prepared rows.
pub struct RowGradients<'a> {
    pass: Pass<'a>,
    next: usize,
}

impl std::fmt::Debug for RowGradients<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RowGradients").field("next", &self.next).finish_non_exhaustive()
    }
}

impl Iterator for RowGradients<'_> {
    type Item = Result<GradientChunk, TfmError>;

    fn next(&mut self) -> Option<Self::Item> {
        let rows = self.pass.some(self.next)?;
        self.next = rows.end;
        Some(Ok(self.pass.gradients(rows)))
    }
}

/// Prepared rows through the rest of the query path, at one adapter.
struct Pass<'a> {
    rows: &'a PreparedRows,
    adapter: &'a Adapter,
    applied: Applied,
    passes: Passes<'a>,
}

/// Some consecutive rows, taken forward and back.
struct Taken {
    rows: Range<usize>,
    /// What the adapter's sites saw, view by view.
    played: Vec<Played>,
    losses: Vec<f64>,
}

impl<'a> Pass<'a> {
    fn new(context: &'a Context, rows: &'a PreparedRows, adapter: &'a Adapter) -> Result<Self, TfmError> {
        if rows.columns != context.column_keys().len() || rows.views.len() != context.views() {
            return Err(TfmError::mismatch("prepared columns", context.column_keys().len(), rows.columns));
        }
        if rows.entry != adapter.entry() {
            let (expected, got) = (format!("{:?}", adapter.entry()), format!("{:?}", rows.entry));
            return Err(TfmError::mismatch("prepared stage", expected, got));
        }
        let applied = adapter.applied(context)?;
        let passes = context.passes(&applied, &rows.readable)?;
        Ok(Self { rows, adapter, applied, passes })
    }

    /// The rows of one pass from `first` on, if there are any.
    fn some(&self, first: usize) -> Option<Range<usize>> {
        let end = self.rows.rows.min(first + self.passes.rows());
        (first < end).then_some(first..end)
    }

    fn chunks(&self) -> Vec<Range<usize>> {
        std::iter::successors(self.some(0), |rows| self.some(rows.end)).collect()
    }

    /// All rows forward and back, in order: as many passes at a time as there are threads, so that little is held.
    fn all(&self) -> impl Iterator<Item = Taken> {
        let chunks = self.chunks();
        let mut first = 0;
        std::iter::from_fn(move || {
            let some = chunks.get(first..chunks.len().min(first + rayon::current_num_threads()))?;
            first += some.len();
            (!some.is_empty())
                .then(|| some.par_iter().map(|rows| self.taken(rows.clone())).collect::<Vec<Taken>>())
        })
        .flatten()
    }

    /// The way of some rows in each view, and their logits, averaged over the views.
    fn forward(&self, rows: &Range<usize>) -> (Vec<Trail>, Vec<f64>) {
        let views = self.rows.views.iter().enumerate();
        let trails: Vec<Trail> = views
            .map(|(view, all)| {
                let width = all.len() / self.rows.rows.max(1);
                let values = &all[rows.start * width..rows.end * width];
                let entering = match self.rows.entry {
                    Entry::Cells => Entering::Cells(values),
                    Entry::Vectors => Entering::Vectors(values),
                    Entry::Read => Entering::Read(values),
                };
                self.passes.forward(view, entering)
            })
            .collect();
        let share = 1.0 / trails.len() as f64;
        let mut logits = vec![0f64; rows.len()];
        for trail in &trails {
            logits.iter_mut().zip(&trail.margins).for_each(|(sum, v)| *sum += f64::from(*v) * share);
        }
        (trails, logits)
    }

    fn logits(&self) -> Vec<f64> {
        self.chunks().par_iter().flat_map_iter(|rows| self.forward(rows).1).collect()
    }

    fn taken(&self, rows: Range<usize>) -> Taken {
        let (trails, logits) = self.forward(&rows);
        let labelled = || logits.iter().zip(&self.rows.labels[rows.clone()]);
        let losses = labelled().map(|(v, y)| log_loss(*v, *y)).collect();
        // The derivative of the log loss by the averaged logit is p - y; each view carries its share of it.
        let share = 1.0 / trails.len() as f64;
        let outer: Vec<f32> =
            labelled().map(|(v, y)| ((1.0 / (1.0 + (-v).exp()) - f64::from(*y)) * share) as f32).collect();
        let played =
            trails.iter().map(|trail| Played::new(self.passes.back(trail, &outer), rows.len())).collect();
        Taken { rows, played, losses }
    }

    fn add_row(&self, taken: &Taken, row: usize, gradient: &mut [f32]) {
        for view in &taken.played {
            self.adapter.add_gradient(&self.applied, &view.row(row), gradient);
        }
    }

    fn gradients(&self, rows: Range<usize>) -> GradientChunk {
        let size = self.adapter.dimension();
        let taken = self.taken(rows);
        let mut gradients = vec![0f32; taken.rows.len() * size];
        if size > 0 {
            for (row, gradient) in gradients.chunks_exact_mut(size).enumerate() {
                self.add_row(&taken, row, gradient);
            }
        }
        GradientChunk { first_row: taken.rows.start, gradients, losses: taken.losses }
    }
}

/// Log loss of a label under a logit, without overflow.
pub(crate) fn log_loss(logit: f64, label: u8) -> f64 {
    let signed = if label == 1 { -logit } else { logit };
    signed.max(0.0) + (-signed.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{Clip, ClippedSum, UnitGroup};
    use crate::{
        adapter::Kind,
        context::{
            Context,
            tests::{adapter, model, table},
        },
        error::TfmError,
    };

    /// Units are summed before clipping, and the sum equals the obvious computation from row gradients.
    #[test]
    fn clipped_sum_equals_the_naive_one_and_ignores_other_units() {
        let (context, rows, at) = (
            Context::build(&model(), &table(40, 3, 3)).unwrap(),
            table(400, 3, 6),
            adapter(Kind::FeatureTokens, 3, 7),
        );
        let prepared = context.prepare(&rows, &at).unwrap();
        // A row out of range is skipped, one named twice counts once.
        let units: Vec<UnitGroup> =
            (0..150).map(|u| UnitGroup { rows: vec![u, 399 - u, 10_000, u] }).collect();
        let chunks = context.row_gradients(&prepared, &at).unwrap();
        let flat: Vec<f32> = chunks.flat_map(|chunk| chunk.unwrap().gradients).collect();
        let row = |i: usize| flat[i * 24..(i + 1) * 24].iter().map(|g| f64::from(*g));
        let unit_gradient =
            |u: &UnitGroup| -> Vec<f64> { row(u.rows[0]).zip(row(u.rows[1])).map(|(a, b)| a + b).collect() };
        let p50 = context.norm_quantile(&prepared, &at, &units, 0.5).unwrap();
        let clip = Clip::new(p50, 1024.0 * 1024.0).unwrap();
        let mut naive = vec![0i64; 24];
        for unit in &units {
            for (n, v) in naive.iter_mut().zip(clip.integers(&unit_gradient(unit))) {
                *n += v;
            }
        }
        let sum = context.clipped_sum(&prepared, &at, &units, clip).unwrap();
        assert_eq!(sum.values, naive);
        // Half of the units are cut: the quantile is a real one.
        let cut = units
            .iter()
            .filter(|u| unit_gradient(u).iter().map(|g| g * g).sum::<f64>().sqrt() > p50 * (1.0 + 1e-12))
            .count();
        assert!((70..=80).contains(&cut), "{cut}");
        assert_eq!((sum.within, sum.beyond), ((units.len() - cut) as u64, cut as u64));
        // Some units alone: the same sum, of fewer rows, in whatever order they are named.
        let some: Vec<UnitGroup> = units.iter().step_by(7).rev().cloned().collect();
        let (fewer, renamed) = prepared.only(&some);
        assert_eq!((fewer.rows, renamed.len()), (2 * some.len(), some.len()));
        let alone = context.clipped_sum(&fewer, &at, &renamed, clip).unwrap();
        assert_eq!(alone, context.clipped_sum(&prepared, &at, &some, clip).unwrap());
        assert_ne!(alone.values, sum.values);
        let nobody = ClippedSum { values: vec![0; 24], within: 0, beyond: 0 };
        let (empty, none) = prepared.only(&[]);
        assert_eq!(context.clipped_sum(&empty, &at, &none, clip).unwrap(), nobody);
        assert_eq!(context.clipped_sum(&prepared, &at, &[], clip).unwrap(), nobody);
        let none = context.prepare(&table(0, 3, 1), &at).unwrap();
        assert_eq!(context.clipped_sum(&none, &at, &units, clip).unwrap(), nobody);
        assert!(context.losses(&none, &at).unwrap().is_empty());
    }

    #[test]
    fn rows_prepared_for_another_kind_are_refused() {
        let context = Context::build(&model(), &table(40, 3, 3)).unwrap();
        let prepared = context.prepare(&table(4, 3, 6), &adapter(Kind::Head, 3, 7)).unwrap();
        let refused = context.row_gradients(&prepared, &adapter(Kind::FeatureTokens, 3, 7)).err();
        assert!(matches!(refused, Some(TfmError::Mismatch { what: "prepared stage", .. })));
    }
}
