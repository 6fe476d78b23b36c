//! The wire as a whole, over real loopback mutual TLS: what works, and what is refused where.

#![allow(clippy::unwrap_used, clippy::type_complexity, reason = "tests")]
#![allow(unreachable_pub, reason = "modules of one test binary share their helpers")]

mod flow;
mod refusals;
mod support;
