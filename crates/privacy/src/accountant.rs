//! Composed privacy loss as the figures people read: ε at a budget's one fixed δ.
//!
//! What the ledger charges adds up in integer ρ: [`zcdp`] is that claim (it holds for discrete Gaussian noise),
//! [`gdp`] the exact figure for continuous Gaussian noise, printed second and labelled, and [`crosscheck`] the second
//! opinion of an independent, proven implementation.
//!
//! Plans of any noise, sampled or not, are lists of [`phase`]s. [`pld`] composes their privacy loss distributions
//! numerically and is the tight figure; [`rdp`] is the independent second one and never below it. [`calibrate`] turns
//! either round: the noise, sampling rate or number of steps that meets a target. [`vectors`] checks all of them
//! against figures from elsewhere.
//!
//! Every figure is for the unit and adjacency its caller names (add or remove one unit, unless replace-one is asked
//! for), assumes that the noise was drawn by the mechanism's owner from an unpredictable source, and is rounded
//! towards a larger ε.

pub mod calibrate;
pub mod crosscheck;
pub mod gdp;
mod loss;
mod normal;
pub mod phase;
pub mod pld;
pub mod rdp;
pub mod vectors;
pub mod zcdp;
