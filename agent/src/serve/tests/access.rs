//! Who gets in: loopback and TLS, identities, host names, certificate reload, and a stop that finishes its work.

use std::time::Duration;

use tabmesh_proto::identity::{DEVELOPMENT_CA_NAME, DevelopmentCa};

use super::{
    super::{
        MAX_BATCH_ROWS, MAX_BODY_BYTES, MAX_CONCURRENCY, MAX_MODEL_NAME_BYTES, MAX_QUEUE, MAX_TOGETHER_ROWS,
        TlsFiles, tls::TlsGate,
    },
    certs::{self, Ca, Leaf},
    *,
};

const SCORING: &str = "spiffe://acme.example/tabmesh/agent/payments/scoring";
const NEIGHBOUR: &str = "spiffe://acme.example/tabmesh/agent/payments/other";

fn config(bind: &str) -> ServeConfig {
    ServeConfig::new(bind.parse().unwrap(), "payments", "fraud", Arc::new(|| NOW_MS))
}

fn nowhere() -> TlsFiles {
    TlsFiles { cert: "/no/tls.crt".into(), key: "/no/tls.key".into(), client_ca: "/no/ca.crt".into() }
}

#[test]
fn beyond_loopback_tls_and_an_allow_list_of_own_agents_are_demanded() {
    for bind in ["0.0.0.0:8080", "[::]:8080", "10.0.0.7:8080", "[::ffff:127.0.0.1]:8080"] {
        let error = config(bind).check().unwrap_err();
        assert_eq!(error, ServeError::PlaintextBeyondLoopback { bind: bind.parse().unwrap() });
        assert_eq!(
            error.to_string(),
            format!(
                "serving on {bind} would expose predictions from real rows in the clear: beyond loopback set tls \
                 (cert, key, client_ca) and allowed, or bind 127.0.0.1"
            )
        );
    }
    for bind in ["127.0.0.1:0", "127.8.8.8:1", "[::1]:0"] {
        assert_eq!(config(bind).check(), Ok(()));
    }
    let with = |tls: bool, allowed: &[&str]| {
        let mut config = config("0.0.0.0:8443");
        if !tls {
            config.bind = "127.0.0.1:0".parse().unwrap();
        }
        config.tls = tls.then(nowhere);
        config.allowed = allowed.iter().map(|id| id.parse().unwrap()).collect();
        config.check()
    };
    assert_eq!(with(true, &[SCORING]), Ok(()));
    assert_eq!(with(true, &[]), Err(ServeError::NobodyAllowed));
    assert_eq!(with(false, &[SCORING]), Err(ServeError::AllowedWithoutTls { got: 1 }));
    let foreign = "spiffe://acme.example/tabmesh/agent/risk/a1";
    let refused = with(true, &[SCORING, foreign]).unwrap_err();
    assert_eq!(
        refused.to_string(),
        format!("{foreign} can't be allowed to call: it is an agent of domain risk, expected payments")
    );
    let coordinator = "spiffe://acme.example/tabmesh/coordinator";
    assert!(matches!(with(true, &[coordinator]), Err(ServeError::AllowedRefused { .. })));
}

#[test]
fn configured_limits_hold_at_their_bounds() {
    type Edit = fn(&mut ServeConfig, usize);
    let cases: [(&str, usize, usize, Edit); 6] = [
        ("max_batch_rows", 1, MAX_BATCH_ROWS, |c, n| c.max_batch_rows = n),
        ("max_body_bytes", 1, MAX_BODY_BYTES, |c, n| c.max_body_bytes = n),
        ("max_concurrency", 1, MAX_CONCURRENCY, |c, n| c.max_concurrency = n),
        ("max_queue", 0, MAX_QUEUE, |c, n| c.max_queue = n),
        ("batching.max_batch_rows", 1, MAX_TOGETHER_ROWS, |c, n| c.batching.max_rows = n),
        ("batching.max_wait_us", 0, 1_000_000, |c, n| {
            c.batching.max_wait = Duration::from_micros(n as u64);
        }),
    ];
    for (name, min, max, edit) in cases {
        let check = |n| {
            let mut config = config("127.0.0.1:0");
            edit(&mut config, n);
            config.check()
        };
        assert_eq!((check(min), check(max)), (Ok(()), Ok(())), "{name}");
        let outside = if min == 0 { vec![max + 1] } else { vec![0, max + 1] };
        for got in outside {
            assert_eq!(check(got), Err(ServeError::Limit { name, got, min, max }));
        }
    }
    let named = |name: String| {
        let mut config = config("127.0.0.1:0");
        config.model_name = name;
        config.check().is_ok()
    };
    assert!(named("fraud_v1.2-x".into()) && named("x".repeat(MAX_MODEL_NAME_BYTES)));
    for name in [String::new(), "a/b".into(), "a b".into(), "é".into(), "x".repeat(MAX_MODEL_NAME_BYTES + 1)]
    {
        assert!(!named(name.clone()), "{name}");
    }
}

