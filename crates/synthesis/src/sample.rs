//! From the model to rows: ancestral draws of cells, then values within cells.
//!
//! Owns the only randomness of the crate, which is an argument: equal model, seed and order of calls give equal rows.
//! Sampling is post-processing of released tables. Refuses more than [`MAX_ROWS`] rows or [`MAX_ROW_CELLS`] cells.

use rand::Rng;
use tabmesh_privacy::release::{Attribute, Binning, MarginalTable};

use crate::SynthesisError;
use crate::fit::TreeModel;
use crate::marginal::{self, probabilities};

/// Rows as cell numbers, one column per attribute of the layout, the label's among them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CellRows {
    dims: Vec<usize>,
    columns: Vec<Vec<u32>>,
    rows: usize,
}

impl CellRows {
    /// Rows from one column of cells per attribute, `dims` holding the cells of each attribute.
    ///
    /// # Errors
    /// [`SynthesisError::LayoutMismatch`] if there are not as many columns as dimensions, columns differ in length, or
    /// a cell is out of range.
    pub fn new(dims: Vec<usize>, columns: Vec<Vec<u32>>) -> Result<Self, SynthesisError> {
        let mismatch = |what, expected, got| Err(SynthesisError::LayoutMismatch { what, expected, got });
        if columns.len() != dims.len() {
            return mismatch("columns", dims.len(), columns.len());
        }
        let rows = columns.first().map_or(0, Vec::len);
        for (column, &dim) in columns.iter().zip(&dims) {
            if column.len() != rows {
                return mismatch("rows", rows, column.len());
            }
            if let Some(&cell) = column.iter().find(|&&cell| cell as usize >= dim) {
                return mismatch("cells of an attribute", dim, cell as usize + 1);
            }
        }
        Ok(Self { dims, columns, rows })
    }

    /// Cells of each attribute.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        &self.dims
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The cells of one attribute, row by row; empty for an attribute out of range.
    #[must_use]
    pub fn column(&self, attribute: usize) -> &[u32] {
        self.columns.get(attribute).map_or(&[], Vec::as_slice)
    }
}

/// Draws `rows` rows from the model.
///
/// # Errors
/// [`SynthesisError::TooManyRows`] above [`MAX_ROWS`] rows or [`MAX_ROW_CELLS`] cells.
pub fn draw<R: Rng + ?Sized>(
    model: &TreeModel,
    rows: usize,
    rng: &mut R,
) -> Result<CellRows, SynthesisError> {
    limit_rows(rows, model.dims().len())?;
    let classes = cumulative(model.classes());
    let labels = (0..rows).map(|_| pick(&classes, rng)).collect();
    draw_features(model, labels, rng)
}

/// Draws one row for each given class: features from P(features | class), whatever the model's own class shares.
///
/// For a context whose label rate should be a domain's own.
///
/// # Errors
/// As [`draw`]; [`SynthesisError::LayoutMismatch`] for a class the model doesn't have.
pub fn draw_for_labels<R: Rng + ?Sized>(
    model: &TreeModel,
    labels: &[u32],
    rng: &mut R,
) -> Result<CellRows, SynthesisError> {
    limit_rows(labels.len(), model.dims().len())?;
    let expected = model.classes().len();
    if let Some(&class) = labels.iter().find(|&&class| class as usize >= expected) {
        let got = class as usize + 1;
        return Err(SynthesisError::LayoutMismatch { what: "classes", expected, got });
    }
    draw_features(model, labels.to_vec(), rng)
}

/// A column of synthetic values.
#[derive(Debug, Clone, PartialEq)]
pub enum SynthColumn {
    /// Numbers within the declared bounds; NaN is a missing value.
    Numeric(Vec<f64>),
    /// Level codes: `0..levels` declared levels, then "other", then missing.
    Codes(Vec<u32>),
}

/// Synthetic rows in the terms of the attributes they were counted by.
#[derive(Debug, Clone, PartialEq)]
pub struct SyntheticTable {
    /// One column per attribute other than the label, in attribute order.
    pub columns: Vec<SynthColumn>,
    /// Class of each row.
    pub labels: Vec<u16>,
    /// Number of rows.
    pub rows: usize,
}

/// Turns cells into values: numbers uniform within their bin on the attribute's scale, codes for levels.
///
/// A merged cell is split among its fine cells in proportion to the released fine histogram: the least noisy 1-way table
/// in `fine` over that attribute's fine cells, numbered as in `attributes`. Without such a table, or where it
/// holds nothing above noise, fine cells are equally likely.
///
/// # Errors
/// [`SynthesisError::LayoutMismatch`] if rows and attributes differ in number or there is not exactly one label;
/// [`SynthesisError::DimensionMismatch`] if an attribute's cells or a fine histogram's don't fit;
/// [`SynthesisError::BadGroups`] for a merge that leaves a cell without members; as [`marginal::check`].
pub fn decode<R: Rng + ?Sized>(
    rows: &CellRows,
    attributes: &[Attribute],
    fine: &[MarginalTable],
    rng: &mut R,
) -> Result<SyntheticTable, SynthesisError> {
    let mismatch = |what, expected, got| Err(SynthesisError::LayoutMismatch { what, expected, got });
    if attributes.len() != rows.dims().len() {
        return mismatch("attributes", rows.dims().len(), attributes.len());
    }
    let labels = attributes.iter().filter(|a| a.is_label()).count();
    if labels != 1 {
        return mismatch("label attributes", 1, labels);
    }
    let mut table = SyntheticTable { columns: Vec::new(), labels: Vec::new(), rows: rows.rows() };
    for (index, attribute) in attributes.iter().enumerate() {
        let (expected, got) = (rows.dims()[index], attribute.cells());
        if expected != got {
            return Err(SynthesisError::DimensionMismatch { attribute: index, expected, got });
        }
        let cells = rows.column(index);
        if attribute.is_label() {
            // Classes are far below u16 in any query that passes its check; a wider one saturates.
            table.labels = cells.iter().map(|&c| u16::try_from(c).unwrap_or(u16::MAX)).collect();
            continue;
        }
        let members = fine_members(attribute, index, fine)?;
        let fine_cells = cells.iter().map(|&cell| {
            let (numbers, shares) = &members[cell as usize];
            if let [only] = numbers.as_slice() { *only } else { numbers[pick(shares, rng) as usize] }
        });
        let fine_cells: Vec<usize> = fine_cells.collect();
        table.columns.push(match &attribute.binning {
            Binning::Levels { .. } => SynthColumn::Codes(
                fine_cells.into_iter().map(|c| u32::try_from(c).unwrap_or(u32::MAX)).collect(),
            ),
            Binning::Edges { log1p, .. } => SynthColumn::Numeric(
                fine_cells.into_iter().map(|c| value_in(attribute, c, *log1p, rng)).collect(),
            ),
        });
    }
    Ok(table)
}

