//! The endpoint driven over real sockets: a client, a small contract, and a linear function in the model's place.
//!
//! The linear predictor stands for the [`Predictor`] trait only; routes, parsing, TLS, log and shutdown are the ones
//! that run in production.

#![allow(clippy::unwrap_used, reason = "tests")]

mod access;
mod answers;
mod batching;
mod certs;
mod refusals;

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
        mpsc,
    },
};

use axum::{
    body::{Body, Bytes, to_bytes},
    http::{HeaderMap, Request, StatusCode},
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tabmesh_contract::{
    batch::{TypedBatch, TypedColumn},
    schema::{Feature, FeatureId, FeatureKind, FeatureSchema, NumericDomain, Scale, Target},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinHandle,
};

use super::{
    CoordinatorContact, Datatype, InputColumn, PredictError, Predictor, ServeConfig, ServeError,
    ServedVersion, log::JsonlLog, serve,
};

/// The test's present, ms since the Unix epoch (June 2025).
const NOW_MS: i64 = 1_750_000_000_000;
/// Key of the prediction log.
const LOG_KEY: [u8; 32] = [9; 32];
/// Digest of the first version in service.
const DIGEST: &str = "0a1b2c3d";
/// Classes of the target.
const CLASSES: [&str; 3] = ["no", "yes", "maybe"];

/// Six features in canonical order; `person.extra` has no column in this domain.
fn schema() -> FeatureSchema {
    let number = |lower, upper| {
        FeatureKind::Numeric(NumericDomain { lower, upper, scale: Scale::Linear, cut_points: None })
    };
    let levels =
        |levels: &[&str]| FeatureKind::Categorical { levels: levels.iter().map(|l| (*l).into()).collect() };
    let feature =
        |id: &str, kind| Feature { id: FeatureId::new(id).unwrap(), kind, unit: None, description: None };
    let features = vec![
        feature("card.amount", number(0.0, 1e6)),
        feature("card.channel", levels(&["web", "app", "branch"])),
        feature("card.flag", levels(&["false", "true"])),
        feature("card.tier", levels(&["1", "2", "3"])),
        feature("person.age", number(0.0, 120.0)),
        feature("person.extra", number(0.0, 1.0)),
    ];
    let classes = CLASSES.iter().map(|c| (*c).into()).collect();
    FeatureSchema::new(features, Target { id: FeatureId::new("card.fraud").unwrap(), classes }).unwrap()
}

/// A deterministic linear function of a row, softmaxed over the classes.
struct Linear {
    schema: FeatureSchema,
    state: Mutex<State>,
    /// What `predict` waits for before it answers, when set.
    gate: Mutex<Option<mpsc::Receiver<()>>>,
    calls: Mutex<Vec<TypedBatch>>,
}

#[derive(Default)]
struct State {
    version: Option<ServedVersion>,
    contact: Option<CoordinatorContact>,
    /// Versions that replace the current one, one a call, while a prediction runs.
    swaps: Vec<ServedVersion>,
    answer: Answering,
}

#[derive(Default, Clone, Copy, PartialEq)]
enum Answering {
    #[default]
    Well,
    Failing,
    Panicking,
    OneRowShort,
    NotFinite,
    /// Fails for more rows than this.
    FailingBeyond(usize),
}

impl Linear {
    fn set(&self, edit: impl FnOnce(&mut State)) {
        edit(&mut self.state.lock().unwrap());
    }

    fn last_batch(&self) -> TypedBatch {
        self.calls.lock().unwrap().last().unwrap().clone()
    }
}

impl Predictor for Linear {
    fn schema(&self) -> &FeatureSchema {
        &self.schema
    }

    fn input_columns(&self) -> Vec<InputColumn> {
        let column = |name: &str, feature: usize, datatype| InputColumn {
            name: name.into(),
            feature,
            datatype,
            kind: self.schema.features()[feature].kind.clone(),
        };
        vec![
            column("age_years", 4, Datatype::Fp64),
            column("amount_eur", 0, Datatype::Fp32),
            column("channel", 1, Datatype::Bytes),
            column("is_flagged", 2, Datatype::Bool),
            column("tier", 3, Datatype::Int64),
        ]
    }

    fn current(&self) -> Option<ServedVersion> {
        self.state.lock().unwrap().version.clone()
    }

    fn predict(&self, batch: &TypedBatch) -> Result<Vec<Vec<f32>>, PredictError> {
        self.calls.lock().unwrap().push(batch.clone());
        if let Some(gate) = &*self.gate.lock().unwrap() {
            gate.recv().unwrap();
        }
        let mut state = self.state.lock().unwrap();
        if let Some(next) = state.swaps.pop() {
            state.version = Some(next);
        }
        let mut rows = linear(batch);
        match state.answer {
            Answering::Well => {}
            Answering::Failing => return Err(PredictError::Failed { reason: "out of memory".into() }),
            Answering::Panicking => {
                drop(state);
                panic!("planned");
            }
            Answering::OneRowShort => drop(rows.pop()),
            Answering::NotFinite => rows[0][1] = f32::NAN,
            Answering::FailingBeyond(most) if rows.len() > most => {
                return Err(PredictError::Failed { reason: "too many".into() });
            }
            Answering::FailingBeyond(_) => {}
        }
        Ok(rows)
    }

    fn coordinator_contact(&self) -> Option<CoordinatorContact> {
        self.state.lock().unwrap().contact
    }
}

/// The linear function itself: a missing number counts as -3, one above 500 as 500, a code as itself.
fn linear(batch: &TypedBatch) -> Vec<Vec<f32>> {
    let cell = |column: &TypedColumn, row: usize| match column {
        TypedColumn::Numeric(values) if values[row].is_nan() => -3.0,
        TypedColumn::Numeric(values) => (values[row] / 100.0).min(5.0),
        TypedColumn::Categorical(codes) => f64::from(codes[row]),
    };
    let score = |row: usize, class: usize| -> f64 {
        let weight = |feature: usize| ((feature * 7 + class * 3) % 5) as f64 / 4.0 - 0.5;
        batch.columns.iter().enumerate().map(|(feature, column)| weight(feature) * cell(column, row)).sum()
    };
    (0..batch.rows())
        .map(|row| {
            let scores: Vec<f64> = (0..CLASSES.len()).map(|class| score(row, class).exp()).collect();
            let total: f64 = scores.iter().sum();
            scores.iter().map(|s| (s / total) as f32).collect()
        })
        .collect()
}

fn version(digest: &str) -> ServedVersion {
    ServedVersion {
        name: "fraud-v1 round 7".into(),
        digest: digest.into(),
        base: "nano 3f".into(),
        adapter: Some("tokens 7".into()),
        forest: Some("trees 7".into()),
        promoted_at_ms: NOW_MS - 5_000,
        published_at_ms: NOW_MS - 90_500,
    }
}

/// A served endpoint; dropping it ends it.
struct Running {
    address: SocketAddr,
    predictor: Arc<Linear>,
    clock_ms: Arc<AtomicI64>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), ServeError>>,
    dir: tempfile::TempDir,
}

