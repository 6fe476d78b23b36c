//! What an accountant composes: mechanisms of known noise, each run a number of times.
//!
//! Noise is stated relative to the L2 sensitivity (the clip norm) of one unit's contribution, so a Gaussian step of
//! multiplier σ adds noise of standard deviation σ·C to a sum to which one unit adds at most C.

/// Why a plan can't be accounted for. Depends on the plan, never on data.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum AccountantError {
    /// A figure of the plan is outside what the accountants were built and tested for.
    #[error("{what} out of range: expected {min} to {max}, got {got}")]
    Range {
        /// The figure.
        what: &'static str,
        /// Smallest allowed.
        min: f64,
        /// Largest allowed.
        max: f64,
        /// The value given.
        got: f64,
    },
    /// This accountant has no bound for the step under this adjacency.
    #[error("{accountant} has no bound for {step} under {adjacency}")]
    Unsupported {
        /// The accountant.
        accountant: &'static str,
        /// The step.
        step: &'static str,
        /// The adjacency.
        adjacency: &'static str,
    },
    /// Nothing in the range searched meets the target.
    #[error("no {what} from {min} to {max} meets the target epsilon")]
    Unreachable {
        /// What was searched.
        what: &'static str,
        /// Smallest tried.
        min: f64,
        /// Largest tried.
        max: f64,
    },
}

/// Which datasets count as neighbours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adjacency {
    /// One unit is added or removed: the house's adjacency.
    AddRemove,
    /// One unit is replaced by another; for converted figures only.
    ReplaceOne,
}

impl Adjacency {
    /// The adjacency in words.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::AddRemove => "add or remove one unit",
            Self::ReplaceOne => "replace one unit",
        }
    }
}

/// One use of a mechanism.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Step {
    /// Gaussian noise of multiplier `sigma` on a sum over all units.
    Gaussian {
        /// Noise multiplier.
        sigma: f64,
    },
    /// Gaussian noise of multiplier `sigma` on a sum over a Poisson sample: each unit is in with probability `rate`,
    /// independently and secretly, and the divisor isn't the sample's size.
    SampledGaussian {
        /// Sampling probability of a unit.
        rate: f64,
        /// Noise multiplier.
        sigma: f64,
    },
    /// Laplace noise of the given scale on a query of L1 sensitivity 1.
    Laplace {
        /// Scale over sensitivity.
        scale: f64,
    },
    /// Discrete Gaussian noise of parameter `sigma` on **one** integer coordinate that a unit changes by at most
    /// `shift`; a vector is one such step for each coordinate a unit can change.
    DiscreteGaussian {
        /// Parameter σ, in integer units.
        sigma: f64,
        /// Largest change, in integer units.
        shift: u32,
    },
}

impl Step {
    /// The step's name in messages and tables.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Gaussian { .. } => "gaussian",
            Self::SampledGaussian { .. } => "poisson-sampled gaussian",
            Self::Laplace { .. } => "laplace",
            Self::DiscreteGaussian { .. } => "discrete gaussian",
        }
    }
}

/// A step run a number of times. Its figures are in range by construction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Phase {
    step: Step,
    steps: u64,
}

impl Phase {
    /// Checks and joins a step and its number of runs.
    ///
    /// # Errors
    /// [`AccountantError::Range`] for a figure outside the limits of this module.
    pub fn new(step: Step, steps: u64) -> Result<Self, AccountantError> {
        match step {
            Step::Gaussian { sigma } => within("sigma", sigma, MIN_SIGMA, MAX_SIGMA)?,
            Step::SampledGaussian { rate, sigma } => {
                within("sampling rate", rate, MIN_RATE, 1.0)?;
                within("sigma", sigma, MIN_SAMPLED_SIGMA, MAX_SIGMA)?;
            }
            Step::Laplace { scale } => within("scale", scale, MIN_SIGMA, MAX_SIGMA)?,
            Step::DiscreteGaussian { sigma, shift } => {
                within("sigma", sigma, MIN_DISCRETE_SIGMA, MAX_DISCRETE_SIGMA)?;
                within("shift over sigma", f64::from(shift) / sigma, MIN_DISCRETE_SHIFT, 1.0 / MIN_SIGMA)?;
            }
        }
        within("steps", steps as f64, 1.0, MAX_STEPS as f64)?;
        Ok(Self { step, steps })
    }

