//! What well-formed requests get: typed batches, answers, metadata, freshness, and lines in the log.

use ring::digest::{SHA256, digest};
use serde_json::{Map, Value, json};

use super::*;

#[tokio::test]
async fn a_flat_request_reaches_the_model_in_the_contracts_terms() {
    let running = start(|_| {}).await;
    let answer = running.infer(&three_rows()).await.ok();
    let typed = three_rows_typed();
    assert_same(&running.predictor.last_batch(), &typed);
    let expected = linear(&typed);
    let label = |row: &Vec<f32>| {
        let best = row.iter().copied().fold(f32::MIN, f32::max);
        CLASSES[row.iter().position(|p| (p - best).abs() < f32::EPSILON).unwrap()]
    };
    let labels: Vec<_> = expected.iter().map(label).collect();
    assert_eq!(probabilities(&answer), expected.concat());
    assert_eq!(
        answer,
        json!({
            "model_name": "fraud",
            "model_version": DIGEST,
            "id": "req-1",
            "parameters": {"model_age_s": 90},
            "outputs": [
                {"name": "probabilities", "shape": [3, 3], "datatype": "FP32", "data": answer["outputs"][0]["data"]},
                {"name": "labels", "shape": [3], "datatype": "BYTES", "data": labels},
            ]
        })
    );
}

#[tokio::test]
async fn nested_data_any_order_and_bare_nan_mean_the_same() {
    let running = start(|_| {}).await;
    let flat = probabilities(&running.infer(&three_rows()).await.ok());
    let mut nested = three_rows();
    let inputs = nested["inputs"].as_array_mut().unwrap();
    inputs.reverse();
    for input in inputs {
        let wrapped: Vec<Value> = input["data"].as_array().unwrap().iter().map(|v| json!([v])).collect();
        (input["shape"], input["data"]) = (json!([3, 1]), json!(wrapped));
    }
    assert_eq!(probabilities(&running.infer(&nested).await.ok()), flat);
    let python = three_rows().to_string().replace("[41.5,null,130]", "[41.5,NaN,130]");
    let answer = running.post("/v2/models/fraud/infer", python).await;
    assert_eq!(probabilities(&answer.ok()), flat);
    // Flat data under shape [n,1] is row-major too.
    let flat_data = with_input(three_rows(), "age_years", |input| input["shape"] = json!([3, 1]));
    assert_eq!(probabilities(&running.infer(&flat_data).await.ok()), flat);
}

#[tokio::test]
async fn datatypes_that_widen_without_loss_are_taken() {
    let running = start(|_| {}).await;
    let of = async |column: &str, datatype: &str, data: Value| {
        let request = with_input(three_rows(), column, |input| {
            let rest = input.as_object_mut().unwrap();
            rest.remove("parameters");
            (input["datatype"], input["data"]) = (json!(datatype), data);
        });
        running.infer(&request).await.ok();
        running.predictor.last_batch()
    };
    let with = |feature: usize, column: TypedColumn| {
        let mut typed = three_rows_typed();
        typed.columns[feature] = column;
        typed
    };
    let numbers = || TypedColumn::Numeric(vec![41.0, -2.0, f64::NAN]);
    for datatype in ["FP64", "FP32", "INT64", "INT32"] {
        assert_same(&of("age_years", datatype, json!([41, -2, null])).await, &with(4, numbers()));
    }
    assert_same(
        &of("age_years", "FP64", json!([0.1, 1e9, 41])).await,
        &with(4, TypedColumn::Numeric(vec![0.1, 1e9, 41.0])),
    );
    let tiers = || TypedColumn::Categorical(vec![2, 3, 4]);
    assert_same(&of("tier", "INT32", json!([3, 4, null])).await, &with(3, tiers()));
    assert_same(&of("tier", "BYTES", json!(["3", "4", null])).await, &with(3, tiers()));
    let flags = || TypedColumn::Categorical(vec![1, 0, 2]);
    assert_same(&of("is_flagged", "BYTES", json!(["true", "false", "perhaps"])).await, &with(2, flags()));
}

