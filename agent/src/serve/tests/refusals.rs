//! What is refused, with which status, in which words.

use std::pin::pin;

use futures_util::future::select;

use super::*;

const COLUMNS: &str = "age_years, amount_eur, channel, is_flagged, tier";

#[tokio::test]
async fn every_misfit_of_a_tensor_is_named() {
    let running = start(|_| {}).await;
    let set =
        |column: &str, field: &str, value: Value| with_input(three_rows(), column, |i| i[field] = value);
    let without = |column: &str| {
        let mut request = three_rows();
        request["inputs"].as_array_mut().unwrap().retain(|input| input["name"] != column);
        request
    };
    let twice = || {
        let mut request = three_rows();
        let again = request["inputs"][0].clone();
        request["inputs"].as_array_mut().unwrap().push(again);
        request
    };
    let mixed = with_input(three_rows(), "age_years", |i| {
        i["parameters"] = json!({"binary_data_size": 24});
    });
    let neither = with_input(three_rows(), "age_years", |i| drop(i.as_object_mut().unwrap().remove("data")));
    let output = |outputs: Value| {
        let mut request = three_rows();
        request["outputs"] = outputs;
        request
    };
    let cases = [
        (set("tier", "name", json!("tear")), format!("unknown column \"tear\", expected: {COLUMNS}")),
        (without("channel"), format!("missing column: channel; expected: {COLUMNS}")),
        (json!({"inputs": []}), format!("missing column: {COLUMNS}; expected: {COLUMNS}")),
        (twice(), "column \"age_years\" is sent twice".into()),
        (
            set("age_years", "datatype", json!("BYTES")),
            "column \"age_years\": datatype \"BYTES\" doesn't fit, expected FP64 or FP32 or INT64 or INT32"
                .into(),
        ),
        (
            set("channel", "datatype", json!("FP64")),
            "column \"channel\": datatype \"FP64\" doesn't fit, expected BYTES".into(),
        ),
        (
            set("tier", "datatype", json!("UINT8")),
            "column \"tier\": datatype \"UINT8\" doesn't fit, expected BYTES or INT64 or INT32".into(),
        ),
        (
            set("is_flagged", "datatype", json!("INT32")),
            "column \"is_flagged\": datatype \"INT32\" doesn't fit, expected BYTES or BOOL".into(),
        ),
        (
            set("age_years", "shape", json!([1, 3])),
            "column \"age_years\": shape [1, 3] doesn't fit, expected [n] or [n,1]".into(),
        ),
        (
            set("age_years", "shape", json!([])),
            "column \"age_years\": shape [] doesn't fit, expected [n] or [n,1]".into(),
        ),
        (
            set("age_years", "data", json!([[1], [2], [3]])),
            "column \"age_years\": shape [3] with nested data doesn't fit, expected [n] or [n,1]".into(),
        ),
        (
            set("age_years", "shape", json!([0])),
            "column \"age_years\": shape names 0 rows, expected at least 1".into(),
        ),
        (
            set("tier", "shape", json!([2])),
            "column \"tier\" has 2 rows, expected 3 as in column \"age_years\"".into(),
        ),
        (
            set("age_years", "data", json!([1, 2])),
            "column \"age_years\": data has 2 values, expected 3 as its shape says".into(),
        ),
        (
            set("age_years", "data", json!([1, "x", 3])),
            "column \"age_years\", row 1: expected a number, NaN or null".into(),
        ),
        (
            set("amount_eur", "data", json!([1, 2, 1e300])),
            "column \"amount_eur\", row 2: expected a finite number or NaN".into(),
        ),
        (
            set("tier", "data", json!([1, 2.5, 3])),
            "column \"tier\", row 1: expected a 64-bit integer or null".into(),
        ),
        (
            set("channel", "data", json!(["a", "b", 3])),
            "column \"channel\", row 2: expected a string or null".into(),
        ),
        (
            set("is_flagged", "data", json!([0, true, false])),
            "column \"is_flagged\", row 0: expected true, false or null (binary: one byte, 0 or 1)".into(),
        ),
        (
            set("channel", "parameters", json!({"null_value": 0})),
            "column \"channel\": parameter null_value must be a string, on a BYTES tensor".into(),
        ),
        (
            set("tier", "parameters", json!({"null_value": "9"})),
            "column \"tier\": parameter null_value must be a string, on a BYTES tensor".into(),
        ),
        (
            set("channel", "parameters", json!({"content_type": "base64"})),
            "column \"channel\": parameter content_type must be other than base64: send text, or binary data"
                .into(),
        ),
        (mixed, "column \"age_years\": expected either data or parameters.binary_data_size, got both".into()),
        (
            neither,
            "column \"age_years\": expected either data or parameters.binary_data_size, got neither".into(),
        ),
        (
            output(json!([{"name": "logits"}])),
            "unknown output \"logits\", expected: probabilities, labels".into(),
        ),
        (
            output(json!([{"name": "labels", "parameters": {"binary_data": 1}}])),
            "labels: parameter binary_data must be true or false".into(),
        ),
    ];
    for (request, text) in cases {
        running.infer(&request).await.refused(400, &text);
    }
    assert!(running.predictor.calls.lock().unwrap().is_empty(), "nothing refused reached the model");
    assert_eq!(running.log_text(), "");
}

