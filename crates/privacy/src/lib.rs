//! What a release costs: mechanisms, accountant, ledger, release vocabulary and budget reports.
//!
//! The flow inside a domain is fixed: an approved plan *reserves* budget in the [`ledger`], the rows are counted
//! ([`release`]) or clipped ([`clip`]) into an integer vector, a [`mechanism`] adds exact discrete Gaussian noise
//! and hands back a [`private::Private`], the ledger *commits* the event with the payload's digest, and only the
//! resulting receipt lets the payload be sent. [`report`] turns a ledger into a signed document anyone can check
//! offline.
//!
//! Pure and synchronous: clocks, randomness and files are arguments. Only unsampled discrete Gaussian events exist
//! here, so one integer currency, [`budget::Rho`] (zero-concentrated DP in units of 2⁻⁴⁰), is exact for all of them.

#![forbid(unsafe_code)]

pub mod accountant;
pub mod budget;
pub mod clip;
pub mod ledger;
pub mod mechanism;
pub mod noise;
pub mod private;
pub mod release;
pub mod report;
pub mod signature;
