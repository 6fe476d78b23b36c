//! Exact counts of a query's cells over rows that stream in.
//!
//! The vector is the marginals one after another, each row-major with the last attribute fastest. It holds exact
//! private counts: it has no wire form, and a mechanism is the only way onward. Callers hand in at most k rows of a
//! unit, chosen without looking at values.

use super::{Attribute, Binning, QueryError, ReleaseQuery};

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
}

/// Accumulates a query's counts chunk by chunk.
#[derive(Debug)]
pub struct Counter<'q> {
    query: &'q ReleaseQuery,
    label: Option<usize>,
    /// Attribute index of each column handed in.
    column_attributes: Vec<usize>,
    counts: Vec<i64>,
}

impl<'q> Counter<'q> {
    /// An accumulator of zeros.
    ///
    /// # Errors
    /// [`CountError::Query`] when the query is refused.
    pub fn new(query: &'q ReleaseQuery) -> Result<Self, CountError> {
        query.check()?;
        let label = query.label_index();
        let column_attributes = (0..query.attributes.len()).filter(|i| Some(*i) != label).collect();
        Ok(Self { query, label, column_attributes, counts: vec![0; query.cells_total()] })
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
        self.check_shapes(columns, labels.len())?;
        let classes = self.label.and_then(|i| self.query.attributes.get(i)).map(Attribute::cells);
        let kept: Vec<(usize, usize)> = labels
            .iter()
            .enumerate()
            .filter_map(|(row, label)| match classes {
                None => Some((row, 0)),
                Some(classes) => {
                    label.map(usize::from).filter(|class| *class < classes).map(|class| (row, class))
                }
            })
            .collect();
        let mut cells: Vec<Vec<u32>> = vec![Vec::new(); self.query.attributes.len()];
        for (column, index) in columns.iter().zip(&self.column_attributes) {
            cells[*index] = cells_of(&self.query.attributes[*index], column, &kept);
        }
        if let Some(index) = self.label {
            cells[index] = kept.iter().map(|(_, class)| *class as u32).collect();
        }
        self.tally(&cells);
        Ok(())
    }

    /// The counts, one vector over all marginals.
    #[must_use]
    pub fn finish(self) -> Vec<i64> {
        self.counts
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

    // Indices come from a checked query (attributes below the list's length, cells below their dimension).
    fn tally(&mut self, cells: &[Vec<u32>]) {
        let mut offset = 0;
        for marginal in &self.query.marginals {
            let dims = self.query.dims(marginal);
            let size: usize = dims.iter().product();
            let counts = &mut self.counts[offset..offset + size];
            match marginal.attributes.as_slice() {
                [a] => cells[*a].iter().for_each(|cell| counts[*cell as usize] += 1),
                [a, b] => {
                    for (x, y) in cells[*a].iter().zip(&cells[*b]) {
                        counts[*x as usize * dims[1] + *y as usize] += 1;
                    }
                }
                [a, b, c] => {
                    for ((x, y), z) in cells[*a].iter().zip(&cells[*b]).zip(&cells[*c]) {
                        counts[(*x as usize * dims[1] + *y as usize) * dims[2] + *z as usize] += 1;
                    }
                }
                _ => debug_assert!(false, "a checked marginal has one to three attributes"),
            }
            offset += size;
        }
    }
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

// A cell is below 4096, so the cast keeps it.
fn cells_of(attribute: &Attribute, column: &ColumnRef<'_>, kept: &[(usize, usize)]) -> Vec<u32> {
    let merged: Vec<u32> = (0..attribute.fine_cells()).map(|fine| attribute.merged(fine) as u32).collect();
    match column {
        ColumnRef::Numeric(values) => {
            kept.iter().map(|(row, _)| merged[attribute.fine_cell_of(values[*row])]).collect()
        }
        ColumnRef::Codes(codes) => {
            kept.iter().map(|(row, _)| merged[attribute.fine_cell_of_code(codes[*row])]).collect()
        }
    }
}

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
