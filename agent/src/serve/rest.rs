//! Routes, admission and answers.
//!
//! A request is admitted before its body is read, so at most `max_concurrency + max_queue` bodies are in memory; the
//! next is answered 503 with `Retry-After`. Parsing, encoding and logging run on the blocking pool,
//! `max_concurrency` at once; in between the request waits in the queue of `batch`, which names the version that
//! computed its answer. A caller that goes away takes its request out of the queue.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Path, Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header, request::Parts},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::Serialize;
use tabmesh_contract::batch::TypedBatch;
use tokio::{sync::Semaphore, time::Instant};

use super::{
    BudgetView, Clock, Predictor, ServeConfig, ServeError, ServedVersion,
    batch::{BatchError, Batcher, Served},
    binary,
    error::{RequestError, shorten},
    log::{Caller, PredictionEntry, PredictionLog},
    metrics::{self, Metrics, ModelFacts},
    oip::{
        Datatype, Health, InferRequest, InferResponse, ModelList, ModelMetadata, ModelReady, OutputData,
        OutputTensor, Parameters, Scalar, ServerMetadata, TensorMetadata,
    },
    tensor::{BINARY_SIZE, InputLayout},
};

/// What all requests share.
pub(super) struct Endpoint {
    /// The promoted model first; never empty.
    models: Vec<Model>,
    max_rows: usize,
    max_body_bytes: usize,
    clock: Clock,
    metrics: Metrics,
    budget: Option<BudgetView>,
    log: Arc<dyn PredictionLog>,
    batcher: Batcher,
    /// Requests that run or wait.
    admission: Arc<Semaphore>,
    /// Requests that are parsed or answered at once.
    slots: Arc<Semaphore>,
}

/// One model under its name.
pub(super) struct Model {
    name: String,
    layout: InputLayout,
    classes: Vec<String>,
    predictor: Arc<dyn Predictor>,
}

impl Model {
    pub(super) fn new(name: String, predictor: Arc<dyn Predictor>) -> Result<Self, ServeError> {
        let layout = InputLayout::new(predictor.schema(), predictor.input_columns())?;
        let classes = predictor.schema().target().classes.clone();
        Ok(Self { name, layout, classes, predictor })
    }
}

impl Endpoint {
    /// # Errors
    /// [`ServeError::Listener`] if the system has no thread left.
    pub(super) fn new(
        config: &ServeConfig,
        models: Vec<Model>,
        log: Arc<dyn PredictionLog>,
    ) -> Result<Arc<Self>, ServeError> {
        let served = models
            .iter()
            .map(|model| Served { predictor: Arc::clone(&model.predictor), classes: model.classes.len() });
        Ok(Arc::new(Self {
            batcher: Batcher::start(served.collect(), config.max_concurrency, config.batching)?,
            models,
            max_rows: config.max_batch_rows,
            max_body_bytes: config.max_body_bytes,
            clock: Arc::clone(&config.clock),
            metrics: Metrics::new(),
            budget: config.budget.clone(),
            log,
            admission: Arc::new(Semaphore::new(config.max_concurrency + config.max_queue)),
            slots: Arc::new(Semaphore::new(config.max_concurrency)),
        }))
    }

    /// The routes for callers that may use them. Requests must carry a [`Caller`] extension.
    pub(super) fn router(self: Arc<Self>) -> Router {
        let limit = DefaultBodyLimit::max(self.max_body_bytes);
        let model = Router::new()
            .route("/", get(model_metadata))
            .route("/ready", get(model_ready))
            .route("/infer", post(infer));
        Router::new()
            .route("/v2", get(server_metadata))
            .route("/v2/health/live", get(live))
            .route("/v2/health/ready", get(ready))
            .route("/v2/models", get(models))
            .route("/metrics", get(scrape))
            .nest("/v2/models/{model}", model.clone())
            .nest("/v2/models/{model}/versions/{version}", model)
            .fallback(async || RequestError::UnknownPath)
            .method_not_allowed_fallback(async || RequestError::Method)
            .layer(limit)
            .layer(middleware::from_fn(check_host))
            .with_state(self)
    }

