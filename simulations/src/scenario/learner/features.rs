//! Rows as numbers by what contracts say, and nothing that rows say.
//!
//! A number is put on its declared scale and range as [-1, 1], with a flag where it is missing. A category is one 0/1 column
//! a declared level, one for other values and one for missing ones; above [`MAX_COLUMNS`] columns levels share them by a
//! hash of their name (Weinberger et al. 2009, arXiv 0902.2206). A feature that a domain doesn't have is missing there.

use tabmesh_contract::batch::{TypedBatch, TypedColumn, missing_code, other_code};
use tabmesh_contract::schema::{FeatureKind, FeatureSchema};
use tabmesh_federation::id::Digest;

/// Rows of equal width, and their labels.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rows {
    pub(crate) width: usize,
    values: Vec<f32>,
    pub(crate) labels: Vec<u8>,
}

impl Rows {
    /// Rows by hand.
    #[cfg(test)]
    pub(crate) fn new(width: usize, values: Vec<f32>, labels: Vec<u8>) -> Self {
        assert_eq!(values.len(), width * labels.len());
        Self { width, values, labels }
    }

    /// A row.
    pub(crate) fn row(&self, i: usize) -> &[f32] {
        self.values.get(i * self.width..(i + 1) * self.width).unwrap_or_default()
    }

    /// Number of rows.
    pub(crate) fn len(&self) -> usize {
        self.labels.len()
    }
}

/// Numbers of a row under a schema.
pub(crate) fn width(schema: &FeatureSchema) -> usize {
    schema.features().iter().map(|feature| columns(&feature.kind)).sum()
}

fn columns(kind: &FeatureKind) -> usize {
    match kind {
        FeatureKind::Numeric(_) => 2,
        FeatureKind::Categorical { levels } => levels.len().min(MAX_COLUMNS) + 2,
    }
}

/// The labelled rows at `rows` of a batch of the schema, as numbers.
pub(crate) fn code(schema: &FeatureSchema, batch: &TypedBatch, rows: &[usize]) -> Rows {
    let width = width(schema);
    let mut values = vec![0_f32; rows.len() * width];
    let mut first = 0;
    for (feature, column) in schema.features().iter().zip(&batch.columns) {
        let slots = columns(&feature.kind);
        let places: Vec<usize> = match &feature.kind {
            FeatureKind::Numeric(_) => Vec::new(),
            FeatureKind::Categorical { levels } => places(levels),
        };
        for (to, row) in values.chunks_exact_mut(width).zip(rows) {
            let to = &mut to[first..first + slots];
            match (&feature.kind, column) {
                (FeatureKind::Numeric(domain), TypedColumn::Numeric(numbers)) => {
                    let value = numbers.get(*row).copied().unwrap_or(f64::NAN);
                    if value.is_nan() {
                        to[1] = 1.0;
                    } else {
                        let on = |v: f64| domain.scale.apply(v);
                        let (low, high) = (on(domain.lower), on(domain.upper));
                        let share = (on(value.clamp(domain.lower, domain.upper)) - low) / (high - low);
                        to[0] = if share.is_finite() { (2.0 * share - 1.0) as f32 } else { 0.0 };
                    }
                }
                (FeatureKind::Categorical { levels }, TypedColumn::Categorical(codes)) => {
                    let code = codes.get(*row).copied().unwrap_or_else(|| missing_code(levels.len()));
                    let slot = if code == missing_code(levels.len()) {
                        slots - 1
                    } else if code == other_code(levels.len()) {
                        slots - 2
                    } else {
                        places.get(code as usize).copied().unwrap_or(slots - 2)
                    };
                    to[slot] = 1.0;
                }
                // A batch of the schema has its kinds, column by column.
                _ => {}
            }
        }
        first += slots;
    }
    let labels = rows.iter().map(|row| u8::from(batch.labels.get(*row) == Some(&Some(1)))).collect();
    Rows { width, values, labels }
}

/// Column of each level.
fn places(levels: &[String]) -> Vec<usize> {
    if levels.len() <= MAX_COLUMNS {
        return (0..levels.len()).collect();
    }
    levels
        .iter()
        .map(|level| {
            let digest = Digest::of(level.as_bytes());
            let head: [u8; 2] = [digest.as_bytes()[0], digest.as_bytes()[1]];
            usize::from(u16::from_le_bytes(head)) % MAX_COLUMNS
        })
        .collect()
}

/// Most columns of a category's levels.
const MAX_COLUMNS: usize = 32;

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::float_cmp,
        reason = "tests; exact equality is meant where it stands"
    )]
    use tabmesh_contract::schema::{Feature, FeatureId, NumericDomain, Scale, Target};

    use super::*;

    fn feature(id: &str, kind: FeatureKind) -> Feature {
        Feature { id: FeatureId::new(id).unwrap(), kind, unit: None, description: None }
    }

    #[test]
    fn rows_are_coded_by_declaration_alone() {
        let numeric = NumericDomain { lower: 0.0, upper: 10.0, scale: Scale::Linear, cut_points: None };
        let levels: Vec<String> = ["a", "b"].map(str::to_owned).to_vec();
        let many: Vec<String> = (0..100).map(|i| format!("l{i:03}")).collect();
        let schema = FeatureSchema::new(
            vec![
                feature("f.a", FeatureKind::Numeric(numeric)),
                feature("f.b", FeatureKind::Categorical { levels }),
                feature("f.c", FeatureKind::Categorical { levels: many }),
            ],
            Target { id: FeatureId::new("t").unwrap(), classes: vec!["0".into(), "1".into()] },
        )
        .unwrap();
        assert_eq!(width(&schema), 2 + 4 + 34);
        let batch = TypedBatch {
            columns: vec![
                TypedColumn::Numeric(vec![2.5, 99.0, f64::NAN]),
                TypedColumn::Categorical(vec![1, 2, 3]),
                TypedColumn::Categorical(vec![7, 100, 101]),
            ],
            labels: vec![Some(1), Some(0), Some(1)],
            units: vec![[0; 16]; 3],
        };
        let rows = code(&schema, &batch, &[0, 1, 2]);
        assert_eq!((rows.len(), &rows.labels[..]), (3, &[1, 0, 1][..]));
        // A value in range, one beyond it, a missing one; level b, other, missing.
        assert_eq!(rows.row(0)[..6], [-0.5, 0.0, 0.0, 1.0, 0.0, 0.0]);
        assert_eq!(rows.row(1)[..6], [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
        assert_eq!(rows.row(2)[..6], [0.0, 1.0, 0.0, 0.0, 0.0, 1.0]);
        for row in 0..3 {
            let ones: f32 = rows.row(row)[6..].iter().sum();
            assert!((ones - 1.0).abs() < 1e-6);
        }
        // A hashed level shares its column, and keeps it.
        assert!(rows.row(0)[6..38].contains(&1.0) && rows.row(2)[39] > 0.5);
    }
}