/// Fine cells of each counted cell with their cumulative shares.
fn fine_members(
    attribute: &Attribute,
    index: usize,
    fine: &[MarginalTable],
) -> Result<Vec<(Vec<usize>, Vec<f64>)>, SynthesisError> {
    let expected = attribute.fine_cells();
    let histogram =
        fine.iter().filter(|t| t.attributes == [index]).min_by(|a, b| a.variance.total_cmp(&b.variance));
    let mass = match histogram {
        Some(table) => {
            marginal::check(table)?;
            let got = table.values.len();
            if got != expected {
                return Err(SynthesisError::DimensionMismatch { attribute: index, expected, got });
            }
            probabilities(&table.values, &[], 0.0)
        }
        None => vec![1.0; expected],
    };
    let mut members = vec![Vec::new(); attribute.cells()];
    (0..expected).for_each(|cell| members[attribute.merged(cell)].push(cell));
    if members.iter().any(Vec::is_empty) {
        return Err(SynthesisError::BadGroups { attribute: index, expected, groups: attribute.cells() });
    }
    let with_shares = |numbers: Vec<usize>| {
        let weights: Vec<f64> = numbers.iter().map(|&n| mass[n]).collect();
        let shares = cumulative(&probabilities(&weights, &[], 0.0));
        (numbers, shares)
    };
    Ok(members.into_iter().map(with_shares).collect())
}

/// A value of a bin, uniform on the attribute's scale; NaN for the missing cell.
fn value_in<R: Rng + ?Sized>(attribute: &Attribute, fine: usize, log1p: bool, rng: &mut R) -> f64 {
    let Some((lower, upper)) = attribute.bin_bounds(fine) else { return f64::NAN };
    let u: f64 = rng.random();
    let between = |a: f64, b: f64| a * (1.0 - u) + b * u;
    let value = if log1p { between(lower.ln_1p(), upper.ln_1p()).exp_m1() } else { between(lower, upper) };
    // Rounding may step over an edge; the lower bound is always inside.
    if attribute.fine_cell_of(value) == fine && value >= lower && value <= upper { value } else { lower }
}

fn draw_features<R: Rng + ?Sized>(
    model: &TreeModel,
    labels: Vec<u32>,
    rng: &mut R,
) -> Result<CellRows, SynthesisError> {
    let structure = model.structure();
    let rows = labels.len();
    let mut columns = vec![Vec::new(); model.dims().len()];
    for &feature in structure.order() {
        let parent = structure.parent(feature);
        let parents = parent.map_or(1, |p| model.dims()[p]);
        // One cumulative distribution per (class, parent cell), in that order.
        let tables: Vec<Vec<f64>> = (0..model.classes().len() * parents)
            .filter_map(|i| model.conditional(feature, i % parents, i / parents))
            .map(cumulative)
            .collect();
        let above = parent.map(|p| &columns[p]);
        let column = labels
            .iter()
            .enumerate()
            .map(|(row, &class)| {
                let cell = above.map_or(0, |column: &Vec<u32>| column[row] as usize);
                pick(&tables[class as usize * parents + cell], rng)
            })
            .collect();
        columns[feature] = column;
    }
    columns[structure.label()] = labels;
    Ok(CellRows { dims: model.dims().to_vec(), columns, rows })
}

fn limit_rows(rows: usize, attributes: usize) -> Result<(), SynthesisError> {
    let limit = MAX_ROWS.min(MAX_ROW_CELLS / attributes.max(1));
    if rows > limit { Err(SynthesisError::TooManyRows { rows, limit }) } else { Ok(()) }
}

fn cumulative(shares: &[f64]) -> Vec<f64> {
    let mut sum = 0.0;
    let mut run: Vec<f64> = shares
        .iter()
        .map(|p| {
            sum += p;
            sum
        })
        .collect();
    // Rounding may leave the end below 1: everything from the last cell with mass on is 1.
    let last = shares.iter().rposition(|p| *p > 0.0).unwrap_or(0);
    run.iter_mut().skip(last).for_each(|c| *c = 1.0);
    run
}

/// A cell by inversion; cells without mass are never picked.
fn pick<R: Rng + ?Sized>(cumulative: &[f64], rng: &mut R) -> u32 {
    let u: f64 = rng.random();
    let cell = cumulative.partition_point(|c| *c <= u);
    u32::try_from(cell).unwrap_or(u32::MAX)
}

/// Most rows drawn at once.
pub const MAX_ROWS: usize = 1 << 20;
/// Most cells (rows times attributes) drawn at once (1 GiB).
pub const MAX_ROW_CELLS: usize = 1 << 28;

#[cfg(test)]
mod tests;
