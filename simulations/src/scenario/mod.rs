//! Experiments as documents: scenarios, their runs, reports and comparisons.
//!
//! A [`document`] says what is run; [`run`] turns it into tasks (set × seed × arm) and does them; [`results`] keep what
//! came out; [`report`] draws it; [`targets`] say what was met; [`compare`] holds two runs against each other and [`sweep`]
//! varies any key.

mod account;
mod answers;
mod bootstrap;
pub mod compare;
mod data;
pub mod document;
mod duplicates;
mod figures;
mod flow;
mod learner;
pub mod null;
pub mod report;
pub mod results;
pub(crate) mod rounds;
pub mod run;
pub mod sweep;
mod tampering;
pub mod targets;

#[cfg(test)]
mod tests;
