//! The tabular foundation model: in-context model, synthetic prior, pre-training, encoding, adapters, gradients.
//!
//! The only crate that sees candle. Everything is synchronous, on the CPU, in f32; clocks and generators are
//! arguments. Matrix products use candle's thread pool, whose size the environment variable `RAYON_NUM_THREADS`
//! sets; training parallelises over tables instead and wants that variable at 1.

#![forbid(unsafe_code)]

pub mod adapter;
pub mod checkpoint;
pub mod context;
pub mod ensemble;
pub mod error;
pub mod features;
pub mod gradient;
pub mod import;
pub(crate) mod infer;
pub mod metrics;
pub mod model;
pub(crate) mod ops;
pub mod preprocess;
pub mod pretrain;
pub mod prior;
pub mod regression;
pub(crate) mod simd;
pub mod student;
pub mod table;

pub use adapter::Adapter;
pub use context::{Context, Serving};
pub use error::TfmError;
pub use model::{
    Model,
    config::ModelConfig,
    forward::{Targets, Task},
    variant::Variant,
};
pub use student::Student;
pub use table::{Coding, EncodedTable, Preprocessing};
