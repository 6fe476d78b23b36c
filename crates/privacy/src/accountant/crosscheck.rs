//! Second opinion: the privacy map and the conversion of the opendp library.
//!
//! The ledger asks it before an event is admitted; if opendp's cost is above ours by more than rounding, one of the
//! two is wrong and nothing may leave. opendp's measurements can't cross threads, so one is built inside each call
//! and dropped. Only maps are used: its sampler has no seam for randomness.

use crate::budget::{Delta, Rho};
use crate::mechanism::{MechanismEvent, MechanismKind};
use opendp::combinators::make_zCDP_to_approxDP;
use opendp::core::Measurement;
use opendp::domains::{AtomDomain, VectorDomain};
use opendp::measurements::{make_gaussian, make_laplace};
use opendp::measures::ZeroConcentratedDivergence;
use opendp::metrics::{L1Distance, L2Distance};

/// The second opinion differs, or couldn't be had.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum CrossCheckError {
    /// opendp charges more than we do.
    #[error("second accountant disagrees: it charges rho {theirs}, the event states {ours}")]
    Disagrees {
        /// ρ of the event.
        ours: f64,
        /// ρ by opendp.
        theirs: f64,
    },
    /// opendp refused the parameters.
    #[error("second accountant refused: {reason}")]
    Unavailable {
        /// opendp's words.
        reason: String,
    },
}

/// ρ of one Gaussian measurement on an integer vector, by opendp's privacy map.
///
/// `sigma` and `l2_sensitivity` in integer units.
///
/// # Errors
/// [`CrossCheckError::Unavailable`] when opendp refuses the parameters.
pub fn opendp_rho(sigma: f64, l2_sensitivity: f64) -> Result<f64, CrossCheckError> {
    gaussian(sigma).and_then(|measurement| measurement.map(&l2_sensitivity).map_err(unavailable))
}

/// ε of one Laplace measurement on an integer vector, by opendp's privacy map.
///
/// `scale` and `l1_sensitivity` in integer units.
///
/// # Errors
/// [`CrossCheckError::Unavailable`] when opendp refuses the parameters.
pub fn opendp_laplace_epsilon(scale: f64, l1_sensitivity: f64) -> Result<f64, CrossCheckError> {
    let domain = VectorDomain::new(AtomDomain::<i64>::default());
    let measurement = make_laplace(domain, L1Distance::<f64>::default(), scale, None).map_err(unavailable)?;
    measurement.map(&l1_sensitivity).map_err(unavailable)
}

/// ε at δ of one Gaussian measurement, by opendp's zCDP conversion.
///
/// # Errors
/// [`CrossCheckError::Unavailable`] when opendp refuses the parameters.
pub fn opendp_epsilon(sigma: f64, l2_sensitivity: f64, delta: Delta) -> Result<f64, CrossCheckError> {
    let converted = make_zCDP_to_approxDP(gaussian(sigma)?).map_err(unavailable)?;
    let profile = converted.map(&l2_sensitivity).map_err(unavailable)?;
    profile.epsilon(delta.get()).map_err(unavailable)
}

/// Compares an event's stated cost with opendp's.
///
/// # Errors
/// [`CrossCheckError`] when opendp charges more by over one part in 10⁹ and two units, or refuses.
pub fn second_opinion(event: &MechanismEvent) -> Result<(), CrossCheckError> {
    let (scale, l2) = (event.sigma_squared.sigma(), (event.l2_sensitivity_squared as f64).sqrt());
    let theirs = match event.kind {
        MechanismKind::DiscreteGaussian
        | MechanismKind::GaussianShares
        | MechanismKind::ThresholdHistogram => opendp_rho(scale, l2)?,
        MechanismKind::DiscreteLaplace => {
            // Pure ε is ε²/2 of zero-concentrated.
            opendp_laplace_epsilon(scale, l2 * f64::from(event.dimension).sqrt())?.powi(2) / 2.0
        }
    };
    let ours = event.rho.as_f64();
    let slack = Rho::from_units(SLACK_UNITS).as_f64();
    if theirs <= ours * (1.0 + RELATIVE_SLACK) + slack {
        Ok(())
    } else {
        Err(CrossCheckError::Disagrees { ours, theirs })
    }
}

type IntegerGaussian =
    Measurement<VectorDomain<AtomDomain<i64>>, L2Distance<f64>, ZeroConcentratedDivergence, Vec<i64>>;

fn gaussian(sigma: f64) -> Result<IntegerGaussian, CrossCheckError> {
    let domain = VectorDomain::new(AtomDomain::<i64>::default());
    make_gaussian(domain, L2Distance::<f64>::default(), sigma, None).map_err(unavailable)
}

fn unavailable(error: opendp::error::Error) -> CrossCheckError {
    CrossCheckError::Unavailable { reason: error.to_string() }
}

