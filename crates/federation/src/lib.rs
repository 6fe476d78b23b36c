//! What a plan and a round are: pure, synchronous state machines without I/O.
//!
//! A [`plan`] is a checked document; a [`job`] is its pipeline; the four release stages ([`release_plan`]) and the
//! training rounds ([`round`], [`descriptor`]) are collections of one integer vector per agent
//! ([`phase::collect`]), [`screen`]ed, summed and turned into a step ([`aggregate`]); a signed [`manifest`] is what
//! comes out. Time and randomness are arguments. Every state is serialisable and is stored by its driver before
//! it is acted on; a restart at any point repeats an event and changes nothing twice.

#![forbid(unsafe_code)]

pub mod adaptive_clip;
pub mod aggregate;
mod checks;
pub mod descriptor;
pub mod documents;
pub mod id;
pub mod job;
pub mod manifest;
pub mod packed;
pub mod peers;
pub mod phase;
pub mod plan;
pub mod release_plan;
pub mod round;
pub mod schedule;
pub mod screen;
pub mod secagg;
pub mod selection;
pub mod vector;
pub mod witness;
