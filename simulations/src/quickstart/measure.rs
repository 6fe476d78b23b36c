//! The figures of the quickstart: every variant on every domain's test rows.
//!
//! The harness scores; agents report nothing. Trees and the unserved variants are computed here from the deployment
//! folder with the agent's own code; what is served is asked of the running agent.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use tabmesh_agent::calibrate::Calibration;
use tabmesh_agent::choose::{Blend, Member};
use tabmesh_agent::config::{Config, ContextSection};
use tabmesh_agent::promote::{Candidate, Loaded, Rows, Served, Tokens, Weights};
use tabmesh_agent::publication::Artefacts;
use tabmesh_agent::source::{self, DomainKey, View};
use tabmesh_agent::{Local, Switches};
use tabmesh_contract::batch::TypedBatch;
use tabmesh_contract::contract::{Contract, SourceKind, SourceSpec};
use tabmesh_contract::schema::FeatureSchema;
use tabmesh_federation::manifest::Trust;
use tabmesh_privacy::signature::VerifyingKey;

use super::dataset::{Domain, schema};
use super::deployment::Layout;
use super::pki::{PkiFolder, Role};
use super::predict;
use crate::baseline;
use crate::score::{Predictions, Variant};

/// Reads a Parquet table in the terms of a contract and a schema.
///
/// # Errors
/// The table can't be read or doesn't fit.
pub fn rows(contract: &Contract, table: &Path, schema: &FeatureSchema) -> Result<TypedBatch> {
    let spec = SourceSpec { kind: SourceKind::Parquet, path: table.display().to_string(), delimiter: None };
    let source = source::open(&spec, Path::new("."));
    let view = View::new(&*source, contract, schema, DomainKey::new(&[0; 32]))?;
    let mut all = TypedBatch::empty(schema);
    for batch in view.rows()? {
        all.append(&batch?.batch);
    }
    Ok(all)
}

/// A domain's contract in its deployment's folder.
///
/// # Errors
/// It can't be read.
pub fn contract(layout: &Layout, domain: &Domain) -> Result<Contract> {
    let text = std::fs::read_to_string(layout.contract(domain.id))?;
    Ok(Contract::parse("contract.yaml", &text).context("contract")?.0)
}

/// Predicts one domain's test rows by every variant; `switches` are those that its agent runs with.
///
/// # Errors
/// A table, artefact or agent can't be used.
pub fn domain(
    layout: &Layout,
    domain: &Domain,
    address: &str,
    switches: Switches,
    seed: u64,
) -> Result<Predictions> {
    let schema = schema()?;
    let contract = contract(layout, domain)?;
    let train = rows(&contract, &layout.train_table(domain.id), &schema)?;
    let test = rows(&contract, &layout.test_table(domain.id), &schema)?;
    let labels: Vec<u8> = test.labels.iter().map(|l| l.map_or(0, |l| u8::try_from(l).unwrap_or(1))).collect();
    let config = Config::load(&layout.agent_config(domain.id))?;
    let agent = Local::open(config, switches, Arc::new(|| 0))?;
    let loaded = agent.serving.published()?.context("nothing was published")?;
    let own = agent.serving.rows()?;
    let mut by_variant = BTreeMap::new();
    by_variant.insert(Variant::LocalTrees, baseline::fit_predict(&train, None, &test, &schema, seed)?);
    let with_corpus = baseline::fit_predict(&train, Some(loaded.corpus()), &test, &schema, seed)?;
    by_variant.insert(Variant::LocalTreesCorpus, with_corpus);
    for (variant, weights, context) in
        [(Variant::Base, Weights::Base, Rows::Local), (Variant::Corpus, Weights::Tuned, Rows::Mixed)]
    {
        let candidate = Candidate { weights, rows: context, tokens: Tokens::Off };
        let answers = alone(&loaded, candidate, &own)?.predict(&test)?;
        let ones = answers.iter().map(|row| row.get(1).copied().map_or(f64::NAN, f64::from)).collect();
        by_variant.insert(variant, ones);
    }
    by_variant.insert(
        Variant::Served,
        tokio::runtime::Handle::current().block_on(predict::served(address, &schema, &test))?,
    );
    Ok(Predictions { domain: domain.id.to_owned(), train_rows: train.rows(), labels, by_variant })
}

/// One variant of the model alone, with these rows of the domain for its context.
///
/// # Errors
/// The model refuses.
pub fn alone(loaded: &Loaded, candidate: Candidate, rows: &TypedBatch) -> Result<Served> {
    Ok(loaded.serve(Blend::of(Member::Model(candidate)), Calibration::NONE, rows)?)
}

/// The publication as the agent of `domain` received it, loaded for another domain, with the schema `own` and the secret
/// `secret`, none of whose rows are in the release.
///
/// # Errors
/// Nothing was published, or it can't be read.
pub fn loaded(
    layout: &Layout,
    pki: &PkiFolder,
    domain: &str,
    own: &FeatureSchema,
    secret: [u8; 32],
) -> Result<Loaded> {
    let key = std::fs::read(pki.signing_public_key(&Role::Coordinator))?;
    let key: [u8; 32] = key.try_into().ok().context("the coordinator's public key has not 32 bytes")?;
    let data_dir = layout.domain(domain).join("data");
    let artefacts = Artefacts::open(&data_dir, VerifyingKey::from_bytes(key), Trust::InsecureDev)?;
    let (_, manifest) = artefacts.current()?.context("nothing was published")?;
    // Of a domain that took part in nothing, no corpus row is known as its own.
    Ok(Loaded::new(&artefacts, &manifest, ("", own), ContextSection::default(), &secret, None)?)
}
