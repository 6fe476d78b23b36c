//! Refusals of a contract, each with the file, line, column and a caret under the text that caused it.
//!
//! Owns [`ContractError`] (a contract is refused) and [`Warning`] (it is accepted, something was assumed).
//! Both carry a [`Place`] and render through `miette`. They quote the contract, which is an owner's
//! declaration, and never a value of the table.

use std::fmt;
use std::sync::Arc;

use miette::{
    Diagnostic, GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteError, MietteSpanContents,
    Severity, SourceCode, SourceSpan, SpanContents,
};
use serde_saphyr::Location;
use thiserror::Error;

use crate::schema::SchemaError;

/// A span of a contract's text: `file:line:column`, with the text at hand for a snippet.
#[derive(Clone, PartialEq, Eq)]
pub struct Place {
    source: Document,
    offset: usize,
    length: usize,
    line: u64,
    column: u64,
}

/// A contract's file name and text, shared by all its places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Document {
    pub(crate) file: Arc<str>,
    pub(crate) text: Arc<str>,
}

impl Document {
    pub(crate) fn new(file: &str, text: &str) -> Self {
        Self { file: file.into(), text: text.into() }
    }

    /// The place of a parser location; an unknown location points at the start of the file.
    pub(crate) fn place(&self, location: Location) -> Box<Place> {
        let span = location.span();
        let number = |value: Option<u64>| value.and_then(|v| usize::try_from(v).ok());
        let offset = number(span.byte_offset()).unwrap_or(0).min(self.text.len());
        let length = number(span.byte_len()).unwrap_or(0).min(self.text.len() - offset);
        // A mapping's span may reach over many lines: the caret stays on the first.
        let length = self
            .text
            .get(offset..offset + length)
            .map_or(0, |covered| covered.find(['\n', '\r']).unwrap_or(covered.len()));
        Box::new(Place {
            source: self.clone(),
            offset,
            length: length.max(1).min(self.text.len() - offset),
            line: location.line().max(1),
            column: location.column().max(1),
        })
    }

    /// The text that a location covers.
    pub(crate) fn covered(&self, location: Location) -> &str {
        let place = self.place(location);
        self.text.get(place.offset..place.offset + place.length).unwrap_or_default()
    }
}

impl Place {
    /// File name as given to the parser.
    #[must_use]
    pub fn file(&self) -> &str {
        &self.source.file
    }

    /// Line, from 1.
    #[must_use]
    pub fn line(&self) -> u64 {
        self.line
    }

    /// Column in characters, from 1.
    #[must_use]
    pub fn column(&self) -> u64 {
        self.column
    }

    /// The text under the caret.
    #[must_use]
    pub fn text(&self) -> &str {
        self.source.text.get(self.offset..self.offset + self.length).unwrap_or_default()
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.source.file, self.line, self.column)
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Place({self}, {:?})", self.text())
    }
}

impl SourceCode for Place {
    fn read_span<'a>(
        &'a self,
        span: &SourceSpan,
        lines_before: usize,
        lines_after: usize,
    ) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        let inner = self.source.text.read_span(span, lines_before, lines_after)?;
        Ok(Box::new(MietteSpanContents::new_named(
            self.source.file.to_string(),
            inner.data(),
            *inner.span(),
            inner.line(),
            inner.column(),
            inner.line_count(),
        )))
    }
}

