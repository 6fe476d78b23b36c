//! An adapter on the way of query rows: the changes themselves, and a tape of what a gradient needs.
//!
//! Changes are added where they act, weights are never copied. Each place where something is added is a site: the gradient
//! of a row by the adapter's values follows from what went into the row's sites and the gradient at their outputs. In
//! row stage, in-context stage and decoder query rows don't meet, so one backward pass over many rows gives each row's
//! own gradient; zero-valued variables at the sites keep it, and nothing else is differentiated.

use candle_core::{DType, Device, Tensor, Var, backprop::GradStore};

use super::low_rank::LowRank;
use crate::{
    error::TfmError,
    infer::{
        Engine,
        change::{Change, HeadAddend},
    },
    model::query::QueryPath,
    ops::{linear::linear, norm::layer_norm},
};

/// An adapter's changes of the query path of one context; the default has none.
#[derive(Debug, Default)]
pub(crate) struct Applied {
    pub(super) cells: Option<Cells>,
    /// Changes of the queries, block by block.
    pub(super) queries: Vec<LowRank>,
    pub(super) head: Option<HeadChange>,
}

/// What is added to cells.
#[derive(Debug)]
pub(super) struct Cells {
    /// Addend `(1, slots, E)`.
    pub(super) delta: Tensor,
    /// The adapter's rows of values that each slot is the sum of.
    pub(super) members: Vec<Vec<usize>>,
}

/// What is added to final norm and decoder.
#[derive(Debug)]
pub(super) struct HeadChange {
    /// Addend of the gain `(D)`.
    pub(super) gain: Tensor,
    /// Addend of the bias `(D)`, where the norm has one.
    pub(super) bias: Option<Tensor>,
    /// Addend of the last layer's weight `(outputs, 2 D)`.
    pub(super) output: Tensor,
}

impl Applied {
    /// What is changed behind the cells, as serving reads it.
    pub(crate) fn change(&self, engine: &Engine) -> Result<Change, TfmError> {
        if let Some(HeadChange { gain, bias, output }) = &self.head {
            let values = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
            let bias = bias.as_ref().map(values).transpose()?.unwrap_or_default();
            let addend = HeadAddend { gain: values(gain)?, bias, output: values(output)? };
            return Ok(engine.head_change(&addend));
        }
        let factors = self.queries.iter().map(LowRank::factors).collect::<Result<Vec<_>, _>>()?;
        Ok(Change::of_queries(&factors, engine.vector()))
    }

    /// What is added to cells, as numbers `(slots, E)`.
    pub(crate) fn addend(&self) -> Result<Option<Vec<f32>>, TfmError> {
        Ok(self.cells.as_ref().map(|Cells { delta, .. }| delta.flatten_all()?.to_vec1()).transpose()?)
    }
}

impl QueryPath for &Applied {
    fn cells(&mut self, cells: Tensor) -> Result<Tensor, TfmError> {
        match &self.cells {
            Some(Cells { delta, .. }) => Ok(cells.broadcast_add(delta)?),
            None => Ok(cells),
        }
    }

    fn queries(&mut self, block: usize, normed: &Tensor, queries: Tensor) -> Result<Tensor, TfmError> {
        match self.queries.get(block) {
            Some(change) => Ok((queries + change.of(normed)?)?),
            None => Ok(queries),
        }
    }

    fn norm(&mut self, rows: &Tensor, gain: &Tensor, bias: &Tensor) -> Result<Tensor, TfmError> {
        let Some(change) = &self.head else { return Ok(layer_norm(rows, gain, bias)?) };
        let gain = (gain + &change.gain)?;
        let bias = match &change.bias {
            Some(addend) => (bias + addend)?,
            None => bias.clone(),
        };
        Ok(layer_norm(rows, &gain, &bias)?)
    }

