//! Requests that arrive together: same answers, fair shares, no work for callers that have gone, a clean end.

use std::time::{Duration, Instant};

use super::super::batch::{Batcher, Batching, Served};
use super::*;

/// A request of `n` different rows.
fn rows(n: usize, seed: usize) -> Value {
    let numbers: Vec<f64> = (0..n).map(|i| (i * 7 + seed * 3) as f64 % 90.0).collect();
    let tiers: Vec<usize> = (0..n).map(|i| 1 + (i + seed) % 3).collect();
    json!({"inputs": [
        {"name": "age_years", "shape": [n], "datatype": "FP64", "data": numbers},
        {"name": "amount_eur", "shape": [n], "datatype": "FP32", "data": numbers},
        {"name": "channel", "shape": [n], "datatype": "BYTES", "data": vec!["app"; n]},
        {"name": "is_flagged", "shape": [n], "datatype": "BOOL", "data": vec![seed % 2 == 0; n]},
        {"name": "tier", "shape": [n], "datatype": "INT64", "data": tiers},
    ]})
}

/// An endpoint with one prediction thread that stands at a gate.
async fn gated(max_rows: usize) -> (Arc<Running>, mpsc::Sender<()>) {
    let running = start(|config| {
        (config.max_concurrency, config.max_queue) = (1, 64);
        config.batching = Batching { max_rows, max_wait: Duration::from_millis(5) };
    })
    .await;
    let (open, gate) = mpsc::channel();
    *running.predictor.gate.lock().unwrap() = Some(gate);
    (Arc::new(running), open)
}

fn send(running: &Arc<Running>, request: Value) -> JoinHandle<Answer> {
    let running = Arc::clone(running);
    tokio::spawn(async move { running.infer(&request).await })
}