#[tokio::test]
async fn a_listener_bound_elsewhere_than_configured_is_found_out() {
    let running = start(|_| {}).await;
    let listener = TcpListener::bind("0.0.0.0:0").await.unwrap();
    let bind = listener.local_addr().unwrap();
    let predictor: Arc<dyn Predictor> = Arc::clone(&running.predictor) as _;
    let log = Arc::new(JsonlLog::open(&running.log_path(), &LOG_KEY).unwrap());
    let refused =
        serve(config("127.0.0.1:0"), listener, predictor, Vec::new(), log, std::future::pending()).await;
    assert_eq!(refused, Err(ServeError::PlaintextBeyondLoopback { bind }));
}

#[tokio::test]
async fn a_web_page_behind_a_rebound_name_gets_nothing() {
    let running = start(|_| {}).await;
    let of = async |host: &str| {
        let request = Request::get("/v2/models/fraud").header("host", host).body(Body::empty()).unwrap();
        exchange(TcpStream::connect(running.address).await.unwrap(), request).await.unwrap()
    };
    of("localhost:8080").await.ok();
    let text = "host \"evil.example\" is not a loopback name, use localhost, 127.0.0.1 or [::1]";
    of("evil.example").await.refused(403, text);
}

/// An endpoint with TLS that allows [`SCORING`], and its CA.
async fn start_tls() -> (Running, Ca, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new("acme ca1");
    let files = certs::write(dir.path(), &ca.server(), &ca);
    let running = start(|config| {
        config.tls = Some(files);
        config.allowed = vec![SCORING.parse().unwrap()];
    })
    .await;
    (running, ca, dir)
}

/// One request over TLS; the error is the connection's.
async fn ask(
    running: &Running,
    ca: &Ca,
    leaf: Option<&Leaf>,
    request: Request<Body>,
) -> Result<Answer, String> {
    let stream = TcpStream::connect(running.address).await.unwrap();
    exchange(certs::connect(stream, ca, leaf).await.map_err(|e| e.to_string())?, request).await
}

fn prediction() -> Request<Body> {
    Request::post("/v2/models/fraud/infer").body(Body::from(three_rows().to_string())).unwrap()
}

#[tokio::test]
async fn only_listed_identities_get_answers() {
    let (running, ca, _dir) = start_tls().await;
    let listed = ca.client(&[SCORING], "x", 2040);
    ask(&running, &ca, Some(&listed), prediction()).await.unwrap().ok();
    let line: Value = serde_json::from_str(&running.log_text()).unwrap();
    assert_eq!(line["caller"], SCORING);

    // Verified by TLS, and refused by identity: the same domain, several ids, none, a common name that looks right.
    for (uris, common) in [
        (&[NEIGHBOUR][..], "x"),
        (&["spiffe://acme.example/tabmesh/coordinator"], "x"),
        (&["spiffe://evil.example/tabmesh/agent/payments/scoring"], "x"),
        (&[SCORING, NEIGHBOUR], "x"),
        (&[], SCORING),
    ] {
        let leaf = ca.client(uris, common, 2040);
        for request in [prediction(), Request::get("/v2/health/live").body(Body::empty()).unwrap()] {
            let answer = ask(&running, &ca, Some(&leaf), request).await.unwrap();
            answer.refused(403, "caller is not on this endpoint's allow list");
        }
    }
    assert_eq!(running.predictor.calls.lock().unwrap().len(), 1);
    assert_eq!(running.log_text().lines().count(), 1);
}

