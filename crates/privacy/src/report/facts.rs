//! What a report says beside its figures: who answers for the deployment and why it is done, what was released, what attacks on the
//! shipped code found, and which tier of public transparency all this amounts to.
//!
//! Nothing here is computed from ledgers. The report's signature says who states it; figures that can be recomputed stand elsewhere.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::budget::{Delta, Epsilon};

/// What whoever runs the deployment states about it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Stated {
    /// Who decides over the data products and answers for the deployment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub curator: Option<String>,
    /// Whom to ask, such as the data protection officer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub contact: Option<String>,
    /// What the releases are for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub intended_use: Option<String>,
    /// What is made of the data and given out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// What the data are about: whose, of which period, from where.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_domain: Option<String>,
    /// Legal ground of the processing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub legal_basis: Option<String>,
    /// Who receives what is released.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub recipients: Vec<String>,
    /// Access control and security around the deployment, beyond what this report says by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub security: Option<String>,
}

impl Stated {
    /// What was stated, with a heading each, for people.
    #[must_use]
    pub fn lines(&self) -> Vec<(&'static str, String)> {
        let recipients = (!self.recipients.is_empty()).then(|| self.recipients.join(", "));
        let all = [
            ("curator", &self.curator),
            ("contact", &self.contact),
            ("intended use", &self.intended_use),
            ("what is released", &self.description),
            ("data", &self.data_domain),
            ("legal basis", &self.legal_basis),
            ("recipients", &recipients),
            ("security", &self.security),
        ];
        all.into_iter().filter_map(|(heading, text)| Some((heading, text.clone()?))).collect()
    }

    /// A text that is empty or longer than [`MAX_STATED_BYTES`], by its heading.
    #[must_use]
    pub fn fault(&self) -> Option<&'static str> {
        let bad = |text: &str| text.trim().is_empty() || text.len() > MAX_STATED_BYTES;
        self.lines().into_iter().find(|(_, text)| bad(text)).map(|(heading, _)| heading)
    }
}

/// A published set of artefacts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// SHA-256 of the signed manifest, in hexadecimal.
    pub manifest: String,
    /// Digest of the plan it came from.
    pub plan_digest: String,
    /// When it was signed, in milliseconds since 1970, UTC.
    pub created_at_ms: i64,
}

/// What an attack on the shipped code found, as the program that made it states.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MeasuredAttack {
    /// Name of the audit.
    pub audit: String,
    /// What was attacked and how, in a sentence.
    pub what: String,
    /// SHA-256 of the program that was attacked, in hexadecimal.
    pub program: String,
    /// When, in milliseconds since 1970, UTC.
    pub measured_at_ms: i64,
    /// ε that the attacked use claims.
    pub claimed: Epsilon,
    /// δ of claim and finding.
    pub delta: Delta,
    /// Lower bound on ε that the attack proves; 0 where it proves none.
    pub found: f64,
    /// Confidence of that bound, in (0, 1).
    pub confidence: f64,
    /// Broken versions of the code that the attack has to catch.
    pub controls: u32,
    /// How many of them it caught; an attack that misses one proves nothing.
    pub controls_caught: u32,
}

impl MeasuredAttack {
    /// Whether the code kept its claim under an attack that caught every broken version.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.controls > 0 && self.controls == self.controls_caught && self.found <= self.claimed.get()
    }

    /// What can't be a result.
    #[must_use]
    pub fn fault(&self) -> Option<&'static str> {
        if !(self.found.is_finite() && self.found >= 0.0) {
            return Some("found must be a number from 0");
        }
        if !(self.confidence > 0.0 && self.confidence < 1.0) {
            return Some("confidence must be between 0 and 1");
        }
        if self.controls_caught > self.controls {
            return Some("controls_caught must be at most controls");
        }
        let texts = [&self.audit, &self.what, &self.program];
        texts.iter().any(|text| text.len() > MAX_STATED_BYTES).then_some("a text is too long")
    }
}

