//! What a domain promised: its contract, the policy over it, and rows in the contract's terms.

pub mod batch;
pub mod schema;
