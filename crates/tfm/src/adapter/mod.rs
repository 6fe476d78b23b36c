//! Adapters: the few values that rounds train, in several kinds behind one trait.
//!
//! Every kind acts on query rows only. The context never sees an adapter, so one cached context serves all adapters and
//! all rounds, and gradients need no pass over it. An adapter is a matrix of values, one row per key; as it starts
//! it is the base to the last bit. What a kind keeps fixed follows from public material: weights of the base or a
//! seed that the kind names.

mod core;
mod file;
mod frozen_lora;
mod head;
mod lora;
mod low_rank;
pub(crate) mod path;
mod svd;
mod tokens;

#[cfg(test)]
mod conformance;

use std::{collections::BTreeSet, sync::Arc};

use serde::{Deserialize, Serialize};

use self::path::{Applied, Site};
use crate::{
    context::Context,
    error::TfmError,
    model::{Model, config::ModelConfig},
};

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Kind {
    /// One vector per column, added to the column's cells.
    #[default]
    FeatureTokens,
    /// Gain and bias of the final norm, and the decoder's last layer.
    Head,
    /// Query projections of the in-context stage by two trained factors of this rank (LoRA, Hu et al. 2021, arXiv
    /// 2106.09685).
    Lora {
        /// Rank of the change.
        rank: usize,
    },
    /// As LoRA, with the factor that reads rows fixed (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313): the trained values
    /// enter linearly, so a sum of clipped and noised updates is the update of a sum.
    FrozenLora {
        /// Rank of the change.
        rank: usize,
        /// Seed of the fixed factors.
        #[serde(default)]
        seed: u64,
    },
    /// A square core between the leading singular directions of each query projection (LoRA-SB, Ponkshe et al. 2024,
    /// arXiv 2411.19557, with the directions of the base's weights instead of a first gradient's).
    Core {
        /// Rank of the change.
        rank: usize,
    },
}

impl Kind {
    /// The kind's name, as plans and files write it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::FeatureTokens => "feature_tokens",
            Self::Head => "head",
            Self::Lora { .. } => "lora",
            Self::FrozenLora { .. } => "frozen_lora",
            Self::Core { .. } => "core",
        }
    }

    /// The kind on a model: what it keeps fixed is computed here.
    fn on(self, model: &Model) -> Result<Arc<dyn AdapterKind>, TfmError> {
        let config = model.config();
        Ok(match self {
            Self::FeatureTokens => Arc::new(tokens::Tokens),
            Self::Head => Arc::new(head::Head::new(config)),
            Self::Lora { rank } => Arc::new(lora::Lora::new(config, rank)),
            Self::FrozenLora { rank, seed } => Arc::new(frozen_lora::FrozenLora::new(config, rank, seed)),
            Self::Core { rank } => Arc::new(core::Core::new(model, rank)?),
        })
    }
}

/// What every kind of adapter does. Values, keys and gradients are `(keys, width)`, row by row.
pub(crate) trait AdapterKind: std::fmt::Debug + Send + Sync {
    /// The first point of the query path that the values change; what comes before is computed once for many rounds.
    fn entry(&self) -> Entry;

    /// Values that leave the base as it is.
    fn initial(&self, layout: &Layout) -> Vec<f32> {
        vec![0.0; layout.dimension()]
    }

    /// The values as changes of the query path of a context.
    fn applied(&self, layout: &Layout, values: &[f32], context: &Context) -> Result<Applied, TfmError>;

    /// Adds one row's gradient, by what its sites saw in one view, to `gradient`.
    fn add_gradient(&self, applied: &Applied, values: &[f32], sites: &[Site<'_>], gradient: &mut [f32]);
}

/// A point of the query path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Cells, before the row stage.
    Cells,
    /// Row vectors, before the in-context stage.
    Vectors,
    /// Rows that have read the context, before the decoder.
    Read,
}

/// Kind and shape of an adapter: what a reader needs to know to make sense of its values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layout {
    /// What is trained.
    pub kind: Kind,
    /// Names of the rows of values: model columns for feature tokens, parts of the model for other kinds.
    pub keys: Vec<String>,
    /// Values per key.
    pub width: usize,
}

