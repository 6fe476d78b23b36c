//! Offline verification of a report file, JSON or HTML.
//!
//! In this order: size, form, pinned key, signature, every ledger's hash chain and rules, signed heads, every derived
//! figure, and for a page that it shows what was signed. A verifier that pins no key learns only that the report is
//! consistent and who claims to have signed it.

use super::html::{EMBED_END, EMBED_START};
use super::{LedgerRecord, Report, ReportError, SignedReport, build, head_statement, render_html};
use crate::ledger::LedgerError;
use crate::signature::{Context, SignatureError, VerifyingKey};
use serde_json::Value;

/// Bytes of a report file at most.
pub const MAX_REPORT_BYTES: usize = 64 << 20;

/// A report that verified.
#[derive(Debug, Clone, PartialEq)]
pub struct Verified {
    /// The report.
    pub report: Report,
    /// Key that signed it.
    pub key: VerifyingKey,
    /// Whether the caller pinned that key; otherwise anybody could have signed.
    pub key_pinned: bool,
    /// Ledgers whose last entry the agent signed, out of all in the report.
    pub signed_heads: usize,
}

/// Why a report doesn't verify.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum VerifyError {
    /// The file is too large.
    #[error("file too large: expected at most {MAX_REPORT_BYTES} bytes, got {got}")]
    TooLarge {
        /// Bytes given.
        got: usize,
    },
    /// The file isn't a report.
    #[error("not a signed report: {reason}")]
    Form {
        /// What is missing or malformed.
        reason: String,
    },
    /// Another key signed.
    #[error("signed by {got}, but {expected} is pinned")]
    Key {
        /// The pinned key.
        expected: VerifyingKey,
        /// The key in the file.
        got: VerifyingKey,
    },
    /// The signature doesn't match the text.
    #[error(transparent)]
    Signature(#[from] SignatureError),
    /// A ledger's chain is broken, or an entry breaks its rules.
    #[error("ledger of {agent}: {source}")]
    Ledger {
        /// SPIFFE id of the agent.
        agent: String,
        /// What is wrong, and where.
        source: LedgerError,
    },
    /// An agent's signature over its last entry doesn't match.
    #[error("ledger of {agent}: the signature over its last entry doesn't match")]
    Head {
        /// SPIFFE id of the agent.
        agent: String,
    },
    /// A printed figure isn't what the entries add up to.
    #[error("{place}: printed {printed}, the entries give {recomputed}")]
    Figure {
        /// Path of the field.
        place: String,
        /// What the report says.
        printed: String,
        /// What was recomputed.
        recomputed: String,
    },
    /// The figures can't be recomputed.
    #[error(transparent)]
    Rebuild(#[from] ReportError),
    /// The page doesn't show what was signed.
    #[error("the page isn't what its signed report renders to; only the embedded report is authentic")]
    Page,
}

/// Verifies a report file.
///
/// # Errors
/// [`VerifyError`] names the first check that failed.
pub fn verify(file: &[u8], pinned: Option<&VerifyingKey>) -> Result<Verified, VerifyError> {
    if file.len() > MAX_REPORT_BYTES {
        return Err(VerifyError::TooLarge { got: file.len() });
    }
    let text = std::str::from_utf8(file).map_err(|error| form(&error))?;
    let is_page = !text.trim_start().starts_with('{');
    let signed: SignedReport =
        serde_json::from_str(if is_page { embedded(text)? } else { text }).map_err(|error| form(&error))?;

    if let Some(expected) = pinned.filter(|key| **key != signed.public_key) {
        return Err(VerifyError::Key { expected: *expected, got: signed.public_key });
    }
    signed.public_key.verify(Context::Report, signed.payload.as_bytes(), &signed.signature)?;
    let report: Report = serde_json::from_str(&signed.payload).map_err(|error| form(&error))?;

    // Building replays every ledger that has a product: chains, rules, then figures.
    let rebuilt = build(report.input()).map_err(|error| match error {
        ReportError::Ledger { agent, source } => VerifyError::Ledger { agent, source },
        other => VerifyError::Rebuild(other),
    })?;
    report.ledgers.iter().try_for_each(check_head)?;
    check_figures(&report, &rebuilt)?;
    if is_page && render_html(&report, &signed)? != text {
        return Err(VerifyError::Page);
    }
    let signed_heads = report.ledgers.iter().filter(|ledger| ledger.head.is_some()).count();
    Ok(Verified { report, key: signed.public_key, key_pinned: pinned.is_some(), signed_heads })
}

fn check_head(ledger: &LedgerRecord) -> Result<(), VerifyError> {
    let Some(head) = &ledger.head else { return Ok(()) };
    let wrong = || VerifyError::Head { agent: ledger.agent.clone() };
    let last = ledger.entries.last().ok_or_else(wrong)?;
    head.public_key
        .verify(Context::LedgerHead, &head_statement(&ledger.agent, last.seq, &last.hash), &head.signature)
        .map_err(|_| wrong())
}

fn check_figures(report: &Report, rebuilt: &Report) -> Result<(), VerifyError> {
    // Nearly always the same to the last digit; only where not, it is looked for where, and by how much.
    if report == rebuilt {
        return Ok(());
    }
    let value = |report: &Report| serde_json::to_value(report).map_err(|error| form(&error));
    match first_difference("report", &value(report)?, &value(rebuilt)?) {
        None => Ok(()),
        Some((place, printed, recomputed)) => Err(VerifyError::Figure { place, printed, recomputed }),
    }
}

// Where two JSON trees differ. Decimal numbers may differ in the last digits, which another machine's exp and ln can
// cause; integers, and ρ is one, may not.
fn first_difference(place: &str, printed: &Value, recomputed: &Value) -> Option<(String, String, String)> {
    match (printed, recomputed) {
        (Value::Object(a), Value::Object(b)) if a.keys().eq(b.keys()) => a
            .iter()
            .zip(b.values())
            .find_map(|((key, a), b)| first_difference(&format!("{place}.{key}"), a, b)),
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => a
            .iter()
            .zip(b)
            .enumerate()
            .find_map(|(i, (a, b))| first_difference(&format!("{place}[{i}]"), a, b)),
        (a, b) if a == b || close(a, b) => None,
        (a, b) => Some((place.to_owned(), a.to_string(), b.to_string())),
    }
}

fn close(a: &Value, b: &Value) -> bool {
    let decimal = |value: &Value| match value {
        Value::Number(number) if number.is_f64() => number.as_f64(),
        Value::String(text) => text.parse::<f64>().ok(),
        _ => None,
    };
    match (decimal(a), decimal(b)) {
        (Some(a), Some(b)) => (a - b).abs() <= FIGURE_TOLERANCE * a.abs().max(b.abs()),
        _ => false,
    }
}

fn embedded(text: &str) -> Result<&str, VerifyError> {
    let missing =
        || VerifyError::Form { reason: "neither JSON nor a page with a signed report in it".to_owned() };
    let (_, rest) = text.split_once(EMBED_START).ok_or_else(missing)?;
    rest.split_once(EMBED_END).map(|(json, _)| json).ok_or_else(missing)
}

fn form(error: &dyn std::fmt::Display) -> VerifyError {
    VerifyError::Form { reason: error.to_string() }
}

const FIGURE_TOLERANCE: f64 = 1e-9;
