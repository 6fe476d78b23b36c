//! Service levels of a data product, judged locally: how fresh its newest row is, how complete its rows are.
//!
//! Outcomes are computed from private rows and stay in the domain. The clock is an argument.

use crate::contract::Slo;
use crate::profile::TableProfile;
use crate::quality::Verdict;

/// The outcome of one service level. Local: it says what was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct SloOutcome {
    /// Which one.
    pub objective: Objective,
    /// What was promised: hours, or a share from 0 to 1.
    pub promised: f64,
    /// What was measured, in the same unit.
    pub measured: Option<f64>,
    /// The judgement.
    pub verdict: Verdict,
}

/// A service level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Objective {
    /// Age of the newest row, in hours; at most what was promised.
    Freshness,
    /// Share of rows with a value in every required column; at least what was promised.
    RowCompleteness,
}

impl Objective {
    /// The key of the service level in the short manifest.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Freshness => "freshness_hours",
            Self::RowCompleteness => "row_completeness",
        }
    }
}

/// Judges the service levels that a contract promises; `now_ms` is milliseconds since 1970 UTC.
///
/// A newest row in the future has age 0. Without a time column, or without rows, a level is skipped.
#[must_use]
pub fn judge(slo: &Slo, profile: &TableProfile, now_ms: i64) -> Vec<SloOutcome> {
    let mut outcomes = Vec::new();
    if let Some(promised) = slo.freshness_hours {
        let age = profile.newest_ms().map(|newest| hours(now_ms.saturating_sub(newest).max(0)));
        let verdict = judged(age, "no readable value in a column with role time", |age| age <= promised);
        outcomes.push(SloOutcome { objective: Objective::Freshness, promised, measured: age, verdict });
    }
    if let Some(promised) = slo.row_completeness {
        let share = profile.row_completeness();
        let verdict = judged(share, "the table has no rows", |share| share >= promised);
        outcomes.push(SloOutcome {
            objective: Objective::RowCompleteness,
            promised,
            measured: share,
            verdict,
        });
    }
    outcomes
}

fn judged(measured: Option<f64>, why_not: &str, kept: impl Fn(f64) -> bool) -> Verdict {
    match measured {
        None => Verdict::Skipped(why_not.to_owned()),
        Some(value) if kept(value) => Verdict::Passed,
        Some(_) => Verdict::Failed,
    }
}

#[allow(clippy::cast_precision_loss, reason = "ages are far below 2^53 ms")]
fn hours(ms: i64) -> f64 {
    ms as f64 / 3_600_000.0
}
