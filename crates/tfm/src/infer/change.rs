//! What an adapter changes of the query side, in the order of the loops; the weights themselves stay shared.
//!
//! A change of low rank is two thin products beside a block's query projection, the final norm and the decoder's last layer
//! are added up once. Context rows never come by here, so one cache serves all adapters.

use super::matrix::{Matrix, Norm};

/// Changes of the query side; the default has none.
#[derive(Default)]
pub(crate) struct Change {
    queries: Vec<Factors>,
    head: Option<Head>,
}

/// Addends of final norm and decoder, in the base's layout.
#[derive(Debug)]
pub(crate) struct HeadAddend {
    /// Of the gain `(D)`.
    pub(crate) gain: Vec<f32>,
    /// Of the bias `(D)`; empty for none.
    pub(crate) bias: Vec<f32>,
    /// Of the last layer's weight `(outputs, 2 D)`.
    pub(crate) output: Vec<f32>,
}

/// Final norm and last layer with the change in them.
pub(super) struct Head {
    pub(super) norm: Norm,
    pub(super) output: Matrix,
}

/// Two factors beside a query projection.
pub(super) struct Factors {
    down: Matrix,
    up: Matrix,
}

impl Change {
    /// Changes of the queries, one for each in-context block: what reads normed rows `(rank, D)`, and what writes queries
    /// `(D, rank)`.
    pub(crate) fn of_queries(factors: &[(Vec<f32>, Vec<f32>)], width: usize) -> Self {
        let pack = |(down, up): &(Vec<f32>, Vec<f32>)| {
            let rank = down.len() / width;
            Factors {
                down: Matrix::new(down, vec![0.0; rank], width),
                up: Matrix::new(up, vec![0.0; width], rank),
            }
        };
        Self { queries: factors.iter().map(pack).collect(), head: None }
    }

    pub(super) fn of_head(norm: Norm, output: Matrix) -> Self {
        Self { queries: Vec::new(), head: Some(Head { norm, output }) }
    }

    /// The change of one block's queries.
    pub(super) fn queries(&self, block: usize) -> Option<&Factors> {
        self.queries.get(block)
    }

    /// The changes of the queries as gradients come back through them.
    pub(super) fn turned(&self) -> Vec<TurnedFactors> {
        let turn = |factors: &Factors| {
            TurnedFactors(Factors { down: factors.up.turned(), up: factors.down.turned() })
        };
        self.queries.iter().map(turn).collect()
    }

    pub(super) fn head(&self) -> Option<&Head> {
        self.head.as_ref()
    }
}

/// Two factors that gradients of queries come back to normed rows by.
pub(super) struct TurnedFactors(Factors);

impl TurnedFactors {
    /// Adds to the gradient of normed rows `(n, D)` what comes back from that of queries `(n, D)`.
    pub(super) fn add_to(&self, of_queries: &[f32], of_normed: &mut [f32]) {
        self.0.add_to(of_queries, of_normed);
    }
}

impl Factors {
    /// Adds the change to queries `(n, D)` of normed rows `(n, D)`.
    pub(super) fn add_to(&self, normed: &[f32], queries: &mut [f32]) {
        self.up.add_to(&self.down.of(normed), queries);
    }
}
