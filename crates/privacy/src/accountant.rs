//! Composed privacy loss as the figures people read: ε at a budget's one fixed δ.
//!
//! Losses add up in integer ρ; these modules only convert. [`zcdp`] is the claim (it holds for discrete Gaussian
//! noise), [`gdp`] the exact figure for continuous Gaussian noise, printed second and labelled, and [`crosscheck`]
//! the second opinion of an independent, proven implementation.

pub mod crosscheck;
pub mod gdp;
pub mod zcdp;
