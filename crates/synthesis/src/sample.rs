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

    /// The rows without their last attribute, and that attribute's cells row by row.
    #[must_use]
    pub fn split_last(mut self) -> (Self, Vec<u32>) {
        self.dims.pop();
        let last = self.columns.pop().unwrap_or_default();
        (self, last)
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

/// The fine 1-way histograms released first, in the terms they were counted by; empty by default.
///
/// Attributes are numbered as in the layout that is decoded, and may be binned otherwise.
#[derive(Debug, Clone, Copy, Default)]
pub struct FineHistograms<'a> {
    /// Attributes of that release, unmerged.
    pub attributes: &'a [Attribute],
    /// Its 1-way tables; others are ignored, and of several for one attribute the least noisy is used.
    pub tables: &'a [MarginalTable],
}

/// Turns cells into values: numbers within their bin on the attribute's scale, codes for levels.
///
/// Within a cell, merged levels are drawn in proportion to the fine histogram, and numbers are uniform within a fine
/// bin drawn in the same way. A fine bin that towers over its neighbours is taken for one repeated value (a spike at
/// zero, an integer) and gives a single number: a declared bound if it touches one, else its middle; otherwise
/// a model could learn from differences inside the bin that real rows don't have. Without a histogram,
/// or where it holds nothing, levels or bins of a cell are equally likely and numbers uniform within them.
///
/// # Errors
/// [`SynthesisError::LayoutMismatch`] if rows and attributes differ in number, there is not exactly one label, or
/// a histogram is of another kind or merged; [`SynthesisError::DimensionMismatch`] if an attribute's or
/// histogram's cells don't fit; [`SynthesisError::BadGroups`] for a merge that leaves a cell without
/// members; as [`marginal::check`].
pub fn decode<R: Rng + ?Sized>(
    rows: &CellRows,
    attributes: &[Attribute],
    fine: FineHistograms<'_>,
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
        let contents = contents(attribute, index, fine)?;
        let mut pick_in = |cell: u32| {
            let (pieces, shares) = &contents[cell as usize];
            if let [only] = pieces.as_slice() { *only } else { pieces[pick(shares, rng) as usize] }
        };
        let pieces: Vec<Piece> = cells.iter().map(|&cell| pick_in(cell)).collect();
        table.columns.push(match &attribute.binning {
            Binning::Levels { .. } => SynthColumn::Codes(pieces.iter().map(Piece::code).collect()),
            Binning::Edges { log1p, .. } => {
                SynthColumn::Numeric(pieces.iter().map(|piece| piece.number(*log1p, rng)).collect())
            }
        });
    }
    Ok(table)
}

/// What a counted cell may hold.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Piece {
    /// A level's code, "other" and missing among them.
    Code(usize),
    /// Numbers from the first up to the second.
    Range(f64, f64),
    /// No number.
    Missing,
}

impl Piece {
    fn code(&self) -> u32 {
        match self {
            Self::Code(code) => u32::try_from(*code).unwrap_or(u32::MAX),
            Self::Range(..) | Self::Missing => u32::MAX,
        }
    }

    /// Uniform on the attribute's scale; NaN where there is no number.
    fn number<R: Rng + ?Sized>(&self, log1p: bool, rng: &mut R) -> f64 {
        let Self::Range(lower, upper) = *self else { return f64::NAN };
        let u: f64 = rng.random();
        let between = |a: f64, b: f64| a * (1.0 - u) + b * u;
        let value =
            if log1p { between(lower.ln_1p(), upper.ln_1p()).exp_m1() } else { between(lower, upper) };
        // Rounding may step over an end; the lower end is always inside.
        if value >= lower && value < upper { value } else { lower }
    }
}

/// The pieces of a counted cell and their cumulative shares.
type Contents = (Vec<Piece>, Vec<f64>);

/// The contents of each counted cell.
fn contents(
    attribute: &Attribute,
    index: usize,
    fine: FineHistograms<'_>,
) -> Result<Vec<Contents>, SynthesisError> {
    let histogram = Histogram::of(attribute, index, fine)?;
    let groups = attribute.cells();
    let mut contents = Vec::with_capacity(groups);
    for cell in 0..groups {
        let members = attribute.members(cell);
        if members.is_empty() {
            let expected = attribute.fine_cells();
            return Err(SynthesisError::BadGroups { attribute: index, expected, groups });
        }
        let whole = |fine: usize| match (&attribute.binning, attribute.bin_bounds(fine)) {
            (Binning::Levels { .. }, _) => Piece::Code(fine),
            (Binning::Edges { .. }, Some((lower, upper))) => Piece::Range(lower, upper),
            (Binning::Edges { .. }, None) => Piece::Missing,
        };
        let mut pieces: Vec<(Piece, f64)> = Vec::new();
        for piece in members.iter().map(|&fine| whole(fine)) {
            histogram.iter().for_each(|h| h.split(piece, &mut pieces));
        }
        if pieces.iter().all(|(_, mass)| *mass <= 0.0) {
            pieces = members.iter().map(|&fine| (whole(fine), 1.0)).collect();
        }
        let mass: Vec<f64> = pieces.iter().map(|(_, mass)| *mass).collect();
        let shares = cumulative(&probabilities(&mass, &[], 0.0));
        contents.push((pieces.into_iter().map(|(piece, _)| piece).collect(), shares));
    }
    Ok(contents)
}