    /// Finds the path's model, checks its version, and gives the version in service.
    fn served(&self, named: &Named) -> Result<(usize, &Model, Option<ServedVersion>), RequestError> {
        let found = self.models.iter().enumerate().find(|(_, model)| model.name == named.model);
        let Some((at, model)) = found else {
            let names: Vec<&str> = self.models.iter().map(|model| model.name.as_str()).collect();
            let (got, served) = (shorten(&named.model), names.join(" or "));
            return Err(RequestError::UnknownModel { got, served });
        };
        let current = model.predictor.current();
        if let Some(current) = &current {
            check_version(named, model, current)?;
        }
        Ok((at, model, current))
    }

    /// Reads a request's body; runs on a blocking thread.
    fn parse(&self, named: &Named, headers: &HeaderMap, body: &[u8]) -> Result<Parsed, RequestError> {
        let split_at = headers.get(binary::HEADER_LENGTH).map(HeaderValue::as_bytes);
        let (json, tail) = binary::split(split_at, body)?;
        let request = InferRequest::parse(json)?;
        let wanted = WantedOutputs::parse(&request)?;
        let (model, served, _) = self.served(named)?;
        let batch = served.layout.batch(&request.inputs, tail, self.max_rows)?;
        Ok(Parsed { id: request.id, wanted, model, batch })
    }

    /// Encodes and logs an answer; runs on a blocking thread.
    fn answer(
        &self,
        asked: &Asked,
        version: &ServedVersion,
        rows: &[Vec<f32>],
    ) -> Result<Response, RequestError> {
        let model = self.models.get(asked.model).ok_or(RequestError::Failed)?;
        let now = (self.clock)();
        let (outputs, tail) = asked.wanted.fill(rows.concat(), &model.classes, rows.len());
        let answer = InferResponse {
            model_name: &model.name,
            model_version: &version.digest,
            id: asked.id.as_deref(),
            parameters: freshness(&*model.predictor, version, now),
            outputs,
        };
        let mut bytes = serde_json::to_vec(&answer).map_err(|error| {
            tracing::error!(%error, "answer could not be encoded");
            RequestError::Failed
        })?;
        let json_bytes = bytes.len();
        bytes.extend_from_slice(&tail);
        let entry = PredictionEntry {
            time_ms: now,
            id: answer.id,
            caller: &asked.caller,
            model_version: &version.digest,
            rows: rows.len(),
            input: &asked.body,
            output: &bytes,
        };
        self.log.append(&entry).map_err(|error| {
            tracing::error!(%error, "prediction refused: it could not be logged");
            RequestError::LogUnavailable
        })?;
        Ok(reply(bytes, (!tail.is_empty()).then_some(json_bytes)))
    }

    /// Runs a piece of work on the blocking pool when there is a slot.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, RequestError> + Send + 'static,
    ) -> Result<T, RequestError> {
        // The semaphore is never closed, so waiting ends with a slot.
        let slot = Arc::clone(&self.slots).acquire_owned().await.map_err(|_| RequestError::Overloaded)?;
        let endpoint = Arc::clone(self);
        let job = tokio::task::spawn_blocking(move || {
            // The slot lives as long as the work, also when the caller has gone.
            let _slot = slot;
            work(&endpoint)
        });
        job.await.unwrap_or_else(|error| {
            tracing::error!(panicked = error.is_panic(), "request ended without an answer");
            Err(RequestError::Failed)
        })
    }
}

/// Refuses a path's version that isn't the one in service.
fn check_version(named: &Named, model: &Model, current: &ServedVersion) -> Result<(), RequestError> {
    match &named.version {
        Some(version) if *version != current.digest => Err(RequestError::UnknownVersion {
            got: shorten(version),
            model: model.name.clone(),
            served: current.digest.clone(),
        }),
        _ => Ok(()),
    }
}

