//! The local check of a table against its contract: one pass, every promise judged, nothing sent.
//!
//! The outcome is computed from private rows and stays in the domain. A check informs; it never writes a range, a
//! category or a class into the contract.

use tabmesh_contract::contract::{Contract, Role};
use tabmesh_contract::profile::{Distinct, TableProfile};
use tabmesh_contract::quality::{self, Measure, QualityOutcome, Severity, Verdict};
use tabmesh_contract::schema::PrivacyUnit;
use tabmesh_contract::slo::{self, SloOutcome};

use super::{Source, SourceError};

/// What a check found.
#[derive(Debug, Clone)]
pub struct TableCheck {
    /// Every declared column, profiled.
    pub profile: TableProfile,
    /// Quality rules, declared and implied.
    pub quality: Vec<QualityOutcome>,
    /// Service levels.
    pub slo: Vec<SloOutcome>,
    /// Privacy units in the table.
    pub units: Distinct,
    over_units: bool,
}

impl TableCheck {
    /// Checks names and types, then profiles all rows and judges them; `now_ms` is milliseconds since 1970 UTC.
    ///
    /// # Errors
    /// [`SourceError`] if the table can't be read as the contract declares it.
    pub fn run(source: &dyn Source, contract: &Contract, now_ms: i64) -> Result<Self, SourceError> {
        source.schema_check(contract)?;
        let profile = super::profile(source, contract)?;
        let units = match &contract.privacy.unit {
            PrivacyUnit::Row => Distinct::Exactly(profile.rows()),
            PrivacyUnit::Entity { column, .. } => {
                profile.column(column).map_or(Distinct::Exactly(0), |column| column.distinct())
            }
        };
        let (Distinct::Exactly(counted) | Distinct::MoreThan(counted)) = units;
        Ok(Self {
            quality: quality::judge(&contract.quality, &profile),
            slo: slo::judge(&contract.slo, &profile, now_ms),
            over_units: contract.privacy.max_units.is_some_and(|declared| counted > declared),
            units,
            profile,
        })
    }

    /// Whether the table keeps its contract: no rule of severity error and no service level is broken, and it has
    /// no more units than declared.
    #[must_use]
    pub fn passed(&self) -> bool {
        let broken = |o: &QualityOutcome| o.verdict == Verdict::Failed && o.rule.severity == Severity::Error;
        !self.over_units
            && !self.quality.iter().any(broken)
            && !self.slo.iter().any(|o| o.verdict == Verdict::Failed)
    }

    /// What the table breaks, one line each. Local: lines hold counts.
    #[must_use]
    pub fn problems(&self, contract: &Contract) -> Vec<String> {
        let mut lines = Vec::new();
        if let (true, Some(declared)) = (self.over_units, contract.privacy.max_units) {
            let (Distinct::Exactly(counted) | Distinct::MoreThan(counted)) = self.units;
            lines.push(format!("the table has {counted} privacy units, max_units declares {declared}"));
        }
        lines.extend(self.breaches(Severity::Error));
        for outcome in self.slo.iter().filter(|o| o.verdict == Verdict::Failed) {
            let measured = outcome.measured.unwrap_or(f64::NAN);
            lines.push(format!(
                "{} is {measured:.3}, promised {}",
                outcome.objective.as_str(),
                outcome.promised
            ));
        }
        lines
    }

    /// What is worth knowing without breaking the contract, one line each. Local: lines hold counts.
    #[must_use]
    pub fn warnings(&self, contract: &Contract) -> Vec<String> {
        let mut lines = self.breaches(Severity::Warning);
        let skipped = self.quality.iter().filter_map(|o| match &o.verdict {
            Verdict::Skipped(why) => Some(format!("{}: skipped, {why}", subject(o))),
            Verdict::Passed | Verdict::Failed => None,
        });
        lines.extend(skipped);
        for outcome in &self.slo {
            if let Verdict::Skipped(why) = &outcome.verdict {
                lines.push(format!("{}: skipped, {why}", outcome.objective.as_str()));
            }
        }
        if let Some(target) = contract.column_with_role(Role::Target)
            && self.profile.column(&target.name).is_some_and(|p| p.distinct() == Distinct::Exactly(1))
        {
            lines.push(format!(
                "column `{}` has one class: gradients teach nothing and no choice of a model can be judged",
                target.name
            ));
        }
        let unused = contract.columns.iter().zip(self.profile.columns());
        for (column, profile) in unused.filter(|(_, p)| p.values() == 0 && p.nulls() > 0) {
            lines.push(format!("column `{}` has no value in {} rows", column.name, profile.nulls()));
        }
        lines
    }

    fn breaches(&self, severity: Severity) -> Vec<String> {
        let broken = |o: &&QualityOutcome| o.verdict == Verdict::Failed && o.rule.severity == severity;
        let line = |o: &QualityOutcome| match &o.rule.measure {
            Measure::Library { must, .. } => {
                format!("{} is {}, must be {must}", subject(o), o.measured.unwrap_or(f64::NAN))
            }
            Measure::Foreign { .. } => subject(o),
        };
        self.quality.iter().filter(broken).map(line).collect()
    }
}

fn subject(outcome: &QualityOutcome) -> String {
    let column = outcome.rule.column.as_ref().map_or_else(|| "table".to_owned(), |c| format!("column `{c}`"));
    match &outcome.rule.measure {
        Measure::Library { metric, .. } => format!("{} of {column}", metric.as_str()),
        Measure::Foreign { engine } => format!("rule of {engine} on {column}"),
    }
}