/// Which tier of the deployments registry of OpenDP and NIST a report fills (registry.opendp.org, "Transparency tiers").
///
/// Tier 1: curator, intended use, product description, date. Tier 2 adds flavour, privacy unit, parameters and deployment model.
/// Tier 3 adds the data domain, unprotected quantities, accounting, implementation and security. All that is neither named by
/// the operator nor missing stands in every report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Transparency {
    /// 0 to 3.
    pub tier: u8,
    /// What the next tier asks for and nobody stated.
    pub missing: Vec<String>,
}

impl Transparency {
    pub(super) fn of(stated: &Stated) -> Self {
        let named = |text: &Option<String>, name: &str| text.is_none().then(|| name.to_owned());
        let first = [
            named(&stated.curator, "curator"),
            named(&stated.intended_use, "intended use"),
            named(&stated.description, "what is released"),
        ];
        let third = [named(&stated.data_domain, "data"), named(&stated.security, "security")];
        let missing = |names: &[Option<String>]| names.iter().flatten().cloned().collect::<Vec<_>>();
        match (missing(&first), missing(&third)) {
            (first, _) if !first.is_empty() => Self { tier: 0, missing: first },
            (_, third) if !third.is_empty() => Self { tier: 2, missing: third },
            _ => Self { tier: 3, missing: Vec::new() },
        }
    }
}

/// Longest stated text, in bytes.
pub const MAX_STATED_BYTES: usize = 2_000;
/// Most measured attacks of a report.
pub const MAX_ATTACKS: usize = 64;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn attack() -> MeasuredAttack {
        MeasuredAttack {
            audit: "mechanism".to_owned(),
            what: "one vector, with and without one unit".to_owned(),
            program: "ab".repeat(32),
            measured_at_ms: 1,
            claimed: Epsilon::new(4.7).unwrap(),
            delta: Delta::new(1e-5).unwrap(),
            found: 4.3,
            confidence: 0.95,
            controls: 3,
            controls_caught: 3,
        }
    }

    #[test]
    fn an_attack_proves_something_only_if_it_catches_every_broken_version() {
        assert!(attack().passed() && attack().fault().is_none());
        assert!(!MeasuredAttack { controls_caught: 2, ..attack() }.passed());
        assert!(!MeasuredAttack { controls: 0, controls_caught: 0, ..attack() }.passed());
        assert!(!MeasuredAttack { found: 4.8, ..attack() }.passed(), "the claim is broken");
        for bad in [
            MeasuredAttack { found: f64::NAN, ..attack() },
            MeasuredAttack { found: -0.1, ..attack() },
            MeasuredAttack { confidence: 1.0, ..attack() },
            MeasuredAttack { controls_caught: 4, ..attack() },
            MeasuredAttack { what: "x".repeat(MAX_STATED_BYTES + 1), ..attack() },
        ] {
            assert!(bad.fault().is_some(), "{bad:?}");
        }
        assert!(MeasuredAttack { what: "x".repeat(MAX_STATED_BYTES), ..attack() }.fault().is_none());
    }

    #[test]
    fn tiers_are_filled_from_the_lowest() {
        let some = |text: &str| Some(text.to_owned());
        let nothing = Transparency::of(&Stated::default());
        assert_eq!((nothing.tier, nothing.missing.len()), (0, 3));
        let first = Stated {
            curator: some("Acme"),
            intended_use: some("churn"),
            description: some("a model"),
            ..Stated::default()
        };
        let second = Transparency::of(&first);
        assert_eq!((second.tier, second.missing), (2, vec!["data".to_owned(), "security".to_owned()]));
        let all = Stated { data_domain: some("customers"), security: some("mTLS"), ..first };
        assert_eq!(Transparency::of(&all).tier, 3);
        let data_alone = Stated { curator: None, ..all.clone() };
        assert_eq!(Transparency::of(&data_alone).tier, 0);
        assert_eq!((all.fault(), all.lines().len()), (None, 5));
        assert_eq!(Stated { curator: some(" "), ..all.clone() }.fault(), Some("curator"));
        assert_eq!(
            Stated { contact: Some("x".repeat(MAX_STATED_BYTES + 1)), ..all }.fault(),
            Some("contact")
        );
    }
}
