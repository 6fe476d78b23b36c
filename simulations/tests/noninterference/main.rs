//! Non-interference: the whole loop on neighbouring tables with equal seeds differs in nothing but the noised payload.
//!
//! Agents and a coordinator run in this process over mutual TLS, once with local noise and once with secure sums; a relay
//! sees what each agent says and hears. Where
//! the tables differ in a gate row alone, which only the choice of the served model sees, every byte everywhere must be
//! equal. Where they differ in a training row, in all labels or in all rows, what differs must be the noised vectors
//! and what is computed from them: equal numbers of calls, messages and status codes, equal sizes, equal contents.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test stops at the first surprise")]

mod mesh;
mod said;
mod tap;

use std::io::Write;
use std::net::TcpListener;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use tabmesh_federation::descriptor::RoundDescriptor;
use tabmesh_federation::secagg::document::Request;
use tabmesh_privacy::release::ReleaseQuery;
use tabmesh_sim::quickstart::{deployment, pki};
use tracing_subscriber::fmt::MakeWriter;

use crate::mesh::{Outcome, Placement, Table};
use crate::said::{Said, fields, said};
use crate::tap::Call;

/// The plain table, and those that are compared with it.
const ALL: [Table; 6] =
    [Table::Plain, Table::OneMoreAtTheGate, Table::OneMore, Table::OneLess, Table::OneClass, Table::Empty];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neighbouring_tables_differ_in_nothing_but_the_noised_payload() {
    compared(Placement::Local, &ALL).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secure_sums_of_neighbouring_tables_differ_in_nothing_but_the_masked_payload() {
    compared(Placement::SecureSum, &ALL).await;
}

/// Runs the loop on each table, the plain one first, and compares the others with it.
async fn compared(placement: Placement, tables: &[Table]) {
    // What the coordinator logs is one stream of this process, so the tests take turns.
    static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    static LOG: LazyLock<Log> = LazyLock::new(|| {
        let log = Log::default();
        tracing_subscriber::fmt().without_time().with_ansi(false).with_writer(log.clone()).init();
        log
    });
    let _turn = TURN.lock().await;
    let log = LOG.clone();
    let root = tempfile::tempdir().unwrap();
    let now = time::OffsetDateTime::now_utc();
    let mut outcomes = Vec::new();
    let listeners = listeners(placement.agents());
    let certificates = root.path().join("certs");
    let pki = pki::write(&certificates, &deployment::roles(), now).unwrap();
    for (number, table) in tables.iter().copied().enumerate() {
        // Each run has its folder; all share the certificates.
        let folder = root.path().join(format!("run-{number}"));
        std::fs::create_dir_all(&folder).unwrap();
        std::os::unix::fs::symlink(&certificates, folder.join("certs")).unwrap();
        // The coordinator's clock stands still, so a deadline never passes: a silent agent would be waited for forever.
        let run =
            tokio::time::timeout(PATIENCE, mesh::run(&folder, &pki, &listeners, placement, table, &log.0))
                .await;
        let run = run.unwrap_or_else(|_| {
            panic!("{placement:?}, {table:?}: the loop does not end; is an agent silent?")
        });
        outcomes.push((table, run));
    }
    let (_, plain) = &outcomes[0];
    assert!(plain.calls.iter().all(|calls| vectors(calls).len() == 6), "four stages and two rounds each");
    assert!(plain.calls.iter().all(|calls| calls.iter().any(cosigns)), "every agent witnesses the audit log");
    for (table, other) in &outcomes[1..] {
        match table {
            Table::OneMoreAtTheGate => all_equal(plain, other),
            _ => equal_but_for_the_noise(plain, other, *table),
        }
    }
    leaks_are_seen(plain);
    let differs =
        outcomes[2..].iter().filter(|(_, other)| vectors(&other.calls[0]) != vectors(&plain.calls[0]));
    assert_eq!(
        differs.count(),
        tables.len() - 2,
        "the tables must show in the noised payload, or this test sees nothing"
    );
}

/// Longest time for one run of the loop, which takes some seconds.
const PATIENCE: Duration = Duration::from_secs(600);

/// One listener for each agent's relay, held from the first run to the last: a port that is let go may be taken.
fn listeners(agents: usize) -> Vec<TcpListener> {
    let open = |_| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    };
    (0..agents).map(open).collect()
}

