//! What a domain promised: its contract, the policy over it, and rows in the contract's terms.
//!
//! A contract is parsed once ([`contract::Contract::parse`]), decided on by policy ([`policy::PolicyBundle`]) and
//! checked against the table inside the domain ([`profile`], [`quality`], [`slo`]). What leaves the domain is the
//! contract itself and refusal codes; profiles and outcomes have no wire form.
#![forbid(unsafe_code)]

pub mod batch;
pub mod card;
pub mod contract;
pub mod error;
mod features;
mod manifest;
pub mod odcs;
pub mod policy;
pub mod profile;
pub mod quality;
mod read;
pub mod schema;
pub mod slo;
mod yaml;
