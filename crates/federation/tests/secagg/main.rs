//! Secure sums: honest runs against plain sums, refusals by name, restarts, and each known attack against the real
//! agent and against one without the check.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod attacks;
mod golden;
mod honest;
mod naive;
mod refusals;
mod restart;
mod ring;
mod uniform;
mod world;