/// √ and ² of a fraction in floats move ρ by a few parts in 10¹⁶; this is generous.
const RELATIVE_SLACK: f64 = 1e-9;
/// One unit for our rounding up, one for theirs.
const SLACK_UNITS: u64 = 2;

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::accountant::zcdp;
    use crate::mechanism::{DiscreteGaussian, EventShape, Noise, VectorLaplace};

    /// A row of `tests/fixtures/dp_vectors.csv` (made with dp_accounting 0.6.0 and mpmath; unsampled Gaussian kinds).
    #[derive(Debug)]
    pub(crate) struct Vector {
        pub(crate) kind: String,
        pub(crate) q: f64,
        sigmas: Vec<f64>,
        steps: u32,
        pub(crate) delta: f64,
        pub(crate) eps_rdp: f64,
        pub(crate) eps_exact: f64,
    }

    impl Vector {
        /// Composed ρ: stated, or Σ 1/(2σ²) over the steps.
        pub(crate) fn rho(&self) -> Rho {
            let rho = if self.kind.starts_with("zcdp") {
                self.q
            } else {
                let once: f64 = self.sigmas.iter().map(|s| 0.5 / (s * s)).sum();
                if self.sigmas.len() == 1 { once * f64::from(self.steps) } else { once }
            };
            Rho::from_f64_round_up(rho).unwrap()
        }
    }

    pub(crate) fn vectors() -> Vec<Vector> {
        let number = |text: &str| text.parse::<f64>().unwrap();
        let text = include_str!("../../tests/fixtures/dp_vectors.csv");
        text.lines()
            .skip(1)
            .map(|line| {
                let f: Vec<&str> = line.split(',').collect();
                Vector {
                    kind: f[0].to_owned(),
                    q: number(f[1]),
                    sigmas: f[2].split('|').map(number).collect(),
                    steps: f[3].parse().unwrap(),
                    delta: number(f[4]),
                    eps_rdp: number(f[5]),
                    eps_exact: number(f[7]),
                }
            })
            .collect()
    }

    #[test]
    fn both_maps_charge_the_same() {
        for (sensitivity_squared, rho) in [(1u64, 0.01), (12, 0.05), (1 << 44, 0.3), (45 * 9, 0.002)] {
            let rho = Rho::from_f64_round_down(rho).unwrap();
            let mechanism = DiscreteGaussian::from_rho(sensitivity_squared, rho).unwrap();
            let event = mechanism.event(EventShape { rows_per_unit: 1, marginals: 1, dimension: 1 });
            second_opinion(&event).unwrap();
            let theirs =
                opendp_rho(event.sigma_squared.sigma(), (sensitivity_squared as f64).sqrt()).unwrap();
            assert!((theirs / event.rho.as_f64() - 1.0).abs() < 1e-8, "{theirs}");
        }
    }

    #[test]
    fn both_maps_charge_the_same_for_laplace_noise() {
        for (sensitivity_squared, dimension, rho) in [(1u64, 1, 0.01), (1 << 40, 50, 0.3), (45 * 9, 3, 0.002)]
        {
            let rho = Rho::from_f64_round_down(rho).unwrap();
            let mechanism = VectorLaplace::from_rho(sensitivity_squared, dimension, rho).unwrap();
            let mut event = mechanism.event(EventShape { rows_per_unit: 1, marginals: 1, dimension });
            second_opinion(&event).unwrap();
            event.rho = Rho::from_units(event.rho.units() - event.rho.units() / 1000);
            assert!(matches!(second_opinion(&event), Err(CrossCheckError::Disagrees { .. })), "{dimension}");
        }
    }

    #[test]
    fn an_understated_event_is_caught() {
        let mechanism = DiscreteGaussian::from_rho(4, Rho::from_units(1 << 33)).unwrap();
        let mut event = mechanism.event(EventShape { rows_per_unit: 1, marginals: 4, dimension: 1 });
        event.rho = Rho::from_units(event.rho.units() / 2);
        assert!(matches!(second_opinion(&event), Err(CrossCheckError::Disagrees { .. })));
        assert!(matches!(opendp_rho(-1.0, 1.0), Err(CrossCheckError::Unavailable { .. })));
    }

    // opendp searches ε by bisection on the same formula and rounds up: within 1e-6 of each other.
    #[test]
    fn both_conversions_agree() {
        for (sigma, delta) in [(1.0, 1e-5), (1.0, 1e-6), (10.0, 1e-5), (0.5, 1e-7)] {
            let delta = Delta::new(delta).unwrap();
            let theirs = opendp_epsilon(sigma, 1.0, delta).unwrap();
            let ours = zcdp::epsilon(Rho::from_f64_round_up(0.5 / (sigma * sigma)).unwrap(), delta).get();
            assert!((ours / theirs - 1.0).abs() < 1e-6, "sigma {sigma}: {ours} against {theirs}");
        }
    }
}
