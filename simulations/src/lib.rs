//! The simulation harness: shipped data, development deployments, baselines, measurements and tables of results.

#![forbid(unsafe_code)]

pub mod audit;
pub mod baseline;
pub mod bench;
pub mod cli;
pub mod logistic;
pub mod process;
pub mod quickstart;
pub mod score;
pub mod utility;
