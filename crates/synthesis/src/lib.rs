//! Synthetic tables from differentially private marginal counts.
//!
//! The coordinator holds sums of noisy counts, one vector per release stage, and no row. This crate turns them into a
//! corpus of synthetic rows to pre-train on and to serve as shared context. Everything here is post-processing of what
//! was released: it costs no privacy and may be repeated, changed and published. It never asks for more data; it
//! only says which marginals are worth measuring next.
//!
//! # The recipe
//!
//! 1. **One-way.** A first stage releases a fine histogram of every attribute; bins and merges are cut from its noisy
//!    counts (in `tabmesh-privacy`), and [`marginal::recut`] brings the histogram to the new cells.
//! 2. **Structure.** Further stages release each feature with the label, and coarse 2-way counts of all pairs of
//!    features. [`tree::pair_scores`] takes the L1 distance of each pair from the product of the released 1-way marginals,
//!    less what noise alone adds; [`selection::structure`] builds the maximum spanning forest of those that noise can't
//!    have made, and where a plan wants it a junction tree with more of these edges, in cliques of bounded size.
//! 3. **Tree.** The last stage releases the counts that [`selection::marginals`] names: (feature, label) for each
//!    feature, (feature, parent) for each edge, all three at once where that many cells bear the noise.
//!    Where each domain's own tables are known and may be told, the domain becomes one more attribute above the features that
//!    differ ([`domains`], [`TreeStructure::under`]).
//! 4. **Fit.** [`fit()`] reconciles all tables by generalised least squares ([`marginal::reconcile`]), draws each pair
//!    towards independence by as much as noise can have made of it ([`signal`]), and puts the pairs together as
//!    P(label) · Π P(feature | parents, label), each with the largest entropy.
//! 5. **Rows.** [`draw`] samples cells, [`decode`] turns them into numbers and level codes, using the fine
//!    histograms within merged levels and bins.
//! 6. **Quality.** [`measure`] gives total variation distances from the noisy tables beside the noise floor.
//!
//! # Where it comes from
//!
//! - Select, measure, generate with a tree of 2-way marginals: McKenna, Miklau & Sheldon, *Winning the NIST Contest: A
//!   scalable and general approach to differentially private synthetic data* (MST), 2021, arXiv 2108.04978. MST
//!   selects by the exponential mechanism on exact counts, which no party of a federation holds; here the scores come
//!   from noisy counts, which are linear and so sum over domains.
//! - The noise is discrete Gaussian and accounted in zero-concentrated DP: Canonne, Kamath & Steinke, *The
//!   discrete Gaussian for differential privacy* (CKS20), arXiv 2004.00010. This crate only uses its variance.
//! - The model, a tree over the features with the label as parent of all: Friedman, Geiger & Goldszmidt, *Bayesian
//!   network classifiers* (TAN), Machine Learning 29, 1997; spanning trees as structure: Chow & Liu, 1968.
//! - Junction trees: Lauritzen & Spiegelhalter, *Local computations with probabilities on graphical structures and their
//!   application to expert systems*, JRSS B 50, 1988; over noisy marginals: McKenna, Sheldon & Miklau, *Graphical-model based
//!   estimation and inference for differential privacy*, 2019, arXiv 1901.09136, which fits all cliques at once where this crate
//!   goes from the root down.
//! - Consistency of overlapping marginals: Hay et al. 2010; Qardaji, Yang & Li, *PriView*, 2014.
//!
//! # Promises
//!
//! Pure and synchronous; randomness is an argument; equal inputs give equal outputs, byte for byte. Whatever the noise,
//! every distribution is non-negative and sums to 1. What the tree can't carry (interactions of features that are not
//! neighbours, beyond what the label explains) is lost; [`Quality`] doesn't show that, since only released
//! marginals can be compared.

#![forbid(unsafe_code)]

mod clique;
pub mod domains;
mod error;
pub mod fit;
pub mod marginal;
pub mod quality;
pub mod sample;
pub mod selection;
pub mod signal;
pub mod tree;

pub use error::SynthesisError;
pub use fit::{TreeModel, fit};
pub use quality::{Quality, measure};
pub use sample::{CellRows, FineHistograms, SynthColumn, SyntheticTable, decode, draw, draw_for_labels};
pub use tree::{PairScore, TreeStructure, Width, pair_scores};
