//! Non-interference: the whole loop on neighbouring tables with equal seeds differs in nothing but the noised payload.
//!
//! Agents and a coordinator run in this process over mutual TLS, with local noise or with secure sums; a relay sees what each
//! agent says and hears. Where the tables differ in a gate row alone, which only the choice of the served model sees,
//! every byte everywhere must be equal. Where they differ in a training row, in all labels or in all rows, what differs must be the
//! noised vectors and what is computed from them: equal numbers of calls, messages and status codes, equal sizes, equal
//! contents. Leaks that are planted into what a loop left behind must be seen.

mod compare;
mod mesh;
mod said;
mod tap;

use std::io::Write;
use std::net::TcpListener;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use tracing_subscriber::fmt::MakeWriter;

use self::compare::{beside_the_noise, cosigns, in_any_byte, vectors};
use self::mesh::Outcome;
pub use self::mesh::{Placement, Table};
use self::said::{Said, said};
use crate::quickstart::{deployment, pki};

/// One comparison, or one planted leak.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// Where the noise was added.
    pub placement: Placement,
    /// What the table of the first domain was compared with, or the leak that was planted.
    pub what: &'static str,
    /// Whether it is a planted leak, which must be seen; a comparison must find nothing.
    pub control: bool,
    /// What may differ.
    pub may_differ: &'static str,
    /// Messages that agents sent in the loop.
    pub messages: usize,
    /// Where something else differs.
    pub differences: Vec<String>,
}

impl Finding {
    /// Whether it came out as it must.
    #[must_use]
    pub fn as_it_must(&self) -> bool {
        self.control != self.differences.is_empty()
    }
}

/// Runs the loop on every table, the plain one first, compares the others with it, and plants leaks.
///
/// `tell` hears what is going on.
///
/// # Errors
/// The loop can't be run, doesn't end, or isn't what this audit knows: then it would see nothing.
pub async fn audit(placement: Placement, tell: impl Fn(&str)) -> Result<Vec<Finding>> {
    // What the coordinator logs is one stream of this process, so audits take turns.
    static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    static LOG: LazyLock<Log> = LazyLock::new(|| {
        let log = Log::default();
        // Where somebody else listens already, there is nothing to hear, which is found out below.
        let _ = tracing_subscriber::fmt().without_time().with_ansi(false).with_writer(log.clone()).try_init();
        log
    });
    let _turn = TURN.lock().await;
    let log = LOG.clone();
    let root = tempfile::Builder::new().prefix("tabmesh-noninterference-").tempdir()?;
    let listeners = listeners(placement.agents())?;
    let certificates = root.path().join("certs");
    let pki = pki::write(&certificates, &deployment::roles(), time::OffsetDateTime::now_utc())?;
    let mut outcomes = Vec::new();
    for (number, table) in Table::ALL.into_iter().enumerate() {
        tell(&format!("{}: {}", placement.words(), table.words()));
        // Each run has its folder; all share the certificates.
        let folder = root.path().join(format!("run-{number}"));
        std::fs::create_dir_all(&folder)?;
        std::os::unix::fs::symlink(&certificates, folder.join("certs"))?;
        // The coordinator's clock stands still, so a deadline never passes: a silent agent would be waited for forever.
        let run = mesh::run(&folder, &pki, &listeners, placement, table, &log.0);
        let run = tokio::time::timeout(PATIENCE, run).await;
        let run =
            run.with_context(|| format!("{}: the loop does not end; is an agent silent?", table.words()))?;
        outcomes.push((table, run?));
    }
    let (_, plain) = outcomes.first().context("no loop")?;
    ensure!(
        !plain.log.is_empty(),
        "the coordinator's log isn't heard: somebody else listens in this process"
    );
    for calls in &plain.calls {
        let got = vectors(calls).len();
        ensure!(
            got == VECTORS,
            "expected {VECTORS} vectors of an agent, four stages and two rounds, got {got}"
        );
        ensure!(calls.iter().any(cosigns), "an agent doesn't witness the audit log");
    }
    let first = |outcome: &Outcome| outcome.calls.first().map(|calls| vectors(calls)).unwrap_or_default();
    let mut findings = Vec::new();
    for (table, other) in outcomes.iter().skip(1) {
        let at_gate = *table == Table::OneMoreAtTheGate;
        ensure!(
            at_gate || first(other) != first(plain),
            "{}: it doesn't show in the noised payload, so that nothing else can be expected to",
            table.words()
        );
        findings.push(Finding {
            placement,
            what: table.words(),
            control: false,
            may_differ: if at_gate { NOTHING } else { PAYLOAD },
            messages: messages(other),
            differences: if at_gate { in_any_byte(plain, other) } else { beside_the_noise(plain, other) },
        });
    }
    findings.extend(planted(placement, plain)?);
    Ok(findings)
}

