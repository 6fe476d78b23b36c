//! The student beside the promoted model: distilled on the domain's own rows, served under a name of its own.
//!
//! Its targets are the promoted blend's answers to rows that are not in the context it answers from, so what it
//! learns is how the model generalises and not what it remembers. A student lies in the data folder with a record of
//! what it was distilled from and how well it follows; a running agent takes a new one up by itself. It is an artefact
//! of the domain, as a context is: it has no wire form.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use tabmesh_contract::batch::TypedBatch;
use tabmesh_contract::schema::FeatureSchema;
use tabmesh_federation::id::Digest;
use tabmesh_tfm::metrics::{log_loss, roc_auc};
use tabmesh_tfm::student::{Fitting, Student};
use tabmesh_tfm::table::Preprocessing;

use crate::domain::Domain;
use crate::files;
use crate::gate::Gate;
use crate::promote::encoded;
use crate::publication::Artefacts;
use crate::serve::{InputColumn, PredictError, Predictor, ServedVersion};
use crate::serving::Serving;
use crate::work::WorkError;

/// What a student was distilled from, and how well it follows on the gate rows. Stays in the domain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// SHA-256 of the student's file.
    pub student: Digest,
    /// The publication it stands on.
    pub manifest: Digest,
    /// Coding of its inputs.
    pub preprocessing: Digest,
    /// The columns that coding is for.
    pub schema: FeatureSchema,
    /// The blend that taught it.
    pub teacher: String,
    /// When the publication was made, UTC milliseconds.
    pub published_ms: i64,
    /// When it was distilled, UTC milliseconds.
    pub distilled_ms: i64,
    /// Rows it learnt from, the corpus' among them.
    pub rows: usize,
    /// Corpus rows among them.
    pub corpus_rows: usize,
    /// How it does on rows that neither it nor its teacher has seen.
    pub gate: Agreement,
}

/// Teacher and student on the gate rows; figures that need both classes are missing where there is one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Agreement {
    /// Labelled rows at the gate.
    pub rows: usize,
    /// Share of rows that both put into the same class.
    pub same_class: f64,
    /// Mean distance of the two probabilities.
    pub mean_distance: f64,
    /// ROC-AUC of the teacher.
    pub teacher_auc: Option<f64>,
    /// ROC-AUC of the student.
    pub student_auc: Option<f64>,
    /// Log loss of the teacher.
    pub teacher_log_loss: Option<f64>,
    /// Log loss of the student.
    pub student_log_loss: Option<f64>,
}

/// Distils the promoted blend and writes student and record; `progress` hears of each epoch and its loss.
///
/// # Errors
/// [`WorkError::NotPromoted`] before the first promotion; [`WorkError`] if the table can't be read, too few rows are there,
/// or a file can't be written: an earlier student stays then.
pub fn distil(
    domain: &Domain,
    serving: &Serving,
    fitting: Fitting,
    now_ms: i64,
    progress: &mut dyn FnMut(usize, f64),
) -> Result<Record, WorkError> {
    let promoted = serving.promoted()?.ok_or(WorkError::NotPromoted)?;
    let loaded = &promoted.loaded;
    let all = domain.rows(&domain.schema)?;
    let split = Gate::new(&domain.secret("gate")).split(&all);
    let training = all.take(&split.training);
    let teach = |context: &TypedBatch, rows: &TypedBatch| -> Result<Vec<f64>, WorkError> {
        let served = loaded.serve(promoted.served.clone(), promoted.calibration, context)?;
        Ok(served.predict(rows)?.iter().map(|row| row.get(1).copied().map_or(0.5, f64::from)).collect())
    };
    let (mut rows, mut targets) = (Vec::new(), Vec::new());
    for fold in 0..FOLDS {
        let part = |inside: bool| -> Vec<usize> {
            (0..training.rows()).filter(|row| (row % FOLDS == fold) == inside).collect()
        };
        let held = training.take(&part(true));
        targets.extend(teach(&training.take(&part(false)), &held)?);
        rows.push(loaded.encode(&held)?);
    }
    let corpus = loaded.corpus();
    let corpus = corpus.take(&(0..corpus.rows().min(MOST_CORPUS_ROWS)).collect::<Vec<_>>());
    targets.extend(teach(&training, &loaded.in_own_columns(&corpus))?);
    rows.push(loaded.encode_shared(&corpus)?);
    let mut parts = rows.into_iter();
    let Some(mut learnt) = parts.next() else { return Err(WorkError::NoContext) };
    for part in parts {
        learnt = learnt.followed_by(&part)?;
    }
    let student = Student::fit(&learnt, &targets, fitting, progress)?;

    let gate = all.take(&split.gate);
    let labelled: Vec<usize> = (0..gate.rows()).filter(|&row| gate.labels[row].is_some()).collect();
    let gate = gate.take(&labelled);
    let labels: Vec<u8> = gate.labels.iter().map(|label| u8::from(*label == Some(1))).collect();
    let followed: Vec<f64> = student.logits(&loaded.encode(&gate)?)?.into_iter().map(sigmoid).collect();
    let agreement = agreement(&teach(&training, &gate)?, &followed, &labels);

    let file = student.to_safetensors(&promoted.served.to_string())?;
    let record = Record {
        student: Digest::of(&file),
        manifest: promoted.manifest,
        preprocessing: promoted.preprocessing,
        schema: loaded.schema().clone(),
        teacher: promoted.served.to_string(),
        published_ms: promoted.published_ms,
        distilled_ms: now_ms,
        rows: learnt.rows,
        corpus_rows: corpus.rows(),
        gate: agreement,
    };
    let store = |name: &str, bytes: &[u8]| {
        let path = domain.config.data_dir.join(name);
        files::replace(&path, bytes).map_err(|source| WorkError::File { path, source })
    };
    store(FILE, &file)?;
    store(RECORD, &serde_json::to_vec_pretty(&record).unwrap_or_default())?;
    Ok(record)
}