/// A request that was read.
struct Parsed {
    id: Option<String>,
    wanted: WantedOutputs,
    /// Position among the models.
    model: usize,
    batch: TypedBatch,
}

/// What an answer repeats or records of its request.
struct Asked {
    id: Option<String>,
    wanted: WantedOutputs,
    model: usize,
    caller: Caller,
    body: Bytes,
}

/// How old the answer's knowledge is.
fn freshness(predictor: &dyn Predictor, version: &ServedVersion, now_ms: i64) -> Parameters {
    let age_s = |since_ms: i64| now_ms.saturating_sub(since_ms).max(0) / 1_000;
    let mut parameters =
        Parameters::from([("model_age_s".into(), Scalar::Int(age_s(version.published_at_ms)))]);
    if let Some(contact) = predictor.coordinator_contact() {
        let stale = now_ms.saturating_sub(contact.last_ms) >= contact.stale_after_ms;
        parameters.insert("stale_coordinator".into(), Scalar::Bool(stale));
        parameters.insert("coordinator_contact_age_s".into(), Scalar::Int(age_s(contact.last_ms)));
    }
    parameters
}

/// The routes of a caller that is not allowed: every request is refused alike.
pub(super) fn refusal() -> Router {
    Router::new().fallback(async || RequestError::Forbidden)
}

/// A JSON answer.
pub(super) fn json<T: Serialize>(status: StatusCode, body: &T) -> Response {
    (status, Json(body)).into_response()
}

/// The path's model and version.
struct Named {
    model: String,
    version: Option<String>,
}

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = RequestError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, RequestError> {
        let path = Path::<BTreeMap<String, String>>::from_request_parts(parts, state).await;
        let Path(mut names) = path.map_err(|_| RequestError::BadPath)?;
        let model = names.remove("model").ok_or(RequestError::BadPath)?;
        Ok(Self { model, version: names.remove("version") })
    }
}

async fn server_metadata() -> Response {
    let (name, version) = ("tabmesh-agent", env!("CARGO_PKG_VERSION"));
    json(StatusCode::OK, &ServerMetadata { name, version, extensions: vec!["binary_tensor_data"] })
}

async fn live() -> Response {
    json(StatusCode::OK, &Health { ready: None, live: true })
}

async fn ready(State(endpoint): State<Arc<Endpoint>>) -> Response {
    let ready = endpoint.models.first().is_some_and(|model| model.predictor.current().is_some());
    json(ready_status(ready), &Health { ready: Some(ready), live: true })
}

async fn models(State(endpoint): State<Arc<Endpoint>>) -> Response {
    // A student is listed once there is one; the promoted model always.
    let listed = |(at, model): &(usize, &Model)| *at == 0 || model.predictor.current().is_some();
    let models = endpoint.models.iter().enumerate().filter(listed).map(|(_, model)| model.name.as_str());
    json(StatusCode::OK, &ModelList { models: models.collect() })
}

async fn model_ready(State(endpoint): State<Arc<Endpoint>>, named: Named) -> Result<Response, RequestError> {
    let (_, model, current) = endpoint.served(&named)?;
    let ready = current.is_some();
    Ok(json(ready_status(ready), &ModelReady { name: &model.name, ready }))
}

async fn model_metadata(
    State(endpoint): State<Arc<Endpoint>>,
    named: Named,
) -> Result<Response, RequestError> {
    let (_, model, current) = endpoint.served(&named)?;
    if let (Some(version), None) = (&named.version, &current) {
        let (got, model, served) = (shorten(version), model.name.clone(), "none".into());
        return Err(RequestError::UnknownVersion { got, model, served });
    }
    let classes = i64::try_from(model.classes.len()).unwrap_or(-1);
    let output = |kind: Output, shape: Vec<i64>| TensorMetadata {
        name: kind.name().into(),
        datatype: kind.datatype(),
        shape,
    };
    let metadata = ModelMetadata {
        name: &model.name,
        versions: current.iter().map(|version| version.digest.clone()).collect(),
        platform: "tabmesh_tfm",
        inputs: model.layout.metadata(),
        outputs: vec![output(Output::Probabilities, vec![-1, classes]), output(Output::Labels, vec![-1])],
        properties: current.map(properties).unwrap_or_default(),
    };
    Ok(json(StatusCode::OK, &metadata))
}