impl Layout {
    /// The layout of a kind on models of a configuration; `columns` are the model columns, which only feature tokens
    /// look at.
    ///
    /// # Errors
    /// [`TfmError::BadConfig`] if the kind can't work on such a model; [`TfmError::TooLarge`] beyond [`MAX_COLUMNS`];
    /// [`TfmError::Mismatch`] for a column given twice.
    pub fn of(kind: Kind, config: &ModelConfig, columns: &[String]) -> Result<Self, TfmError> {
        if config.regression() {
            let (field, expected) = ("base of an adapter", "a classifier");
            return Err(TfmError::BadConfig { field, expected, got: "a regression model".to_owned() });
        }
        let (keys, width) = match kind {
            Kind::FeatureTokens => (columns.to_vec(), config.embed_dim),
            Kind::Head => head::keys(config),
            Kind::Lora { rank } => lora::keys(config, low_rank::checked(rank, config)?),
            Kind::FrozenLora { rank, .. } => frozen_lora::keys(config, low_rank::checked(rank, config)?),
            Kind::Core { rank } => core::keys(config, core::checked(rank, config)?),
        };
        if keys.len() > MAX_COLUMNS {
            return Err(TfmError::TooLarge { what: "adapter columns", got: keys.len(), limit: MAX_COLUMNS });
        }
        let distinct: BTreeSet<&String> = keys.iter().collect();
        if distinct.len() != keys.len() {
            return Err(TfmError::mismatch("distinct column keys", keys.len(), distinct.len()));
        }
        Ok(Self { kind, keys, width })
    }

    /// Number of trained values, `D`.
    #[must_use]
    pub fn dimension(&self) -> usize {
        self.keys.len().saturating_mul(self.width)
    }

    fn check(&self, values: &[f32]) -> Result<(), TfmError> {
        if values.len() != self.dimension() {
            return Err(TfmError::mismatch("adapter values", self.dimension(), values.len()));
        }
        if values.iter().any(|v| !v.is_finite()) {
            return Err(TfmError::NotFinite { name: file::tensor_name(self.kind).to_owned() });
        }
        Ok(())
    }
}

/// An adapter of a base: trained values, and what its kind keeps fixed.
#[derive(Debug, Clone)]
pub struct Adapter {
    layout: Layout,
    values: Vec<f32>,
    kind: Arc<dyn AdapterKind>,
}

impl Adapter {
    /// An adapter that leaves the base as it is.
    ///
    /// # Errors
    /// As [`Layout::of`].
    pub fn initial(kind: Kind, model: &Model, columns: &[String]) -> Result<Self, TfmError> {
        let layout = Layout::of(kind, model.config(), columns)?;
        let kind = kind.on(model)?;
        let values = kind.initial(&layout);
        Ok(Self { layout, values, kind })
    }

    /// The same kind on the same base with other values, key by key.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for a wrong number of values, [`TfmError::NotFinite`] for one that isn't a number.
    pub fn with_values(&self, values: Vec<f32>) -> Result<Self, TfmError> {
        self.layout.check(&values)?;
        Ok(Self { layout: self.layout.clone(), values, kind: Arc::clone(&self.kind) })
    }

    /// Kind and shape.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Values `(keys, width)`, row by row.
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Number of trained values, `D`.
    #[must_use]
    pub fn dimension(&self) -> usize {
        self.values.len()
    }

    /// Adds `factor * step`.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] for another length, [`TfmError::NotFinite`] if a value stops being finite; then nothing
    /// is changed.
    pub fn add_scaled(&mut self, step: &[f64], factor: f64) -> Result<(), TfmError> {
        if step.len() != self.values.len() {
            return Err(TfmError::mismatch("adapter step", self.values.len(), step.len()));
        }
        let moved: Vec<f32> =
            self.values.iter().zip(step).map(|(v, s)| (f64::from(*v) + factor * s) as f32).collect();
        self.layout.check(&moved)?;
        self.values = moved;
        Ok(())
    }

    pub(crate) fn entry(&self) -> Entry {
        self.kind.entry()
    }

    /// The changes of a context's query path.
    ///
    /// # Errors
    /// [`TfmError::Mismatch`] if the context's model has other sizes than the adapter's base.
    pub(crate) fn applied(&self, context: &Context) -> Result<Applied, TfmError> {
        self.kind.applied(&self.layout, &self.values, context)
    }

