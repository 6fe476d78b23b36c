//! Experiments as documents: scenarios, their runs, reports and comparisons.
//!
//! A [`document`] says what is run; [`run`] turns it into tasks (set × seed × arm) and does them; [`results`] keep what
//! came out; [`report`] draws it; [`compare`] holds two runs against each other and [`sweep`] varies any key.

mod account;
pub mod compare;
mod data;
pub mod document;
mod figures;
mod learner;
pub mod null;
pub mod report;
pub mod results;
mod rounds;
pub mod run;
pub mod sweep;

#[cfg(test)]
mod tests;