/// The request of [`three_rows`] with every tensor in binary, and the bytes behind the JSON.
fn three_rows_binary() -> (Value, Vec<u8>) {
    let mut request = three_rows();
    let mut tail = Vec::new();
    let typed: [Vec<u8>; 5] = [
        [41.5_f64, f64::NAN, 130.0].iter().flat_map(|v| v.to_le_bytes()).collect(),
        [12.25_f32, 0.1, f32::NAN].iter().flat_map(|v| v.to_le_bytes()).collect(),
        ["app", "NA", "fax"]
            .iter()
            .flat_map(|t| [&(t.len() as u32).to_le_bytes()[..], t.as_bytes()].concat())
            .collect(),
        vec![1, 0, 0],
        [2_i64, 9, 9].iter().flat_map(|v| v.to_le_bytes()).collect(),
    ];
    for (input, bytes) in request["inputs"].as_array_mut().unwrap().iter_mut().zip(typed) {
        let input = input.as_object_mut().unwrap();
        input.remove("data");
        let parameters = input.entry("parameters").or_insert_with(|| Value::Object(Map::new()));
        parameters["binary_data_size"] = json!(bytes.len());
        tail.extend(bytes);
    }
    (request, tail)
}

#[tokio::test]
async fn binary_tensors_mean_the_same_and_come_back_when_asked_for() {
    let running = start(|_| {}).await;
    let (request, tail) = three_rows_binary();
    let answer = running.infer_binary(&request, &tail).await.ok();
    let mut typed = three_rows_typed();
    typed.columns[2] = TypedColumn::Categorical(vec![1, 0, 0]);
    typed.columns[3] = TypedColumn::Categorical(vec![1, 3, 3]);
    assert_same(&running.predictor.last_batch(), &typed);
    let expected = linear(&typed).concat();
    assert_eq!(probabilities(&answer), expected);

    // As stock Triton clients do: binary in, binary out.
    let mut request = request;
    request["parameters"] = json!({"binary_data_output": true});
    let answer = running.infer_binary(&request, &tail).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.headers["content-type"], "application/octet-stream");
    let json_bytes: usize =
        answer.headers["inference-header-content-length"].to_str().unwrap().parse().unwrap();
    let (head, tensors) = answer.body.split_at(json_bytes);
    let head: Value = serde_json::from_slice(head).unwrap();
    assert_eq!(head["outputs"][0]["parameters"]["binary_data_size"], json!(36));
    assert_eq!(head["outputs"][0].get("data"), None);
    let floats: Vec<f32> = tensors[..36].as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    assert_eq!(floats, expected);
    let labels = running.infer(&three_rows()).await.ok()["outputs"][1]["data"].as_array().unwrap().len();
    assert_eq!(labels, 3);
    let size = head["outputs"][1]["parameters"]["binary_data_size"].as_u64().unwrap();
    assert_eq!(tensors.len() as u64, 36 + size);
    let first = u32::from_le_bytes(tensors[36..40].try_into().unwrap()) as usize;
    assert!(CLASSES.contains(&std::str::from_utf8(&tensors[40..40 + first]).unwrap()));
}

#[tokio::test]
async fn some_tensors_may_be_binary_and_one_output_alone_may_be_asked_for() {
    let running = start(|_| {}).await;
    let mut request = with_input(three_rows(), "amount_eur", |input| {
        input.as_object_mut().unwrap().remove("data");
        input["parameters"] = json!({"binary_data_size": 12});
    });
    request["outputs"] = json!([{"name": "labels", "parameters": {"binary_data": false}}]);
    let tail: Vec<u8> = [12.25_f32, 0.1, f32::NAN].iter().flat_map(|v| v.to_le_bytes()).collect();
    let answer = running.infer_binary(&request, &tail).await.ok();
    assert_same(&running.predictor.last_batch(), &three_rows_typed());
    assert_eq!(answer["outputs"].as_array().unwrap().len(), 1);
    assert_eq!(answer["outputs"][0]["name"], "labels");
}