fn properties(version: ServedVersion) -> BTreeMap<&'static str, String> {
    let mut properties = BTreeMap::from([
        ("mode", "domain".into()),
        ("version_name", version.name),
        ("base", version.base),
        ("promoted_at_ms", version.promoted_at_ms.to_string()),
        ("published_at_ms", version.published_at_ms.to_string()),
    ]);
    properties.extend(version.adapter.map(|adapter| ("adapter", adapter)));
    properties.extend(version.forest.map(|forest| ("forest", forest)));
    properties
}

async fn scrape(State(endpoint): State<Arc<Endpoint>>) -> Response {
    let now = (endpoint.clock)();
    let age_s = |since_ms: i64| now.saturating_sub(since_ms).max(0) / 1_000;
    let facts = |model: &Model| {
        let current = model.predictor.current();
        (model.name.clone(), current.map(|version| age_s(version.published_at_ms)))
    };
    let named: Vec<(String, Option<i64>)> = endpoint.models.iter().map(facts).collect();
    let models: Vec<ModelFacts<'_>> =
        named.iter().map(|(name, age_s)| ModelFacts { name, age_s: *age_s }).collect();
    let contact = endpoint.models.first().and_then(|model| model.predictor.coordinator_contact());
    // Before the first contact its time is that of the start, or none.
    let contact = contact.filter(|contact| contact.last_ms > 0).map(|contact| age_s(contact.last_ms));
    let budget = endpoint.budget.as_ref().and_then(|budget| budget());
    let text = endpoint.metrics.text(&models, contact, budget.as_ref());
    ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response()
}

async fn infer(
    State(endpoint): State<Arc<Endpoint>>,
    caller: Extension<Caller>,
    named: Named,
    request: Request,
) -> Result<Response, RequestError> {
    let began = Instant::now();
    // A label must not grow with what callers make up.
    let known = endpoint.models.iter().find(|model| model.name == named.model);
    let model = known.map_or_else(|| "unknown".to_owned(), |model| model.name.clone());
    let outcome = predicted(&endpoint, caller, named, request).await;
    match outcome {
        Ok((response, rows)) => {
            endpoint.metrics.answered(&model, response.status().as_u16(), Some(rows), began.elapsed());
            Ok(response)
        }
        Err(error) => {
            endpoint.metrics.answered(&model, error.status().as_u16(), None, began.elapsed());
            Err(error)
        }
    }
}

