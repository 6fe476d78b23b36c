//! What each command does once its arguments are parsed.

pub(crate) mod agents;
pub(crate) mod client;
mod cost;
mod files;
pub(crate) mod model;
pub(crate) mod plan;
pub(crate) mod report;
pub(crate) mod serve;