impl Running {
    fn log_path(&self) -> PathBuf {
        self.dir.path().join("predictions.jsonl")
    }

    fn log_text(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap()
    }

    async fn get(&self, path: &str) -> Answer {
        let request = Request::get(path).body(Body::empty()).unwrap();
        exchange(TcpStream::connect(self.address).await.unwrap(), request).await.unwrap()
    }

    async fn post(&self, path: &str, body: impl Into<Body>) -> Answer {
        let request = Request::post(path).body(body.into()).unwrap();
        exchange(TcpStream::connect(self.address).await.unwrap(), request).await.unwrap()
    }

    async fn infer(&self, body: &Value) -> Answer {
        self.post("/v2/models/fraud/infer", body.to_string()).await
    }

    /// Sends JSON with binary tensors behind it.
    async fn infer_binary(&self, json: &Value, tail: &[u8]) -> Answer {
        let mut body = json.to_string().into_bytes();
        let request =
            Request::post("/v2/models/fraud/infer").header("Inference-Header-Content-Length", body.len());
        body.extend_from_slice(tail);
        let request = request.body(Body::from(body)).unwrap();
        exchange(TcpStream::connect(self.address).await.unwrap(), request).await.unwrap()
    }
}

/// Starts the endpoint on a free loopback port with a version in service.
async fn start(edit: impl FnOnce(&mut ServeConfig)) -> Running {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let clock_ms = Arc::new(AtomicI64::new(NOW_MS));
    let clock = Arc::clone(&clock_ms);
    let mut config =
        ServeConfig::new(address, "payments", "fraud", Arc::new(move || clock.load(Ordering::Relaxed)));
    edit(&mut config);
    let predictor = Arc::new(Linear {
        schema: schema(),
        state: Mutex::new(State { version: Some(version(DIGEST)), ..State::default() }),
        gate: Mutex::new(None),
        calls: Mutex::new(Vec::new()),
    });
    let dir = tempfile::tempdir().unwrap();
    let log = Arc::new(JsonlLog::open(&dir.path().join("predictions.jsonl"), &LOG_KEY).unwrap());
    let (stop, stopped) = oneshot::channel();
    let shutdown = async move { drop(stopped.await) };
    let served: Arc<dyn Predictor> = Arc::clone(&predictor) as _;
    let task = tokio::spawn(serve(config, listener, served, Vec::new(), log, shutdown));
    Running { address, predictor, clock_ms, stop: Some(stop), task, dir }
}

