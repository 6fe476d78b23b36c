//! The simulation harness: shipped data, development deployments, scenarios, baselines, measurements and tables of results.

#![forbid(unsafe_code)]

pub mod audit;
pub mod baseline;
pub mod bench;
pub mod cli;
pub mod logistic;
pub mod process;
pub mod quickstart;
pub mod scenario;
pub mod score;
pub mod utility;
