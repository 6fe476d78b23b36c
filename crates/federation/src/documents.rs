//! The documents coordinator and agents exchange beside release queries and round descriptors.
//!
//! All are JSON, named by the SHA-256 of their bytes as sent, with unknown fields refused. None can carry code, a path,
//! or anything an agent would obey against its own contract and policy.

use serde::{Deserialize, Serialize};
use tabmesh_contract::batch::{TypedBatch, TypedColumn};
use tabmesh_contract::schema::{FeatureKind, FeatureSchema};
use thiserror::Error;

use crate::id::{Digest, PlanDigest};

/// Why a document is refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DocumentError {
    /// More bytes than the kind allows.
    #[error("{what} has at most {max} bytes, got {got}")]
    TooLarge {
        /// Kind of document.
        what: &'static str,
        /// Limit.
        max: usize,
        /// Bytes given.
        got: usize,
    },
    /// Not JSON of this shape.
    #[error("not a {what}: {reason}")]
    Malformed {
        /// Kind of document.
        what: &'static str,
        /// The parser's words.
        reason: String,
    },
    /// A part doesn't fit the rest.
    #[error("{what}: expected {expected}, got {got}")]
    Mismatch {
        /// The part.
        what: &'static str,
        /// What fits.
        expected: String,
        /// What was found.
        got: String,
    },
}

/// A plan as agents first hear of it: its bytes, and what their contracts have in common.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanAnnouncement {
    /// The plan's YAML as submitted.
    pub plan: String,
    /// Digest of these bytes.
    pub digest: PlanDigest,
    /// Features and target the cohort shares.
    pub schema: FeatureSchema,
    /// Agents asked to take part.
    pub cohort: u32,
    /// Who submitted it.
    pub approvals: Vec<String>,
}

/// A manifest on its way to the agents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Publication {
    /// Digest of the signed manifest, a blob.
    pub manifest: Digest,
    /// The detached signature, in hexadecimal.
    pub signature: String,
}

/// The end of a plan for one agent: refund what was not used, state the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanClosing {
    /// The plan.
    pub plan: PlanDigest,
}

/// Synthetic rows drawn from a release: differentially private by post-processing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorpusDocument {
    /// The plan it was drawn for.
    pub plan: PlanDigest,
    /// One column per feature of the schema, in canonical order.
    pub columns: Vec<CorpusColumn>,
    /// Class of each row.
    pub labels: Vec<u16>,
    /// Which domain each row stands for, where the plan asked for it and domains differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub domains: Option<DomainColumn>,
}

/// The domain that each synthetic row stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DomainColumn {
    /// Data products of the cohort.
    pub products: Vec<String>,
    /// Place in `products` of each row's domain.
    pub rows: Vec<u16>,
}

/// A column of synthetic values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CorpusColumn {
    /// Numbers; null is missing.
    Numeric(Vec<Option<f32>>),
    /// Level codes: declared levels, then "other", then missing.
    Codes(Vec<u32>),
}

impl CorpusDocument {
    /// The rows in the contract's terms.
    ///
    /// # Errors
    /// [`DocumentError::Mismatch`] if columns, kinds, lengths, codes or classes don't fit the schema.
    pub fn batch(&self, schema: &FeatureSchema) -> Result<TypedBatch, DocumentError> {
        let mismatch = |what, expected: usize, got: usize| {
            Err(DocumentError::Mismatch { what, expected: expected.to_string(), got: got.to_string() })
        };
        let rows = self.labels.len();
        if self.columns.len() != schema.features().len() {
            return mismatch("corpus columns", schema.features().len(), self.columns.len());
        }
        if let Some(DomainColumn { products, rows: of }) = &self.domains {
            if of.len() != rows {
                return mismatch("corpus rows with a domain", rows, of.len());
            }
            if let Some(&code) = of.iter().find(|&&code| usize::from(code) >= products.len()) {
                return mismatch("corpus domains", products.len(), usize::from(code) + 1);
            }
        }
        let classes = schema.target().classes.len();
        if let Some(&class) = self.labels.iter().find(|&&class| usize::from(class) >= classes) {
            return mismatch("corpus classes", classes, usize::from(class) + 1);
        }
        let mut columns = Vec::with_capacity(self.columns.len());
        for (column, feature) in self.columns.iter().zip(schema.features()) {
            let typed = match (column, &feature.kind) {
                (CorpusColumn::Numeric(values), FeatureKind::Numeric(_)) => {
                    TypedColumn::Numeric(values.iter().map(|v| v.map_or(f64::NAN, f64::from)).collect())
                }
                (CorpusColumn::Codes(codes), FeatureKind::Categorical { levels }) => {
                    if let Some(&code) = codes.iter().find(|&&code| code as usize > levels.len() + 1) {
                        return mismatch("corpus level codes", levels.len() + 2, code as usize + 1);
                    }
                    TypedColumn::Categorical(codes.clone())
                }
                _ => {
                    let (expected, got) = (feature.id.to_string(), "a column of another kind".to_owned());
                    return Err(DocumentError::Mismatch { what: "corpus column", expected, got });
                }
            };
            if typed.len() != rows {
                return mismatch("corpus rows", rows, typed.len());
            }
            columns.push(typed);
        }
        Ok(TypedBatch {
            columns,
            labels: self.labels.iter().map(|&class| Some(class)).collect(),
            units: vec![[0; 16]; rows],
        })
    }

