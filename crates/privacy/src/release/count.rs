//! Exact counts of a query's cells over rows that stream in.
//!
//! The vector is the marginals one after another, each row-major with the last attribute fastest. It holds exact
//! private counts: it has no wire form, and a mechanism is the only way onward. Callers hand in at most k rows of a
//! unit, chosen without looking at values.
//!
//! Each value is turned into its cell number once, whatever the number of marginals; full chunks of these go to
//! joint tables (`joint.rs`), on this thread or on several. The result doesn't depend on how rows are cut into chunks
//! or on the number of threads, and memory depends on the query alone.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::joint::{Chunk, Codes, JointTable, MAX_CHUNK_ROWS, Scratch, plan};
use super::{Attribute, Binning, MAX_ATTRIBUTES, MAX_CELLS, QueryError, ReleaseQuery};

/// Bytes that counting one query may take at most, whatever the number of rows. The largest query that
/// [`ReleaseQuery::check`] lets through needs less on [`MAX_THREADS`] threads.
pub const MAX_COUNTER_BYTES: usize = 96 << 20;
/// Threads that count at most.
pub const MAX_THREADS: usize = 16;

/// Values of one attribute for a chunk of rows.
#[derive(Debug, Clone, Copy)]
pub enum ColumnRef<'a> {
    /// Numbers; NaN is missing.
    Numeric(&'a [f64]),
    /// Level codes: `0..levels`, then `levels` = other, anything above = missing.
    Codes(&'a [u32]),
}

impl ColumnRef<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Numeric(values) => values.len(),
            Self::Codes(codes) => codes.len(),
        }
    }
}

/// Why a chunk can't be counted: the caller's table and the query don't fit together.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CountError {
    /// The query itself is refused.
    #[error(transparent)]
    Query(#[from] QueryError),
    /// The number of columns isn't the number of attributes without the label.
    #[error("columns: expected one for each of the {expected} attributes other than the label, got {got}")]
    Columns {
        /// Attributes other than the label.
        expected: usize,
        /// Columns given.
        got: usize,
    },
    /// A column is numeric where levels are counted, or the other way round.
    #[error("column of {id:?}: numbers need edges and codes need levels")]
    Kind {
        /// The attribute.
        id: String,
    },
    /// Columns of one chunk differ in length.
    #[error("rows of {id:?}: expected {expected}, got {got}")]
    Rows {
        /// The attribute.
        id: String,
        /// Rows of the chunk.
        expected: usize,
        /// Rows of this column.
        got: usize,
    },
    /// Counting the query would take more memory than is allowed; nothing was read for it.
    #[error("counting takes {needed} bytes, allowed are {allowed}: ask for fewer marginals or cells")]
    Memory {
        /// Bytes needed.
        needed: usize,
        /// Bytes allowed.
        allowed: usize,
    },
}

/// What counting may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resources {
    /// Threads that count, from 1 to [`MAX_THREADS`]; other numbers are taken as the nearer end. With one, counting
    /// happens on the caller's thread, otherwise beside it.
    pub threads: usize,
    /// Bytes at most.
    pub bytes: usize,
}

impl Default for Resources {
    /// The caller's thread and [`MAX_COUNTER_BYTES`].
    fn default() -> Self {
        Self { threads: 1, bytes: MAX_COUNTER_BYTES }
    }
}

/// Accumulates a query's counts chunk by chunk.
#[derive(Debug)]
pub struct Counter<'q> {
    query: &'q ReleaseQuery,
    label: Option<usize>,
    /// Attribute index of each column handed in.
    column_attributes: Vec<usize>,
    coders: Vec<Coder>,
    pending: Chunk,
    pace: Pace,
    /// One for each thread.
    shares: Vec<Share>,
    scratch: Scratch,
    /// Rows of the columns at hand that are counted; kept for its memory.
    kept: Vec<usize>,
}

impl<'q> Counter<'q> {
    /// An accumulator of zeros with the default [`Resources`].
    ///
    /// # Errors
    /// [`CountError::Query`] when the query is refused.
    pub fn new(query: &'q ReleaseQuery) -> Result<Self, CountError> {
        Self::with(query, Resources::default())
    }

    /// An accumulator of zeros.
    ///
    /// # Errors
    /// [`CountError::Query`] when the query is refused, [`CountError::Memory`] when it needs more than allowed.
    pub fn with(query: &'q ReleaseQuery, resources: Resources) -> Result<Self, CountError> {
        query.check()?;
        let row_bytes: usize = query.attributes.iter().map(Coder::width).sum();
        let chunk_rows = (CHUNK_BYTES / row_bytes).clamp(1, MAX_CHUNK_ROWS);
        Self::built(query, resources, Pace { chunk_rows, fold_after: u32::MAX })
    }