#[tokio::test]
async fn metadata_health_and_readiness_follow_the_promotion() {
    let running = start(|_| {}).await;
    running.predictor.set(|state| state.version = None);
    let server = running.get("/v2").await.ok();
    assert_eq!(server["extensions"], json!(["binary_tensor_data"]));
    assert_eq!(server["name"], "tabmesh-agent");
    assert_eq!(running.get("/v2/health/live").await.ok(), json!({"live": true}));
    assert_eq!(running.get("/v2/models").await.ok(), json!({"models": ["fraud"]}));
    let ready = running.get("/v2/health/ready").await;
    assert_eq!((ready.status.as_u16(), ready.json()), (503, json!({"ready": false, "live": true})));
    let ready = running.get("/v2/models/fraud/ready").await;
    assert_eq!((ready.status.as_u16(), ready.json()), (503, json!({"name": "fraud", "ready": false})));
    let column = |name: &str, datatype: &str| json!({"name": name, "datatype": datatype, "shape": [-1]});
    let mut metadata = json!({
        "name": "fraud",
        "versions": [],
        "platform": "tabmesh_tfm",
        "inputs": [
            column("age_years", "FP64"), column("amount_eur", "FP32"), column("channel", "BYTES"),
            column("is_flagged", "BOOL"), column("tier", "INT64"),
        ],
        "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]}, column("labels", "BYTES")],
    });
    assert_eq!(running.get("/v2/models/fraud").await.ok(), metadata);
    let not_ready = "model \"fraud\" has no promoted version yet, retry later";
    let refused = running.infer(&three_rows()).await;
    refused.refused(503, not_ready);
    assert_eq!(refused.headers["retry-after"], "1");

    running.predictor.set(|state| state.version = Some(version(DIGEST)));
    assert_eq!(running.get("/v2/health/ready").await.ok(), json!({"ready": true, "live": true}));
    metadata["versions"] = json!([DIGEST]);
    metadata["properties"] = json!({
        "mode": "domain", "version_name": "fraud-v1 round 7", "base": "nano 3f", "adapter": "tokens 7", "forest": "trees 7",
        "promoted_at_ms": "1749999995000", "published_at_ms": "1749999909500",
    });
    assert_eq!(running.get("/v2/models/fraud").await.ok(), metadata);
    let versioned = format!("/v2/models/fraud/versions/{DIGEST}");
    assert_eq!(running.get(&versioned).await.ok(), metadata);
    assert_eq!(
        running.get(&format!("{versioned}/ready")).await.ok(),
        json!({"name": "fraud", "ready": true})
    );
    let answer = running.post(&format!("{versioned}/infer"), three_rows().to_string()).await.ok();
    assert_eq!(answer["model_version"], DIGEST);
}

#[tokio::test]
async fn answers_say_how_old_their_knowledge_is() {
    let running = start(|_| {}).await;
    let contact = CoordinatorContact { last_ms: NOW_MS - 59_999, stale_after_ms: 60_000 };
    running.predictor.set(|state| state.contact = Some(contact));
    let fresh = running.infer(&three_rows()).await.ok();
    let expected = |stale: bool, age: i64, contact: i64| json!({"model_age_s": age, "stale_coordinator": stale, "coordinator_contact_age_s": contact});
    assert_eq!(fresh["parameters"], expected(false, 90, 59));
    running.clock_ms.store(NOW_MS + 1, Ordering::Relaxed);
    assert_eq!(running.infer(&three_rows()).await.ok()["parameters"], expected(true, 90, 60));
    // A clock set back never makes a negative age.
    running.clock_ms.store(0, Ordering::Relaxed);
    assert_eq!(running.infer(&three_rows()).await.ok()["parameters"], expected(false, 0, 0));
}