/// A status, headers and body.
#[derive(Debug)]
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    #[track_caller]
    fn ok(self) -> Value {
        assert_eq!(self.status, StatusCode::OK, "{:?}", self.body);
        self.json()
    }

    #[track_caller]
    fn refused(&self, status: u16, text: &str) {
        assert_eq!((self.status.as_u16(), self.json()), (status, json!({ "error": text })));
    }
}

/// One request over a fresh connection.
async fn exchange<S>(stream: S, request: Request<Body>) -> Result<Answer, String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let words = |e: hyper::Error| format!("{e:?}");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(words)?;
    let connection = tokio::spawn(connection);
    let (head, body) = sender.send_request(request).await.map_err(words)?.into_parts();
    let body = to_bytes(Body::new(body), usize::MAX).await.map_err(|e| e.to_string())?;
    drop(sender);
    drop(connection.await);
    Ok(Answer { status: head.status, headers: head.headers, body })
}

/// Three rows in every column, with missing, other and declared values.
fn three_rows() -> Value {
    json!({
        "id": "req-1",
        "inputs": [
            {"name": "age_years", "shape": [3], "datatype": "FP64", "data": [41.5, null, 130]},
            {"name": "amount_eur", "shape": [3], "datatype": "FP32", "data": [12.25, 0.1, null]},
            {"name": "channel", "shape": [3], "datatype": "BYTES", "parameters": {"null_value": "NA"},
             "data": ["app", "NA", "fax"]},
            {"name": "is_flagged", "shape": [3], "datatype": "BOOL", "data": [true, false, null]},
            {"name": "tier", "shape": [3], "datatype": "INT64", "data": [2, 9, null]},
        ]
    })
}

/// What [`three_rows`] means in the contract's terms, written by hand.
fn three_rows_typed() -> TypedBatch {
    let nan = f64::NAN;
    TypedBatch {
        columns: vec![
            TypedColumn::Numeric(vec![12.25, f64::from(0.1_f32), nan]),
            TypedColumn::Categorical(vec![1, 4, 3]),
            TypedColumn::Categorical(vec![1, 0, 3]),
            TypedColumn::Categorical(vec![1, 3, 4]),
            TypedColumn::Numeric(vec![41.5, nan, 130.0]),
            TypedColumn::Numeric(vec![nan, nan, nan]),
        ],
        labels: vec![None; 3],
        units: vec![[0; 16]; 3],
    }
}

/// Equality of batches in which missing numbers are equal.
#[track_caller]
fn assert_same(got: &TypedBatch, expected: &TypedBatch) {
    assert_eq!(format!("{got:?}"), format!("{expected:?}"));
}

/// Changes one input tensor of a request.
fn with_input(mut request: Value, column: &str, edit: impl FnOnce(&mut Value)) -> Value {
    let inputs = request["inputs"].as_array_mut().unwrap();
    edit(inputs.iter_mut().find(|input| input["name"] == column).unwrap());
    request
}

/// The row-major probabilities of an answer.
fn probabilities(answer: &Value) -> Vec<f32> {
    let data = answer["outputs"][0]["data"].as_array().unwrap();
    data.iter().map(|p| p.as_f64().unwrap() as f32).collect()
}