#[tokio::test]
async fn what_is_no_inference_request_is_refused() {
    let running = start(|_| {}).await;
    for (body, says) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("{", "EOF while parsing an object at line 1 column 1"),
        ("{}", "missing field `inputs` at line 1 column 2"),
        (
            r#"{"inputs":[{"name":"tier","shape":[-1],"datatype":"INT64"}]}"#,
            "invalid value: integer `-1`, expected u64 at line 1 column 37",
        ),
    ] {
        let answer = running.post("/v2/models/fraud/infer", body).await;
        answer.refused(400, &format!("not an inference request: {says}"));
    }
}

#[tokio::test]
async fn lying_binary_lengths_are_refused() {
    let running = start(|_| {}).await;
    let request = with_input(three_rows(), "is_flagged", |input| {
        input.as_object_mut().unwrap().remove("data");
        input["parameters"] = json!({"binary_data_size": 3});
    });
    let flagged = |text: &str| format!("column \"is_flagged\": {text}");
    for (tail, text) in [
        (&b"\x01\x00"[..], flagged("2 bytes of binary data, expected 3 as binary_data_size says")),
        (b"\x01\x00\x01\x01\x01", "2 bytes follow the last binary tensor, expected 0".into()),
        (
            b"\x01\x00\x02",
            "column \"is_flagged\", row 2: expected true, false or null (binary: one byte, 0 or 1)".into(),
        ),
    ] {
        running.infer_binary(&request, tail).await.refused(400, &text);
    }
    running.infer_binary(&request, b"\x01\x00\x01").await.ok();
    for (size, tail, text) in [
        (json!(2), 2, "2 bytes of binary data, expected 3 (3 values of 1)"),
        (json!(-1), 3, "parameter binary_data_size must be an integer of at least 0"),
        (json!("3"), 3, "parameter binary_data_size must be an integer of at least 0"),
    ] {
        let lying = with_input(request.clone(), "is_flagged", |i| i["parameters"]["binary_data_size"] = size);
        running.infer_binary(&lying, &vec![1; tail]).await.refused(400, &flagged(text));
    }
    for header in ["9999", "x"] {
        let request =
            Request::post("/v2/models/fraud/infer").header("Inference-Header-Content-Length", header);
        let request = request.body(Body::from("{}")).unwrap();
        let answer = exchange(TcpStream::connect(running.address).await.unwrap(), request).await.unwrap();
        answer
            .refused(400, "inference-header-content-length must be an integer from 0 to the body's 2 bytes");
    }
}

#[tokio::test]
async fn limits_hold_at_the_limit_and_refuse_one_more() {
    let exact = three_rows().to_string().len();
    let running = start(|config| {
        config.max_batch_rows = 3;
        config.max_body_bytes = exact;
    })
    .await;
    running.infer(&three_rows()).await.ok();
    let padded = format!("{} ", three_rows());
    let answer = running.post("/v2/models/fraud/infer", padded).await;
    answer.refused(413, &format!("request body exceeds {exact} bytes, send fewer rows a request"));
    let running = start(|config| config.max_batch_rows = 2).await;
    let text = "column \"age_years\": 3 rows exceed the limit of 2 a request";
    running.infer(&three_rows()).await.refused(400, text);
}

