//! What a federation is worth on domain-split tables: the whole loop, scored beside its rivals.
//!
//! The loop is the product's own, over mutual TLS through pipes in memory, with coordinator and agents in this process; only
//! what no agent may do is added: pooling, and scoring on test rows. [`run`] measures one folder; scenarios use the
//! same parts.

#[cfg(test)]
mod apart;
pub(crate) mod contracts;
pub(crate) mod federation;
mod liar;
#[cfg(test)]
pub(crate) mod made_up;
pub(crate) mod measure;
pub(crate) mod member;
pub(crate) mod newcomer;
mod run;
pub(crate) mod set;
mod wire;

pub use run::{Args, run};