/// Plants a leak in what a loop left behind; the place is that of a vector among the first agent's calls and their messages.
type Plant = fn(&mut Outcome, (usize, usize));

/// What an agent or a coordinator that leaks would leave behind, planted one at a time: each is seen by both comparisons, or
/// by the stricter one alone where it is inside the noised payload.
fn leaks_are_seen(plain: &Outcome) {
    let seen = |compare: fn(&Outcome, &Outcome), other: &Outcome| {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| compare(plain, other))).is_err()
    };
    fn loose(plain: &Outcome, other: &Outcome) {
        equal_but_for_the_noise(plain, other, Table::OneMore);
    }
    assert!(!seen(all_equal, plain) && !seen(loose, plain), "a loop differs from itself");
    let vector = |outcome: &Outcome| {
        let calls = outcome.calls[0].iter().enumerate();
        let mut places = calls.flat_map(|(call, said)| (0..said.up.messages.len()).map(move |at| (call, at)));
        let is_vector = |(call, at): &(usize, usize)| {
            matches!(said(&outcome.calls[0][*call].up.messages[*at]), Said::Vector { .. })
        };
        places.find(is_vector).unwrap()
    };
    let leaks: [(&str, Plant); 7] = [
        ("one more call", |o, _| {
            let last = o.calls[0].last().unwrap().clone();
            o.calls[0].push(last);
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
    for (leak, plant) in leaks {
        let mut planted = plain.clone();
        plant(&mut planted, vector(plain));
        assert!(seen(all_equal, &planted), "{leak} isn't seen where every byte must be equal");
        assert!(seen(loose, &planted), "{leak} isn't seen beside the noise");
    }
    // The noised payload is what may differ; a bit of it is seen where nothing may.
    let mut noise = plain.clone();
    let (call, at) = vector(plain);
    let last = noise.calls[0][call].up.messages[at].last_mut().unwrap();
    *last ^= 1;
    assert!(seen(all_equal, &noise), "another payload isn't seen where every byte must be equal");
}

/// Every byte on every link, every line logged, every record kept.
fn all_equal(plain: &Outcome, other: &Outcome) {
    for agent in 0..plain.calls.len() {
        assert_eq!(plain.calls[agent].len(), other.calls[agent].len(), "calls of agent {agent}");
        for (call, (a, b)) in plain.calls[agent].iter().zip(&other.calls[agent]).enumerate() {
            assert_eq!(a.up.headers, b.up.headers, "request headers of call {call} of agent {agent}");
            assert_eq!(a.down.headers, b.down.headers, "status of call {call} of agent {agent}");
            // The bytes themselves would fill the screen.
            assert!(a.up.messages == b.up.messages, "call {call} of agent {agent}: it says other bytes");
            assert!(a.down.messages == b.down.messages, "call {call} of agent {agent}: it hears other bytes");
        }
    }
    assert_eq!(plain.log, other.log);
    assert!(plain.files == other.files, "the coordinator keeps other records");
    assert!(plain.report == other.report, "the report has other bytes");
}

fn equal_but_for_the_noise(plain: &Outcome, other: &Outcome, table: Table) {
    for agent in 0..plain.calls.len() {
        let (a, b) = (&plain.calls[agent], &other.calls[agent]);
        assert_eq!(a.len(), b.len(), "{table:?}: calls of agent {agent}");
        for (number, (a, b)) in a.iter().zip(b).enumerate() {
            let place = format!("{table:?}: call {number} of agent {agent}");
            assert_eq!(a.up.headers, b.up.headers, "{place}: request headers");
            assert_eq!(a.down.headers, b.down.headers, "{place}: status");
            let covered = |call: &Call| -> Vec<Said> {
                call.up.messages.iter().map(|m| said(m)).map(length_is_checked_apart).collect()
            };
            assert_eq!(covered(a), covered(b), "{place}: what the agent says");
            if covered(a) != [Said::Fetch] {
                assert_eq!(a.down.messages.len(), b.down.messages.len(), "{place}: answers");
            }
        }
        sizes_are_those_asked_for(&other.calls[agent], &format!("{table:?}, agent {agent}"));
    }
    let words =
        |lines: &[String]| -> Vec<String> { lines.iter().map(|line| without_figures(line)).collect() };
    assert_eq!(words(&plain.log), words(&other.log), "{table:?}: what the coordinator logs");
    assert_eq!(
        plain.files.keys().collect::<Vec<_>>(),
        other.files.keys().collect::<Vec<_>>(),
        "{table:?}: what the coordinator keeps"
    );
}

/// Sizes of later vectors follow from earlier ones; each is held against what was asked.
fn length_is_checked_apart(said: Said) -> Said {
    match said {
        Said::Vector { rest, .. } => Said::Vector { rest, bytes: 0 },
        other => other,
    }
}

/// Whether an agent cosigns a checkpoint in this call.
fn cosigns(call: &Call) -> bool {
    call.up.messages.iter().any(|message| matches!(said(message), Said::Witnessed { cosigned: true, .. }))
}

/// Noised payloads by assignment.
fn vectors(calls: &[Call]) -> Vec<(String, Vec<u8>)> {
    let messages = calls.iter().flat_map(|call| &call.up.messages);
    let vector = |message: &Vec<u8>| {
        matches!(said(message), Said::Vector { .. }).then(|| {
            let fields = fields(message).unwrap();
            let field = |wanted: u64| fields.iter().find(|(n, _)| *n == wanted).unwrap().1.clone();
            (String::from_utf8(field(1)).unwrap(), field(5))
        })
    };
    messages.filter_map(vector).collect()
}

/// Every vector has eight bytes for every cell or coordinate that its assignment asks for.
fn sizes_are_those_asked_for(calls: &[Call], place: &str) {
    let frames = calls.iter().flat_map(|call| &call.down.messages);
    let mut asked = std::collections::BTreeMap::new();
    for frame in frames {
        let Some(assignment) = fields(frame).and_then(|f| f.into_iter().find(|(n, _)| *n == 2)) else {
            continue;
        };
        let Some(assignment) = fields(&assignment.1) else { continue };
        let field = |wanted: u64| assignment.iter().find(|(n, _)| *n == wanted).map(|(_, v)| v.as_slice());
        let (Some(id), Some(document)) = (field(1), field(3)) else { continue };
        // A secure sum's first step says what is summed.
        let document = match Request::from_bytes(document) {
            Ok(Request::Advertise(opening)) => opening.summed.bytes().to_vec(),
            _ => document.to_vec(),
        };
        let document = document.as_slice();
        let query = ReleaseQuery::from_json(document).ok().map(|query| query.cells_total());
        let round = RoundDescriptor::from_bytes(document).ok().map(|descriptor| descriptor.len());
        if let Some(cells) = query.or(round) {
            asked.insert(String::from_utf8(id.to_vec()).unwrap(), cells * 8);
        }
    }
    for (id, payload) in vectors(calls) {
        assert_eq!(Some(&payload.len()), asked.get(&id), "{place}: {id}");
    }
}

/// A line without digests and numbers: those of later steps are computed from the noised counts.
fn without_figures(line: &str) -> String {
    let words =
        line.split(' ').map(|word| if word.contains(|c: char| c.is_ascii_digit()) { "#" } else { word });
    words.collect::<Vec<_>>().join(" ")
}

/// Keeps what the coordinator logs.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let line = String::from_utf8_lossy(bytes);
        if line.contains("tabmesh_coordinator") {
            self.0.lock().unwrap().push(line.into_owned());
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