    /// The step.
    #[must_use]
    pub fn step(&self) -> Step {
        self.step
    }

    /// How often it is run.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.steps
    }
}

/// The joint noise multiplier's inverse, μ = √Σ T/σ², of phases that are all unsampled Gaussian; nothing otherwise.
///
/// Under replace-one two neighbours differ by twice the sensitivity, so μ doubles.
#[must_use]
pub fn gaussian_mu(phases: &[Phase], adjacency: Adjacency) -> Option<f64> {
    let mut sum = 0.0;
    for phase in phases {
        match phase.step {
            Step::Gaussian { sigma } => sum += phase.steps as f64 / (sigma * sigma),
            _ => return None,
        }
    }
    let factor = match adjacency {
        Adjacency::AddRemove => 1.0,
        Adjacency::ReplaceOne => 2.0,
    };
    Some(factor * sum.sqrt())
}

// False for NaN.
fn within(what: &'static str, got: f64, min: f64, max: f64) -> Result<(), AccountantError> {
    if got >= min && got <= max { Ok(()) } else { Err(AccountantError::Range { what, min, max, got }) }
}

/// Smallest noise multiplier of an unsampled step: below it one step alone costs ε > 100.
pub const MIN_SIGMA: f64 = 0.05;
/// Smallest noise multiplier of a sampled step.
pub const MIN_SAMPLED_SIGMA: f64 = 0.1;
/// Largest noise multiplier.
pub const MAX_SIGMA: f64 = 1e6;
/// Smallest sampling rate.
pub const MIN_RATE: f64 = 1e-9;
/// Smallest parameter of a discrete Gaussian, in integer units.
pub const MIN_DISCRETE_SIGMA: f64 = 0.25;
/// Largest parameter of a discrete Gaussian, in integer units: its atoms are listed one by one.
pub const MAX_DISCRETE_SIGMA: f64 = 16_384.0;
/// Smallest shift of a discrete Gaussian, in multiples of its parameter.
pub const MIN_DISCRETE_SHIFT: f64 = 1e-6;
/// Most runs of a step.
pub const MAX_STEPS: u64 = 10_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_holds_at_its_edge_and_not_past_it() {
        let gaussian = |sigma| Step::Gaussian { sigma };
        let sampled = |rate, sigma| Step::SampledGaussian { rate, sigma };
        let discrete = |sigma, shift| Step::DiscreteGaussian { sigma, shift };
        for (step, steps) in [
            (gaussian(MIN_SIGMA), 1),
            (gaussian(MAX_SIGMA), MAX_STEPS),
            (sampled(MIN_RATE, MIN_SAMPLED_SIGMA), 1),
            (sampled(1.0, MAX_SIGMA), 1),
            (Step::Laplace { scale: MIN_SIGMA }, 1),
            (discrete(MIN_DISCRETE_SIGMA, 1), 1),
            (discrete(MAX_DISCRETE_SIGMA, 1), 1),
            (discrete(1.0, 20), 1),
        ] {
            assert!(Phase::new(step, steps).is_ok(), "{step:?} {steps}");
        }
        for (step, steps) in [
            (gaussian(MIN_SIGMA * 0.999), 1),
            (gaussian(MAX_SIGMA * 1.001), 1),
            (gaussian(f64::NAN), 1),
            (gaussian(1.0), 0),
            (gaussian(1.0), MAX_STEPS + 1),
            (sampled(0.0, 1.0), 1),
            (sampled(1.001, 1.0), 1),
            (sampled(0.5, MIN_SAMPLED_SIGMA * 0.999), 1),
            (Step::Laplace { scale: f64::INFINITY }, 1),
            (discrete(MIN_DISCRETE_SIGMA * 0.999, 1), 1),
            (discrete(MAX_DISCRETE_SIGMA * 1.001, 1), 1),
            (discrete(1.0, 0), 1),
            (discrete(1.0, 21), 1),
        ] {
            assert!(
                matches!(Phase::new(step, steps), Err(AccountantError::Range { .. })),
                "{step:?} {steps}"
            );
        }
    }
}
