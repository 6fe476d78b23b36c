//! Per-row gradients of the log loss by the feature-token deltas, and their clipped integer sum.
//!
//! Private rows go through the query path only: with a context of corpus rows a row's gradient is a function of that
//! row alone, so adding or removing a unit moves the sum by that unit's clipped gradient and nothing else. The cells
//! of a row don't depend on the deltas; they are computed once per context and each round runs row stage, in-context
//! stage and decoder. The gradient is that of the served prediction, both views averaged, before clipping.

use candle_core::{Device, Tensor, Var};

use crate::{
    adapter::FeatureTokens,
    context::{CHUNK_ROWS, Context},
    error::TfmError,
    model::variant::Grouping,
    table::EncodedTable,
};

/// Rows with the part of their computation that no delta changes. Holds private data; has no wire form.
pub struct PreparedRows {
    rows: usize,
    columns: usize,
    grouping: Grouping,
    width: usize,
    labels: Vec<u8>,
    /// Cells `(rows, slots, E)` of each view.
    cells: Vec<Vec<f32>>,
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
    /// Gradients `(rows of the chunk, columns, E)` in the column order of the context.
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

/// L2 clip of one unit's gradient and the grid of its integer form.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clip {
    norm: f64,
    scale: f64,
}

impl Clip {
    /// A clip norm in gradient units and a power-of-two number of integer steps per gradient unit.
    ///
    /// # Errors
    /// [`TfmError::BadConfig`] unless the norm is finite and above 0, the scale a power of two within
    /// `[2^-20, 2^40]`, and the integer bound `floor(norm * scale)` within `[1, 2^40]`.
    pub fn new(norm: f64, scale: f64) -> Result<Self, TfmError> {
        let bad =
            |field, expected, got: f64| Err(TfmError::BadConfig { field, expected, got: got.to_string() });
        if !(norm.is_finite() && norm > 0.0) {
            return bad("clip norm", "finite and above 0", norm);
        }
        // A power of two has an empty mantissa.
        let power_of_two = scale.is_finite() && scale > 0.0 && scale.to_bits().trailing_zeros() >= 52;
        if !power_of_two || !(0.5f64.powi(20)..=2f64.powi(40)).contains(&scale) {
            return bad("gradient scale", "a power of two from 2^-20 to 2^40", scale);
        }
        let bound = (norm * scale).floor();
        if !(1.0..=2f64.powi(40)).contains(&bound) {
            return bad("clip norm times scale", "from 1 to 2^40", norm * scale);
        }
        Ok(Self { norm, scale })
    }

    /// The integer L2 bound of one unit, `floor(norm * scale)`: the sensitivity of the sum.
    #[must_use]
    pub fn integer_norm(&self) -> u64 {
        // Between 1 and 2^40 by construction.
        (self.norm * self.scale).floor() as u64
    }

    /// Clips a unit's gradient to the norm, scales and truncates each entry toward zero.
    ///
    /// A gradient with an entry that isn't finite becomes zero, so that no row can make the round fail.
    #[must_use]
    pub fn integers(&self, gradient: &[f64]) -> Vec<i64> {
        let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        if !norm.is_finite() {
            return vec![0; gradient.len()];
        }
        let bound = self.integer_norm();
        let limit = u128::from(bound) * u128::from(bound);
        let mut factor = self.scale * (bound as f64 / self.scale / norm).min(1.0);
        loop {
            let integers: Vec<i64> = gradient.iter().map(|g| (g * factor).trunc() as i64).collect();
            let square: u128 =
                integers.iter().map(|v| u128::from(v.unsigned_abs()) * u128::from(v.unsigned_abs())).sum();
            if square <= limit {
                return integers;
            }
            // Rounding of the factor left the norm a hair too large.
            factor *= 1.0 - 1e-12;
        }
    }
}

impl Context {
    /// Computes the cells of labelled rows once for many rounds.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] if columns differ from the context's or a row has no label.
    pub fn prepare(&self, rows: &EncodedTable) -> Result<PreparedRows, TfmError> {
        self.check_queries(rows)?;
        let width = self.model().config().embed_dim;
        let mut cells = vec![Vec::with_capacity(rows.rows * rows.columns * width); self.views()];
        for values in rows.values.chunks(CHUNK_ROWS * rows.columns) {
            for (view, kept) in cells.iter_mut().enumerate() {
                kept.extend(self.cells(view, values)?.flatten_all()?.to_vec1::<f32>()?);
            }
        }
        Ok(PreparedRows {
            rows: rows.rows,
            columns: rows.columns,
            grouping: self.model().config().variant.grouping(),
            width,
            labels: rows.known_labels()?,
            cells,
        })
    }

