//! YAML text to typed documents, parser errors to [`ContractError`]s with a caret.
//!
//! Refuses duplicate keys, several documents in a file, YAML 1.1 booleans (`yes`, `off`) and documents that
//! expand beyond a fixed budget of nodes.

use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_saphyr::{Error, Location, Spanned};

use crate::error::{ContractError, Document};

/// Parses a document of one type.
///
/// # Errors
/// [`ContractError`] with the place of the first offence.
pub(crate) fn parse<T: DeserializeOwned>(document: &Document) -> Result<T, ContractError> {
    let options = serde_saphyr::options! {
        strict_booleans: true,
        with_snippet: false,
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            max_nodes: MAX_NODES,
            max_documents: 1,
        },
    };
    serde_saphyr::from_str_with_options(&document.text, options).map_err(|error| refuse(document, &error))
}

fn refuse(document: &Document, error: &Error) -> ContractError {
    let error = error.without_snippet();
    let place = document.place(error.location().unwrap_or(Location::UNKNOWN));
    let owned = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect();
    match error {
        Error::SerdeUnknownField { field, expected, .. } => {
            ContractError::UnknownKey { place, key: field.clone(), expected: owned(expected) }
        }
        Error::SerdeMissingField { field, .. } => {
            ContractError::MissingKey { place, key: (*field).to_owned() }
        }
        Error::DuplicateMappingKey { key, .. } => ContractError::DeclaredTwice {
            place,
            what: key.as_ref().map_or_else(|| "a key".to_owned(), |key| format!("key `{key}`")),
        },
        Error::SerdeInvalidType { unexpected, expected, .. }
        | Error::SerdeInvalidValue { unexpected, expected, .. } => ContractError::WrongValue {
            place,
            what: "the value".into(),
            expected: expected.clone(),
            got: unexpected.clone(),
        },
        Error::SerdeInvalidLength { len, expected, .. } => ContractError::WrongValue {
            place,
            what: "the list".into(),
            expected: expected.clone(),
            got: format!("{len} items"),
        },
        Error::InvalidScalar { ty, .. } => {
            let got = format!("`{}`", place.text());
            ContractError::WrongValue { place, what: "the value".into(), expected: (*ty).into(), got }
        }
        Error::NonFiniteFloat { value, .. } => {
            let got = format!("`{value}`");
            ContractError::WrongValue {
                place,
                what: "the value".into(),
                expected: "a finite number".into(),
                got,
            }
        }
        Error::InvalidBooleanStrict { .. } => {
            let got = format!("`{}`", place.text());
            ContractError::WrongValue {
                place,
                what: "the value".into(),
                expected: "true or false".into(),
                got,
            }
        }
        other => {
            let text = other.to_string();
            // The place is said once, in front.
            let message = text.split(" at line ").next().unwrap_or_default().trim_end_matches([':', ',']);
            ContractError::Syntax { place, message: message.to_lowercase() }
        }
    }
}

/// A mapping with text keys in document order, each key with its location.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Pairs<V>(pub(crate) Vec<(Spanned<String>, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Pairs<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PairsVisitor<V>(std::marker::PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for PairsVisitor<V> {
            type Value = Pairs<V>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a mapping")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }

        deserializer.deserialize_map(PairsVisitor(std::marker::PhantomData))
    }
}

/// A value that stands where another value of the text stands.
pub(crate) fn at<T>(location: Location, value: T) -> Spanned<T> {
    Spanned::new(value, location, location)
}

/// Deepest nesting of a contract.
const MAX_DEPTH: usize = 32;
/// Most YAML nodes of a contract.
const MAX_NODES: usize = 200_000;
