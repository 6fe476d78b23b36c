//! Predictions of a running agent, asked over the Open Inference Protocol like any client would.

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tabmesh_contract::batch::{TypedBatch, TypedColumn};
use tabmesh_contract::schema::{FeatureKind, FeatureSchema};
use tokio::net::TcpStream;

use super::dataset::COLUMNS;

/// Rows asked for in one request.
const ROWS_PER_REQUEST: usize = 250;
/// Text that stands for a missing category.
const MISSING: &str = "__missing__";

/// A request for rows `from..until` of a batch: one tensor per column, under the contract's column names.
#[must_use]
pub fn request(schema: &FeatureSchema, rows: &TypedBatch, from: usize, until: usize, id: &str) -> Value {
    let inputs: Vec<Value> = COLUMNS
        .iter()
        .filter_map(|column| {
            let at = schema.features().iter().position(|f| f.id.as_str() == column.feature)?;
            let (kind, values) = (&schema.features().get(at)?.kind, rows.columns.get(at)?);
            Some(tensor(column.name, kind, values, from, until))
        })
        .collect();
    json!({ "id": id, "inputs": inputs })
}

fn tensor(name: &str, kind: &FeatureKind, values: &TypedColumn, from: usize, until: usize) -> Value {
    let shape = [until - from];
    match (kind, values) {
        (FeatureKind::Categorical { levels }, TypedColumn::Categorical(codes)) => {
            let text = |code: &u32| match levels.get(*code as usize) {
                Some(level) => level.clone(),
                None if *code as usize == levels.len() => "__other__".to_owned(),
                None => MISSING.to_owned(),
            };
            let data: Vec<String> = codes.iter().skip(from).take(until - from).map(text).collect();
            json!({ "name": name, "shape": shape, "datatype": "BYTES",
                "parameters": { "null_value": MISSING }, "data": data })
        }
        (_, TypedColumn::Numeric(numbers)) => {
            let number = |v: &f64| if v.is_nan() { Value::Null } else { json!(v) };
            let data: Vec<Value> = numbers.iter().skip(from).take(until - from).map(number).collect();
            json!({ "name": name, "shape": shape, "datatype": "FP64", "data": data })
        }
        (FeatureKind::Numeric(_), TypedColumn::Categorical(_)) => Value::Null,
    }
}

/// Sends one request and gives the answer.
///
/// # Errors
/// The connection fails, or the agent answers with an error.
pub async fn infer(address: &str, body: &Value) -> Result<Value> {
    let stream = TcpStream::connect(address).await.with_context(|| format!("connecting to {address}"))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::post("/v2/models/income/infer")
        .header("host", address)
        .header("content-type", "application/json")
        .body(Full::new(Bytes::from(serde_json::to_vec(body)?)))?;
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    let bytes = answer.into_body().collect().await?.to_bytes();
    if !status.is_success() {
        bail!("{address} answered {status}: {}", String::from_utf8_lossy(&bytes));
    }
    Ok(serde_json::from_slice(&bytes)?)
}

/// Probability of class 1 of every row, as the agent serves it.
///
/// # Errors
/// As [`infer`], or an answer without the promised tensor.
pub async fn served(address: &str, schema: &FeatureSchema, rows: &TypedBatch) -> Result<Vec<f64>> {
    let mut all = Vec::with_capacity(rows.rows());
    for from in (0..rows.rows()).step_by(ROWS_PER_REQUEST) {
        let until = (from + ROWS_PER_REQUEST).min(rows.rows());
        let answer = infer(address, &request(schema, rows, from, until, &format!("rows-{from}"))).await?;
        let outputs = answer["outputs"].as_array().context("an answer without outputs")?;
        let probabilities = outputs.iter().find(|o| o["name"] == "probabilities");
        let data =
            probabilities.and_then(|o| o["data"].as_array()).context("an answer without probabilities")?;
        all.extend(data.chunks(2).filter_map(|pair| pair.get(1)?.as_f64()));
    }
    if all.len() != rows.rows() {
        bail!("{address} answered {} rows of {}", all.len(), rows.rows());
    }
    Ok(all)
}