    fn built(query: &'q ReleaseQuery, resources: Resources, pace: Pace) -> Result<Self, CountError> {
        let groups = plan(query);
        let threads = resources.threads.clamp(1, MAX_THREADS).min(groups.len().max(1));
        let row_bytes: usize = query.attributes.iter().map(Coder::width).sum();
        // Counts twice: in their tables, and as the one vector at the end.
        let needed = query.cells_total() * 2 * size_of::<i64>()
            + groups.iter().map(|group| group.cells).sum::<usize>() * size_of::<u32>()
            + (threads + 1) * Scratch::BYTES
            + CHUNKS_ALIVE * pace.chunk_rows * row_bytes;
        if needed > resources.bytes {
            return Err(CountError::Memory { needed, allowed: resources.bytes });
        }
        let mut used = vec![false; query.attributes.len()];
        query.marginals.iter().flat_map(|marginal| &marginal.attributes).for_each(|at| used[*at] = true);
        let coders = query.attributes.iter().zip(used).map(|(attribute, used)| Coder::new(attribute, used));
        let coders: Vec<Coder> = coders.collect();
        let mut tables: Vec<Vec<JointTable>> = (0..threads).map(|_| Vec::new()).collect();
        for (at, group) in groups.into_iter().enumerate() {
            tables[at % threads].push(JointTable::new(query, group));
        }
        let label = query.label_index();
        Ok(Self {
            query,
            label,
            column_attributes: (0..query.attributes.len()).filter(|at| Some(*at) != label).collect(),
            pending: empty_chunk(&coders, pace.chunk_rows),
            coders,
            pace,
            shares: tables.into_iter().map(Share::Here).collect(),
            scratch: Scratch::new(),
            kept: Vec::new(),
        })
    }

