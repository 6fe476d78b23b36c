//! Tuning the base on the corpus: continued pre-training with replay of the synthetic prior.
//!
//! Post-processing of the release, so it costs no privacy. Resumes from its checkpoint after a crash with the same
//! weights; a plan with zero steps keeps the base as it is.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tabmesh_federation::job::{Job, JobEvent};
use tabmesh_federation::plan::Plan;
use tabmesh_store::{Digest, Kind};
use tabmesh_tfm::checkpoint::BaseInfo;
use tabmesh_tfm::features::text_vectors;
use tabmesh_tfm::model::Model;
use tabmesh_tfm::pretrain::{Corpus, PretrainConfig, Start};
use tabmesh_tfm::table::EncodedTable;

use super::corpus;
use crate::error::CoordinatorError;
use crate::mesh::{Mesh, named, stored};
use crate::plans::Submitted;

/// Tunes the base, stores and registers the result.
pub(super) async fn run(
    mesh: &Arc<Mesh>,
    submitted: &Arc<Submitted>,
    job: &Job,
) -> Result<JobEvent, CoordinatorError> {
    let base = mesh.base_model()?;
    let encoded = corpus::encoded(mesh, submitted, job)?;
    let digest = submitted.digest;
    let folder = mesh.config.data_dir.join("pretrain");
    std::fs::create_dir_all(&folder)
        .map_err(|e| CoordinatorError::Step(format!("{} can't be made: {e}", folder.display())))?;
    let checkpoint = folder.join(format!("{digest}.ckpt"));
    let work = {
        let mesh = Arc::clone(mesh);
        let plan = submitted.plan.clone();
        move || {
            let (model, info) = Model::from_safetensors(&mesh.blobs.get(&base)?)?;
            if plan.pretrain.steps == 0 {
                return Ok::<Digest, CoordinatorError>(base);
            }
            let config = config(&plan, &model, mesh.config.threads, seed_of(&digest));
            let start =
                Start::Continue { corpus: training_rows(&model, encoded)?, base: Box::new(model.clone()) };
            // Progress needs durations only; the wall clock stays behind its seam.
            #[allow(
                clippy::disallowed_methods,
                reason = "a stopwatch for progress lines; no output depends on it"
            )]
            let began = Instant::now();
            let mut told = Duration::ZERO;
            let mut progress = |p: &tabmesh_tfm::pretrain::Progress<'_>| {
                if began.elapsed() - told >= TELL_EVERY || p.step == p.total {
                    told = began.elapsed();
                    let line = format!(
                        "tuning step {} of {}, loss {:.4}, {:.0} s left",
                        p.step, p.total, p.loss_ema, p.eta_s
                    );
                    mesh.plans.tell(digest, mesh.now_ms(), line);
                }
                Ok(())
            };
            let now = || began.elapsed();
            mesh.tuning_stop.store(false, Ordering::Relaxed);
            let tuned = tabmesh_tfm::pretrain::run(
                &config,
                &start,
                Some(&checkpoint),
                &now,
                &mut progress,
                &mesh.tuning_stop,
            )?;
            let info = BaseInfo {
                name: format!("{}-tuned", info.name),
                parent: Some(base.to_string()),
                steps: config.steps,
                seed: config.seed,
                ..info
            };
            Ok(mesh.blobs.put(&tuned.to_safetensors(&info)?)?)
        }
    };
    let joined = tokio::task::spawn_blocking(work).await;
    let tuned = joined.map_err(|error| CoordinatorError::Step(format!("tuning ended early: {error}")))??;
    mesh.share(&tuned)?;
    if tuned != base {
        let parents = [Some(base), job.products().corpus.map(stored)].into_iter().flatten().collect();
        mesh.register(Kind::Base, tuned, parents)?;
    }
    Ok(JobEvent::Pretrained { tuned: named(tuned) })
}

fn config(plan: &Plan, model: &Model, threads: usize, seed: u64) -> PretrainConfig {
    let mut config = PretrainConfig::continued(model.config().clone(), u64::from(plan.pretrain.steps), seed);
    config.threads = threads;
    config.learning_rate = plan.pretrain.learning_rate;
    config.replay_share = plan.pretrain.prior_replay;
    config.tables_per_slice = 1;
    config.slices_per_step = plan.pretrain.tables_per_step as usize;
    // Validation tables are synthetic and tell nothing about a corpus; one look at the end is enough.
    config.validate_every = config.steps;
    config
}

fn training_rows(model: &Model, encoded: EncodedTable) -> Result<Corpus, CoordinatorError> {
    let texts = match model.config().feature_text_dim {
        0 => None,
        dim => Some(text_vectors(&encoded.column_texts, dim)),
    };
    let labels = encoded.known_labels()?;
    Ok(Corpus { columns: encoded.columns, values: encoded.values, labels, texts })
}

/// A seed that every replica and every restart derives alike.
pub(super) fn seed_of(plan: &tabmesh_federation::id::PlanDigest) -> u64 {
    let bytes = plan.0.as_bytes();
    u64::from_be_bytes(std::array::from_fn(|i| bytes[i]))
}

/// Least time between two progress lines.
const TELL_EVERY: Duration = Duration::from_secs(2);
