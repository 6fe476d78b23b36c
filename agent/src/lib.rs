//! The agent of one data domain: reads its tables, answers with noised statistics, and serves the merged model.

#![forbid(unsafe_code)]

pub mod serve;