/// Plants a leak in what a loop left behind; the place is that of a vector among the first agent's calls and their messages.
type Plant = fn(&mut Outcome, (usize, usize));

/// What an agent or a coordinator that leaks would leave behind, planted one at a time: each must be seen by both comparisons, or
/// by the stricter one alone where it is inside the noised payload.
fn planted(placement: Placement, plain: &Outcome) -> Result<Vec<Finding>> {
    ensure!(
        in_any_byte(plain, plain).is_empty() && beside_the_noise(plain, plain).is_empty(),
        "a loop differs from itself"
    );
    let calls = plain.calls.first().context("no agent")?;
    let mut places = calls
        .iter()
        .enumerate()
        .flat_map(|(call, said)| (0..said.up.messages.len()).map(move |at| (call, at)));
    let vector = places
        .find(|(call, at)| matches!(said(&calls[*call].up.messages[*at]), Said::Vector { .. }))
        .context("no vector")?;
    let leaks: [(&'static str, Plant); 7] = [
        ("one more call", |o, _| {
            let more = o.calls[0].last().cloned();
            o.calls[0].extend(more);
        }),
        ("another header", |o, _| o.calls[0][0].up.headers[0].push("x-rows: 121".to_owned())),
        ("another status", |o, _| o.calls[0][0].down.headers[0].push("grpc-message: 121 rows".to_owned())),
        // Field 15, two bytes, after everything that the vector's message has.
        ("a field beside the vector", |o, (call, at)| {
            o.calls[0][call].up.messages[at].extend([15 << 3 | 2, 2, b'1', b'2']);
        }),
        ("one message more", |o, (call, at)| {
            let message = o.calls[0][call].up.messages[at].clone();
            o.calls[0][call].up.messages.push(message);
        }),
        ("a word in the log", |o, _| o.log[0].push_str(" few")),
        ("a record", |o, _| {
            o.files.insert("rows".to_owned(), b"121".to_vec());
        }),
    ];
    let mut findings = Vec::new();
    let mut control = |what, may_differ, differences| {
        let messages = messages(plain);
        findings.push(Finding { placement, what, control: true, may_differ, messages, differences });
    };
    for (leak, plant) in leaks {
        let mut other = plain.clone();
        plant(&mut other, vector);
        control(leak, NOTHING, in_any_byte(plain, &other));
        control(leak, PAYLOAD, beside_the_noise(plain, &other));
    }
    // The noised payload is what may differ; a bit of it is seen where nothing may.
    let mut noise = plain.clone();
    let (call, at) = vector;
    if let Some(last) = noise.calls[0][call].up.messages[at].last_mut() {
        *last ^= 1;
    }
    control("a bit of the payload", NOTHING, in_any_byte(plain, &noise));
    Ok(findings)
}

fn messages(outcome: &Outcome) -> usize {
    outcome.calls.iter().flatten().map(|call| call.up.messages.len()).sum()
}

/// One listener for each agent's relay, held from the first run to the last: a port that is let go may be taken.
fn listeners(agents: usize) -> Result<Vec<TcpListener>> {
    let open = |_| {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    (0..agents).map(open).collect()
}

/// Keeps what the coordinator logs.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let line = String::from_utf8_lossy(bytes);
        if line.contains("tabmesh_coordinator") {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(line.into_owned());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Longest time for one run of the loop, which takes some seconds.
const PATIENCE: Duration = Duration::from_secs(600);
/// Vectors of an agent in the loop: four stages of a release and two rounds.
const VECTORS: usize = 6;
const NOTHING: &str = "nothing";
const PAYLOAD: &str = "the noised payload";
