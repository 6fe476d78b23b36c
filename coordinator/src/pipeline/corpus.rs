//! The synthetic corpus and the coding of features: post-processing of the release.
//!
//! Rows are drawn with a seed derived from the plan, so a restart draws the same ones. Nothing here costs privacy.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;
use serde::Serialize;
use tabmesh_contract::schema::{Feature, FeatureId, FeatureKind};
use tabmesh_federation::documents::{CorpusColumn, CorpusDocument};
use tabmesh_federation::job::{Job, JobEvent};
use tabmesh_privacy::release::{Attribute, Binning, MarginalTable};
use tabmesh_store::Kind;
use tabmesh_synthesis::fit::fit;
use tabmesh_synthesis::marginal::{best_marginal, probabilities, reconcile};
use tabmesh_synthesis::quality::{Quality, measure};
use tabmesh_synthesis::sample::{FineHistograms, SynthColumn, decode, draw};
use tabmesh_tfm::table::{Coding, EncodedTable, Preprocessing, Statistics};

use super::domains::{DomainCard, Domains};
use super::release::Released;
use crate::error::CoordinatorError;
use crate::mesh::{Mesh, named, stored};
use crate::plans::Submitted;

/// What is said about a corpus beside its rows.
#[derive(Serialize)]
struct CorpusCard {
    plan: String,
    rows: usize,
    /// Features that each feature depends on, its own parent in the tree first.
    parents: Vec<Vec<String>>,
    quality: Quality,
    #[serde(skip_serializing_if = "Option::is_none")]
    domains: Option<DomainCard>,
}

/// Fits the tree model, draws the corpus, derives the coding, stores and shares both.
pub(super) async fn build(
    mesh: &Arc<Mesh>,
    submitted: &Arc<Submitted>,
    job: &Job,
) -> Result<JobEvent, CoordinatorError> {
    let released = Released::load(mesh, submitted, job)?;
    let work = {
        let (mesh, submitted, job) = (Arc::clone(mesh), Arc::clone(submitted), job.clone());
        move || draw_corpus(&mesh, &submitted, &job, &released)
    };
    let joined = tokio::task::spawn_blocking(work).await;
    let (corpus, preprocessing) =
        joined.map_err(|error| CoordinatorError::Step(format!("synthesis ended early: {error}")))??;
    Ok(JobEvent::CorpusReady { corpus, preprocessing })
}

fn draw_corpus(
    mesh: &Mesh,
    submitted: &Submitted,
    job: &Job,
    released: &Released,
) -> Result<(tabmesh_federation::id::Digest, tabmesh_federation::id::Digest), CoordinatorError> {
    let features = released.schema.features();
    let mut tree = released.tree(submitted)?;
    let attributes = released.stage(4)?.query.attributes.clone();
    let fine = released.stage(1)?.tables()?;
    let mut tables = released.stage(2)?.tables()?;
    tables.extend(released.stage(4)?.tables()?);
    let domains = Domains::of(mesh, job, released, (submitted.plan.release.domain_column, &tree))?;
    if let Some(domains) = &domains {
        (tree, tables) = (domains.tree.clone(), domains.tables.clone());
    }
    let model = fit(&tree, &tables)?;

    let mut rng = ChaCha20Rng::from_seed(*submitted.digest.0.as_bytes());
    let rows = draw(&model, submitted.plan.corpus.rows as usize, &mut rng)?;
    let quality = measure(&rows, &tree, &tables)?;
    let asked = &released.stage(1)?.query.attributes;
    let histograms = FineHistograms { attributes: asked, tables: &fine };
    let (rows, of_domains) = match &domains {
        Some(domains) => {
            let (rows, cells) = rows.split_last();
            (rows, Some(domains.column(&cells)))
        }
        None => (rows, None),
    };
    let drawn = decode(&rows, &attributes, histograms, &mut rng)?;
    let document = CorpusDocument {
        plan: submitted.digest,
        columns: drawn.columns.into_iter().map(column).collect(),
        labels: drawn.labels,
        domains: of_domains,
    };
    document.batch(&released.schema).map_err(|error| CoordinatorError::Step(error.to_string()))?;
    let corpus = mesh.put_json(&document)?;

    reconcile(&mut tables)?;
    let preprocessing = preprocessing(released, &attributes, &fine, &tables)?;
    let coding = mesh.put_json(&preprocessing)?;
    let names: Vec<String> = features.iter().map(|feature| feature.id.to_string()).collect();
    let name = |at: usize| names.get(at).cloned();
    let card = CorpusCard {
        plan: submitted.digest.to_string(),
        rows: document.labels.len(),
        parents: (0..features.len()).map(|f| tree.above(f).into_iter().filter_map(name).collect()).collect(),
        quality,
        domains: domains.map(|domains| domains.card(&names)),
    };
    let card = mesh.put_json(&card)?;
    for digest in [&corpus, &coding, &card] {
        mesh.share(digest)?;
    }
    mesh.register(Kind::Corpus, corpus, Vec::new())?;
    let line = format!(
        "{} synthetic rows; total variation of 1-way marginals {:.3} (noise floor {:.3}), of 2-way {:.3} ({:.3})",
        document.labels.len(),
        quality.one_way_mean,
        quality.one_way_noise_floor,
        quality.two_way_mean,
        quality.noise_floor
    );
    mesh.plans.tell(submitted.digest, mesh.now_ms(), line);
    Ok((named(corpus), named(coding)))
}

