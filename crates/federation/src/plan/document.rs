//! From bytes to a checked plan, and from a fault to its place in the file.
//!
//! Parsing refuses unknown keys, duplicate keys and oversized documents; validation collects *all* faults, so an
//! author fixes a plan in one go. Places are found by reading the document a second time into a tree of spans.

use std::collections::BTreeMap;

use garde::Validate;
use miette::{Diagnostic, LabeledSpan, NamedSource, SourceCode};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{
    DefaultMessageFormatter, Error as YamlError, Location, MessageFormatter, NonFiniteFloatPolicy, Spanned,
};
use thiserror::Error;

use crate::plan::{MAX_PLAN_BYTES, Plan};

/// Why a plan is refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The document is too large to be read.
    #[error("a plan has at most {MAX_PLAN_BYTES} bytes, got {got}")]
    TooLarge {
        /// Its size in bytes.
        got: usize,
    },
    /// The document isn't UTF-8.
    #[error("a plan is UTF-8 text, byte {at} is not")]
    NotText {
        /// First bad byte.
        at: usize,
    },
    /// The document has faults.
    #[error(transparent)]
    Faulty(Box<Faults>),
    /// The budget can't be shared out.
    #[error("{path}: {message}")]
    Budget {
        /// Field at fault.
        path: &'static str,
        /// What is wrong.
        message: String,
    },
}

impl Diagnostic for PlanError {
    fn code<'a>(&'a self) -> Option<Box<dyn std::fmt::Display + 'a>> {
        Some(Box::new("tabmesh::plan"))
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        match self {
            Self::Faulty(faults) => Some(&faults.source),
            _ => None,
        }
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        match self {
            Self::Faulty(faults) => {
                let label =
                    |fault: &Fault| LabeledSpan::new(Some(fault.message.clone()), fault.offset, fault.length);
                Some(Box::new(faults.faults.iter().map(label)))
            }
            _ => None,
        }
    }
}

/// All faults of one document, with the document.
#[derive(Debug)]
pub struct Faults {
    file: String,
    source: NamedSource<String>,
    faults: Vec<Fault>,
}

impl Faults {
    /// The faults, in document order.
    #[must_use]
    pub fn list(&self) -> &[Fault] {
        &self.faults
    }
}

impl std::fmt::Display for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, fault) in self.faults.iter().enumerate() {
            let Fault { path, message, line, column, .. } = fault;
            let (gap, colon) = (if i == 0 { "" } else { "\n" }, if path.is_empty() { "" } else { ": " });
            write!(f, "{gap}{}:{line}:{column}: {path}{colon}{message}", self.file)?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}

/// One fault and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Dotted path of the field; empty for a syntax error.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// Line, from 1.
    pub line: u64,
    /// Column, from 1.
    pub column: u64,
    offset: usize,
    length: usize,
}

impl Fault {
    fn at(path: String, message: String, location: Option<Location>) -> Self {
        let location = location.filter(|l| *l != Location::UNKNOWN);
        let span = location.map(|l| l.span());
        let bytes = |value: Option<u64>| value.and_then(|v| usize::try_from(v).ok()).unwrap_or(0);
        Self {
            path,
            message,
            line: location.map_or(1, |l| l.line()),
            column: location.map_or(1, |l| l.column()),
            offset: bytes(span.and_then(|s| s.byte_offset())),
            length: bytes(span.and_then(|s| s.byte_len())),
        }
    }
}

/// Parses and validates.
pub(super) fn parse(bytes: &[u8], file: &str) -> Result<Plan, PlanError> {
    if bytes.len() > MAX_PLAN_BYTES {
        return Err(PlanError::TooLarge { got: bytes.len() });
    }
    let text = std::str::from_utf8(bytes).map_err(|error| PlanError::NotText { at: error.valid_up_to() })?;
    let check = |plan: &Plan| {
        let mut found: Vec<(String, String)> = match plan.validate() {
            Ok(()) => Vec::new(),
            Err(report) => report.iter().map(|(path, error)| (path.to_string(), error.to_string())).collect(),
        };
        if found.is_empty() {
            let contradictions = plan.contradictions().into_iter();
            found = contradictions.map(|(path, message)| (path.to_owned(), message)).collect();
        }
        found
    };
    read_document(text, file, check).map_err(PlanError::Faulty)
}

/// Reads a YAML document of any kind; `check` gives path and message of each fault, and `file` is the name shown.
///
/// # Errors
/// [`Faults`] with the place of each: the first syntax error or unknown key, or all that `check` found.
pub fn read_document<T: DeserializeOwned>(
    text: &str,
    file: &str,
    check: impl FnOnce(&T) -> Vec<(String, String)>,
) -> Result<T, Box<Faults>> {
    let refuse = |mut faults: Vec<Fault>| {
        faults.sort_by_key(|fault| (fault.line, fault.column));
        let source = NamedSource::new(file, text.to_owned());
        Box::new(Faults { file: file.to_owned(), source, faults })
    };
    let options = serde_saphyr::options! { with_snippet: false };
    let document: T =
        serde_saphyr::from_str_with_options(text, options).map_err(|error| refuse(vec![syntax(&error)]))?;
    let found = check(&document);
    if found.is_empty() {
        return Ok(document);
    }
    // A document that parsed parses as a tree too; should it not, places are unknown. `.nan` must pass: it is one of the
    // faults to be placed.
    let options = serde_saphyr::options! {
        with_snippet: false,
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
    };
    let tree = serde_saphyr::from_str_with_options::<Spanned<Node>>(text, options).ok();
    let place = |path: &str| tree.as_ref().map(|tree| locate(tree, path));
    Err(refuse(found.into_iter().map(|(path, m)| Fault::at(path.clone(), m, place(&path))).collect()))
}

fn syntax(error: &YamlError) -> Fault {
    let inner = error.without_snippet();
    let message = DefaultMessageFormatter.format_message(inner).into_owned();
    Fault::at(String::new(), message, inner.location())
}

/// The location of the deepest part of `path` that the document has: a missing key points at its parent.
fn locate(tree: &Spanned<Node>, path: &str) -> Location {
    let mut at = tree;
    for key in path.split(['.', '[', ']']).filter(|part| !part.is_empty()) {
        let child = match &at.value {
            Node::Map(entries) => entries.get(key),
            Node::List(items) => key.parse().ok().and_then(|i: usize| items.get(i)),
            Node::Scalar => None,
        };
        match child {
            Some(child) => at = child,
            None => break,
        }
    }
    at.referenced
}

/// A document reduced to its shape.
enum Node {
    Map(BTreeMap<String, Spanned<Self>>),
    List(Vec<Spanned<Self>>),
    Scalar,
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("any YAML value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut entries = BTreeMap::new();
        while let Some(key) = map.next_key::<String>()? {
            entries.insert(key, map.next_value()?);
        }
        Ok(Node::Map(entries))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_str<E>(self, _: &str) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        Node::deserialize(deserializer)
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        IgnoredAny::deserialize(deserializer).map(|_| Node::Scalar)
    }
}
