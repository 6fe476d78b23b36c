//! What must survive `kill -9` and power loss: small records, content-addressed blobs, append-only logs and the
//! registry of model versions built on the first two. [`merkle`] trees and signed [`checkpoint`]s make a log provable to
//! others.
//!
//! Everything here is synchronous, reads no clock and knows no domain type: callers pass times and bytes.
//! Order of trust: the hash-chained [`log`] is the record of what was spent and decided; [`record`]s are an index
//! that can be rebuilt from it; [`blob`]s carry their own proof in their name.

#![forbid(unsafe_code)]

pub mod blob;
pub mod checkpoint;
mod digest;
mod disk;
mod error;
pub mod format;
pub mod log;
pub mod merkle;
pub mod pack;
pub mod record;
pub mod registry;

pub use blob::{BlobStore, BlobWriter};
pub use checkpoint::audit_origin;
pub use digest::{Digest, Hasher};
pub use error::{FrameDamage, StoreError};
pub use log::{Log, LogEntry, LogHead, TornTail};
pub use pack::PackStore;
pub use record::{Memory, Op, Records, Sled};
pub use registry::{Kind, NewVersion, Registry, Version};