/// Why a contract is refused.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum ContractError {
    /// The file is larger than [`crate::contract::MAX_CONTRACT_BYTES`]; it was not parsed.
    #[error("{file}: a contract has at most {limit} bytes, got {got}")]
    TooLarge {
        /// File name.
        file: String,
        /// Size found, in bytes.
        got: usize,
        /// Largest size, in bytes.
        limit: usize,
    },
    /// The text isn't YAML, or uses a construct that contracts may not use.
    #[error("{place}: {message}")]
    Syntax {
        /// Where.
        place: Box<Place>,
        /// What the parser said.
        message: String,
    },
    /// A key that the format doesn't have.
    #[error("{place}: unknown key `{key}`")]
    UnknownKey {
        /// Where the key stands.
        place: Box<Place>,
        /// The key found.
        key: String,
        /// Keys allowed there.
        expected: Vec<String>,
    },
    /// A key that must be there.
    #[error("{place}: key `{key}` is missing")]
    MissingKey {
        /// The mapping that lacks it.
        place: Box<Place>,
        /// The key.
        key: String,
    },
    /// A value of the wrong type or outside what is allowed.
    #[error("{place}: {what} must be {expected}, got {got}")]
    WrongValue {
        /// Where the value stands.
        place: Box<Place>,
        /// The key or thing the value belongs to.
        what: String,
        /// What is allowed.
        expected: String,
        /// What was found.
        got: String,
    },
    /// A statement about a column that the schema doesn't have.
    #[error("{place}: {what} names column `{column}`, which the schema doesn't declare")]
    UnknownColumn {
        /// Where the name stands.
        place: Box<Place>,
        /// The key that names it.
        what: &'static str,
        /// The name found.
        column: String,
        /// Columns declared.
        declared: Vec<String>,
    },
    /// The same thing is declared twice, differently.
    #[error("{place}: {what} is declared twice")]
    DeclaredTwice {
        /// Where the second declaration stands.
        place: Box<Place>,
        /// What is declared twice.
        what: String,
    },
    /// A column with personal data is declared a feature or the target.
    #[error("{place}: column `{column}` is marked pii and can't be a {role}")]
    PiiFeature {
        /// Where its role stands.
        place: Box<Place>,
        /// The column.
        column: String,
        /// `feature` or `target`.
        role: &'static str,
    },
    /// A numeric feature without a declared range.
    #[error("{place}: numeric feature `{column}` declares no range")]
    UndeclaredRange {
        /// Where the column stands.
        place: Box<Place>,
        /// The column.
        column: String,
    },
    /// A categorical feature or the target without declared categories.
    #[error("{place}: categorical column `{column}` declares no categories")]
    UndeclaredCategories {
        /// Where the column stands.
        place: Box<Place>,
        /// The column.
        column: String,
    },
    /// A numeric range whose bounds are reversed, equal or not finite.
    #[error("{place}: range of `{column}` must be finite with lower < upper, got [{lower}, {upper}]")]
    ReversedRange {
        /// Where the range stands.
        place: Box<Place>,
        /// The column.
        column: String,
        /// Lower bound found.
        lower: f64,
        /// Upper bound found.
        upper: f64,
    },
    /// Two columns claim one canonical feature id.
    #[error("{place}: columns `{first}` and `{second}` both declare the canonical feature id `{id}`")]
    DuplicateFeature {
        /// Where the second declaration stands.
        place: Box<Place>,
        /// The id.
        id: String,
        /// Column that declares it first.
        first: String,
        /// Column that declares it again.
        second: String,
    },
    /// Not exactly one column has the role `target`.
    #[error("{place}: a schema needs exactly one column with role target, got {got}")]
    TargetCount {
        /// Where the schema, or the surplus target, stands.
        place: Box<Place>,
        /// Number of targets found.
        got: usize,
    },
    /// Another rule of the canonical schema is broken.
    #[error("{place}: {source}")]
    Schema {
        /// Where the column or schema stands.
        place: Box<Place>,
        /// The broken rule.
        source: SchemaError,
    },
}

impl ContractError {
    /// Where the refused text stands; none for a file too large to read.
    #[must_use]
    pub fn place(&self) -> Option<&Place> {
        match self {
            Self::TooLarge { .. } => None,
            Self::Syntax { place, .. }
            | Self::UnknownKey { place, .. }
            | Self::MissingKey { place, .. }
            | Self::WrongValue { place, .. }
            | Self::UnknownColumn { place, .. }
            | Self::DeclaredTwice { place, .. }
            | Self::PiiFeature { place, .. }
            | Self::UndeclaredRange { place, .. }
            | Self::UndeclaredCategories { place, .. }
            | Self::ReversedRange { place, .. }
            | Self::DuplicateFeature { place, .. }
            | Self::TargetCount { place, .. }
            | Self::Schema { place, .. } => Some(place),
        }
    }