/// The answer to a prediction request, and its number of rows.
async fn predicted(
    endpoint: &Arc<Endpoint>,
    Extension(caller): Extension<Caller>,
    named: Named,
    request: Request,
) -> Result<(Response, usize), RequestError> {
    if let (_, model, None) = endpoint.served(&named)? {
        return Err(RequestError::NotReady { model: model.name.clone() });
    }
    if let Some(encoding) = request.headers().get(header::CONTENT_ENCODING)
        && encoding.as_bytes() != b"identity"
    {
        return Err(RequestError::Encoding { got: shorten(&String::from_utf8_lossy(encoding.as_bytes())) });
    }
    // Held until the answer is made.
    let _admitted =
        Arc::clone(&endpoint.admission).try_acquire_owned().map_err(|_| RequestError::Overloaded)?;
    let headers = request.headers().clone();
    let body = read_body(request, endpoint.max_body_bytes).await?;
    // Counted once the body is here: others wait for it no longer than parsing takes.
    let arrival = endpoint.batcher.arrival();
    let (named, bytes) = (Arc::new(named), body.clone());
    let path = Arc::clone(&named);
    let parsed = endpoint.blocking(move |endpoint| endpoint.parse(&path, &headers, &bytes)).await?;
    let Parsed { id, wanted, model, batch } = parsed;
    let (version, rows) = match endpoint.batcher.predict(model, batch, arrival).await {
        Ok(answer) => answer,
        Err(BatchError::NotReady) => return Err(RequestError::NotReady { model: named.model.clone() }),
        Err(BatchError::Failed) => return Err(RequestError::Failed),
        Err(BatchError::Replaced) => return Err(RequestError::Replaced),
    };
    if let Some(model) = endpoint.models.get(model) {
        // The version may have changed since the path was read.
        check_version(&named, model, &version)?;
    }
    let asked = Asked { id, wanted, model, caller, body };
    let count = rows.len();
    let response = endpoint.blocking(move |endpoint| endpoint.answer(&asked, &version, &rows)).await?;
    Ok((response, count))
}

async fn read_body(request: Request, limit: usize) -> Result<Bytes, RequestError> {
    match tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, &())).await {
        Err(_) => Err(RequestError::BodyTimeout { limit_s: BODY_TIMEOUT.as_secs() }),
        Ok(Err(refused)) if refused.status() == StatusCode::PAYLOAD_TOO_LARGE => {
            Err(RequestError::BodyTooLarge { limit })
        }
        Ok(Err(_)) => Err(RequestError::BodyBroken),
        Ok(Ok(body)) => Ok(body),
    }
}

/// Refuses loopback requests that name another host: a web page could reach 127.0.0.1 through a DNS name of its own
/// and read predictions from the user's browser.
async fn check_host(request: Request, next: Next) -> Result<Response, RequestError> {
    let host = request
        .headers()
        .get(header::HOST)
        .filter(|_| matches!(request.extensions().get::<Caller>(), Some(Caller::Loopback)));
    if let Some(host) = host
        && !host.to_str().is_ok_and(is_loopback_host)
    {
        return Err(RequestError::ForeignHost { got: shorten(&String::from_utf8_lossy(host.as_bytes())) });
    }
    Ok(next.run(request).await)
}

fn is_loopback_host(host: &str) -> bool {
    let name = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()));
    let name = name.map_or(host, |(name, _)| name);
    let bare = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).unwrap_or(name);
    bare.eq_ignore_ascii_case("localhost")
        || bare.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn ready_status(ready: bool) -> StatusCode {
    if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

/// The answer's bytes with their headers; `json_bytes` where binary tensors follow the JSON.
fn reply(bytes: Vec<u8>, json_bytes: Option<usize>) -> Response {
    let content_type = if json_bytes.is_some() { "application/octet-stream" } else { "application/json" };
    let mut response = Response::new(Body::from(bytes));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    if let Some(length) = json_bytes {
        headers.insert(binary::HEADER_LENGTH, HeaderValue::from(length));
    }
    response
}

/// An output the endpoint can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Output {
    Probabilities,
    Labels,
}

impl Output {
    fn name(self) -> &'static str {
        match self {
            Self::Probabilities => "probabilities",
            Self::Labels => "labels",
        }
    }

    fn datatype(self) -> Datatype {
        match self {
            Self::Probabilities => Datatype::Fp32,
            Self::Labels => Datatype::Bytes,
        }
    }
}

/// The outputs of one request, and which of them in binary.
struct WantedOutputs(Vec<(Output, bool)>);

