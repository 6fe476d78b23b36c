//! Final norm and last decoder layer: the end of the query path, and the cheapest gradient.
//!
//! The last layer is changed by one vector: half of it is added to the weights of class 1 and half taken from those of class 0,
//! as only their difference is read. Its bias is left out: averaged over both orders of the classes it has no effect.

use super::{
    AdapterKind, Entry, Layout,
    path::{Applied, Site},
};
use crate::{context::Context, error::TfmError, infer::change::HeadAddend, model::config::ModelConfig};

#[derive(Debug)]
pub(super) struct Head {
    width: usize,
    /// Whether the final norm has a bias.
    biased: bool,
}

/// Keys and values per key: gain and bias `(D)` of the norm, two halves of the last layer's `(2 D)`.
pub(super) fn keys(config: &ModelConfig) -> (Vec<String>, usize) {
    let biased = !config.variant.bias_free_ln;
    let names = ["norm.gain", "norm.bias", "margin.0", "margin.1"].iter();
    let keys = names.filter(|name| biased || **name != "norm.bias").map(ToString::to_string).collect();
    (keys, config.row_width())
}

impl Head {
    pub(super) fn new(config: &ModelConfig) -> Self {
        Self { width: config.row_width(), biased: !config.variant.bias_free_ln }
    }

    /// Where the last layer's values start.
    fn margin(&self) -> usize {
        if self.biased { 2 * self.width } else { self.width }
    }
}

impl AdapterKind for Head {
    fn entry(&self) -> Entry {
        Entry::Read
    }

    fn applied(&self, _layout: &Layout, values: &[f32], context: &Context) -> Result<Applied, TfmError> {
        let config = context.model().config();
        if (config.row_width(), !config.variant.bias_free_ln) != (self.width, self.biased) {
            let shown = |width, biased| format!("rows of width {width}, norm with bias: {biased}");
            let expected = shown(config.row_width(), !config.variant.bias_free_ln);
            return Err(TfmError::mismatch("base of the adapter", expected, shown(self.width, self.biased)));
        }
        let (norm, margin) = values.split_at(self.margin());
        let (gain, bias) = norm.split_at(self.width);
        let mut output = vec![0f32; config.outputs() * margin.len()];
        for (i, v) in margin.iter().enumerate() {
            output[i] = -0.5 * v;
            output[margin.len() + i] = 0.5 * v;
        }
        let head = HeadAddend { gain: gain.to_vec(), bias: bias.to_vec(), output };
        Ok(Applied { head: Some(head), ..Applied::default() })
    }

    fn add_gradient(&self, _applied: &Applied, _values: &[f32], sites: &[Site<'_>], gradient: &mut [f32]) {
        let [norm, scores] = sites else { return };
        let (of_norm, of_margin) = gradient.split_at_mut(self.margin());
        let (of_gain, of_bias) = of_norm.split_at_mut(self.width);
        for ((to, hat), g) in of_gain.iter_mut().zip(norm.input).zip(norm.gradient) {
            *to += hat * g;
        }
        for (to, g) in of_bias.iter_mut().zip(norm.gradient) {
            *to += g;
        }
        let [zero, one, ..] = scores.gradient else { return };
        let half = 0.5 * (one - zero);
        for (to, hidden) in of_margin.iter_mut().zip(scores.input) {
            *to += half * hidden;
        }
    }
}