#[tokio::test]
async fn foreign_expired_missing_and_plaintext_callers_never_reach_http() {
    let (running, ca, _dir) = start_tls().await;
    let foreign = Ca::new("acme ca1").client(&[SCORING], "x", 2040);
    // The process's clock stands in 2025, whatever the machine's says.
    let expired = ca.client(&[SCORING], "x", 2025);
    for leaf in [None, Some(&foreign), Some(&expired)] {
        assert!(ask(&running, &ca, leaf, prediction()).await.is_err());
    }
    let plaintext = exchange(TcpStream::connect(running.address).await.unwrap(), prediction()).await;
    assert!(plaintext.is_err());
    running.clock_ms.store(NOW_MS - 365 * 86_400_000, Ordering::Relaxed);
    ask(&running, &ca, Some(&expired), prediction()).await.unwrap().ok();
    assert_eq!(running.predictor.calls.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn changed_certificates_are_taken_and_broken_ones_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (Ca::new("ca1"), Ca::new("ca2"));
    let mut config = config("127.0.0.1:0");
    config.allowed = vec![SCORING.parse().unwrap()];
    let gate = TlsGate::load(&certs::write(dir.path(), &old.server(), &old), &config).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let get_in = async |ca: &Ca| {
        let leaf = ca.client(&[SCORING], "x", 2040);
        let client =
            async { certs::connect(TcpStream::connect(address).await.unwrap(), ca, Some(&leaf)).await };
        let server = async { gate.accept(listener.accept().await.unwrap().0).await };
        let (client, server) = tokio::join!(client, server);
        client.is_ok() && server.is_ok_and(|(_, caller)| caller.is_ok())
    };
    assert!(get_in(&old).await);
    assert_eq!(gate.reload(), Ok(false));
    certs::write(dir.path(), &new.server(), &new);
    assert_eq!(gate.reload(), Ok(true));
    assert!(get_in(&new).await);
    assert!(!get_in(&old).await);
    // A key that doesn't belong to the certificate, as in the middle of a rotation.
    let leaf = new.server();
    certs::write(dir.path(), &Leaf { cert: leaf.cert, key: new.server().key }, &new);
    assert!(matches!(gate.reload(), Err(ServeError::Tls { .. })));
    assert!(get_in(&new).await);
}

#[test]
fn unusable_certificate_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new("ca");
    let mut config = config("127.0.0.1:0");
    let mut load = |files: &TlsFiles, development| {
        config.development = development;
        TlsGate::load(files, &config).err().map(|e| e.to_string())
    };
    let files = certs::write(dir.path(), &ca.server(), &ca);
    assert_eq!(load(&files, DevelopmentCa::Refuse), None);
    std::fs::write(&files.client_ca, "nothing").unwrap();
    let says = format!("tls file {}: no certificate in it", files.client_ca.display());
    assert_eq!(load(&files, DevelopmentCa::Refuse), Some(says));
    let says = load(&nowhere(), DevelopmentCa::Refuse).unwrap();
    assert!(says.starts_with("tls file /no/tls.crt: "), "{says}");
    let development = Ca::new(DEVELOPMENT_CA_NAME);
    let files = certs::write(dir.path(), &development.server(), &development);
    assert_eq!(load(&files, DevelopmentCa::Accept), None);
    let says = format!(
        "tls file {}: a development CA is refused outside development mode",
        files.client_ca.display()
    );
    assert_eq!(load(&files, DevelopmentCa::Refuse), Some(says));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_finishes_running_requests_and_accepts_no_more() {
    let mut running = start(|_| {}).await;
    let (open, gate) = mpsc::channel();
    *running.predictor.gate.lock().unwrap() = Some(gate);
    let stop = running.stop.take().unwrap();
    let (request, address) = (three_rows(), running.address);
    let (answer, ()) = tokio::join!(running.infer(&request), async {
        while running.predictor.calls.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        stop.send(()).unwrap();
        while TcpStream::connect(address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        open.send(()).unwrap();
    });
    answer.ok();
    assert_eq!(running.task.await.unwrap(), Ok(()));
}

#[tokio::test]
async fn columns_that_contradict_the_schema_stop_the_start() {
    let schema = schema();
    let column = |name: &str, feature: usize, datatype| InputColumn {
        name: name.into(),
        feature,
        datatype,
        kind: schema.features().get(feature).unwrap_or_else(|| &schema.features()[0]).kind.clone(),
    };
    let mut wrong_kind = column("a", 0, Datatype::Fp64);
    wrong_kind.kind = schema.features()[1].kind.clone();
    for (columns, says) in [
        (vec![], "there is no input column"),
        (vec![column("a", 6, Datatype::Fp64)], "no such feature"),
        (vec![wrong_kind], "its kind differs from the feature's"),
        (vec![column("", 0, Datatype::Fp64)], "its name is empty or used twice"),
        (
            vec![column("a", 0, Datatype::Fp64), column("a", 4, Datatype::Fp64)],
            "its name is empty or used twice",
        ),
        (
            vec![column("a", 0, Datatype::Fp64), column("b", 0, Datatype::Fp64)],
            "its feature has another column",
        ),
        (vec![column("a", 0, Datatype::Bytes)], "a numeric feature can't be BYTES"),
        (vec![column("a", 1, Datatype::Fp64)], "a categorical feature can't be a float"),
    ] {
        let name = columns.last().map(|c| c.name.clone()).unwrap_or_default();
        let refused = super::super::tensor::InputLayout::new(&schema, columns).unwrap_err();
        assert_eq!(refused, ServeError::Layout { column: name, reason: says.into() });
    }
}
