//! Marginals that share attributes, counted together: one increment a row serves all marginals of a joint table.
//!
//! Counting every marginal by itself costs an increment a row and marginal. A table over three attributes holds
//! all its pairs as sums over one axis, so pairs of 40 attributes need about a third of the increments. [`plan`]
//! covers a query's marginals greedily by tables small enough for a first-level cache; [`JointTable::add`] turns the
//! codes of a chunk into cell numbers, block by block, and counts these; [`JointTable::fold`] sums the axes out. All
//! of it is exact integer arithmetic: no order of rows or tables changes a count.

use super::ReleaseQuery;

/// Cells of a table that serves several marginals at most; two lanes of 16-bit counters fill 32 KiB, a first-level
/// cache.
pub(super) const MAX_JOINT_CELLS: usize = 8_192;
/// Cells that all joint tables of a query may have beyond those of their first marginals.
pub(super) const MAX_EXTRA_CELLS: usize = 1 << 22;
/// Rows of a chunk at most: a 16-bit counter can't overflow within one.
pub(super) const MAX_CHUNK_ROWS: usize = 1 << 15;

/// Attributes counted together, and the marginals that they serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    /// Attribute indices; the last one varies fastest.
    pub(super) attributes: Vec<usize>,
    /// Marginal indices; every attribute of theirs is among the group's.
    pub(super) marginals: Vec<usize>,
    /// Product of the attributes' cells.
    pub(super) cells: usize,
}

/// Covers every marginal of a checked query by exactly one group.
///
/// A group starts with the first marginal left and takes in, one by one, the attribute that completes most marginals
/// which are left, while its cells fit.
pub(super) fn plan(query: &ReleaseQuery) -> Vec<Group> {
    let sizes: Vec<usize> = query.attributes.iter().map(|attribute| attribute.cells().max(1)).collect();
    let mut left: Vec<usize> = (0..query.marginals.len()).collect();
    let mut spare = MAX_EXTRA_CELLS;
    let mut groups = Vec::new();
    while let Some(first) = left.first() {
        let mut attributes = query.marginals[*first].attributes.clone();
        let mut inside = vec![false; sizes.len()];
        attributes.iter().for_each(|attribute| inside[*attribute] = true);
        let mut cells: usize = attributes.iter().map(|attribute| sizes[*attribute]).product();
        while let Some(more) = best_addition(query, &left, &inside, &sizes, cells, spare) {
            spare -= cells * (sizes[more] - 1);
            cells *= sizes[more];
            inside[more] = true;
            attributes.push(more);
        }
        let served = |marginal: &usize| query.marginals[*marginal].attributes.iter().all(|a| inside[*a]);
        let (marginals, rest) = left.into_iter().partition(served);
        left = rest;
        groups.push(Group { attributes, marginals, cells });
    }
    groups
}

/// The attribute that completes most marginals; of equals the one with fewest cells, then the first.
fn best_addition(
    query: &ReleaseQuery,
    left: &[usize],
    inside: &[bool],
    sizes: &[usize],
    cells: usize,
    spare: usize,
) -> Option<usize> {
    let mut gains = vec![0u32; sizes.len()];
    for marginal in left {
        let mut outside = query.marginals[*marginal].attributes.iter().filter(|a| !inside[**a]);
        if let (Some(only), None) = (outside.next(), outside.next()) {
            gains[*only] += 1;
        }
    }
    let fits = |size: usize| cells * size <= MAX_JOINT_CELLS && cells * (size - 1) <= spare;
    gains
        .iter()
        .zip(sizes)
        .enumerate()
        .filter(|(_, (gain, size))| **gain > 0 && fits(**size))
        .max_by_key(|(at, (gain, size))| (**gain, std::cmp::Reverse((**size, *at))))
        .map(|(at, _)| at)
}

/// Cell numbers of one attribute for the rows of a chunk.
#[derive(Debug, Clone)]
pub(super) enum Codes {
    /// Of at most 256 cells.
    Narrow(Vec<u8>),
    /// Of more.
    Wide(Vec<u16>),
}

/// Rows as cell numbers, one column for each attribute; a column that no marginal needs is empty.
#[derive(Debug, Clone)]
pub(super) struct Chunk {
    pub(super) codes: Vec<Codes>,
    pub(super) rows: usize,
}

/// What a thread needs for counting, whatever the tables are.
#[derive(Debug)]
pub(super) struct Scratch {
    index: Vec<u32>,
    short: Box<[u16; BLOCK_ROWS]>,
    /// Neighbouring rows often fall into the same cell; in turn they go to two lanes, so that none waits for the other.
    lanes: Box<[[u16; MAX_JOINT_CELLS]; 2]>,
}

impl Scratch {
    /// Bytes of one.
    pub(super) const BYTES: usize = BLOCK_ROWS * 6 + MAX_JOINT_CELLS * 4;

    pub(super) fn new() -> Self {
        Self {
            index: vec![0; BLOCK_ROWS],
            short: Box::new([0; BLOCK_ROWS]),
            lanes: Box::new([[0; MAX_JOINT_CELLS]; 2]),
        }
    }
}