fn column(column: SynthColumn) -> CorpusColumn {
    match column {
        SynthColumn::Numeric(values) => {
            CorpusColumn::Numeric(values.into_iter().map(|v| (!v.is_nan()).then_some(v as f32)).collect())
        }
        SynthColumn::Codes(codes) => CorpusColumn::Codes(codes),
    }
}

/// The published coding: standardisation from the fine histograms, label counts of levels from all tables together.
fn preprocessing(
    released: &Released,
    attributes: &[Attribute],
    fine: &[MarginalTable],
    tables: &[MarginalTable],
) -> Result<Preprocessing, CoordinatorError> {
    let features = released.schema.features();
    let label = features.len();
    let mut statistics: BTreeMap<FeatureId, Statistics> = BTreeMap::new();
    for (at, feature) in features.iter().enumerate() {
        let missing =
            || CoordinatorError::NotFound { what: "released counts of", id: feature.id.to_string() };
        let histogram = fine.iter().find(|t| t.attributes == [at]).ok_or_else(missing)?;
        let attribute = attributes.get(at).ok_or_else(missing)?;
        let found = match &feature.kind {
            FeatureKind::Numeric(_) => {
                let asked = released.stage(1)?.query.attributes.get(at).ok_or_else(missing)?;
                numeric(feature, asked, histogram)?
            }
            FeatureKind::Categorical { .. } => {
                levels(attribute, histogram, &best_marginal(tables, &[at, label])?)
            }
        };
        statistics.insert(feature.id.clone(), found);
    }
    let counts = best_marginal(tables, &[label])?;
    let class = |at: usize| counts.values.get(at).copied().unwrap_or(0.0).max(0.0);
    Ok(Preprocessing::new(&released.schema, [class(0), class(1)], &statistics)?)
}

fn numeric(
    feature: &Feature,
    attribute: &Attribute,
    histogram: &MarginalTable,
) -> Result<Statistics, CoordinatorError> {
    let (FeatureKind::Numeric(domain), Binning::Edges { lower, upper, edges, .. }) =
        (&feature.kind, &attribute.binning)
    else {
        return Err(CoordinatorError::Step(format!("{} was not counted as a number", feature.id)));
    };
    let mut bounds = Vec::with_capacity(edges.len() + 2);
    bounds.push(*lower);
    bounds.extend_from_slice(edges);
    bounds.push(*upper);
    // The last cell is that of missing values. Cells that noise alone could have made are read as empty, or the tails
    // of a heavy-tailed feature would be all noise.
    let floor = NOISE_SDS * histogram.noise_sd();
    let bins: Vec<f64> =
        histogram.values.iter().take(edges.len() + 1).map(|v| if *v < floor { 0.0 } else { *v }).collect();
    Ok(Statistics::from_histogram(&bounds, &bins, domain.scale)?)
}

/// Counts `[class 0, class 1]` of every declared level, "other" and missing; a merged cell is shared out among its
/// members by the 1-way histogram.
fn levels(attribute: &Attribute, histogram: &MarginalTable, by_label: &MarginalTable) -> Statistics {
    let classes = by_label.dims.last().copied().unwrap_or(2).max(1);
    // `best_marginal` keeps the axes in the order asked for: level, then class.
    let count = |cell: usize, class: usize| {
        by_label.values.get(cell * classes + class).copied().unwrap_or(0.0).max(0.0)
    };
    let mut counts = vec![[0.0; 2]; attribute.fine_cells()];
    for cell in 0..attribute.cells() {
        let members = attribute.members(cell);
        let weights: Vec<f64> =
            members.iter().map(|&m| histogram.values.get(m).copied().unwrap_or(0.0)).collect();
        for (&member, share) in members.iter().zip(probabilities(&weights, &[], 0.0)) {
            if let Some(slot) = counts.get_mut(member) {
                *slot = [share * count(cell, 0), share * count(cell, 1)];
            }
        }
    }
    Statistics::Levels(counts)
}

/// The corpus as the model reads it.
pub(super) fn encoded(
    mesh: &Mesh,
    submitted: &Submitted,
    job: &Job,
) -> Result<EncodedTable, CoordinatorError> {
    let missing = |what: &'static str| CoordinatorError::NotFound { what, id: submitted.digest.to_string() };
    let products = job.products();
    let corpus = products.corpus.ok_or_else(|| missing("corpus of plan"))?;
    let coding = products.preprocessing.ok_or_else(|| missing("preprocessing of plan"))?;
    let document: CorpusDocument = mesh.get_json(stored(corpus), "corpus")?;
    let preprocessing: Preprocessing = mesh.get_json(stored(coding), "preprocessing")?;
    let schema = super::schema_of(mesh, &submitted.plan, job.roster())?;
    let batch = document.batch(&schema).map_err(|error| CoordinatorError::Step(error.to_string()))?;
    Ok(preprocessing.encode(&batch, Coding::Foreign)?)
}

/// Fine cells below so many standard deviations of noise count as empty in means and deviations.
const NOISE_SDS: f64 = 2.0;