    fn scores(&mut self, hidden: &Tensor, scores: Tensor) -> Result<Tensor, TfmError> {
        let Some(HeadChange { output, .. }) = &self.head else { return Ok(scores) };
        let none = Tensor::zeros(output.dim(0)?, DType::F32, &Device::Cpu)?;
        Ok((scores + linear(hidden, output, &none)?)?)
    }
}

/// The query path of one view, with what its sites saw.
pub(crate) struct Tape<'a> {
    applied: &'a Applied,
    sites: Vec<(Option<Tensor>, Var)>,
}

impl<'a> Tape<'a> {
    pub(crate) fn new(applied: &'a Applied) -> Self {
        Self { applied, sites: Vec::new() }
    }

    /// What the sites saw of each of `rows` rows, in the order in which rows pass them.
    pub(crate) fn played(self, gradients: &GradStore, rows: usize) -> Result<Played, TfmError> {
        let flat = |tensor: &Tensor| -> Result<Values, TfmError> {
            Ok(Values { width: tensor.elem_count() / rows.max(1), values: tensor.flatten_all()?.to_vec1()? })
        };
        let mut sites = Vec::with_capacity(self.sites.len());
        for (input, tap) in self.sites {
            let input = input.as_ref().map(flat).transpose()?.unwrap_or_default();
            let gradient = match gradients.get(&tap) {
                Some(gradient) => flat(gradient)?,
                None => flat(&tap)?,
            };
            sites.push((input, gradient));
        }
        Ok(Played(sites))
    }

    fn site(&mut self, input: Option<Tensor>, output: &Tensor) -> Result<Tensor, TfmError> {
        let tap = Var::zeros(output.dims(), DType::F32, &Device::Cpu)?;
        let tapped = (output + tap.as_tensor())?;
        self.sites.push((input, tap));
        Ok(tapped)
    }
}

impl QueryPath for Tape<'_> {
    fn cells(&mut self, cells: Tensor) -> Result<Tensor, TfmError> {
        let mut applied = self.applied;
        let changed = applied.cells(cells)?;
        if applied.cells.is_some() { self.site(None, &changed) } else { Ok(changed) }
    }

    fn queries(&mut self, block: usize, normed: &Tensor, queries: Tensor) -> Result<Tensor, TfmError> {
        let mut applied = self.applied;
        let changed = applied.queries(block, normed, queries)?;
        if block < applied.queries.len() { self.site(Some(normed.clone()), &changed) } else { Ok(changed) }
    }

    fn norm(&mut self, rows: &Tensor, gain: &Tensor, bias: &Tensor) -> Result<Tensor, TfmError> {
        let mut applied = self.applied;
        let normed = applied.norm(rows, gain, bias)?;
        if applied.head.is_none() {
            return Ok(normed);
        }
        let (one, zero) = (gain.ones_like()?, gain.zeros_like()?);
        self.site(Some(layer_norm(rows, &one, &zero)?), &normed)
    }

    fn scores(&mut self, hidden: &Tensor, scores: Tensor) -> Result<Tensor, TfmError> {
        let mut applied = self.applied;
        let changed = applied.scores(hidden, scores)?;
        if applied.head.is_some() { self.site(Some(hidden.clone()), &changed) } else { Ok(changed) }
    }
}

/// Values of some rows, end to end.
#[derive(Default)]
struct Values {
    width: usize,
    values: Vec<f32>,
}

impl Values {
    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.width..(row + 1) * self.width]
    }
}

/// What the sites of one view saw: inputs, and gradients at the outputs.
pub(crate) struct Played(Vec<(Values, Values)>);

impl Played {
    /// The sites of one row.
    pub(crate) fn row(&self, row: usize) -> Vec<Site<'_>> {
        self.0
            .iter()
            .map(|(input, gradient)| Site { input: input.row(row), gradient: gradient.row(row) })
            .collect()
    }
}

/// One row at one site.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Site<'a> {
    /// What went in; empty where nothing but the values did.
    pub(super) input: &'a [f32],
    /// Gradient of the loss by what came out.
    pub(super) gradient: &'a [f32],
}