#[tokio::test]
async fn unknown_paths_models_versions_and_verbs_are_refused() {
    let running = start(|_| {}).await;
    for path in ["/v2/models/other", "/v2/models/other/ready", "/v2/models/other/versions/1"] {
        running.get(path).await.refused(404, "unknown model \"other\", expected \"fraud\"");
    }
    let answer = running.post("/v2/models/other/infer", three_rows().to_string()).await;
    answer.refused(404, "unknown model \"other\", expected \"fraud\"");
    let text = "unknown version \"1\" of model \"fraud\", in service: 0a1b2c3d";
    for path in ["/v2/models/fraud/versions/1", "/v2/models/fraud/versions/1/ready"] {
        running.get(path).await.refused(404, text);
    }
    running.post("/v2/models/fraud/versions/1/infer", three_rows().to_string()).await.refused(404, text);
    for path in ["/", "/v1/models/fraud:predict", "/v2/models/fraud/explain", "/v2/repository/index"] {
        running.get(path).await.refused(404, "no such path, see GET /v2");
    }
    running.get("/v2/models/fraud/infer").await.refused(405, "method not allowed on this path");
    running.post("/v2", "").await.refused(405, "method not allowed on this path");
    running.get("/v2/models/%ff").await.refused(400, "path is not valid percent-encoded UTF-8");
    running.predictor.set(|state| state.version = None);
    let none = "unknown version \"1\" of model \"fraud\", in service: none";
    running.get("/v2/models/fraud/versions/1").await.refused(404, none);
}

#[tokio::test]
async fn compressed_bodies_are_refused_by_name() {
    let running = start(|_| {}).await;
    let request = Request::post("/v2/models/fraud/infer").header("content-encoding", "gzip");
    let request = request.body(Body::from("x")).unwrap();
    let answer = exchange(TcpStream::connect(running.address).await.unwrap(), request).await.unwrap();
    answer.refused(415, "content-encoding \"gzip\" is not supported, send the body as it is");
}

#[tokio::test]
async fn a_failing_model_says_so_without_its_reasons() {
    let running = start(|_| {}).await;
    for answer in [Answering::Failing, Answering::Panicking, Answering::OneRowShort, Answering::NotFinite] {
        running.predictor.set(|state| state.answer = answer);
        running.infer(&three_rows()).await.refused(500, "prediction failed, see the agent's log");
        running.predictor.state.clear_poison();
    }
    assert_eq!(running.log_text(), "");
    running.predictor.set(|state| state.answer = Answering::Well);
    running.infer(&three_rows()).await.ok();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn overload_is_refused_at_once_and_the_queue_is_served() {
    let running = start(|config| (config.max_concurrency, config.max_queue) = (1, 1)).await;
    let (open, gate) = mpsc::channel();
    *running.predictor.gate.lock().unwrap() = Some(gate);
    let request = three_rows();
    let running_one = running.infer(&request);
    let others = async {
        while running.predictor.calls.lock().unwrap().is_empty() {
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        // The first holds the one slot; of two more, one takes the one place in the queue.
        let (second, third) = (pin!(running.infer(&request)), pin!(running.infer(&request)));
        let both = select(second, third).await;
        let (refused, queued) = both.factor_first();
        (0..2).for_each(|_| open.send(()).unwrap());
        queued.await.ok();
        refused
    };
    let (first, refused) = tokio::join!(running_one, others);
    first.ok();
    refused.refused(503, "too many requests at once, retry later");
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(running.log_text().lines().count(), 2);
    *running.predictor.gate.lock().unwrap() = None;
    running.infer(&request).await.ok();
}

#[tokio::test]
async fn no_answer_without_a_record() {
    struct Full;
    impl super::super::log::PredictionLog for Full {
        fn append(
            &self,
            _: &super::super::log::PredictionEntry<'_>,
        ) -> Result<(), super::super::log::LogError> {
            let (path, reason) = ("p".into(), "no space left on device".into());
            Err(super::super::log::LogError::Io { path, action: "append", reason })
        }
    }
    let running = start(|_| {}).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = ServeConfig::new(address, "payments", "fraud", Arc::new(|| NOW_MS));
    let predictor: Arc<dyn Predictor> = Arc::clone(&running.predictor) as _;
    tokio::spawn(serve(config, listener, predictor, Vec::new(), Arc::new(Full), std::future::pending()));
    let request = Request::post("/v2/models/fraud/infer").body(Body::from(three_rows().to_string())).unwrap();
    let answer = exchange(TcpStream::connect(address).await.unwrap(), request).await.unwrap();
    answer.refused(503, "prediction log is not writable, no answer without a record");
}