fn agreement(teacher: &[f64], student: &[f64], labels: &[u8]) -> Agreement {
    let rows = labels.len();
    let share = |sum: f64| if rows == 0 { f64::NAN } else { sum / rows as f64 };
    let pairs = || teacher.iter().zip(student);
    Agreement {
        rows,
        same_class: share(pairs().filter(|(t, s)| (**t >= 0.5) == (**s >= 0.5)).count() as f64),
        mean_distance: share(pairs().map(|(t, s)| (t - s).abs()).sum()),
        teacher_auc: roc_auc(teacher, labels),
        student_auc: roc_auc(student, labels),
        teacher_log_loss: log_loss(teacher, labels),
        student_log_loss: log_loss(student, labels),
    }
}

fn sigmoid(logit: f64) -> f64 {
    1.0 / (1.0 + (-logit).exp())
}

struct InService {
    student: Student,
    preprocessing: Preprocessing,
    shared: FeatureSchema,
    version: ServedVersion,
}

/// Serves the student of the data folder, whenever there is one.
pub struct StudentService {
    artefacts: Arc<Artefacts>,
    serving: Arc<Serving>,
    folder: PathBuf,
    /// What was read last, and when the record was written.
    current: RwLock<(Option<SystemTime>, Option<Arc<InService>>)>,
}

impl StudentService {
    /// Nothing is read before the first request.
    #[must_use]
    pub fn new(folder: PathBuf, artefacts: Arc<Artefacts>, serving: Arc<Serving>) -> Self {
        Self { artefacts, serving, folder, current: RwLock::new((None, None)) }
    }

    /// The student in service, read anew when its record has changed.
    fn service(&self) -> Option<Arc<InService>> {
        let written = std::fs::metadata(self.path(RECORD)).and_then(|facts| facts.modified()).ok();
        {
            let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
            if current.0 == written {
                return current.1.clone();
            }
        }
        let read = written.and_then(|_| match self.read() {
            Ok(student) => Some(Arc::new(student)),
            Err(error) => {
                tracing::error!(%error, "the student can't be loaded; distil it again");
                None
            }
        });
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        *current = (written, read);
        current.1.clone()
    }

    fn read(&self) -> Result<InService, WorkError> {
        let file = |name: &str| {
            let path = self.path(name);
            std::fs::read(&path).map_err(|source| WorkError::File { path, source })
        };
        let broken = |reason: String| WorkError::File {
            path: self.path(RECORD),
            source: std::io::Error::new(std::io::ErrorKind::InvalidData, reason),
        };
        let record: Record =
            serde_json::from_slice(&file(RECORD)?).map_err(|error| broken(error.to_string()))?;
        let bytes = file(FILE)?;
        if Digest::of(&bytes) != record.student {
            return Err(broken(format!("the student's file is not {}", record.student)));
        }
        let (student, _) = Student::from_safetensors(&bytes)?;
        let preprocessing = self.artefacts.preprocessing(&record.preprocessing)?;
        let version = ServedVersion {
            name: format!("student of {}", record.teacher),
            digest: record.student.to_string(),
            base: record.manifest.to_string(),
            adapter: None,
            promoted_at_ms: record.distilled_ms,
            published_at_ms: record.published_ms,
        };
        Ok(InService { student, preprocessing, shared: record.schema, version })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }
}

impl Predictor for StudentService {
    fn schema(&self) -> &FeatureSchema {
        self.serving.schema()
    }

    fn input_columns(&self) -> Vec<InputColumn> {
        self.serving.input_columns()
    }

    fn current(&self) -> Option<ServedVersion> {
        self.service().map(|service| service.version.clone())
    }

    fn predict(&self, batch: &TypedBatch) -> Result<Vec<Vec<f32>>, PredictError> {
        let service = self.service().ok_or(PredictError::NotReady)?;
        let failed = |error: WorkError| PredictError::Failed { reason: error.to_string() };
        let rows = encoded(&service.preprocessing, batch, self.schema(), &service.shared).map_err(failed)?;
        let logits = service.student.logits(&rows).map_err(|error| failed(error.into()))?;
        let answer = |logit: f64| {
            let one = sigmoid(logit) as f32;
            vec![1.0 - one, one]
        };
        Ok(logits.into_iter().map(answer).collect())
    }
}

/// What a student's name has beyond the promoted model's.
pub const STUDENT_SUFFIX: &str = "-student";
/// Parts of the training rows; each is answered from a context of the others.
const FOLDS: usize = 4;
/// Corpus rows a student learns from at most.
const MOST_CORPUS_ROWS: usize = 4_000;
const FILE: &str = "student.safetensors";
const RECORD: &str = "student.json";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agreement_is_counted_by_hand() {
        let labels = [0, 1, 1, 0];
        let found = agreement(&[0.1, 0.9, 0.6, 0.4], &[0.2, 0.8, 0.4, 0.4], &labels);
        assert_eq!((found.rows, found.same_class), (4, 0.75));
        assert!((found.mean_distance - 0.1).abs() < 1e-12);
        assert_eq!((found.teacher_auc, found.student_auc), (Some(1.0), Some(0.875)));
        assert!(agreement(&[], &[], &[]).same_class.is_nan());
    }
}
