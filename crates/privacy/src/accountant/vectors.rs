//! Reference vectors: figures from elsewhere, and whether ours agree within their stated tolerances.
//!
//! A file is CSV with the columns `mechanism, q, sigma, steps, delta, eps_rdp, eps_pld` and, where known, `eps_exact`
//! (closed form) and `eps_pld_fine` (a finer grid of the reference). Kinds of rows: `gaussian`, `gaussian_composed`
//! (one σ a step, joined by `|`), `poisson_gaussian`, `gaussian_replace_one`, `poisson_gaussian_replace_one`,
//! `laplace(scale)`, `mixed:pg(q,sigma,steps)+gauss(sigma)+…`, `calibrate(sigma=rdp|exact_gaussian)` and
//! `calibrate(sigma=rdp|pld)` (the ε columns are the target, the σ column holds both answers) and `zcdp_rho_to_eps`
//! (the q column holds ρ). An empty field means: no such figure.
//!
//! The reference's grid makes its own PLD figures up to 0.7 % too large, so ours may lie below `eps_pld`, but not below
//! the truth: `eps_exact`, or `eps_pld_fine` less 10⁻⁴, or `eps_pld` less 10⁻⁵.

use super::calibrate::{Accountant, Target, noise_multiplier};
use super::phase::{AccountantError, Adjacency, Phase, Step, gaussian_mu};
use super::{gdp, pld, rdp, zcdp};
use crate::budget::{BudgetError, Delta, Epsilon, Rho};
use serde::Serialize;

/// Why a file or row can't be read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum VectorError {
    /// The file is too long.
    #[error("vectors: expected at most {MAX_ROWS} rows, got more")]
    TooManyRows,
    /// A column the rows need isn't there.
    #[error("vectors: no column {name:?} in the header")]
    NoColumn {
        /// The column.
        name: &'static str,
    },
    /// A field that isn't a number, or is missing.
    #[error("column {name}: expected a number, got {got:?}")]
    Number {
        /// The column.
        name: &'static str,
        /// Its text, cut to 64 characters.
        got: String,
    },
    /// A kind of row this house has no accountant for.
    #[error("unknown kind of row {got:?}")]
    Kind {
        /// The kind, cut to 64 characters.
        got: String,
    },
    /// A row without any figure to compare with.
    #[error("the row states no figure to compare with")]
    NoFigure,
    /// A budget figure out of range.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// A plan out of range.
    #[error(transparent)]
    Accountant(#[from] AccountantError),
}

/// One row of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Vector {
    row: usize,
    mechanism: String,
    q: String,
    sigma: String,
    steps: String,
    delta: String,
    eps_rdp: String,
    eps_pld: String,
    eps_exact: String,
    eps_pld_fine: String,
}

/// One figure of a row, compared.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    /// Which figure: `exact`, `pld`, `rdp` (as the reference computes it), `rdp_integral` (ours, not above),
    /// `zcdp`, `sigma_rdp`, `sigma_tight`.
    pub name: &'static str,
    /// The reference's.
    pub expected: f64,
    /// Ours.
    pub got: f64,
    /// Whether ours is within the tolerance.
    pub ok: bool,
}

/// A row, checked.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Case {
    /// Number of the row, 1 for the first below the header.
    pub row: usize,
    /// Its kind.
    pub mechanism: String,
    /// The tightest figure of the reference: exact, else PLD, else RDP (σ by the tight accountant for `calibrate`).
    pub expected: Option<f64>,
    /// Ours for the same.
    pub got: Option<f64>,
    /// Whether every figure of the row agrees.
    pub ok: bool,
    /// Every figure.
    pub figures: Vec<Figure>,
    /// Why the row couldn't be computed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Splits a file into rows.