    /// Rows that stand for a data product, in order; none without a domain column or for one that isn't in it.
    #[must_use]
    pub fn rows_of(&self, product: &str) -> Vec<usize> {
        let Some(DomainColumn { products, rows }) = &self.domains else { return Vec::new() };
        let Some(code) = products.iter().position(|known| known == product) else { return Vec::new() };
        (0..rows.len()).filter(|&row| usize::from(rows[row]) == code).collect()
    }
}

/// Reads a document of this module.
///
/// # Errors
/// [`DocumentError::TooLarge`] above `max` bytes, [`DocumentError::Malformed`] for another shape.
pub fn read<'a, T: Deserialize<'a>>(
    what: &'static str,
    bytes: &'a [u8],
    max: usize,
) -> Result<T, DocumentError> {
    if bytes.len() > max {
        return Err(DocumentError::TooLarge { what, max, got: bytes.len() });
    }
    serde_json::from_slice(bytes).map_err(|e| DocumentError::Malformed { what, reason: e.to_string() })
}

/// Largest plan announcement, publication or closing, in bytes.
pub const MAX_DOCUMENT_BYTES: usize = 4 << 20;
/// Largest corpus, in bytes.
pub const MAX_CORPUS_BYTES: usize = 1 << 30;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use tabmesh_contract::schema::{Feature, FeatureId, NumericDomain, Scale, Target};

    use super::*;

    fn schema() -> FeatureSchema {
        let id = |text: &str| FeatureId::new(text).unwrap();
        let numeric = NumericDomain { lower: 0.0, upper: 9.0, scale: Scale::Linear, cut_points: None };
        let feature = |name: &str, kind| Feature { id: id(name), kind, unit: None, description: None };
        let levels = vec!["x".to_owned(), "y".to_owned()];
        FeatureSchema::new(
            vec![
                feature("a", FeatureKind::Numeric(numeric)),
                feature("b", FeatureKind::Categorical { levels }),
            ],
            Target { id: id("t"), classes: vec!["0".into(), "1".into()] },
        )
        .unwrap()
    }

    fn corpus() -> CorpusDocument {
        let columns = vec![CorpusColumn::Numeric(vec![Some(1.5), None]), CorpusColumn::Codes(vec![1, 3])];
        CorpusDocument { plan: PlanDigest::of(b"plan"), columns, labels: vec![0, 1], domains: None }
    }

    #[test]
    fn a_domain_column_says_whose_rows_are_whose() {
        let products = vec!["shop.sales".to_owned(), "bank.loans".to_owned()];
        let with = |rows: Vec<u16>| CorpusDocument {
            domains: Some(DomainColumn { products: products.clone(), rows }),
            ..corpus()
        };
        let bytes = serde_json::to_vec(&with(vec![1, 0])).unwrap();
        let read: CorpusDocument = read("corpus", &bytes, MAX_CORPUS_BYTES).unwrap();
        assert!(read.batch(&schema()).is_ok());
        assert_eq!((read.rows_of("bank.loans"), read.rows_of("shop.sales")), (vec![0], vec![1]));
        assert!(read.rows_of("shop").is_empty() && corpus().rows_of("shop.sales").is_empty());
        let refusal = |rows: Vec<u16>| with(rows).batch(&schema()).unwrap_err().to_string();
        assert!(refusal(vec![1]).contains("rows with a domain"), "{}", refusal(vec![1]));
        assert!(refusal(vec![0, 2]).contains("corpus domains: expected 2, got 3"), "{}", refusal(vec![0, 2]));
    }

    #[test]
    fn a_corpus_becomes_rows_and_survives_json() {
        let bytes = serde_json::to_vec(&corpus()).unwrap();
        let read: CorpusDocument = read("corpus", &bytes, MAX_CORPUS_BYTES).unwrap();
        assert_eq!(read, corpus());
        let batch = read.batch(&schema()).unwrap();
        assert_eq!(batch.labels, vec![Some(0), Some(1)]);
        let TypedColumn::Numeric(values) = &batch.columns[0] else { panic!("kind") };
        assert!(values[0].to_bits() == 1.5_f64.to_bits() && values[1].is_nan());
    }

    #[test]
    fn what_does_not_fit_the_schema_is_refused_by_name() {
        let refuse = |edit: fn(&mut CorpusDocument), word: &str| {
            let mut document = corpus();
            edit(&mut document);
            let error = document.batch(&schema()).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        refuse(|c| c.labels[0] = 2, "classes");
        refuse(|c| c.columns.truncate(1), "columns");
        refuse(|c| c.columns[1] = CorpusColumn::Codes(vec![0, 4]), "codes");
        refuse(|c| c.columns[1] = CorpusColumn::Codes(vec![0]), "rows");
        refuse(|c| c.columns.swap(0, 1), "another kind");
    }

    #[test]
    fn unknown_fields_and_one_byte_too_many_are_refused() {
        let bytes = br#"{"plan":"00","extra":1}"#;
        assert!(matches!(read::<PlanClosing>("closing", bytes, 1000), Err(DocumentError::Malformed { .. })));
        assert!(matches!(
            read::<PlanClosing>("closing", bytes, bytes.len() - 1),
            Err(DocumentError::TooLarge { .. })
        ));
    }
}
