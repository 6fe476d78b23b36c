//! What each command does once its arguments are parsed.

pub(crate) mod budget;
pub(crate) mod check;
pub(crate) mod convert;
pub(crate) mod corpus;
pub(crate) mod disjoint;
pub(crate) mod distill;
pub(crate) mod levels;
pub(crate) mod predict;
pub(crate) mod promotion;
