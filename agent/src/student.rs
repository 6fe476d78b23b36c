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
            forest: None,
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
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::path::Path;
    use std::time::Duration;

    use ring::rand::SystemRandom;
    use ring::signature::Ed25519KeyPair;
    use tabmesh_contract::batch::TypedColumn;
    use tabmesh_federation::manifest::Trust;
    use tabmesh_privacy::signature::VerifyingKey;
    use tabmesh_proto::identity::SpiffeId;
    use tabmesh_store::BlobStore;
    use tempfile::TempDir;

    use super::*;
    use crate::config::Config;

    const CONTRACT: &str = "name: shop.sales
version: '1.0.0'
owner: shop@example.com
schema:
  - {name: label, type: integer, role: target, feature: sale.fraud, categories: ['0', '1']}
  - {name: tid, type: string, role: id, unique: true}
  - {name: amount, type: decimal, range: [0, 100], feature: sale.amount}
  - {name: category, type: categorical, categories: [grocery, travel], feature: sale.category}
privacy: {sensitivity: low, allow_training: true, unit: row, max_units: 100}
source: {type: csv, path: sales.csv}
";

    /// A domain in a folder of its own, its student's service, and rows that a student can learn from.
    struct Fixture {
        folder: TempDir,
        service: StudentService,
        rows: TypedBatch,
        preprocessing: Preprocessing,
    }

    impl Fixture {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let write = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
            std::fs::create_dir_all(folder.path().join("keys")).unwrap();
            write("contract.yaml", CONTRACT.as_bytes());
            write(
                "policy.yaml",
                b"grant: {product: shop.sales, epsilon: '3', delta: '0.00001', signer: owner@example.com}",
            );
            write("keys/agent.pk8", Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap().as_ref());
            write("keys/coordinator.pub", &[7; 32]);
            write("agent.yaml", Config::example().as_bytes());
            let config = Config::load(&folder.path().join("agent.yaml")).unwrap();
            let id = SpiffeId::agent("acme.example", &config.domain, &config.name).unwrap();
            let data = config.data_dir.clone();
            std::fs::create_dir_all(&data).unwrap();
            let domain = Arc::new(Domain::load(config, id, Some(1)).unwrap());
            let rows = TypedBatch {
                columns: vec![
                    TypedColumn::Numeric((0..60).map(f64::from).collect()),
                    TypedColumn::Categorical((0..60).map(|row| row % 2).collect()),
                ],
                labels: (0..60).map(|row| Some(u16::from(row > 25))).collect(),
                units: vec![[0; 16]; 60],
            };
            let preprocessing = Preprocessing::fit(&domain.schema, &rows).unwrap();
            let blobs = BlobStore::open(&data.join("artefacts")).unwrap();
            blobs.put(&serde_json::to_vec(&preprocessing).unwrap()).unwrap();
            let pinned = VerifyingKey::from_bytes([7; 32]);
            let artefacts = Arc::new(Artefacts::open(&data, pinned, Trust::Production).unwrap());
            let serving = Arc::new(Serving::new(domain, Arc::clone(&artefacts), Arc::new(|| 0)));
            Self { folder, service: StudentService::new(data, artefacts, serving), rows, preprocessing }
        }

        fn data(&self) -> &Path {
            &self.service.folder
        }

        /// A student as `distil` leaves one in the data folder.
        fn put_student(&self, seed: u64) -> Student {
            let schema = self.service.schema().clone();
            let encoded = encoded(&self.preprocessing, &self.rows, &schema, &schema).unwrap();
            let teacher: Vec<f64> = (0..60).map(|row| if row > 25 { 0.9 } else { 0.2 }).collect();
            let fitting = Fitting { seed, hidden: 4, epochs: 200 };
            let student = Student::fit(&encoded, &teacher, fitting, &mut |_, _| ()).unwrap();
            let file = student.to_safetensors("a blend").unwrap();
            let agreement = agreement(&[], &[], &[]);
            let record = Record {
                student: Digest::of(&file),
                manifest: Digest::of(b"manifest"),
                preprocessing: Digest::of(&serde_json::to_vec(&self.preprocessing).unwrap()),
                schema,
                teacher: "a blend".to_owned(),
                published_ms: 5,
                distilled_ms: 7,
                rows: 60,
                corpus_rows: 0,
                gate: Agreement { same_class: 1.0, mean_distance: 0.0, ..agreement },
            };
            std::fs::write(self.data().join(FILE), &file).unwrap();
            std::fs::write(self.data().join(RECORD), serde_json::to_vec(&record).unwrap()).unwrap();
            student
        }

        /// Makes the record look as if it had been written so many seconds after the epoch.
        fn written_at(&self, seconds: u64) {
            let record = std::fs::File::options().write(true).open(self.data().join(RECORD)).unwrap();
            record.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).unwrap();
        }

        /// What a student answers to all rows, without the service.
        fn answers_of(&self, student: &Student) -> Vec<f32> {
            let schema = self.service.schema();
            let rows = encoded(&self.preprocessing, &self.rows, schema, schema).unwrap();
            student.logits(&rows).unwrap().into_iter().map(|logit| sigmoid(logit) as f32).collect()
        }

        fn served(&self) -> Vec<f32> {
            let answers = self.service.predict(&self.rows).unwrap();
            assert!(answers.iter().all(|row| row.len() == 2 && (row[0] + row[1] - 1.0).abs() < 1e-6));
            answers.iter().map(|row| row[1]).collect()
        }
    }

    #[test]
    fn nothing_is_served_before_a_student_is_distilled_and_then_it_is() {
        let fixture = Fixture::new();
        assert_eq!(fixture.service.current(), None);
        assert_eq!(fixture.service.predict(&fixture.rows), Err(PredictError::NotReady));
        let student = fixture.put_student(1);
        let version = fixture.service.current().unwrap();
        assert_eq!(version.digest, Digest::of(&student.to_safetensors("a blend").unwrap()).to_string());
        assert_eq!((version.name.as_str(), version.published_at_ms), ("student of a blend", 5));
        assert_eq!((version.base, version.promoted_at_ms), (Digest::of(b"manifest").to_string(), 7));
        let served = fixture.served();
        assert_eq!(served, fixture.answers_of(&student));
        assert!(served[59] > served[0] + 0.2, "it follows its teacher: {} {}", served[0], served[59]);
        let names: Vec<String> =
            fixture.service.input_columns().into_iter().map(|column| column.name).collect();
        assert_eq!(names, ["amount", "category"]);
    }

    /// Distilled again while the agent runs: the next request is the new one's. Taken away: nobody answers.
    #[test]
    fn a_new_student_is_taken_up_and_a_removed_one_is_gone() {
        let fixture = Fixture::new();
        let first = fixture.put_student(1);
        fixture.written_at(1000);
        assert_eq!(fixture.served(), fixture.answers_of(&first));
        let second = fixture.put_student(2);
        fixture.written_at(2000);
        let (old, new) = (fixture.answers_of(&first), fixture.answers_of(&second));
        assert_ne!(old, new);
        assert_eq!(fixture.served(), new);
        std::fs::remove_file(fixture.data().join(RECORD)).unwrap();
        assert_eq!(fixture.service.predict(&fixture.rows), Err(PredictError::NotReady));
        assert!(fixture.folder.path().exists());
    }

    /// Attack: weights swapped under a record that names others.
    #[test]
    fn weights_that_the_record_does_not_name_are_not_served() {
        let fixture = Fixture::new();
        fixture.put_student(1);
        fixture.written_at(1000);
        let other = fixture.put_student(2).to_safetensors("a blend").unwrap();
        fixture.put_student(1);
        std::fs::write(fixture.data().join(FILE), &other).unwrap();
        fixture.written_at(2000);
        assert_eq!(fixture.service.current(), None);
        assert_eq!(fixture.service.predict(&fixture.rows), Err(PredictError::NotReady));
    }

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
