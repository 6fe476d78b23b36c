//! Secure aggregation: a server learns the sum of integer vectors and nothing about any one of them.
//!
//! Bonawitz et al. 2017 ("Practical Secure Aggregation for Privacy-Preserving Machine Learning", with the
//! consistency round of §6 against a server that lies), over the complete graph, or over a ring in random order
//! for large rosters (Bell et al. 2020). Each agent adds a mask it shares with each neighbour, which cancels in
//! the sum, and one of its own; both can be recomputed from Shamir's shares, of which agents open one kind for
//! survivors and the other for dropouts, after enough of them have signed the same set of survivors.
//!
//! | file | owns |
//! |---|---|
//! | [`descriptor`], [`roster`], [`policy`] | what the sum is, who is in it, what an agent accepts |
//! | [`noise`], [`contribution`] | each agent's share of the noise, and the vector it is added to |
//! | [`keys`], [`share`], [`mask`], [`graph`] | the parts of the protocol |
//! | [`message`], [`consistency`] | what is said, and what is signed |
//! | [`document`], [`setup`] | the same as documents between processes, and a sum's descriptor from a plan |
//! | [`agent`], [`server`], `unmask` | who does what when |
//!
//! Everything here is pure: messages in, messages out, randomness and time as arguments. What an agent must store
//! before a message may leave comes with the message.
//!
//! # What it doesn't do
//! - A malicious agent can put any vector within the bound into the sum: norms of masked vectors aren't proven.
//! - A malicious agent or server can end an attempt, by sealed shares that don't open or by silence; by name where
//!   it shows.
//! - Below four agents it is refused: there noise is added in full by each agent, locally.

pub mod agent;
pub mod consistency;
pub mod contribution;
pub mod descriptor;
pub mod document;
mod encoded;
pub mod graph;
pub mod keys;
pub mod mask;
pub mod message;
pub mod noise;
pub mod policy;
pub mod roster;
pub mod server;
pub mod setup;
pub mod share;
mod unmask;