/// Counts of one group.
#[derive(Debug)]
pub(super) struct JointTable {
    attributes: Vec<usize>,
    dims: Vec<usize>,
    totals: Vec<u32>,
    /// Rows in `totals` since the last fold.
    rows: u64,
    marginals: Vec<Served>,
}

/// One marginal of a table.
#[derive(Debug)]
struct Served {
    index: usize,
    /// For each attribute of the table, how far one step along it moves in the marginal; 0 if it isn't the marginal's.
    strides: Vec<usize>,
    counts: Vec<i64>,
}

impl JointTable {
    pub(super) fn new(query: &ReleaseQuery, group: Group) -> Self {
        let dims: Vec<usize> = group.attributes.iter().map(|at| query.attributes[*at].cells()).collect();
        let served = |index: usize| {
            let own = &query.marginals[index].attributes;
            let own_dims = query.dims(&query.marginals[index]);
            let stride = |attribute: &usize| {
                let place = own.iter().position(|at| at == attribute);
                place.map_or(0, |place| own_dims[place + 1..].iter().product())
            };
            let strides = group.attributes.iter().map(stride).collect();
            Served { index, strides, counts: vec![0; own_dims.iter().product()] }
        };
        let marginals = group.marginals.iter().map(|index| served(*index)).collect();
        Self { attributes: group.attributes, dims, totals: vec![0; group.cells], rows: 0, marginals }
    }

    /// Counts a chunk. Folds first if the totals might overflow: after `most` rows, which is at most `u32::MAX`.
    pub(super) fn add(&mut self, chunk: &Chunk, scratch: &mut Scratch, most: u32) {
        if self.rows + chunk.rows as u64 > u64::from(most) {
            self.fold();
        }
        self.rows += chunk.rows as u64;
        if self.totals.len() <= MAX_JOINT_CELLS {
            self.add_narrow(chunk, scratch)
        } else {
            self.add_wide(chunk, scratch)
        }
    }

    fn add_narrow(&mut self, chunk: &Chunk, scratch: &mut Scratch) {
        let cells = self.totals.len();
        let [even, odd] = &mut *scratch.lanes;
        even[..cells].fill(0);
        odd[..cells].fill(0);
        let mut from = 0;
        while from < chunk.rows {
            let rows = BLOCK_ROWS.min(chunk.rows - from);
            let index = &mut scratch.short[..rows];
            index.fill(0);
            for (attribute, dim) in self.attributes.iter().zip(&self.dims) {
                // Cell numbers of a narrow table stay below 8192.
                let dim = *dim as u16;
                match &chunk.codes[*attribute] {
                    Codes::Narrow(codes) => extend(index, &codes[from..from + rows], dim),
                    Codes::Wide(codes) => extend(index, &codes[from..from + rows], dim),
                }
            }
            let (pairs, last) = index.as_chunks::<2>();
            for [a, b] in pairs {
                // The mask changes no cell number; it tells the compiler that none is out of bounds.
                let (a, b) = (usize::from(*a) % MAX_JOINT_CELLS, usize::from(*b) % MAX_JOINT_CELLS);
                even[a] = even[a].wrapping_add(1);
                odd[b] = odd[b].wrapping_add(1);
            }
            for a in last {
                let a = usize::from(*a) % MAX_JOINT_CELLS;
                even[a] = even[a].wrapping_add(1);
            }
            from += rows;
        }
        for ((total, a), b) in self.totals.iter_mut().zip(even.iter()).zip(odd.iter()) {
            *total = total.wrapping_add(u32::from(*a)).wrapping_add(u32::from(*b));
        }
    }

    fn add_wide(&mut self, chunk: &Chunk, scratch: &mut Scratch) {
        let mut from = 0;
        while from < chunk.rows {
            let rows = BLOCK_ROWS.min(chunk.rows - from);
            let index = &mut scratch.index[..rows];
            index.fill(0);
            for (attribute, dim) in self.attributes.iter().zip(&self.dims) {
                // A checked attribute has at most 4096 cells, a checked query 2²¹.
                let dim = *dim as u32;
                match &chunk.codes[*attribute] {
                    Codes::Narrow(codes) => extend(index, &codes[from..from + rows], dim),
                    Codes::Wide(codes) => extend(index, &codes[from..from + rows], dim),
                }
            }
            for cell in index {
                self.totals[*cell as usize] += 1;
            }
            from += rows;
        }
    }

    /// Sums the totals into the marginals and clears them.
    fn fold(&mut self) {
        if self.rows == 0 {
            return;
        }
        let mut place = vec![0usize; self.dims.len()];
        for total in &mut self.totals {
            let count = i64::from(std::mem::take(total));
            if count != 0 {
                for marginal in &mut self.marginals {
                    let cell: usize =
                        place.iter().zip(&marginal.strides).map(|(at, stride)| at * stride).sum();
                    marginal.counts[cell] += count;
                }
            }
            for (at, dim) in place.iter_mut().zip(&self.dims).rev() {
                *at += 1;
                if *at < *dim {
                    break;
                }
                *at = 0;
            }
        }
        self.rows = 0;
    }

