//! What an attack found, put on record for the budget report: one line an attack, in a file that a coordinator's `attacks:` names.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use tabmesh_privacy::budget::{Delta, Epsilon};
use tabmesh_privacy::report::{MAX_ATTACKS, MeasuredAttack};

use super::DELTA;
use super::guess::Guesses;
use super::mechanism::Finding;
use super::one_run::Run;
use crate::process::program_digest;

/// One attack on the shipped code, and how its controls went.
pub(super) struct Outcome {
    audit: String,
    what: String,
    claimed: f64,
    found: f64,
    confidence: f64,
    /// Whether each control was caught.
    controls: Vec<bool>,
}

/// An attack's row: what it is about, whether it is on the shipped code, claimed and found ε, and whether the claim is broken.
struct Line {
    about: String,
    shipped: bool,
    claimed: f64,
    found: f64,
    broken: bool,
}

impl Outcome {
    pub(super) fn of_mechanism(findings: &[Finding]) -> Vec<Self> {
        let trials = findings.first().map_or(0, |finding| finding.trials);
        let sum = |finding: &Finding| match finding.subject.is_sum() {
            true => "a secure sum, seen by the coordinator and a colluder",
            false => "a clipped sum",
        };
        let line = |finding: &Finding| Line {
            about: format!("one unit in or out of {}, {trials} vectors each", sum(finding)),
            shipped: finding.subject.is_shipped(),
            claimed: finding.claimed,
            found: finding.found[0].max(finding.found[1]),
            broken: finding.broken,
        };
        // Four rates are bounded at 97.5 %, two for each direction.
        of("mechanism", 0.9, findings.iter().map(line))
    }

    pub(super) fn of_guesses(audit: &'static str, guesses: &[Guesses]) -> Vec<Self> {
        let line = |guess: &Guesses| Line {
            about: guess.attack.to_owned(),
            shipped: guess.subject == super::guess::Subject::Shipped,
            claimed: guess.claimed,
            found: guess.found,
            broken: guess.broken,
        };
        of(audit, 0.975, guesses.iter().map(line))
    }

    pub(super) fn of_runs(runs: &[Run]) -> Vec<Self> {
        let line = |run: &Run| Line {
            about: format!("guesses about the units in one vector of {}", run.vector),
            shipped: run.subject == super::guess::Subject::Shipped,
            claimed: run.claimed,
            found: run.found,
            broken: run.broken,
        };
        of("one-run", 0.95, runs.iter().map(line))
    }

    fn measured(&self, now_ms: i64, program: &str) -> Result<MeasuredAttack> {
        let count = |controls: usize| u32::try_from(controls).context("controls");
        Ok(MeasuredAttack {
            audit: self.audit.clone(),
            what: self.what.clone(),
            program: program.to_owned(),
            measured_at_ms: now_ms,
            claimed: Epsilon::new(self.claimed)?,
            delta: Delta::new(DELTA)?,
            // Where nothing is random an attacker can be sure: more than any claim, and still a number.
            found: self.found.clamp(0.0, f64::MAX),
            confidence: self.confidence,
            controls: count(self.controls.len())?,
            controls_caught: count(self.controls.iter().filter(|caught| **caught).count())?,
        })
    }
}

/// Rows about the same thing are one outcome: the shipped code's figures, and what became of the controls.
fn of(audit: &str, confidence: f64, lines: impl Iterator<Item = Line>) -> Vec<Outcome> {
    let mut outcomes: Vec<Outcome> = Vec::new();
    let mut controls: Vec<(String, bool)> = Vec::new();
    for Line { about, shipped, claimed, found, broken } in lines {
        if shipped {
            let audit = audit.to_owned();
            outcomes.push(Outcome { audit, what: about, claimed, found, confidence, controls: Vec::new() });
        } else {
            controls.push((about, broken));
        }
    }
    for outcome in &mut outcomes {
        let own = controls.iter().filter(|(about, _)| *about == outcome.what);
        outcome.controls = own.map(|(_, broken)| *broken).collect();
    }
    outcomes
}

/// Adds outcomes to a file, in place of older ones about the same; other lines stay.
///
/// # Errors
/// The file holds something else, would hold more than [`MAX_ATTACKS`], or can't be written.
pub(super) fn add(path: &Path, outcomes: &[Outcome], now_ms: i64) -> Result<()> {
    let mut all: Vec<MeasuredAttack> = match std::fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .with_context(|| format!("{} holds no attacks on record; name another file", path.display()))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
    };
    let program = program_digest()?.to_string();
    for outcome in outcomes {
        let measured = outcome.measured(now_ms, &program)?;
        all.retain(|known| (&known.audit, &known.what) != (&measured.audit, &measured.what));
        all.push(measured);
    }
    ensure!(
        all.len() <= MAX_ATTACKS,
        "{} would hold {} attacks, a report takes at most {MAX_ATTACKS}",
        path.display(),
        all.len()
    );
    crate::scenario::results::write(path, &serde_json::to_vec_pretty(&all)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn line(about: &str, shipped: bool, broken: bool) -> Line {
        let found = if broken { 9.0 } else { 2.5 };
        Line { about: about.to_owned(), shipped, claimed: 3.0, found, broken }
    }

    #[test]
    fn an_attack_is_on_record_once_with_its_own_controls() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audits.json");
        let read = || serde_json::from_slice::<Vec<MeasuredAttack>>(&std::fs::read(&path).unwrap()).unwrap();
        let lines = [
            line("counts", true, false),
            line("counts", false, true),
            line("counts", false, false),
            line("gradients", true, false),
            line("gradients", false, true),
        ];
        add(&path, &of("one-run", 0.95, lines.into_iter()), 5).unwrap();
        let (first, second) = (read().remove(0), read().remove(1));
        assert_eq!((first.what.as_str(), first.controls, first.controls_caught), ("counts", 2, 1));
        assert_eq!((second.controls, second.controls_caught, second.measured_at_ms), (1, 1, 5));
        assert!(!first.passed() && second.passed() && first.fault().is_none());
        // Made again, it takes its own place; another attack of that name stays.
        let again = [line("counts", true, false), line("counts", false, true)];
        add(&path, &of("one-run", 0.95, again.into_iter()), 6).unwrap();
        let all = read();
        assert_eq!(all.iter().map(|attack| attack.measured_at_ms).collect::<Vec<_>>(), [5, 6]);
        assert!(all.iter().all(MeasuredAttack::passed));
        // A file of something else is left alone.
        std::fs::write(&path, b"{}").unwrap();
        assert!(add(&path, &[], 7).unwrap_err().to_string().contains("audits.json"));
        assert_eq!(std::fs::read(&path).unwrap(), b"{}");
    }
}
