//! Buffered asynchronous averaging: FedBuff of Nguyen et al. 2022 (arXiv 2106.06639), algorithm 1.
//!
//! Agents work at their own pace from whatever model they were given. The server keeps their changes until the buffer is
//! full, each weighed by 1/√(1 + staleness) (the paper's polynomial scaling, a = ½; staleness is the number of server steps
//! since the agent's model), and steps on their sum over the buffer's size. A step is taken on what a few agents sent, so a
//! buffer needs each update; the paper's own secure aggregation is a trusted enclave.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::aggregate::optimiser::OptimiserSpec;
use crate::aggregate::strategy::{FederatedStrategy, PLAIN_STEP, Pace};
use crate::aggregate::{FedAvg, Rule};

/// Asynchronous local steps with a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FedBuff {
    /// Changes the server waits for before a step, 1 to 10,000. Default 10, the paper's.
    #[serde(default = "default_buffer")]
    pub buffer: u32,
}

/// Size of the buffer if none is named.
fn default_buffer() -> u32 {
    10
}

/// What has come in since the last server step.
#[derive(Debug, Clone, PartialEq)]
pub struct Buffer {
    size: u32,
    held: u32,
    sum: Vec<f64>,
}

impl Buffer {
    /// An empty buffer for `size` changes of `len` values.
    #[must_use]
    pub fn new(size: u32, len: usize) -> Self {
        Self { size: size.max(1), held: 0, sum: vec![0.0; len] }
    }

    /// Takes one change; gives what to step on when the buffer is full, and is empty again then.
    pub fn push(&mut self, change: &[f64], staleness: u32) -> Option<Vec<f64>> {
        let weight = FedBuff::weight(staleness);
        self.sum.iter_mut().zip(change).for_each(|(s, v)| *s += v * weight);
        self.held += 1;
        (self.held >= self.size).then(|| {
            let factor = 1.0 / f64::from(self.held);
            self.held = 0;
            let len = self.sum.len();
            std::mem::replace(&mut self.sum, vec![0.0; len]).into_iter().map(|v| v * factor).collect()
        })
    }
}

impl FedBuff {
    /// Weight of a change that is `staleness` server steps old.
    #[must_use]
    pub fn weight(staleness: u32) -> f64 {
        1.0 / (1.0 + f64::from(staleness)).sqrt()
    }
}

impl FederatedStrategy for FedBuff {
    fn kind(&self) -> &'static str {
        "fedbuff"
    }

    fn paper(&self) -> &'static str {
        "Nguyen et al. 2022, arXiv 2106.06639"
    }

    /// Each agent's change counts alike.
    fn rule(&self) -> Rule {
        Rule::FedAvg(FedAvg {})
    }

    fn optimiser(&self) -> OptimiserSpec {
        PLAIN_STEP
    }

    fn pace(&self) -> Pace {
        Pace::Buffered { size: self.buffer }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_buffer_gives_the_weighted_sum_over_its_size_and_starts_again() {
        let mut buffer = Buffer::new(2, 1);
        assert_eq!(buffer.push(&[3.0], 0), None);
        // 1/√(1 + 3) = ½.
        assert_eq!(buffer.push(&[4.0], 3), Some(vec![2.5]));
        assert_eq!(buffer.push(&[1.0], 0), None);
        assert_eq!(buffer.push(&[1.0], 0), Some(vec![1.0]));
    }
}
