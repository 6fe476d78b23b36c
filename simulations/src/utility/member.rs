//! One domain of a federation: its name, its contract, its tables.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use tabmesh_contract::batch::TypedBatch;
use tabmesh_contract::contract::Contract;
use tabmesh_contract::schema::FeatureSchema;

use super::newcomer::Size;
use crate::quickstart::measure::rows;

/// A domain as its agent and its judge see it.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    /// Name for people.
    pub(crate) domain: String,
    /// Name of its data product.
    pub(crate) product: String,
    /// Text of its contract, whose source is the training table.
    pub(crate) contract: String,
    /// Its training table.
    pub(crate) train: PathBuf,
    /// Its test table, which no agent sees.
    pub(crate) test: PathBuf,
}

/// Training and test rows of one domain in its declared terms.
pub(crate) struct Tables {
    pub(crate) schema: FeatureSchema,
    pub(crate) train: TypedBatch,
    pub(crate) test: TypedBatch,
    /// Of the test rows.
    pub(crate) labels: Vec<u8>,
}

impl Member {
    /// Its name as identities and products spell it.
    pub(crate) fn name(&self) -> String {
        name(&self.domain)
    }

    /// The same domain with another training table.
    ///
    /// # Errors
    /// The contract doesn't name the present table once.
    pub(crate) fn with_train(mut self, train: PathBuf) -> Result<Self> {
        let (old, new) = (self.train.display().to_string(), train.display().to_string());
        let times = self.contract.matches(&old).count();
        ensure!(times == 1, "{}: the contract names its table {times} times", self.domain);
        self.contract = self.contract.replace(&old, &new);
        self.train = train;
        Ok(self)
    }

    /// Its contract, by which the other domains may be told what sets this one apart.
    ///
    /// # Errors
    /// The contract has not one `privacy` in braces.
    pub(crate) fn published_contract(&self) -> Result<String> {
        const PRIVACY: &str = "\nprivacy: {";
        let times = self.contract.matches(PRIVACY).count();
        ensure!(times == 1, "{}: the contract has {times} maps of privacy", self.domain);
        Ok(self.contract.replace(PRIVACY, &format!("{PRIVACY}domain_aggregates: published, ")))
    }

    /// Reads its contract.
    ///
    /// # Errors
    /// It isn't one.
    pub(crate) fn parsed(&self) -> Result<Contract> {
        let (contract, _) = Contract::parse("contract.yaml", &self.contract)
            .map_err(|error| anyhow::anyhow!("contract of {}: {}", self.domain, error.render()))?;
        Ok(contract)
    }

    /// Reads its tables.
    ///
    /// # Errors
    /// Contract or tables can't be read.
    pub(crate) fn tables(&self) -> Result<Tables> {
        let contract = self.parsed()?;
        let schema = contract.approved_schema().with_context(|| format!("schema of {}", self.domain))?;
        let train = rows(&contract, &self.train, &schema)?;
        let test = rows(&contract, &self.test, &schema)?;
        let labels = test.labels.iter().map(|label| u8::from(*label == Some(1))).collect();
        Ok(Tables { schema, train, test, labels })
    }

    /// What of it can be scored.
    ///
    /// # Errors
    /// As [`Self::tables`].
    pub(crate) fn size(&self) -> Result<Size> {
        let Tables { train, labels, .. } = self.tables()?;
        let ones = labels.iter().filter(|label| **label == 1).count();
        Ok(Size { train: train.rows(), test: [labels.len() - ones, ones] })
    }
}

/// A domain's name as identities and products spell it.
pub(crate) fn name(domain: &str) -> String {
    domain.to_lowercase().replace('_', "-")
}