/// One released fine histogram as probabilities.
struct Histogram<'a> {
    attribute: &'a Attribute,
    mass: Vec<f64>,
    spikes: Vec<bool>,
    log1p: bool,
}

impl<'a> Histogram<'a> {
    /// The histogram of an attribute, if one was given.
    fn of(
        attribute: &Attribute,
        index: usize,
        fine: FineHistograms<'a>,
    ) -> Result<Option<Self>, SynthesisError> {
        let tables = fine.tables.iter().filter(|t| t.attributes == [index]);
        let Some(table) = tables.min_by(|a, b| a.variance.total_cmp(&b.variance)) else {
            return Ok(None);
        };
        marginal::check(table)?;
        let attributes = fine.attributes.len();
        let Some(counted) = fine.attributes.get(index) else {
            return Err(SynthesisError::UnknownAttribute { got: index, attributes });
        };
        let log1p = match (&attribute.binning, &counted.binning) {
            (Binning::Edges { log1p, .. }, Binning::Edges { .. }) => Some(*log1p),
            (Binning::Levels { levels }, Binning::Levels { levels: others }) if levels == others => {
                Some(false)
            }
            _ => None,
        };
        let (expected, got) = (counted.fine_cells(), table.values.len());
        match log1p {
            Some(log1p) if counted.merge.is_none() && expected == got => {
                let mass = probabilities(&table.values, &[], 0.0);
                Ok(Some(Self { attribute: counted, mass, spikes: spikes(table), log1p }))
            }
            Some(_) if counted.merge.is_none() => {
                Err(SynthesisError::DimensionMismatch { attribute: index, expected, got })
            }
            _ => Err(SynthesisError::LayoutMismatch {
                what: "unmerged cells of the same kind",
                expected: attribute.fine_cells(),
                got: counted.cells(),
            }),
        }
    }

    /// The one value a spike most likely is: a declared bound if its bin touches one, else the bin's middle.
    fn spike(&self, bin: usize, start: f64, end: f64) -> Option<Piece> {
        let (Binning::Edges { lower, upper, .. }, true) = (&self.attribute.binning, self.spikes.get(bin)?)
        else {
            return None;
        };
        let point = if start <= *lower {
            start
        } else if end >= *upper {
            end
        } else {
            start + (end - start) / 2.0
        };
        Some(Piece::Range(point, point))
    }

    /// Adds the parts of a piece that the histogram tells apart, with their mass.
    fn split(&self, piece: Piece, into: &mut Vec<(Piece, f64)>) {
        match piece {
            Piece::Code(code) => into.push((piece, self.mass[code])),
            Piece::Missing => into.push((piece, self.mass[self.mass.len() - 1])),
            Piece::Range(lower, upper) => {
                let on_scale = |v: f64| if self.log1p { v.ln_1p() } else { v };
                let width = |a: f64, b: f64| on_scale(b) - on_scale(a);
                for (bin, &mass) in self.mass.iter().enumerate() {
                    let Some((from, to)) = self.attribute.bin_bounds(bin) else { continue };
                    let (start, end) = (from.max(lower), to.min(upper));
                    let share = width(start, end) / width(from, to);
                    if mass > 0.0 && start < end && share > 0.0 {
                        let piece = self.spike(bin, start, end).unwrap_or(Piece::Range(start, end));
                        into.push((piece, mass * share.min(1.0)));
                    }
                }
            }
        }
    }
}

/// Fine bins that stand out of their neighbours too far for a smooth density: most likely one repeated value.
fn spikes(table: &MarginalTable) -> Vec<bool> {
    // The last cell holds missing values and is nobody's neighbour.
    let bins = &table.values[..table.values.len() - 1];
    let count = |i: usize| bins.get(i).copied().unwrap_or(0.0).max(0.0);
    let above_noise = SPIKE_SDS * table.variance.sqrt();
    (0..bins.len())
        .map(|i| {
            let beside = if i == 0 { count(1) } else { count(i - 1).max(count(i + 1)) };
            count(i) > SPIKE_RATIO * beside + above_noise
        })
        .collect()
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
        let parents = structure.above(feature);
        let combinations = model.combinations(feature);
        // One cumulative distribution per (class, parent cells), in that order.
        let tables: Vec<Vec<f64>> = (0..model.classes().len() * combinations)
            .filter_map(|i| model.conditional(feature, i % combinations, i / combinations))
            .map(cumulative)
            .collect();
        let column = labels
            .iter()
            .enumerate()
            .map(|(row, &class)| {
                let above = parents.iter().fold(0, |at, parent| {
                    at * model.dims()[*parent]
                        + columns[*parent].get(row).map_or(0, |cell: &u32| *cell as usize)
                });
                pick(&tables[class as usize * combinations + above], rng)
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

/// How many times the count of its larger neighbour a fine bin must hold to count as one repeated value.
const SPIKE_RATIO: f64 = 3.0;
/// By how many standard deviations of the noise it must do so.
const SPIKE_SDS: f64 = 4.0;
/// Most rows drawn at once.
pub const MAX_ROWS: usize = 1 << 20;
/// Most cells (rows times attributes) drawn at once (1 GiB).
pub const MAX_ROW_CELLS: usize = 1 << 28;

#[cfg(test)]
mod tests;
