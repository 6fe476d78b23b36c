//! What rounds train: the kinds of adapter that a plan can name, with their figures.
//!
//! A kind without figures may be written as its name alone, as in `adapter: feature_tokens`; with figures it is a map, as in
//! `adapter: {kind: lora, rank: 2}`. All kinds but the forest change what the model does with query rows; the forest stands beside it.

use std::fmt;

use garde::Validate;
use schemars::JsonSchema;
use serde::de::value::{MapAccessDeserializer, MapDeserializer};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

/// What rounds train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, Validate)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum AdapterSpec {
    /// One vector per feature, added to that feature's cells.
    FeatureTokens,
    /// Gain and bias of the final norm and the decoder's last layer.
    Head,
    /// Both factors of a change of low rank to the query projections of the in-context stage (LoRA).
    Lora {
        /// Rank of the change, 1 to 64 and at most the width of the base's rows. Default 1.
        #[serde(default = "default_rank")]
        #[garde(range(min = 1, max = MAX_ADAPTER_RANK))]
        rank: u32,
    },
    /// As `lora`, with the factor that reads rows fixed at values drawn from a public seed (FFA-LoRA).
    FrozenLora {
        /// Rank of the change, 1 to 64 and at most the width of the base's rows. Default 1.
        #[serde(default = "default_rank")]
        #[garde(range(min = 1, max = MAX_ADAPTER_RANK))]
        rank: u32,
        /// Seed of the fixed values. Default 0.
        #[serde(default)]
        #[garde(skip)]
        seed: u64,
    },
    /// A square core between the leading singular directions of each query projection of the base (LoRA-SB).
    Core {
        /// Side of the core, 1 to 64 and at most the width of the base's rows. Default 8.
        #[serde(default = "default_core_rank")]
        #[garde(range(min = 1, max = MAX_ADAPTER_RANK))]
        rank: u32,
    },
    /// Leaf values of random trees, beside the model: each round learns some of them by a Newton step on noisy sums. Their splits are
    /// drawn from the released counts. The default.
    Forest {
        /// Trees that a round learns, 1 to 32. Default 4.
        #[serde(default = "default_trees")]
        #[garde(range(min = 1, max = MAX_ROUND_TREES))]
        trees: u32,
        /// Splits between root and leaf, 1 to 8. Default 4.
        #[serde(default = "default_depth")]
        #[garde(range(min = 1, max = MAX_TREE_DEPTH))]
        depth: u32,
    },
}

impl Default for AdapterSpec {
    fn default() -> Self {
        Self::Forest { trees: default_trees(), depth: default_depth() }
    }
}

impl AdapterSpec {
    /// Integers of a round's answer where they aren't one for each adapter value: two sums for each leaf of a forest's trees of the
    /// round. 0 for other kinds.
    #[must_use]
    pub fn leaf_sums(&self) -> u64 {
        match *self {
            Self::Forest { trees, depth } => (2 * u64::from(trees)) << depth.min(MAX_TREE_DEPTH),
            _ => 0,
        }
    }

    /// Largest L2 norm of a row's part in a forest's sums: √trees. `None` for other kinds, whose gradients have no such bound.
    ///
    /// A row adds `y − p` and `p (1 − p)` to one leaf of each tree, and `(y − p)² + p² (1 − p)² ≤ 1` for all `p` in `[0, 1]` and `y` in
    /// `{0, 1}`: with `q = |y − p|` it is `q² (1 + (1 − q)²)`, which grows up to 1 at `q = 1`.
    #[must_use]
    pub fn row_norm(&self) -> Option<f64> {
        match *self {
            Self::Forest { trees, .. } => Some(f64::from(trees).sqrt()),
            _ => None,
        }
    }
}

impl fmt::Display for AdapterSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FeatureTokens => f.write_str("feature_tokens"),
            Self::Head => f.write_str("head"),
            Self::Lora { rank } => write!(f, "lora of rank {rank}"),
            Self::FrozenLora { rank, seed } => write!(f, "frozen_lora of rank {rank}, seed {seed}"),
            Self::Core { rank } => write!(f, "core of rank {rank}"),
            Self::Forest { trees, depth } => write!(f, "forest of {trees} trees a round, depth {depth}"),
        }
    }
}

/// Reads a kind from its name or from a map.
pub(super) fn name_or_map<'de, D: Deserializer<'de>>(deserializer: D) -> Result<AdapterSpec, D::Error> {
    struct Either;

    impl<'de> Visitor<'de> for Either {
        type Value = AdapterSpec;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a kind of adapter, or a map with `kind` and its figures")
        }

        fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<AdapterSpec, E> {
            // A name is a map with nothing beside the kind.
            let pair = std::iter::once(("kind", name));
            AdapterSpec::deserialize(MapDeserializer::<_, E>::new(pair))
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<AdapterSpec, A::Error> {
            AdapterSpec::deserialize(MapAccessDeserializer::new(map))
        }
    }

    deserializer.deserialize_any(Either)
}

/// The two forms, for the JSON schema.
#[derive(JsonSchema)]
#[schemars(untagged, inline)]
#[expect(dead_code, reason = "describes a document and is never made")]
pub(super) enum NameOrMap {
    /// A kind at its default figures.
    Name(AdapterName),
    /// A kind with its figures.
    Map(AdapterSpec),
}

/// Names of the kinds.
#[derive(JsonSchema)]
#[schemars(rename_all = "snake_case")]
#[expect(dead_code, reason = "describes a document and is never made")]
pub(super) enum AdapterName {
    FeatureTokens,
    Head,
    Lora,
    FrozenLora,
    Core,
    Forest,
}

fn default_rank() -> u32 {
    1
}

fn default_core_rank() -> u32 {
    8
}

fn default_trees() -> u32 {
    4
}

fn default_depth() -> u32 {
    4
}

/// Most trees that a round learns.
pub const MAX_ROUND_TREES: u32 = 32;
/// Most splits between root and leaf.
pub const MAX_TREE_DEPTH: u32 = 8;
/// Largest rank of an adapter.
pub const MAX_ADAPTER_RANK: u32 = 64;
