//! What a federation is worth on a folder of domain-split tables: the whole loop, scored beside its rivals.
//!
//! The loop is the product's own, over mutual TLS, with coordinator and agents in this process; only what no agent may
//! do is added: pooling, and scoring on test rows.

mod contracts;
mod federation;
mod measure;
mod run;
mod set;

pub use run::{Args, run};