    /// Adds a chunk of rows.
    ///
    /// `columns` holds one column for each attribute *other than the label*, in the query's order. Where the query
    /// has the label, rows whose label is `None` or not a declared class are left out of every marginal; where it
    /// doesn't, `labels` only says how many rows there are.
    ///
    /// # Errors
    /// [`CountError`] when shapes or kinds don't fit the query; nothing was added then.
    pub fn add(&mut self, columns: &[ColumnRef<'_>], labels: &[Option<u16>]) -> Result<(), CountError> {
        self.add_chosen(columns, labels, 0..labels.len())
    }

    /// As [`Counter::add`], but counts the `rows` at these places alone; places beyond the end are left out.
    ///
    /// # Errors
    /// As [`Counter::add`].
    pub fn add_chosen(
        &mut self,
        columns: &[ColumnRef<'_>],
        labels: &[Option<u16>],
        rows: impl IntoIterator<Item = usize>,
    ) -> Result<(), CountError> {
        self.check_shapes(columns, labels.len())?;
        let classes = self.label.and_then(|at| self.query.attributes.get(at)).map(Attribute::cells);
        let counts = |row: &usize| match (labels.get(*row), classes) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(label), Some(classes)) => label.is_some_and(|class| usize::from(class) < classes),
        };
        let mut kept = std::mem::take(&mut self.kept);
        kept.clear();
        kept.extend(rows.into_iter().filter(counts));
        let mut rest = kept.as_slice();
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(self.pace.chunk_rows - self.pending.rows));
            self.code(columns, labels, now);
            if self.pending.rows == self.pace.chunk_rows {
                self.start_threads();
                self.tally();
            }
            rest = later;
        }
        self.kept = kept;
        Ok(())
    }

    /// The counts, one vector over all marginals.
    #[must_use]
    pub fn finish(mut self) -> Vec<i64> {
        if self.pending.rows > 0 {
            self.tally();
        }
        let mut starts = Vec::with_capacity(self.query.marginals.len());
        let mut cells = 0;
        for marginal in &self.query.marginals {
            starts.push(cells);
            cells += self.query.dims(marginal).iter().product::<usize>();
        }
        let mut all = vec![0; cells];
        for (index, counts) in self.shares.into_iter().flat_map(Share::finish) {
            all[starts[index]..starts[index] + counts.len()].copy_from_slice(&counts);
        }
        all
    }

    fn check_shapes(&self, columns: &[ColumnRef<'_>], rows: usize) -> Result<(), CountError> {
        if columns.len() != self.column_attributes.len() {
            return Err(CountError::Columns { expected: self.column_attributes.len(), got: columns.len() });
        }
        for (column, index) in columns.iter().zip(&self.column_attributes) {
            let attribute = &self.query.attributes[*index];
            let id = || attribute.id.clone();
            match (&attribute.binning, column) {
                (Binning::Edges { .. }, ColumnRef::Numeric(_))
                | (Binning::Levels { .. }, ColumnRef::Codes(_)) => {}
                _ => return Err(CountError::Kind { id: id() }),
            }
            if column.len() != rows {
                return Err(CountError::Rows { id: id(), expected: rows, got: column.len() });
            }
        }
        Ok(())
    }

    /// Appends rows to the chunk. Every column has as many rows as there are labels, and `rows` lie below.
    fn code(&mut self, columns: &[ColumnRef<'_>], labels: &[Option<u16>], rows: &[usize]) {
        for (column, index) in columns.iter().zip(&self.column_attributes) {
            let coder = &self.coders[*index];
            let codes = &mut self.pending.codes[*index];
            match column {
                _ if !coder.used => {}
                ColumnRef::Numeric(values) => push(codes, rows.iter().map(|row| coder.number(values[*row]))),
                ColumnRef::Codes(levels) => push(codes, rows.iter().map(|row| coder.level(levels[*row]))),
            }
        }
        if let Some(index) = self.label.filter(|at| self.coders[*at].used) {
            push(&mut self.pending.codes[index], rows.iter().map(|row| labels[*row].unwrap_or_default()));
        }
        self.pending.rows += rows.len();
    }

    /// A table of less than a chunk isn't worth a thread, so none is started before the first is full.
    fn start_threads(&mut self) {
        if self.shares.len() > 1 {
            let shares = std::mem::take(&mut self.shares);
            self.shares = shares.into_iter().map(|share| share.apart(self.pace)).collect();
        }
    }

    fn tally(&mut self) {
        let chunk = std::mem::replace(&mut self.pending, empty_chunk(&self.coders, self.pace.chunk_rows));
        let chunk = Arc::new(chunk);
        self.shares.iter_mut().for_each(|share| share.add(&chunk, &mut self.scratch, self.pace));
    }
}

/// How often what has piled up is worked off.
#[derive(Debug, Clone, Copy)]
struct Pace {
    chunk_rows: usize,
    fold_after: u32,
}

/// Some of a query's tables.
#[derive(Debug)]
enum Share {
    /// Counted on the caller's thread.
    Here(Vec<JointTable>),
    /// Counted by another one.
    There { chunks: SyncSender<Arc<Chunk>>, thread: JoinHandle<Vec<JointTable>> },
}

impl Share {
    /// Gives the tables to a thread of their own; they stay here if the system has none.
    fn apart(self, pace: Pace) -> Self {
        let Self::Here(tables) = self else { return self };
        let (sender, receiver): (_, Receiver<Arc<Chunk>>) = sync_channel(CHUNKS_WAITING);
        // Tables travel by a channel, so that they aren't lost with a thread that can't start.
        let (hand_over, handed_over) = sync_channel::<Vec<JointTable>>(1);
        let work = move || {
            let mut tables = handed_over.recv().unwrap_or_default();
            let mut scratch = Scratch::new();
            for chunk in receiver {
                tables.iter_mut().for_each(|table| table.add(&chunk, &mut scratch, pace.fold_after));
            }
            tables
        };
        match std::thread::Builder::new().name("counting".to_owned()).spawn(work) {
            Ok(thread) => match hand_over.send(tables) {
                Ok(()) => Self::There { chunks: sender, thread },
                Err(unsent) => Self::Here(unsent.0),
            },
            Err(_) => Self::Here(tables),
        }
    }

    fn add(&mut self, chunk: &Arc<Chunk>, scratch: &mut Scratch, pace: Pace) {
        match self {
            Self::Here(tables) => {
                tables.iter_mut().for_each(|table| table.add(chunk, scratch, pace.fold_after));
            }
            // A thread that has ended did so by a panic, which `finish` passes on.
            Self::There { chunks, .. } => drop(chunks.send(Arc::clone(chunk))),
        }
    }

    fn finish(self) -> Vec<(usize, Vec<i64>)> {
        let tables = match self {
            Self::Here(tables) => tables,
            Self::There { chunks, thread } => {
                drop(chunks);
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            }
        };
        tables.into_iter().flat_map(JointTable::finish).collect()
    }
}

/// Turns values of one attribute into cell numbers.
#[derive(Debug)]
struct Coder {
    /// Whether any marginal has the attribute.
    used: bool,
    narrow: bool,
    edges: Vec<f64>,
    /// Cell of each fine cell; a cell is below 4096.
    merged: Vec<u16>,
}

impl Coder {
    fn new(attribute: &Attribute, used: bool) -> Self {
        let edges = match &attribute.binning {
            Binning::Edges { edges, .. } => edges.clone(),
            Binning::Levels { .. } => Vec::new(),
        };
        let merged = (0..attribute.fine_cells()).map(|fine| attribute.merged(fine) as u16).collect();
        Self { used, narrow: Self::width(attribute) == 1, edges, merged }
    }

    /// Bytes of a cell number.
    fn width(attribute: &Attribute) -> usize {
        if attribute.cells() <= usize::from(u8::MAX) + 1 { 1 } else { 2 }
    }

    /// As [`Attribute::fine_cell_of`], merged.
    fn number(&self, value: f64) -> u16 {
        let fine = if value.is_nan() {
            self.edges.len() + 1
        } else {
            self.edges.partition_point(|edge| *edge <= value)
        };
        self.merged[fine]
    }

    /// As [`Attribute::fine_cell_of_code`], merged.
    fn level(&self, code: u32) -> u16 {
        self.merged[(code as usize).min(self.merged.len() - 1)]
    }
}

fn push(codes: &mut Codes, cells: impl Iterator<Item = u16>) {
    match codes {
        // Narrow columns are those of at most 256 cells.
        Codes::Narrow(codes) => codes.extend(cells.map(|cell| cell as u8)),
        Codes::Wide(codes) => codes.extend(cells),
    }
}

fn empty_chunk(coders: &[Coder], rows: usize) -> Chunk {
    let column = |coder: &Coder| {
        let rows = if coder.used { rows } else { 0 };
        if coder.narrow {
            Codes::Narrow(Vec::with_capacity(rows))
        } else {
            Codes::Wide(Vec::with_capacity(rows))
        }
    };
    Chunk { codes: coders.iter().map(column).collect(), rows: 0 }
}

/// Counts one table in one call.
///
/// # Errors
/// As [`Counter::add`].
pub fn count(
    query: &ReleaseQuery,
    columns: &[ColumnRef<'_>],
    labels: &[Option<u16>],
) -> Result<Vec<i64>, CountError> {
    let mut counter = Counter::new(query)?;
    counter.add(columns, labels)?;
    Ok(counter.finish())
}

/// Bytes of a chunk at most.
const CHUNK_BYTES: usize = 4 << 20;
/// Chunks that may wait for a counting thread.
const CHUNKS_WAITING: usize = 1;
/// Chunks in memory at most: one that fills, one that is handed out, those that wait, one that is counted.
const CHUNKS_ALIVE: usize = CHUNKS_WAITING + 3;

const _: () = assert!(
    2 * size_of::<i64>() * MAX_CELLS
        + size_of::<u32>() * (MAX_CELLS + super::joint::MAX_EXTRA_CELLS)
        + (MAX_THREADS + 1) * Scratch::BYTES
        + CHUNKS_ALIVE * CHUNK_BYTES
        <= MAX_COUNTER_BYTES,
    "every checked query fits"
);
const _: () = assert!(CHUNK_BYTES >= 2 * MAX_ATTRIBUTES, "a chunk holds a row");

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::super::tests::{levels, numeric, query};
    use super::*;
    use proptest::prelude::*;

    fn example() -> ReleaseQuery {
        query(
            vec![numeric("a", &[10.0]), Attribute::label(2), levels("c", 2, Some(vec![0, 1, 1, 2]))],
            &[&[0], &[1], &[2, 1], &[0, 1, 2]],
        )
    }

    #[test]
    fn counts_a_small_table_by_hand() {
        let a = [5.0, 50.0, f64::NAN, 5.0];
        let c = [0, 1, 3, 2];
        let labels = [Some(0), Some(1), Some(1), None];
        let query = example();
        let counts = count(&query, &[ColumnRef::Numeric(&a), ColumnRef::Codes(&c)], &labels).unwrap();
        assert_eq!(&counts[..3], &[1, 1, 1], "bins, then missing; the row without label is dropped");
        assert_eq!(&counts[3..5], &[1, 2], "classes");
        assert_eq!(&counts[5..11], &[1, 0, 0, 1, 0, 1], "merged level by class");
        let mut cube = [0; 18];
        cube[0] = 1; // a=0, label 0, c=0
        cube[6 + 3 + 1] = 1; // a=1, label 1, c=1
        cube[12 + 3 + 2] = 1; // a missing, label 1, c missing
        assert_eq!(&counts[11..], &cube);
    }

    #[test]
    fn without_the_label_every_row_counts() {
        let query = query(vec![levels("c", 1, None)], &[&[0]]);
        assert_eq!(
            count(&query, &[ColumnRef::Codes(&[0, 1, 7])], &[None, None, Some(9)]).unwrap(),
            vec![1, 1, 1]
        );
    }

    #[test]
    fn tables_that_do_not_fit_are_refused_by_name() {
        let query = example();
        let mut counter = Counter::new(&query).unwrap();
        let numbers = ColumnRef::Numeric(&[1.0]);
        let codes = ColumnRef::Codes(&[0]);
        assert_eq!(counter.add(&[numbers], &[Some(0)]), Err(CountError::Columns { expected: 2, got: 1 }));
        assert_eq!(counter.add(&[codes, codes], &[Some(0)]), Err(CountError::Kind { id: "a".into() }));
        assert_eq!(
            counter.add(&[numbers, ColumnRef::Codes(&[])], &[Some(0)]),
            Err(CountError::Rows { id: "c".into(), expected: 1, got: 0 })
        );
        assert!(counter.finish().iter().all(|count| *count == 0));
    }

    #[test]
    fn memory_is_checked_before_the_work() {
        let query = example();
        let refused = |bytes| Counter::with(&query, Resources { threads: 1, bytes }).unwrap_err();
        let CountError::Memory { needed, allowed: 1 } = refused(1) else { panic!("{:?}", refused(1)) };
        assert!(Counter::with(&query, Resources { threads: 1, bytes: needed }).is_ok());
        assert_eq!(refused(needed - 1), CountError::Memory { needed, allowed: needed - 1 });
    }

    #[test]
    fn totals_are_folded_before_they_overflow() {
        let query = example();
        let (a, c) = (vec![5.0; 100], vec![1; 100]);
        let columns = [ColumnRef::Numeric(&a), ColumnRef::Codes(&c)];
        let labels = vec![Some(1); 100];
        let whole = count(&query, &columns, &labels).unwrap();
        let pace = Pace { chunk_rows: 7, fold_after: 20 };
        let mut counter = Counter::built(&query, Resources::default(), pace).unwrap();
        counter.add(&columns, &labels).unwrap();
        assert_eq!(counter.finish(), whole);
        assert_eq!(whole[0], 100);
    }

    /// By the definition of a cell, attribute by attribute and row by row.
    fn naive(query: &ReleaseQuery, columns: &[ColumnRef<'_>], labels: &[Option<u16>]) -> Vec<i64> {
        let mut all = Vec::new();
        for marginal in &query.marginals {
            let dims = query.dims(marginal);
            let mut counts = vec![0; dims.iter().product()];
            for row in 0..labels.len() {
                let class = labels[row].map(usize::from);
                if let Some(at) = query.label_index()
                    && class.is_none_or(|class| class >= query.attributes[at].cells())
                {
                    continue;
                }
                let mut cell = 0;
                for (at, dim) in marginal.attributes.iter().zip(&dims) {
                    let attribute = &query.attributes[*at];
                    let column = query.attributes[..*at].iter().filter(|before| !before.is_label()).count();
                    let own = match columns.get(column) {
                        _ if attribute.is_label() => class.unwrap(),
                        Some(ColumnRef::Numeric(values)) => {
                            attribute.merged(attribute.fine_cell_of(values[row]))
                        }
                        Some(ColumnRef::Codes(codes)) => {
                            attribute.merged(attribute.fine_cell_of_code(codes[row]))
                        }
                        None => panic!("a column for each attribute"),
                    };
                    cell = cell * dim + own;
                }
                counts[cell] += 1;
            }
            all.extend(counts);
        }
        all
    }

    /// Narrow and wide attributes, merges, one to three ways, a marginal too large to be joined, one listed twice.
    fn mixed() -> ReleaseQuery {
        let edges: Vec<f64> = (1..90).map(f64::from).collect();
        query(
            vec![
                numeric("a", &edges),
                levels("b", 300, None),
                Attribute::label(3),
                levels("c", 2, Some(vec![0, 1, 1, 2])),
                numeric("d", &[10.0, 50.0]),
                levels("unused", 4, None),
            ],
            &[&[0, 1], &[1], &[2], &[3, 0], &[0, 2, 3], &[4, 3], &[3, 4], &[3, 4], &[2, 4], &[4, 1]],
        )
    }

    type Mixed = (f64, u32, Option<u16>, u32, f64);

    fn mixed_rows() -> impl Strategy<Value = Vec<Mixed>> {
        let value = || prop_oneof![1 => Just(f64::NAN), 9 => -10.0..120.0f64];
        prop::collection::vec((value(), 0u32..310, prop::option::of(0u16..4), 0u32..6, value()), 0..200)
    }

    type Row = (f64, u32, Option<u16>);

    fn rows() -> impl Strategy<Value = Vec<Row>> {
        let value = prop_oneof![Just(f64::NAN), -10.0..120.0f64];
        prop::collection::vec((value, 0u32..6, prop::option::of(0u16..3)), 0..60)
    }

    fn count_rows(query: &ReleaseQuery, rows: &[Row]) -> Vec<i64> {
        let a: Vec<f64> = rows.iter().map(|r| r.0).collect();
        let c: Vec<u32> = rows.iter().map(|r| r.1).collect();
        let labels: Vec<Option<u16>> = rows.iter().map(|r| r.2).collect();
        count(query, &[ColumnRef::Numeric(&a), ColumnRef::Codes(&c)], &labels).unwrap()
    }

    proptest! {
        // Twice the same counts, whatever the threads, the chunks and the way rows are handed in.
        #[test]
        fn counts_equal_the_definition(rows in mixed_rows(), threads in 1usize..5, chunk_rows in 1usize..90, fold_after in 90u32..150, cut in 1usize..70) {
            let query = mixed();
            let (a, b): (Vec<f64>, Vec<u32>) = rows.iter().map(|r| (r.0, r.1)).unzip();
            let (c, d): (Vec<u32>, Vec<f64>) = rows.iter().map(|r| (r.3, r.4)).unzip();
            let labels: Vec<Option<u16>> = rows.iter().map(|r| r.2).collect();
            let columns = [ColumnRef::Numeric(&a), ColumnRef::Codes(&b), ColumnRef::Codes(&c), ColumnRef::Numeric(&d), ColumnRef::Codes(&c)];
            let expected = naive(&query, &columns, &labels);
            prop_assert_eq!(&count(&query, &columns, &labels).unwrap(), &expected);
            let resources = Resources { threads, ..Resources::default() };
            let mut counter = Counter::built(&query, resources, Pace { chunk_rows, fold_after }).unwrap();
            let all: Vec<usize> = (0..rows.len() + 3).collect();
            for part in all.chunks(cut) {
                counter.add_chosen(&columns, &labels, part.iter().copied()).unwrap();
            }
            prop_assert_eq!(counter.finish(), expected);
        }

        // One row more changes the vector by at most √m in L2: what the noise is calibrated to.
        #[test]
        fn one_row_moves_the_vector_by_its_sensitivity_at_most(mut rows in rows(), extra in (0.0..99.0f64, 0u32..6, prop::option::of(0u16..3))) {
            let query = example();
            let before = count_rows(&query, &rows);
            rows.push(extra);
            let after = count_rows(&query, &rows);
            let distance: i64 = before.iter().zip(&after).map(|(a, b)| (a - b).pow(2)).sum();
            prop_assert!(distance as u64 <= query.l2_sensitivity_squared());
            prop_assert_eq!(distance as u64, if extra.2.is_some_and(|l| l < 2) { query.l2_sensitivity_squared() } else { 0 });
        }

        #[test]
        fn chunks_add_up_to_the_whole(rows in rows(), cut in 0usize..60) {
            let query = example();
            let (head, tail) = rows.split_at(cut.min(rows.len()));
            let sum: Vec<i64> = count_rows(&query, head).iter().zip(count_rows(&query, tail)).map(|(a, b)| a + b).collect();
            prop_assert_eq!(sum, count_rows(&query, &rows));
        }

        #[test]
        fn every_marginal_counts_every_labelled_row_once(rows in rows()) {
            let query = example();
            let counts = count_rows(&query, &rows);
            let labelled = rows.iter().filter(|r| r.2.is_some_and(|l| l < 2)).count() as i64;
            for (range, name) in [(0..3, "a"), (3..5, "label"), (5..11, "pair"), (11..29, "cube")] {
                prop_assert_eq!(counts[range].iter().sum::<i64>(), labelled, "{}", name);
            }
        }
    }
}