async fn until(what: impl Fn() -> bool) {
    let began = Instant::now();
    while !what() {
        assert!(began.elapsed() < Duration::from_secs(20), "nothing happened for 20 s");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn calls(running: &Running) -> Vec<usize> {
    running.predictor.calls.lock().unwrap().iter().map(TypedBatch::rows).collect()
}

/// Whatever was predicted together, each caller gets the bits it would have got alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_wait_together_are_predicted_together_with_the_same_bits() {
    let alone = start(|config| config.batching = Batching::OFF).await;
    let (running, open) = gated(256).await;
    let first = send(&running, rows(1, 0));
    until(|| calls(&running) == [1]).await;
    let others: Vec<_> = (1..9).map(|seed| send(&running, rows(seed, seed))).collect();
    // All eight are in the queue once their bodies were read; the gate holds the thread meanwhile.
    tokio::time::sleep(Duration::from_millis(300)).await;
    (0..9).for_each(|_| open.send(()).unwrap());
    first.await.unwrap().ok();
    for (seed, other) in (1..9).zip(others) {
        let expected = probabilities(&alone.infer(&rows(seed, seed)).await.ok());
        assert_eq!(probabilities(&other.await.unwrap().ok()), expected, "request {seed}");
    }
    let calls = calls(&running);
    assert_eq!(calls.iter().sum::<usize>(), 1 + 36);
    assert!(calls.len() < 6, "hardly anything was put together: {calls:?}");
    assert!(alone.predictor.calls.lock().unwrap().len() == 8);
}

/// Attack: one request of many rows, then a small one. The small one is answered after one more batch at most.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_request_does_not_starve_a_small_one() {
    let (running, open) = gated(4).await;
    let first = send(&running, rows(1, 0));
    until(|| calls(&running) == [1]).await;
    let large = send(&running, rows(20, 1));
    tokio::time::sleep(Duration::from_millis(200)).await;
    let small = send(&running, rows(2, 2));
    tokio::time::sleep(Duration::from_millis(200)).await;
    (0..3).for_each(|_| open.send(()).unwrap());
    first.await.unwrap().ok();
    let alone = start(|config| config.batching = Batching::OFF).await;
    let expected = probabilities(&alone.infer(&rows(2, 2)).await.ok());
    assert_eq!(probabilities(&small.await.unwrap().ok()), expected);
    assert!(!large.is_finished() && calls(&running).iter().all(|rows| *rows <= 4));
    (0..20).for_each(|_| open.send(()).unwrap());
    let expected = probabilities(&alone.infer(&rows(20, 1)).await.ok());
    assert_eq!(probabilities(&large.await.unwrap().ok()), expected);
    assert!(calls(&running).iter().all(|rows| *rows <= 4), "{:?}", calls(&running));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_that_has_gone_costs_no_prediction() {
    let (running, open) = gated(256).await;
    let first = send(&running, rows(1, 0));
    until(|| calls(&running) == [1]).await;
    let gone = send(&running, rows(30, 1));
    tokio::time::sleep(Duration::from_millis(200)).await;
    gone.abort();
    tokio::time::sleep(Duration::from_millis(500)).await;
    (0..3).for_each(|_| open.send(()).unwrap());
    first.await.unwrap().ok();
    send(&running, rows(2, 2)).await.unwrap().ok();
    assert_eq!(calls(&running), [1, 2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_request_s_failure_is_not_the_others() {
    let (running, open) = gated(256).await;
    running.predictor.set(|state| state.answer = Answering::FailingBeyond(4));
    let first = send(&running, rows(1, 0));
    until(|| calls(&running) == [1]).await;
    let (large, small) = (send(&running, rows(5, 1)), send(&running, rows(2, 2)));
    tokio::time::sleep(Duration::from_millis(300)).await;
    (0..6).for_each(|_| open.send(()).unwrap());
    first.await.unwrap().ok();
    small.await.unwrap().ok();
    large.await.unwrap().refused(500, "prediction failed, see the agent's log");
}

/// An answer in several parts comes from one version, though the version changes between the parts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_in_parts_comes_from_one_version() {
    let (running, open) = gated(4).await;
    let large = send(&running, rows(12, 1));
    until(|| calls(&running) == [4]).await;
    open.send(()).unwrap();
    until(|| calls(&running).len() == 2).await;
    running.predictor.set(|state| state.version = Some(version("ffff")));
    (0..20).for_each(|_| open.send(()).unwrap());
    let answer = large.await.unwrap().ok();
    assert_eq!(answer["model_version"], "ffff");
    assert_eq!(probabilities(&answer).len(), 36);
    // Two parts by the old version, one of them asked again, then three by the new one or more.
    assert!(calls(&running).iter().sum::<usize>() >= 4 + 12, "{:?}", calls(&running));
}

/// The endpoint ends, and its threads with it, while requests wait in the queue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shutdown_ends_the_threads_and_answers_what_waits() {
    let (running, open) = gated(256).await;
    let first = send(&running, rows(1, 0));
    until(|| calls(&running) == [1]).await;
    let waiting = send(&running, rows(2, 1));
    tokio::time::sleep(Duration::from_millis(200)).await;
    (0..2).for_each(|_| open.send(()).unwrap());
    first.await.unwrap().ok();
    waiting.await.unwrap().ok();
    let mut running = Arc::into_inner(running).unwrap();
    drop(running.stop.take());
    let began = Instant::now();
    (&mut running.task).await.unwrap().unwrap();
    let predictor = Arc::clone(&running.predictor);
    // The threads hold the predictor; this test holds it twice.
    until(|| Arc::strong_count(&predictor) == 2).await;
    assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
}

fn batcher(batching: Batching) -> (Arc<Batcher>, Arc<Linear>) {
    let linear = Arc::new(Linear {
        schema: schema(),
        state: Mutex::new(State { version: Some(version(DIGEST)), ..State::default() }),
        gate: Mutex::new(None),
        calls: Mutex::new(Vec::new()),
    });
    let served = Served { predictor: Arc::clone(&linear) as _, classes: CLASSES.len() };
    (Arc::new(Batcher::start(vec![served], 2, batching).unwrap()), linear)
}

/// While another request is on its way the first waits for it, but no longer than it may.
#[tokio::test]
async fn the_deadline_bounds_the_wait_for_a_request_on_its_way() {
    let (batcher, linear) = batcher(Batching { max_rows: 256, max_wait: Duration::from_millis(800) });
    let (first, second) = (batcher.arrival(), batcher.arrival());
    let began = Instant::now();
    let both = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        batcher.predict(0, three_rows_typed(), second).await
    };
    let (one, two) = tokio::join!(batcher.predict(0, three_rows_typed(), first), both);
    assert!(one.is_ok() && two.is_ok() && began.elapsed() < Duration::from_millis(800));
    assert_eq!(linear.last_batch().rows(), 6);
    // This one waits for a request that never comes.
    let (third, never) = (batcher.arrival(), batcher.arrival());
    let began = Instant::now();
    assert!(batcher.predict(0, three_rows_typed(), third).await.is_ok());
    assert!(began.elapsed() >= Duration::from_millis(800));
    drop(never);
    // And a lone one for nobody.
    let began = Instant::now();
    assert!(batcher.predict(0, three_rows_typed(), batcher.arrival()).await.is_ok());
    assert!(began.elapsed() < Duration::from_millis(700));
}

#[tokio::test]
async fn without_batching_every_request_is_predicted_alone() {
    let (batcher, linear) = batcher(Batching { max_rows: 2, max_wait: Duration::ZERO });
    for _ in 0..3 {
        assert!(batcher.predict(0, three_rows_typed(), batcher.arrival()).await.is_ok());
    }
    assert!(linear.calls.lock().unwrap().iter().all(|batch| batch.rows() == 3));
}