    pub(crate) fn add_gradient(&self, applied: &Applied, sites: &[Site<'_>], gradient: &mut [f32]) {
        self.kind.add_gradient(applied, &self.values, sites, gradient);
    }
}

/// Most rows of values of an adapter.
pub const MAX_COLUMNS: usize = 1024;
/// Largest rank of an adapter.
pub const MAX_RANK: usize = 64;
/// Widest rows for which singular directions are computed.
pub const MAX_CORE_WIDTH: usize = 1024;
pub use file::MAX_ADAPTER_BYTES;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::{Adapter, Kind, Layout, MAX_COLUMNS, MAX_RANK};
    use crate::{context::tests::model, error::TfmError, model::config::ModelConfig};

    fn keys(n: usize) -> Vec<String> {
        (0..n).map(|i| i.to_string()).collect()
    }

    #[test]
    fn steps_that_overflow_change_nothing() {
        let mut adapter = Adapter::initial(Kind::FeatureTokens, &model(), &keys(1)).unwrap();
        let step = |first: f64| std::iter::once(first).chain([-1.0; 7]).collect::<Vec<_>>();
        adapter.add_scaled(&step(1.0), 0.5).unwrap();
        assert_eq!(adapter.values()[..2], [0.5, -0.5]);
        assert!(matches!(adapter.add_scaled(&step(1e300), 1.0), Err(TfmError::NotFinite { .. })));
        assert!(adapter.add_scaled(&[1.0], 1.0).is_err());
        assert_eq!(adapter.values()[..2], [0.5, -0.5]);
        assert!(adapter.with_values(vec![0.0; 7]).is_err());
        assert!(adapter.with_values(vec![f32::NAN; 8]).is_err());
    }

    #[test]
    fn limits_hold_at_one_above() {
        let of = |kind, config: &ModelConfig, columns: &[String]| Layout::of(kind, config, columns);
        let tiny = ModelConfig::tiny();
        assert!(of(Kind::FeatureTokens, &tiny, &keys(MAX_COLUMNS)).is_ok());
        let over = of(Kind::FeatureTokens, &tiny, &keys(MAX_COLUMNS + 1));
        assert!(matches!(over, Err(TfmError::TooLarge { limit: MAX_COLUMNS, .. })));
        assert!(of(Kind::FeatureTokens, &tiny, &["a".into(), "a".into()]).is_err());
        let kinds: [fn(usize) -> Kind; 3] = [
            |rank| Kind::Lora { rank },
            |rank| Kind::FrozenLora { rank, seed: 0 },
            |rank| Kind::Core { rank },
        ];
        let (nano, wide) = (ModelConfig::nano(), ModelConfig { embed_dim: 512, ..ModelConfig::nano() });
        for kind in kinds {
            assert!(of(kind(MAX_RANK), &nano, &[]).is_ok());
            for (rank, config) in [(MAX_RANK + 1, &nano), (0, &nano), (tiny.row_width() + 1, &tiny)] {
                let refused = of(kind(rank), config, &[]).unwrap_err().to_string();
                assert!(refused.contains("adapter rank"), "{refused}");
            }
            assert!(of(kind(tiny.row_width()), &tiny, &[]).is_ok());
        }
        // Rows of 2048 entries: singular directions would take minutes, a plain low rank doesn't.
        assert!(of(Kind::Lora { rank: 1 }, &wide, &[]).is_ok());
        let refused = of(Kind::Core { rank: 1 }, &wide, &[]).unwrap_err().to_string();
        assert!(refused.contains("row width"), "{refused}");
        let regressor = ModelConfig { max_classes: 0, ..ModelConfig::tiny() };
        assert!(of(Kind::Head, &regressor, &[]).unwrap_err().to_string().contains("a regression model"));
    }

    #[test]
    fn kinds_read_as_they_are_written() {
        for (kind, text) in [
            (Kind::FeatureTokens, r#"{"kind":"feature_tokens"}"#),
            (Kind::FrozenLora { rank: 2, seed: 7 }, r#"{"kind":"frozen_lora","rank":2,"seed":7}"#),
            (Kind::Core { rank: 8 }, r#"{"kind":"core","rank":8}"#),
        ] {
            assert_eq!(serde_json::to_string(&kind).unwrap(), text);
            assert_eq!(serde_json::from_str::<Kind>(text).unwrap(), kind);
            assert!(text.contains(&format!("{:?}", kind.name())));
        }
    }
}