impl WantedOutputs {
    /// All outputs unless some are named; binary by `binary_data` of the output, else `binary_data_output`.
    fn parse(request: &InferRequest) -> Result<Self, RequestError> {
        let at_request = flag(request.parameters.as_ref(), "binary_data_output", "request")?.unwrap_or(false);
        let named = request.outputs.as_deref().unwrap_or_default();
        if named.is_empty() {
            return Ok(Self(vec![(Output::Probabilities, at_request), (Output::Labels, at_request)]));
        }
        let mut wanted: Vec<(Output, bool)> = Vec::new();
        for output in named {
            let found = [Output::Probabilities, Output::Labels].into_iter().find(|o| o.name() == output.name);
            let kind = found.ok_or_else(|| RequestError::UnknownOutput { got: shorten(&output.name) })?;
            let binary = flag(output.parameters.as_ref(), "binary_data", kind.name())?.unwrap_or(at_request);
            if !wanted.iter().any(|(seen, _)| *seen == kind) {
                wanted.push((kind, binary));
            }
        }
        Ok(Self(wanted))
    }

    /// The tensors of an answer and the bytes that follow the JSON; `probabilities` are `rows × classes`, row-major.
    fn fill<'a>(
        &self,
        probabilities: Vec<f32>,
        classes: &'a [String],
        rows: usize,
    ) -> (Vec<OutputTensor<'a>>, Vec<u8>) {
        let mut tail = Vec::new();
        let tensor = |&(output, in_binary): &(Output, bool)| {
            let (shape, data) = match output {
                Output::Probabilities => (vec![rows, classes.len()], OutputData::Fp32(probabilities.clone())),
                Output::Labels => (vec![rows], OutputData::Bytes(labels(&probabilities, classes))),
            };
            let before = tail.len();
            match &data {
                _ if !in_binary => {}
                OutputData::Fp32(values) => binary::put_fp32(&mut tail, values),
                OutputData::Bytes(texts) => binary::put_texts(&mut tail, texts),
            }
            let size = i64::try_from(tail.len() - before).unwrap_or(i64::MAX);
            let (parameters, data) = if in_binary {
                (Parameters::from([(BINARY_SIZE.into(), Scalar::Int(size))]), None)
            } else {
                (Parameters::new(), Some(data))
            };
            OutputTensor { name: output.name(), shape, datatype: output.datatype(), parameters, data }
        };
        let tensors = self.0.iter().map(tensor).collect();
        (tensors, tail)
    }
}

/// The likeliest class of each row, the first of equals.
fn labels<'a>(probabilities: &[f32], classes: &'a [String]) -> Vec<&'a str> {
    let likeliest = |row: &[f32]| {
        let better =
            |best: (usize, f32), (class, &p): (usize, &f32)| if p > best.1 { (class, p) } else { best };
        let (class, _) = row.iter().enumerate().fold((0, f32::NEG_INFINITY), better);
        classes.get(class).map_or("", String::as_str)
    };
    probabilities.chunks(classes.len().max(1)).map(likeliest).collect()
}

fn flag(parameters: Option<&Parameters>, name: &'static str, at: &str) -> Result<Option<bool>, RequestError> {
    match parameters.and_then(|p| p.get(name)) {
        None => Ok(None),
        Some(Scalar::Bool(value)) => Ok(Some(*value)),
        Some(_) => Err(RequestError::BadParameter { at: at.to_owned(), name, expected: "true or false" }),
    }
}

/// Longest time a body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_names_pass_as_host() {
        for host in ["localhost", "LocalHost:80", "127.0.0.1:8080", "127.9.9.9", "[::1]:8080", "[::1]"] {
            assert!(is_loopback_host(host), "{host}");
        }
        for host in
            ["evil.example", "evil.example:8080", "localhost.evil.example", "10.0.0.1:80", "", "[::2]:1"]
        {
            assert!(!is_loopback_host(host), "{host}");
        }
    }

    #[test]
    fn labels_are_the_first_of_the_likeliest() {
        let classes = ["no".to_owned(), "yes".to_owned()];
        assert_eq!(labels(&[0.9, 0.1, 0.5, 0.5, 0.2, 0.8], &classes), ["no", "no", "yes"]);
    }
}