///
/// # Errors
/// [`VectorError::NoColumn`] or [`VectorError::TooManyRows`]; faults of single rows come out of [`Vector::check`].
pub fn parse(text: &str) -> Result<Vec<Vector>, VectorError> {
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let header = fields(lines.next().unwrap_or_default());
    let place = |name: &'static str| header.iter().position(|column| column == name);
    let needed = |name: &'static str| place(name).ok_or(VectorError::NoColumn { name });
    let (mechanism, q, sigma) = (needed("mechanism")?, needed("q")?, needed("sigma")?);
    let (steps, delta) = (needed("steps")?, needed("delta")?);
    let (eps_rdp, eps_pld) = (needed("eps_rdp")?, needed("eps_pld")?);
    let (eps_exact, eps_pld_fine) = (place("eps_exact"), place("eps_pld_fine"));
    let mut rows = Vec::new();
    for (index, line) in lines.enumerate() {
        if index >= MAX_ROWS {
            return Err(VectorError::TooManyRows);
        }
        let fields = fields(line);
        let field = |at: usize| fields.get(at).cloned().unwrap_or_default();
        let optional = |at: Option<usize>| at.map(field).unwrap_or_default();
        rows.push(Vector {
            row: index + 1,
            mechanism: field(mechanism),
            q: field(q),
            sigma: field(sigma),
            steps: field(steps),
            delta: field(delta),
            eps_rdp: field(eps_rdp),
            eps_pld: field(eps_pld),
            eps_exact: optional(eps_exact),
            eps_pld_fine: optional(eps_pld_fine),
        });
    }
    Ok(rows)
}