    /// Gradients of all prepared rows at the given deltas, chunk by chunk.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] if the adapter has another width or the rows belong to another context.
    pub fn row_gradients<'a>(
        &'a self,
        rows: &'a PreparedRows,
        tokens: &FeatureTokens,
    ) -> Result<RowGradients<'a>, TfmError> {
        if rows.columns != self.column_keys().len() || rows.cells.len() != self.views() {
            return Err(TfmError::mismatch("prepared columns", self.column_keys().len(), rows.columns));
        }
        Ok(RowGradients { context: self, rows, delta: self.slot_delta(tokens)?, next: 0 })
    }

    /// Sum over units of clipped integer gradients, in the column order of the context (`columns * E` entries).
    ///
    /// No units or no rows give zeros. Row indices out of range are skipped.
    ///
    /// # Errors
    /// As [`Self::row_gradients`]; [`TfmError::TooLarge`] if the sum leaves 64 bits.
    pub fn clipped_sum(
        &self,
        rows: &PreparedRows,
        tokens: &FeatureTokens,
        units: &[UnitGroup],
        clip: Clip,
    ) -> Result<Vec<i64>, TfmError> {
        let mut sum = vec![0i64; rows.columns * rows.width];
        self.for_each_unit(rows, tokens, units, &mut |gradient| {
            for (total, value) in sum.iter_mut().zip(clip.integers(gradient)) {
                *total = total.checked_add(value).ok_or(TfmError::TooLarge {
                    what: "sum of gradients",
                    got: usize::MAX,
                    limit: i64::MAX as usize,
                })?;
            }
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
        tokens: &FeatureTokens,
        units: &[UnitGroup],
        quantile: f64,
    ) -> Result<f64, TfmError> {
        let mut norms = Vec::with_capacity(units.len());
        self.for_each_unit(rows, tokens, units, &mut |gradient| {
            norms.push(gradient.iter().map(|g| g * g).sum::<f64>().sqrt());
            Ok(())
        })?;
        norms.sort_by(f64::total_cmp);
        let at = (quantile.clamp(0.0, 1.0) * norms.len().saturating_sub(1) as f64).round() as usize;
        Ok(norms.get(at).copied().unwrap_or(0.0))
    }

    /// Calls `f` with each unit's summed gradient, in an order that depends on row indices only.
    fn for_each_unit(
        &self,
        rows: &PreparedRows,
        tokens: &FeatureTokens,
        units: &[UnitGroup],
        f: &mut dyn FnMut(&[f64]) -> Result<(), TfmError>,
    ) -> Result<(), TfmError> {
        let size = rows.columns * rows.width;
        // Units end with their last row; what is open at a time is bounded by rows that units spread apart.
        let mut last_row = vec![None; units.len()];
        let mut owners: Vec<Vec<usize>> = vec![Vec::new(); rows.rows];
        for (unit, group) in units.iter().enumerate() {
            for &row in group.rows.iter().filter(|r| **r < rows.rows) {
                owners[row].push(unit);
                last_row[unit] = last_row[unit].max(Some(row));
            }
        }
        let mut open: std::collections::BTreeMap<usize, Vec<f64>> = std::collections::BTreeMap::new();
        for chunk in self.row_gradients(rows, tokens)? {
            let chunk = chunk?;
            for (i, gradient) in chunk.gradients.chunks_exact(size).enumerate() {
                let row = chunk.first_row + i;
                for &unit in &owners[row] {
                    let sum = open.entry(unit).or_insert_with(|| vec![0.0; size]);
                    for (s, g) in sum.iter_mut().zip(gradient) {
                        *s += f64::from(*g);
                    }
                }
                for &unit in &owners[row] {
                    if last_row[unit] == Some(row)
                        && let Some(sum) = open.remove(&unit)
                    {
                        f(&sum)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Iterator over the gradients of prepared rows.
pub struct RowGradients<'a> {
    context: &'a Context,
    rows: &'a PreparedRows,
    delta: Tensor,
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
        if self.next >= self.rows.rows {
            return None;
        }
        let (first, count) = (self.next, GRADIENT_ROWS.min(self.rows.rows - self.next));
        self.next += count;
        Some(self.chunk(first, count))
    }
}

impl RowGradients<'_> {
    fn chunk(&self, first: usize, count: usize) -> Result<GradientChunk, TfmError> {
        let PreparedRows { columns, grouping, width, ref labels, ref cells, .. } = *self.rows;
        let slots = grouping.slots(columns);
        let (size, shape) = (slots * width, (count, slots, width));
        // Gradients of intermediate tensors are dropped on the way back; a zero variable keeps the one at the cells.
        let tap = Var::zeros(shape, candle_core::DType::F32, &Device::Cpu)?;
        let offset = tap.as_tensor().broadcast_add(&self.delta)?;
        let mut logits: Option<Tensor> = None;
        for (view, cells) in cells.iter().enumerate() {
            let cells =
                Tensor::from_slice(&cells[first * size..(first + count) * size], shape, &Device::Cpu)?;
            let margin = self.context.margins(view, &(cells + &offset)?)?;
            logits = Some(match logits {
                Some(sum) => (sum + margin)?,
                None => margin,
            });
        }
        let logits = logits.ok_or_else(|| TfmError::mismatch("views of a context", "at least 1", 0))?;
        let share = 1.0 / cells.len() as f64;
        let values: Vec<f64> = logits.to_vec1::<f32>()?.into_iter().map(|v| f64::from(v) * share).collect();
        let labels = &labels[first..first + count];
        // The derivative of the log loss by the averaged logit is p - y; each view carries its share of it.
        let outer: Vec<f32> = values
            .iter()
            .zip(labels)
            .map(|(v, y)| ((1.0 / (1.0 + (-v).exp()) - f64::from(*y)) * share) as f32)
            .collect();
        let losses = values.iter().zip(labels).map(|(v, y)| log_loss(*v, *y)).collect();
        let outer = Tensor::from_vec(outer, count, &Device::Cpu)?;
        let gradients = (logits * outer)?.sum_all()?.backward()?;
        let slots_gradient: Vec<f32> = match gradients.get(&tap) {
            Some(g) => g.flatten_all()?.to_vec1()?,
            None => vec![0.0; count * size],
        };
        let mut columns_gradient = vec![0f32; count * columns * width];
        let rows = columns_gradient.chunks_exact_mut(columns * width);
        for (to, from) in rows.zip(slots_gradient.chunks_exact(size)) {
            spread(from, to, grouping, width);
        }
        Ok(GradientChunk { first_row: first, gradients: columns_gradient, losses })
    }
}

/// Pulls a row's slot gradients back to its columns, each of which may be part of several slots.
fn spread(slots: &[f32], columns_gradient: &mut [f32], grouping: Grouping, width: usize) {
    let columns = columns_gradient.len() / width;
    for (j, slot) in slots.chunks_exact(width).enumerate() {
        for column in grouping.members(j, columns).flatten() {
            for (to, g) in columns_gradient[column * width..][..width].iter_mut().zip(slot) {
                *to += g;
            }
        }
    }
}

/// Log loss of a label under a logit, without overflow.
fn log_loss(logit: f64, label: u8) -> f64 {
    let signed = if label == 1 { -logit } else { logit };
    signed.max(0.0) + (-signed.abs()).exp().ln_1p()
}

const GRADIENT_ROWS: usize = 192;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::{Clip, UnitGroup, log_loss};
    use crate::{
        adapter::FeatureTokens,
        context::{
            Context,
            tests::{model, model_of, table, tokens},
        },
        model::variant::{FeatureGroup, Variant},
    };

    fn gradients(context: &Context, rows: &crate::table::EncodedTable, at: &FeatureTokens) -> Vec<f32> {
        let prepared = context.prepare(rows).unwrap();
        context.row_gradients(&prepared, at).unwrap().flat_map(|c| c.unwrap().gradients).collect()
    }

    #[test]
    fn batched_gradients_equal_one_row_at_a_time() {
        let (context, rows, at) =
            (Context::build(&model(), &table(40, 5, 3)).unwrap(), table(200, 5, 6), tokens(5, 7));
        let all = gradients(&context, &rows, &at);
        for i in (0..rows.rows).step_by(23) {
            let one = gradients(&context, &rows.take(&[i]), &at);
            let worst = one.iter().zip(&all[i * 40..]).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(worst < 1e-6, "row {i}: {worst}");
        }
    }

    /// Central differences of the log loss of the served prediction, for 2, 3 and 6 columns (with few columns a
    /// slot holds a column twice), and for models whose slots are single columns or blocks of columns.
    #[test]
    fn gradients_match_central_differences_of_the_served_loss() {
        let blocks = Variant { col_feature_group: FeatureGroup::Valid, ..Variant::default() };
        let plain = Variant::default();
        for (variant, columns) in
            [(plain, 2usize), (plain, 3), (plain, 6), (Variant::first(), 4), (blocks, 5)]
        {
            let context = Context::build(&model_of(variant), &table(40, columns, 3)).unwrap();
            let (rows, at) = (table(3, columns, 8), tokens(columns, 9));
            let analytic = gradients(&context, &rows, &at);
            for (row, label) in rows.labels.iter().enumerate() {
                let loss = |entry: usize, by: f64| {
                    let mut step = vec![0f64; at.dimension()];
                    step[entry] = by;
                    let mut moved = at.clone();
                    moved.add_scaled(&step, 1.0).unwrap();
                    log_loss(context.logits(&rows.take(&[row]), Some(&moved)).unwrap()[0], label.unwrap())
                };
                for entry in (0..at.dimension()).step_by(5) {
                    let numeric = (loss(entry, 0.01) - loss(entry, -0.01)) / 0.02;
                    let exact = f64::from(analytic[row * at.dimension() + entry]);
                    assert!(
                        (numeric - exact).abs() < 1e-4 + 0.01 * exact.abs(),
                        "{columns}: {numeric} {exact}"
                    );
                }
            }
        }
    }

    /// Units are summed before clipping, and the sum equals the obvious computation from row gradients.
    #[test]
    fn clipped_sum_equals_the_naive_one_and_ignores_other_units() {
        let (context, rows, at) =
            (Context::build(&model(), &table(40, 3, 3)).unwrap(), table(400, 3, 6), tokens(3, 7));
        let prepared = context.prepare(&rows).unwrap();
        let units: Vec<UnitGroup> = (0..150).map(|u| UnitGroup { rows: vec![u, 399 - u, 10_000] }).collect();
        let flat = gradients(&context, &rows, &at);
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
        assert_eq!(context.clipped_sum(&prepared, &at, &units, clip).unwrap(), naive);
        // Half of the units are cut: the quantile is a real one.
        let cut =
            units.iter().filter(|u| unit_gradient(u).iter().map(|g| g * g).sum::<f64>().sqrt() > p50).count();
        assert!((70..=80).contains(&cut), "{cut}");
        assert_eq!(context.clipped_sum(&prepared, &at, &[], clip).unwrap(), vec![0; 24]);
        let none = context.prepare(&table(0, 3, 1)).unwrap();
        assert_eq!(context.clipped_sum(&none, &at, &units, clip).unwrap(), vec![0; 24]);
    }

    #[test]
    fn clip_refuses_grids_that_are_not_powers_of_two() {
        assert!(Clip::new(1.0, 1024.0).is_ok() && Clip::new(1.0, 0.5f64.powi(3)).is_err());
        for (norm, scale) in
            [(1.0, 1000.0), (0.0, 1024.0), (f64::NAN, 1024.0), (1.0, 2f64.powi(41)), (1e-9, 1024.0)]
        {
            assert!(Clip::new(norm, scale).is_err(), "{norm} {scale}");
        }
        assert_eq!(Clip::new(1.0, 1024.0).unwrap().integers(&[f64::NAN, 1.0]), [0, 0]);
        assert_eq!(Clip::new(1.0, 4.0).unwrap().integers(&[0.3, -0.3]), [1, -1]);
    }

    proptest! {
        /// Whatever the gradient, the integer norm keeps the bound that the noise is calibrated to.
        #[test]
        fn integer_norm_never_exceeds_the_bound(
            gradient in prop::collection::vec(-1e6f64..1e6, 1..60),
            norm in 1e-3f64..1e3,
            power in 4i32..30,
        ) {
            let Ok(clip) = Clip::new(norm, 2f64.powi(power)) else { return Ok(()) };
            let square: u128 = clip
                .integers(&gradient)
                .iter()
                .map(|v| u128::from(v.unsigned_abs()).pow(2))
                .sum();
            prop_assert!(square <= u128::from(clip.integer_norm()).pow(2));
        }
    }
}
