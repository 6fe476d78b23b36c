//! The crate against outside references and across modules; one binary.

#![allow(clippy::unwrap_used, reason = "tests")]

mod golden;
