//! A forest of random trees whose leaf values federated rounds learn: boosting under differential privacy.
//!
//! Pairs of columns are all that a release of marginals can carry; a tree of depth four sees what four columns say together. Its
//! splits are drawn from counts that are released already, so that only leaf values cost privacy, and those are sums over rows:
//! small, linear, and as fit for a secure sum as any other vector of a round.
//!
//! # The recipe
//!
//! 1. **Grow.** [`Forest::grow`] draws the splits of every tree from the noisy counts of each column by class and a seed. Columns and
//!    cuts that tell classes apart are drawn more often.
//! 2. **Sum.** In each round [`Rows::sums`] gives, for every leaf of the round's trees, the sums over a domain's units of `y − p` and
//!    of `p (1 − p)`, where `p` is what the forest says so far. A unit's vector is clipped, so the noise has a norm to go by.
//! 3. **Step.** [`Step::values`] makes leaf values of the noisy sums: one Newton step, drawn towards zero by as much as noise and few
//!    rows call for, and shared among the round's trees.
//!
//! # Where it comes from
//!
//! - Newton steps on the sums of gradients and second derivatives in leaves: Chen & Guestrin, *XGBoost: a scalable tree boosting
//!   system*, KDD 2016, section 2.2.
//! - Totally random splits, so that the whole budget goes to leaf sums, and several trees a round: Maddock, Cormode, Wang, Maple &
//!   Jha, *Federated boosted decision trees with differential privacy*, CCS 2022, arXiv 2210.02910. There splits are uniform over
//!   the columns; here counts that are differentially private already say where to look.
//!
//! # Promises
//!
//! Pure and synchronous; equal inputs give equal forests, byte for byte. Two-class targets only; logits are those of class 1.

#![forbid(unsafe_code)]

mod error;
mod forest;
mod grow;
mod split;
mod step;
mod sums;

pub use error::ForestError;
pub use forest::{Forest, MAX_FOREST_BYTES, Shape};
pub use grow::{Cells, Column};
pub use split::Split;
pub use step::Step;
pub use sums::Rows;
