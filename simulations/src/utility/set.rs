//! A folder of tables split by domain: `dataset.json`, `train/DOMAIN.parquet`, `test/DOMAIN.parquet`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::newcomer::Size;
use crate::bench::raw_table::{Description, RawTable};

/// A described folder.
#[derive(Debug, Clone)]
pub(crate) struct Set {
    pub(crate) name: String,
    pub(crate) columns: Vec<Column>,
    /// Names of the domains, in the description's order.
    pub(crate) domains: Vec<String>,
    /// Whether the privacy unit is the entity and not the row.
    pub(crate) by_entity: bool,
    folder: PathBuf,
    tables: Description,
}

/// A column as described.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Column {
    pub(crate) name: String,
    /// `int64`, `float64` or `double`, `string`, `int8`.
    #[serde(rename = "type")]
    pub(crate) physical: String,
    /// `row_id`, `entity_id`, `label`, `feature`, `sensitive`, `pii`.
    pub(crate) role: String,
}

#[derive(Debug, Deserialize)]
struct Described {
    name: String,
    kind: String,
    task: String,
    #[serde(default)]
    privacy_unit: String,
    columns: Vec<Column>,
    domains: Vec<DescribedDomain>,
}

#[derive(Debug, Deserialize)]
struct DescribedDomain {
    name: String,
}

impl Set {
    /// Reads a folder's description.
    ///
    /// # Errors
    /// The file can't be read, or describes something else than two-class tables of at least [`LEAST_DOMAINS`] domains.
    pub(crate) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("dataset.json");
        let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let described: Described = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a description", path.display()))?;
        let Described { name, kind, task, privacy_unit, columns, domains } = described;
        ensure!(kind == "domains", "{}: kind is {kind:?}, expected \"domains\"", path.display());
        ensure!(task == "binary", "{}: task is {task:?}, expected \"binary\"", path.display());
        let domains: Vec<String> = domains.into_iter().map(|domain| domain.name).collect();
        ensure!(
            domains.len() >= LEAST_DOMAINS,
            "{}: {} domains, expected at least {LEAST_DOMAINS}: one is the newcomer, three make a cohort",
            path.display(),
            domains.len()
        );
        let tables = Description::read(folder)?;
        let by_entity = privacy_unit.starts_with("entity_id");
        Ok(Self { name, columns, domains, by_entity, folder: folder.to_owned(), tables })
    }

    /// A domain's training table.
    pub(crate) fn train(&self, domain: &str) -> PathBuf {
        self.folder.join("train").join(format!("{domain}.parquet"))
    }

    /// A domain's test table.
    pub(crate) fn test(&self, domain: &str) -> PathBuf {
        self.folder.join("test").join(format!("{domain}.parquet"))
    }

    /// The folder.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// What of a domain with these tables can be scored.
    ///
    /// # Errors
    /// A table can't be read.
    pub(crate) fn size(&self, train: &Path, test: &Path) -> Result<Size> {
        let (train, test) = (self.tables.rows(train)?, self.tables.rows(test)?);
        let ones = test.labels.iter().filter(|label| **label == 1).count();
        Ok(Size { train: train.labels.len(), test: [test.labels.len() - ones, ones] })
    }

    /// Training rows of some domains, one after the other, as cells.
    ///
    /// # Errors
    /// A table can't be read, or differs from the others.
    pub(crate) fn pooled<'a>(&self, domains: impl IntoIterator<Item = &'a String>) -> Result<RawTable> {
        let mut pooled = RawTable { columns: Vec::new(), labels: Vec::new() };
        for domain in domains {
            pooled.append(self.tables.rows(&self.train(domain))?)?;
        }
        Ok(pooled)
    }
}

/// Domains needed: one is left out as the newcomer, and a cohort has at least three.
const LEAST_DOMAINS: usize = 4;