/// Row `i` of a family of requests, and many of them in one.
fn family(rows: impl Iterator<Item = usize> + Clone) -> Value {
    let count = rows.clone().count();
    let tensor = |name: &str, datatype: &str, cell: &dyn Fn(usize) -> Value| {
        let data: Vec<Value> = rows.clone().map(cell).collect();
        json!({"name": name, "shape": [count], "datatype": datatype, "data": data})
    };
    let channels = ["web", "app", "branch", "fax"];
    json!({"inputs": [
        tensor("age_years", "FP64", &|i| if i % 7 == 0 { Value::Null } else { json!(i as f64 * 1.37) }),
        tensor("amount_eur", "FP32", &|i| json!(i as f64 * 0.3)),
        tensor("channel", "BYTES", &|i| json!(channels[i % 4])),
        tensor("is_flagged", "BOOL", &|i| json!(i % 3 == 0)),
        tensor("tier", "INT64", &|i| json!(i % 5)),
    ]})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_answers_as_its_rows_do_one_by_one() {
    let running = start(|config| config.max_queue = 64).await;
    let batched = probabilities(&running.infer(&family(0..40)).await.ok());
    let singles = futures_util::future::join_all((0..40).map(|i| {
        let (running, request) = (&running, family(i..i + 1));
        async move { probabilities(&running.infer(&request).await.ok()) }
    }))
    .await;
    assert_eq!(batched, singles.concat());
    assert_eq!(running.log_text().lines().count(), 41);
}

#[tokio::test]
async fn an_answer_names_the_version_that_computed_it() {
    let running = start(|_| {}).await;
    // Replaced once while it computes: the second attempt runs on the new version alone.
    running.predictor.set(|state| state.swaps = vec![version("ffff")]);
    assert_eq!(running.infer(&three_rows()).await.ok()["model_version"], "ffff");
    assert_eq!(running.predictor.calls.lock().unwrap().len(), 2);
    // A request for the version that has just gone is refused, not answered by its successor.
    running.predictor.set(|state| state.swaps = vec![version("eeee")]);
    let gone = running.post("/v2/models/fraud/versions/ffff/infer", three_rows().to_string()).await;
    gone.refused(404, "unknown version \"ffff\" of model \"fraud\", in service: eeee");
    // Replaced at every attempt.
    running.predictor.set(|state| state.swaps = ["d", "c", "b"].map(version).to_vec());
    running.infer(&three_rows()).await.refused(503, "the model was being replaced, retry later");
}

#[tokio::test]
async fn the_log_has_ids_and_keyed_digests_and_no_values() {
    let running = start(|_| {}).await;
    let mut request = with_input(three_rows(), "channel", |input| {
        input["data"] = json!(["CANARY-level", "NA", "CANARY-other"]);
    });
    request["inputs"][0]["data"] = json!([271_828.182_845, 31, 41]);
    request["parameters"] = json!({"note": "CANARY-parameter"});
    let body = request.to_string();
    let answer = running.post("/v2/models/fraud/infer", body.clone()).await;
    assert_eq!(answer.status, StatusCode::OK);
    // A refused request leaves no line at all.
    let refused = with_input(request, "channel", |input| input["datatype"] = json!("INT64"));
    assert_eq!(running.infer(&refused).await.status, StatusCode::BAD_REQUEST);

    let text = running.log_text();
    let line: Value = serde_json::from_str(&text).unwrap();
    let log = JsonlLog::open(&running.dir.path().join("other.jsonl"), &LOG_KEY).unwrap();
    assert_eq!(
        line,
        json!({
            "time_ms": NOW_MS, "id": "req-1", "caller": "loopback", "model_version": DIGEST, "rows": 3,
            "input_hmac": log.input_digest(body.as_bytes()), "output_hmac": log.output_digest(&answer.body),
        })
    );
    for canary in ["CANARY", "271828", "age_years", "probabilities"] {
        assert!(!text.contains(canary), "{canary} in {text}");
    }
    // Digests without the key could be found by guessing rows.
    for bytes in [body.as_bytes(), &answer.body] {
        assert!(!text.contains(&hex::encode(digest(&SHA256, bytes))));
    }
}