    /// What the owner can do about it.
    #[must_use]
    pub fn advice(&self) -> String {
        match self {
            Self::TooLarge { .. } => "keep one table per contract and leave data out of it".into(),
            Self::Syntax { .. } => "quote texts that hold ':' or '#', and indent with spaces".into(),
            Self::UnknownKey { key, expected, .. } => match closest(key, expected) {
                Some(near) => format!("did you mean `{near}`? allowed here: {}", expected.join(", ")),
                None => format!("allowed here: {}", expected.join(", ")),
            },
            Self::MissingKey { key, .. } => format!("add `{key}:`"),
            Self::WrongValue { expected, .. } => format!("write {expected}"),
            Self::UnknownColumn { declared, .. } => format!("declared columns: {}", declared.join(", ")),
            Self::DeclaredTwice { .. } => "keep one of the two declarations".into(),
            Self::PiiFeature { .. } => {
                "drop the role (the column then stays local), or declare pii: false if it holds no personal data"
                    .into()
            }
            Self::UndeclaredRange { column, .. } => format!(
                "declare `range: [lower, upper]` from what `{column}` can mean, not from its rows: \
                 the bounds clip values before noise is added"
            ),
            Self::UndeclaredCategories { column, .. } => {
                format!("declare `categories: [..]` for `{column}`; anything else counts as \"other\"")
            }
            Self::ReversedRange { .. } => "write the smaller bound first".into(),
            Self::DuplicateFeature { .. } => "give each column its own `feature:` id".into(),
            Self::TargetCount { .. } => "mark the one column to predict with `role: target`".into(),
            Self::Schema { .. } => "correct the declaration of the column".into(),
        }
    }

    /// The error as text: message, `file:line:column`, the line with a caret, and advice. No colours.
    #[must_use]
    pub fn render(&self) -> String {
        render(self)
    }
}

impl Diagnostic for ContractError {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        Some(Box::new(self.advice()))
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.place().map(|place| place as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        self.place().map(label)
    }
}

/// Something the parser assumed or corrected in a contract it accepts.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{place}: {message}")]
pub struct Warning {
    place: Box<Place>,
    message: String,
}

impl Warning {
    pub(crate) fn new(place: Box<Place>, message: impl Into<String>) -> Self {
        Self { place, message: message.into() }
    }

    /// Where.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// What was assumed.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The warning as text with a caret. No colours.
    #[must_use]
    pub fn render(&self) -> String {
        render(self)
    }
}

impl Diagnostic for Warning {
    fn severity(&self) -> Option<Severity> {
        Some(Severity::Warning)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        Some(&*self.place)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        Some(label(&self.place))
    }
}

fn label(place: &Place) -> Box<dyn Iterator<Item = LabeledSpan>> {
    Box::new(std::iter::once(LabeledSpan::new(None, place.offset, place.length)))
}

fn render(diagnostic: &dyn Diagnostic) -> String {
    let mut out = String::new();
    let handler =
        GraphicalReportHandler::new_themed(GraphicalTheme::none()).with_links(false).with_width(110);
    match handler.render_report(&mut out, diagnostic) {
        Ok(()) => out,
        Err(_) => diagnostic.to_string(),
    }
}

/// The allowed key nearest to a misspelt one, if at most two edits away.
fn closest<'a>(key: &str, allowed: &'a [String]) -> Option<&'a str> {
    allowed
        .iter()
        .map(|candidate| (edits(key, candidate), candidate.as_str()))
        .filter(|(distance, _)| *distance <= 2)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Levenshtein distance of two short texts.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        if let Some(first) = row.first_mut() {
            *first = left;
        }
        for (cell, to) in row.iter_mut().skip(1).zip(b.chars()) {
            let above = *cell;
            let cost = diagonal + usize::from(from != to);
            left = cost.min(above + 1).min(left + 1);
            diagonal = above;
            *cell = left;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edit_distance_of_known_pairs() {
        for (a, b, expected) in [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("role", "rule", 1)] {
            assert_eq!(edits(a, b), expected, "{a} -> {b}");
            assert_eq!(edits(b, a), expected, "{b} -> {a}");
        }
    }
}
