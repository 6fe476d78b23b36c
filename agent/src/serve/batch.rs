//! Micro-batching: requests that arrive together are predicted together.
//!
//! Requests wait in one queue, of which a fixed number of threads take batches. A batch is closed when it is full,
//! when its oldest request has waited [`Batching::max_wait`], or at once when no other request is on its way, so that
//! a lone request waits for nobody. Each request gets an equal share of a batch first; what a large one has left
//! takes part in the next batches, so it can't keep small ones waiting for longer than one batch a turn. A request
//! whose caller has gone is dropped before it costs anything.
//!
//! A row's prediction doesn't depend on the rows beside it ([`Predictor::predict`]), so an answer is the same as without
//! batching. An answer comes from one version: if that changes between two parts of a request, it starts anew. If a
//! batch of several requests fails, each is tried alone, so that none fails for another.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tabmesh_contract::batch::TypedBatch;
use tokio::sync::oneshot;

use super::{PredictError, Predictor, ServeError, ServedVersion};

/// How requests are put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batching {
    /// Most rows predicted together, at most [`MAX_TOGETHER_ROWS`].
    pub max_rows: usize,
    /// Longest wait of a request for others; zero predicts every request alone and whole. At most [`MAX_WAIT`].
    pub max_wait: Duration,
}

impl Batching {
    /// Every request alone.
    pub const OFF: Self = Self { max_rows: DEFAULT_TOGETHER_ROWS, max_wait: Duration::ZERO };

    fn is_off(self) -> bool {
        self.max_wait.is_zero()
    }
}

impl Default for Batching {
    fn default() -> Self {
        Self { max_rows: DEFAULT_TOGETHER_ROWS, max_wait: DEFAULT_WAIT }
    }
}

/// What came of a request: the version and its probabilities, row by row.
pub(super) type Answer = Result<(ServedVersion, Vec<Vec<f32>>), BatchError>;

/// Why a request has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum BatchError {
    /// No version has been promoted yet.
    NotReady,
    /// The model failed or broke its promise; the reason is in the agent's log.
    Failed,
    /// The version changed during each of the attempts.
    Replaced,
}

/// The queue and its threads; dropping it ends them after the batches they are at.
pub(super) struct Batcher {
    shared: Arc<Shared>,
}

struct Shared {
    models: Vec<Served>,
    batching: Batching,
    queue: Mutex<Queue>,
    changed: Condvar,
    /// Requests that were admitted and are not in the queue yet.
    arriving: AtomicUsize,
}

/// One model as the threads see it.
pub(super) struct Served {
    pub(super) predictor: Arc<dyn Predictor>,
    pub(super) classes: usize,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    closed: bool,
}

/// A request, or what is left of it.
struct Job {
    model: usize,
    rows: TypedBatch,
    /// Rows answered so far, by one version.
    done: Vec<Vec<f32>>,
    version: Option<ServedVersion>,
    attempts: usize,
    since: Instant,
    answer: oneshot::Sender<Answer>,
}

impl Job {
    fn left(&self) -> usize {
        self.rows.rows() - self.done.len()
    }
}

/// A request on its way to the queue.
pub(super) struct Arrival<'a>(&'a Shared);

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        if self.0.arriving.fetch_sub(1, Ordering::AcqRel) == 1 {
            // Whoever waits for it need not any longer. The lock keeps the signal from passing a thread by that has
            // just looked.
            drop(self.0.lock());
            self.0.changed.notify_all();
        }
    }
}

impl Batcher {
    /// Starts `threads` threads.
    ///
    /// # Errors
    /// [`ServeError::Listener`] if the system has no thread left.
    pub(super) fn start(models: Vec<Served>, threads: usize, batching: Batching) -> Result<Self, ServeError> {
        let shared = Arc::new(Shared {
            models,
            batching,
            queue: Mutex::default(),
            changed: Condvar::new(),
            arriving: AtomicUsize::new(0),
        });
        let batcher = Self { shared };
        for i in 0..threads {
            let shared = Arc::clone(&batcher.shared);
            thread::Builder::new()
                .name(format!("predict-{i}"))
                .spawn(move || shared.work())
                .map_err(|e| ServeError::Listener { reason: e.to_string() })?;
        }
        Ok(batcher)
    }