    /// The counts of every marginal, each with its index.
    pub(super) fn finish(mut self) -> Vec<(usize, Vec<i64>)> {
        self.fold();
        self.marginals.into_iter().map(|marginal| (marginal.index, marginal.counts)).collect()
    }
}

/// One more axis for cell numbers, the fastest so far.
fn extend<I: CellNumber, C: Copy + Into<I>>(index: &mut [I], codes: &[C], dim: I) {
    for (cell, code) in index.iter_mut().zip(codes) {
        *cell = cell.then(dim, (*code).into());
    }
}

trait CellNumber: Copy {
    fn then(self, dim: Self, code: Self) -> Self;
}

impl CellNumber for u16 {
    fn then(self, dim: Self, code: Self) -> Self {
        self.wrapping_mul(dim).wrapping_add(code)
    }
}

impl CellNumber for u32 {
    fn then(self, dim: Self, code: Self) -> Self {
        self.wrapping_mul(dim).wrapping_add(code)
    }
}

/// Rows whose cell numbers are made at a time; with the lanes they stay in a first-level cache.
const BLOCK_ROWS: usize = 2_048;

const _: () = assert!(MAX_CHUNK_ROWS <= u16::MAX as usize, "a lane's counter holds a chunk's rows");
const _: () = assert!(MAX_JOINT_CELLS.is_power_of_two() && MAX_JOINT_CELLS <= u16::MAX as usize);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::super::tests::{levels, query};
    use super::super::{Attribute, MAX_ATTRIBUTES, MAX_CELLS, MAX_MARGINALS, MarginalSpec};
    use super::*;

    fn of_cells(cells: &[usize]) -> Vec<Attribute> {
        let one = |(at, cells): (usize, &usize)| {
            levels(&format!("f{at}"), u32::try_from(*cells - 2).unwrap(), None)
        };
        cells.iter().enumerate().map(one).collect()
    }

    fn pairs(attributes: usize) -> Vec<MarginalSpec> {
        let pair = |a| (a + 1..attributes).map(move |b| MarginalSpec { attributes: vec![a, b] });
        (0..attributes).flat_map(pair).collect()
    }

    fn covers(query: &ReleaseQuery, groups: &[Group]) {
        let mut served: Vec<usize> =
            groups.iter().flat_map(|group| group.marginals.iter().copied()).collect();
        served.sort_unstable();
        assert_eq!(served, (0..query.marginals.len()).collect::<Vec<_>>(), "every marginal once");
        for group in groups {
            let cells: usize = group.attributes.iter().map(|at| query.attributes[*at].cells()).product();
            assert_eq!(cells, group.cells);
            let alone = group
                .marginals
                .iter()
                .any(|m| query.marginals[*m].attributes.len() == group.attributes.len());
            assert!(alone || cells <= MAX_JOINT_CELLS, "{group:?}");
            for marginal in &group.marginals {
                assert!(query.marginals[*marginal].attributes.iter().all(|at| group.attributes.contains(at)));
            }
        }
    }

    #[test]
    fn pairs_need_about_a_third_of_the_increments() {
        let mut query = query(of_cells(&[17; 40]), &[&[0]]);
        query.marginals = pairs(40);
        query.check().unwrap();
        let groups = plan(&query);
        covers(&query, &groups);
        // 780 pairs; triples can't do with fewer than 267 (Schönheim's bound).
        assert!((267..=330).contains(&groups.len()), "{}", groups.len());

        let mut small = self::query(of_cells(&[4; 12]), &[&[0]]);
        small.marginals = pairs(12);
        let groups = plan(&small);
        covers(&small, &groups);
        assert!(groups.len() <= 12, "six attributes of four cells fit one table: {}", groups.len());
    }

    #[test]
    fn wide_marginals_stand_alone_and_single_ones_share() {
        let query =
            query(of_cells(&[200, 200, 5, 6, 7]), &[&[0, 1], &[0], &[2], &[3], &[4], &[2, 3, 4], &[1, 0]]);
        let groups = plan(&query);
        covers(&query, &groups);
        assert_eq!(groups.len(), 2, "{groups:?}");
        assert_eq!(groups[0].cells, 40_000);
        assert_eq!(groups[1].marginals, [2, 3, 4, 5]);
    }

    #[test]
    fn the_largest_queries_keep_within_the_extra_cells() {
        let mut query = query(of_cells(&[3; MAX_ATTRIBUTES]), &[&[0]]);
        query.marginals = pairs(MAX_ATTRIBUTES).into_iter().step_by(16).take(MAX_MARGINALS).collect();
        query.check().unwrap();
        let groups = plan(&query);
        covers(&query, &groups);
        let total: usize = groups.iter().map(|group| group.cells).sum();
        assert!(total <= MAX_CELLS + MAX_EXTRA_CELLS, "{total}");
    }
}
