//! A whole deployment on one machine, on shipped data.

pub mod dataset;
pub mod deployment;
pub mod pki;
