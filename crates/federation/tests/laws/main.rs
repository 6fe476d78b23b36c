//! Laws of collections and rounds under random histories, against an oracle that is obviously right.
#![allow(clippy::unwrap_used, reason = "tests")]

mod collection_laws;
mod round_laws;
mod world;