impl Vector {
    /// Computes the row's figures and compares them. Never fails: what can't be computed isn't ok.
    #[must_use]
    pub fn check(&self) -> Case {
        let (figures, error) = match self.figures() {
            Ok(figures) => (figures, None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        let rank =
            |figure: &&Figure| RANKING.iter().position(|name| *name == figure.name).unwrap_or(RANKING.len());
        let main = figures.iter().min_by_key(rank);
        Case {
            row: self.row,
            mechanism: self.mechanism.clone(),
            expected: main.map(|figure| figure.expected),
            got: main.map(|figure| figure.got),
            ok: !figures.is_empty() && figures.iter().all(|figure| figure.ok),
            error,
            figures,
        }
    }

    fn figures(&self) -> Result<Vec<Figure>, VectorError> {
        let figures = if self.mechanism.starts_with("calibrate(") {
            self.calibrated()?
        } else if self.mechanism.starts_with("zcdp_rho_to_eps") {
            self.converted()?
        } else {
            self.composed()?
        };
        if figures.is_empty() { Err(VectorError::NoFigure) } else { Ok(figures) }
    }

    fn composed(&self) -> Result<Vec<Figure>, VectorError> {
        let (phases, adjacency) = self.phases()?;
        let delta = self.delta()?;
        let mut figures = Vec::new();
        if let Some(expected) = optional("eps_exact", &self.eps_exact)? {
            let mu = gaussian_mu(&phases, adjacency).and_then(|mu| gdp::epsilon_at_mu(mu, delta));
            let got = mu.ok_or_else(|| self.unknown())?.get();
            figures.push(Figure { name: "exact", expected, got, ok: near(got, expected, EXACT_TOLERANCE) });
        }
        if let Some(expected) = optional("eps_pld", &self.eps_pld)? {
            let got = pld::epsilon(&phases, adjacency, delta)?.get();
            let ok = got <= expected * (1.0 + PLD_EXCESS) && got >= self.truth(expected)?;
            figures.push(Figure { name: "pld", expected, got, ok });
        }
        if let Some(expected) = optional("eps_rdp", &self.eps_rdp)? {
            let got = rdp::epsilon_by_series(&phases, adjacency, delta)?.get();
            figures.push(Figure { name: "rdp", expected, got, ok: near(got, expected, RDP_TOLERANCE) });
            // Without the reference's shortcut: at most as large, and never below the tight figure.
            let tight = optional("eps_pld", &self.eps_pld)?.unwrap_or(0.0);
            let exact = rdp::epsilon(&phases, adjacency, delta)?.get();
            let ok = exact >= tight && exact <= got * (1.0 + RDP_TOLERANCE);
            figures.push(Figure { name: "rdp_integral", expected, got: exact, ok });
        }
        Ok(figures)
    }

    // The smallest ε that isn't below the truth.
    fn truth(&self, eps_pld: f64) -> Result<f64, VectorError> {
        if let Some(exact) = optional("eps_exact", &self.eps_exact)? {
            return Ok(exact * (1.0 - EXACT_TOLERANCE));
        }
        let fine = optional("eps_pld_fine", &self.eps_pld_fine)?;
        Ok(fine.map_or(eps_pld * (1.0 - 1e-5), |fine| fine * (1.0 - 1e-4)) - 1e-6)
    }

    fn calibrated(&self) -> Result<Vec<Figure>, VectorError> {
        let (rate, steps) = (number("q", &self.q)?, count(&self.steps)?);
        let tolerance = if rate < 1.0 { SAMPLED_SIGMA_TOLERANCE } else { SIGMA_TOLERANCE };
        let mut figures = Vec::new();
        let parts: Vec<&str> = self.sigma.split('|').collect();
        for (at, (name, accountant, epsilon)) in [
            ("sigma_rdp", Accountant::Renyi, &self.eps_rdp),
            ("sigma_tight", Accountant::Tight, &self.eps_pld),
        ]
        .into_iter()
        .enumerate()
        {
            let expected = number("sigma", parts.get(at).copied().unwrap_or_default())?;
            let epsilon = Epsilon::new(number("eps_pld", epsilon)?)?;
            let target =
                Target { accountant, adjacency: Adjacency::AddRemove, epsilon, delta: self.delta()? };
            let got = noise_multiplier(rate, steps, target)?;
            let reached =
                accountant.epsilon(&[gaussian(rate, got, steps)?], target.adjacency, target.delta)?;
            let ok = reached <= epsilon && near(got, expected, tolerance);
            figures.push(Figure { name, expected, got, ok });
        }
        Ok(figures)
    }

    fn converted(&self) -> Result<Vec<Figure>, VectorError> {
        let rho = number("q", &self.q)?;
        let delta = self.delta()?;
        let mut figures = Vec::new();
        if let Some(expected) = optional("eps_rdp", &self.eps_rdp)? {
            let got = zcdp::epsilon(Rho::from_f64_round_up(rho)?, delta).get();
            // The reference tries a dense grid of orders, ours searches between them.
            let ok = got <= expected * (1.0 + 1e-6) && got >= expected * (1.0 - 1e-4);
            figures.push(Figure { name: "zcdp", expected, got, ok });
        }
        if let Some(expected) = optional("eps_exact", &self.eps_exact)? {
            let got = gdp::epsilon_at_mu((2.0 * rho).sqrt(), delta).ok_or_else(|| self.unknown())?.get();
            figures.push(Figure { name: "exact", expected, got, ok: near(got, expected, EXACT_TOLERANCE) });
        }
        Ok(figures)
    }

    fn phases(&self) -> Result<(Vec<Phase>, Adjacency), VectorError> {
        let sigma = || number("sigma", &self.sigma);
        let (mut adjacency, mut phases) = (Adjacency::AddRemove, Vec::new());
        match self.mechanism.as_str() {
            "gaussian" | "gaussian_replace_one" => {
                phases.push(Phase::new(Step::Gaussian { sigma: sigma()? }, count(&self.steps)?)?);
            }
            "poisson_gaussian" | "poisson_gaussian_replace_one" => {
                phases.push(gaussian(number("q", &self.q)?, sigma()?, count(&self.steps)?)?);
            }
            "gaussian_composed" => {
                for part in self.sigma.split('|') {
                    phases.push(Phase::new(Step::Gaussian { sigma: number("sigma", part)? }, 1)?);
                }
            }
            "laplace(scale)" => {
                phases.push(Phase::new(Step::Laplace { scale: sigma()? }, count(&self.steps)?)?);
            }
            mixed => {
                let parts = mixed.strip_prefix("mixed:").ok_or_else(|| self.unknown())?;
                for part in parts.split('+') {
                    phases.push(self.part(part.trim())?);
                }
            }
        }
        if self.mechanism.ends_with("_replace_one") {
            adjacency = Adjacency::ReplaceOne;
        }
        Ok((phases, adjacency))
    }

    // `pg(q,sigma,steps)`, `gauss(sigma)` or `gauss(sigma,steps)`, `laplace(scale)` or `laplace(scale,steps)`.
    fn part(&self, text: &str) -> Result<Phase, VectorError> {
        let (name, rest) = text.split_once('(').ok_or_else(|| self.unknown())?;
        let arguments: Vec<&str> =
            rest.strip_suffix(')').ok_or_else(|| self.unknown())?.split(',').map(str::trim).collect();
        let value = |text: &str| number("mechanism", text);
        match (name, arguments.as_slice()) {
            ("pg", [rate, sigma, steps]) => gaussian(value(rate)?, value(sigma)?, count(steps)?),
            ("gauss", [sigma]) => gaussian(1.0, value(sigma)?, 1),
            ("gauss", [sigma, steps]) => gaussian(1.0, value(sigma)?, count(steps)?),
            ("laplace", [scale]) => Ok(Phase::new(Step::Laplace { scale: value(scale)? }, 1)?),
            ("laplace", [scale, steps]) => {
                Ok(Phase::new(Step::Laplace { scale: value(scale)? }, count(steps)?)?)
            }
            _ => Err(self.unknown()),
        }
    }

    fn delta(&self) -> Result<Delta, VectorError> {
        Ok(Delta::new(number("delta", &self.delta)?)?)
    }

    fn unknown(&self) -> VectorError {
        VectorError::Kind { got: short(&self.mechanism) }
    }
}

fn gaussian(rate: f64, sigma: f64, steps: u64) -> Result<Phase, VectorError> {
    let step = if (1.0..=1.0).contains(&rate) {
        Step::Gaussian { sigma }
    } else {
        Step::SampledGaussian { rate, sigma }
    };
    Ok(Phase::new(step, steps)?)
}

// False for NaN.
fn near(got: f64, expected: f64, tolerance: f64) -> bool {
    (got - expected).abs() <= tolerance * expected.abs()
}

fn number(name: &'static str, text: &str) -> Result<f64, VectorError> {
    let parsed = text.trim().parse::<f64>().ok().filter(|value| value.is_finite());
    parsed.ok_or_else(|| VectorError::Number { name, got: short(text) })
}

fn optional(name: &'static str, text: &str) -> Result<Option<f64>, VectorError> {
    if text.trim().is_empty() { Ok(None) } else { number(name, text).map(Some) }
}

// Step counts may be written as `100` or `100.0`.
fn count(text: &str) -> Result<u64, VectorError> {
    let value = number("steps", text)?;
    // The limits on phases are far below 2^53, so the cast is exact for all that pass them.
    if value >= 0.0 && value.fract().abs() < f64::MIN_POSITIVE {
        Ok(value as u64)
    } else {
        Err(VectorError::Number { name: "steps", got: short(text) })
    }
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

// Fields of a CSV line; a quoted field may hold commas, and quotes written twice.
fn fields(line: &str) -> Vec<String> {
    let (mut found, mut field, mut quoted) = (Vec::new(), String::new(), false);
    let mut characters = line.chars().peekable();
    while let Some(c) = characters.next() {
        match c {
            '"' if quoted && characters.peek() == Some(&'"') => {
                characters.next();
                field.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => found.push(std::mem::take(&mut field)),
            _ => field.push(c),
        }
    }
    found.push(field);
    found
}

/// Most rows of a file.
pub const MAX_ROWS: usize = 10_000;
const RANKING: [&str; 7] = ["exact", "sigma_tight", "pld", "zcdp", "rdp", "rdp_integral", "sigma_rdp"];
const EXACT_TOLERANCE: f64 = 1e-9;
const PLD_EXCESS: f64 = 1e-3;
const RDP_TOLERANCE: f64 = 1e-6;
const SIGMA_TOLERANCE: f64 = 1e-3;
const SAMPLED_SIGMA_TOLERANCE: f64 = 2e-3;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const ALL: &str = include_str!("../../tests/fixtures/accountant_vectors.csv");

    // dp_accounting 0.6.0 and mpmath; see the fixtures' README.
    #[test]
    fn every_reference_figure_is_met() {
        let rows = parse(ALL).unwrap();
        assert_eq!(rows.len(), 97);
        let wrong: Vec<Case> = rows.iter().map(Vector::check).filter(|case| !case.ok).collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }

    // Each kind once, with one of its figures moved past its tolerance: the check must see it.
    #[test]
    fn a_wrong_figure_is_found() {
        let header = ALL.lines().next().unwrap();
        for row in [
            "gaussian,1.0,1.0,1,1e-05,4.728507067217623,4.3771781000249295,4.3771782,",
            "gaussian,1.0,1.0,1,1e-05,4.7285,4.3771781000249295,4.3771780956812245,",
            "poisson_gaussian,0.01,1.0,100,1e-05,1.2141452944480204,0.7170,,",
            "poisson_gaussian,0.01,1.0,100,1e-05,1.2141452944480204,0.7180367095394373,,0.7183",
            "laplace(scale),1.0,1.0,10,1e-05,9.990334479142616,9.975,,",
            "gaussian_replace_one,1.0,2.0,1,1e-05,,4.36,,",
            "calibrate(sigma=rdp|exact_gaussian),1.0,7.667367803744385|7.0418,1,1e-05,0.5,0.5,,",
            "zcdp_rho_to_eps(rho in q col),0.5,1.0,1,1e-05,4.7290,4.377178095681137,4.3771780956812245,",
        ] {
            let rows = parse(&format!("{header}\n{row}\n")).unwrap();
            let case = rows[0].check();
            assert!(!case.ok && case.error.is_none(), "{case:?}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_not_ok_and_says_why() {
        let header = ALL.lines().next().unwrap();
        for (row, said) in [
            ("skellam,1.0,1.0,1,1e-05,1,1,,", "unknown kind"),
            ("gaussian,1.0,one,1,1e-05,1,1,,", "column sigma"),
            ("gaussian,1.0,1.0,1.5,1e-05,1,1,,", "column steps"),
            ("gaussian,1.0,-1.0,1,1e-05,1,1,,", "sigma out of range"),
            ("gaussian,1.0,1.0,1,2,1,1,,", "delta out of range"),
            ("gaussian,1.0,1.0,1,1e-05,,,,", "no figure"),
            ("\"mixed:pg(0.1,1.0)+gauss(2)\",,,,1e-05,1,1,,", "unknown kind"),
            ("gaussian", "column sigma"),
        ] {
            let rows = parse(&format!("{header}\n{row}\n")).unwrap();
            let case = rows[0].check();
            assert!(!case.ok && case.error.as_deref().unwrap().contains(said), "{case:?}");
        }
        assert_eq!(parse("mechanism,q\n"), Err(VectorError::NoColumn { name: "sigma" }));
        let long = format!("{header}\n{}", "gaussian,1,1,1,1e-5,1,1,,\n".repeat(MAX_ROWS + 1));
        assert_eq!(parse(&long), Err(VectorError::TooManyRows));
        assert_eq!(parse(&long[..long.len() - 26]).unwrap().len(), MAX_ROWS);
    }

    #[test]
    fn quoted_fields_keep_their_commas() {
        assert_eq!(fields("a,\"b,c\",\"d\"\"e\",,"), ["a", "b,c", "d\"e", "", ""]);
    }
}