    /// Notes that a request is on its way.
    pub(super) fn arrival(&self) -> Arrival<'_> {
        self.shared.arriving.fetch_add(1, Ordering::AcqRel);
        Arrival(&self.shared)
    }

    /// Predicts rows of a model; dropping the future takes the request out of the queue.
    pub(super) async fn predict(&self, model: usize, rows: TypedBatch, arrival: Arrival<'_>) -> Answer {
        let (answer, answered) = oneshot::channel();
        let (done, since) = (Vec::with_capacity(rows.rows()), Instant::now());
        let job = Job { model, rows, done, version: None, attempts: 1, since, answer };
        self.shared.lock().jobs.push_back(job);
        self.shared.changed.notify_all();
        drop(arrival);
        // A thread that lets go of a request without an answer has panicked outside of the model.
        answered.await.unwrap_or(Err(BatchError::Failed))
    }
}

impl Drop for Batcher {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing that can panic runs under the lock.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        while let Some(taken) = self.next() {
            for (job, rows) in self.predict(taken) {
                self.settle(job, rows);
            }
        }
    }

    /// Waits for a batch and takes its requests, each with the number of rows that are in it.
    fn next(&self) -> Option<Vec<(Job, usize)>> {
        let mut queue = self.lock();
        loop {
            if queue.closed {
                return None;
            }
            queue.jobs.retain(|job| !job.answer.is_closed());
            let Some(since) = queue.jobs.front().map(|job| job.since) else {
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let waited = since.elapsed();
            if self.batching.is_off() || waited >= self.batching.max_wait || self.is_full(&queue) {
                return Some(self.take(&mut queue));
            }
            if self.arriving.load(Ordering::Acquire) == 0 {
                return Some(self.take(&mut queue));
            }
            let rest = self.batching.max_wait - waited;
            queue = self.changed.wait_timeout(queue, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn is_full(&self, queue: &Queue) -> bool {
        let model = queue.jobs.front().map(|job| job.model);
        let rows = queue.jobs.iter().filter(|job| Some(job.model) == model).map(Job::left);
        rows.sum::<usize>() >= self.batching.max_rows
    }

    /// Takes the oldest request's model: its requests in equal shares, then what still fits, the oldest first.
    fn take(&self, queue: &mut Queue) -> Vec<(Job, usize)> {
        if self.batching.is_off() {
            let alone = |job: Job| {
                let rows = job.left();
                (job, rows)
            };
            return queue.jobs.pop_front().map(alone).into_iter().collect();
        }
        let model = queue.jobs.front().map(|job| job.model);
        let (same, others): (VecDeque<Job>, VecDeque<Job>) =
            queue.jobs.drain(..).partition(|job| Some(job.model) == model);
        let share = (self.batching.max_rows / same.len().max(1)).max(1);
        let mut room = self.batching.max_rows;
        let mut taken: Vec<(Job, usize)> = Vec::with_capacity(same.len());
        queue.jobs = others;
        for job in same {
            let rows = job.left().min(share).min(room);
            room -= rows;
            taken.push((job, rows));
        }
        for (job, rows) in &mut taken {
            let more = (job.left() - *rows).min(room);
            room -= more;
            *rows += more;
        }
        // Requests that found no room go back to the front, in their order.
        let (taken, waiting): (Vec<_>, Vec<_>) = taken.into_iter().partition(|(_, rows)| *rows > 0);
        waiting.into_iter().rev().for_each(|(job, _)| queue.jobs.push_front(job));
        taken
    }

    /// Predicts a batch; each request comes back with its rows' answer.
    fn predict(&self, taken: Vec<(Job, usize)>) -> Vec<(Job, Answer)> {
        let part = |(job, rows): &(Job, usize)| {
            let first = job.done.len();
            job.rows.take(&(first..first + rows).collect::<Vec<_>>())
        };
        let Some(model) = taken.first().map(|(job, _)| job.model) else { return Vec::new() };
        let parts: Vec<TypedBatch> = taken.iter().map(part).collect();
        let whole = |parts: &[TypedBatch]| {
            let mut parts = parts.iter().cloned();
            let mut all = parts.next().unwrap_or_default();
            parts.for_each(|part| all.append(&part));
            all
        };
        match self.ask(model, &whole(&parts)) {
            Err(BatchError::Failed) if taken.len() > 1 => {
                let answers: Vec<Answer> = parts.iter().map(|part| self.ask(model, part)).collect();
                taken.into_iter().map(|(job, _)| job).zip(answers).collect()
            }
            Err(error) => taken.into_iter().map(|(job, _)| (job, Err(error.clone()))).collect(),
            Ok((version, rows)) => {
                let mut rows = rows.into_iter();
                let mut answer =
                    |count: usize| -> Answer { Ok((version.clone(), rows.by_ref().take(count).collect())) };
                taken.into_iter().map(|(job, count)| (job, answer(count))).collect()
            }
        }
    }

    /// Asks the model, by one version from start to end.
    fn ask(&self, model: usize, rows: &TypedBatch) -> Answer {
        let Served { predictor, classes } = self.models.get(model).ok_or(BatchError::Failed)?;
        for _ in 0..VERSION_ATTEMPTS {
            let version = predictor.current().ok_or(BatchError::NotReady)?;
            let answer = catch_unwind(AssertUnwindSafe(|| predictor.predict(rows))).map_err(|_| {
                tracing::error!(model_version = version.digest, "prediction panicked");
                BatchError::Failed
            })?;
            let answer = answer.map_err(|error| match error {
                PredictError::NotReady => BatchError::NotReady,
                PredictError::Failed { .. } => {
                    tracing::error!(%error, model_version = version.digest, "prediction failed");
                    BatchError::Failed
                }
            })?;
            if predictor.current().is_none_or(|now| now.digest != version.digest) {
                continue;
            }
            let fits = |row: &Vec<f32>| row.len() == *classes && row.iter().all(|p| p.is_finite());
            if answer.len() != rows.rows() || !answer.iter().all(fits) {
                let (expected, got) = (rows.rows(), answer.len());
                tracing::error!(
                    expected,
                    got,
                    classes,
                    "predictor broke its promise: rows, classes or finite values"
                );
                return Err(BatchError::Failed);
            }
            return Ok((version, answer));
        }
        Err(BatchError::Replaced)
    }

    /// Answers a request, or puts what is left of it back.
    fn settle(&self, mut job: Job, answer: Answer) {
        let (version, rows) = match answer {
            Ok(answer) => answer,
            Err(error) => return reply(job.answer, Err(error)),
        };
        if job.version.as_ref().is_some_and(|before| before.digest != version.digest) {
            if job.attempts == VERSION_ATTEMPTS {
                return reply(job.answer, Err(BatchError::Replaced));
            }
            job.attempts += 1;
            job.done.clear();
            job.version = None;
        } else {
            job.done.extend(rows);
            job.version = Some(version.clone());
        }
        if job.left() == 0 {
            return reply(job.answer, Ok((version, job.done)));
        }
        // Behind those that came meanwhile, which is their turn.
        self.lock().jobs.push_back(job);
        self.changed.notify_all();
    }
}

fn reply(to: oneshot::Sender<Answer>, answer: Answer) {
    // A caller that has gone needs no answer.
    let _ = to.send(answer);
}

/// Upper bound of [`Batching::max_rows`].
pub const MAX_TOGETHER_ROWS: usize = 65_536;
/// Default of [`Batching::max_rows`].
pub const DEFAULT_TOGETHER_ROWS: usize = 256;
/// Upper bound of [`Batching::max_wait`].
pub const MAX_WAIT: Duration = Duration::from_secs(1);
/// Default of [`Batching::max_wait`].
pub const DEFAULT_WAIT: Duration = Duration::from_micros(500);
/// Predictions tried before giving up on a version that keeps changing.
pub(super) const VERSION_ATTEMPTS: usize = 3;
