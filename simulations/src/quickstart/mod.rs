//! A whole deployment on one machine, on shipped data.

pub mod dataset;
pub mod deployed;
pub mod deployment;
pub mod measure;
pub mod pki;
pub mod predict;
pub mod run;

pub use run::{Options, run};
