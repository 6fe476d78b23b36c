//! What two loops differ in: every byte, or everything but the noised payload and what is computed from it.

use std::collections::BTreeMap;

use tabmesh_federation::descriptor::RoundDescriptor;
use tabmesh_federation::secagg::document::Request;
use tabmesh_privacy::release::ReleaseQuery;

use super::mesh::Outcome;
use super::said::{Said, fields, said};
use super::tap::Call;

/// Differences by place, up to [`MOST_TOLD`] of them.
#[derive(Debug, Default)]
pub(super) struct Differences(Vec<String>);

impl Differences {
    /// What was found.
    pub(super) fn into_places(self) -> Vec<String> {
        self.0
    }

    fn expect(&mut self, equal: bool, place: impl FnOnce() -> String) {
        if !equal && self.0.len() < MOST_TOLD {
            self.0.push(place());
        }
    }
}

/// Every byte on every link, every line logged, every record kept.
pub(super) fn in_any_byte(plain: &Outcome, other: &Outcome) -> Vec<String> {
    let mut found = Differences::default();
    found.expect(plain.calls.len() == other.calls.len(), || "agents".to_owned());
    for (agent, (a, b)) in plain.calls.iter().zip(&other.calls).enumerate() {
        found.expect(a.len() == b.len(), || format!("agent {agent}: number of calls"));
        for (call, (a, b)) in a.iter().zip(b).enumerate() {
            for (same, what) in [
                (a.up.headers == b.up.headers, "request headers"),
                (a.down.headers == b.down.headers, "status"),
                (a.up.messages == b.up.messages, "what it says"),
                (a.down.messages == b.down.messages, "what it hears"),
            ] {
                found.expect(same, || format!("agent {agent}, call {call}: {what}"));
            }
        }
    }
    found.expect(plain.log == other.log, || "the coordinator's log".to_owned());
    found.expect(plain.files == other.files, || "the coordinator's audit log or mirrored ledgers".to_owned());
    found.expect(plain.report == other.report, || "the report".to_owned());
    found.into_places()
}

/// Numbers of calls, messages and status codes, sizes, and contents outside the noised payload.
pub(super) fn beside_the_noise(plain: &Outcome, other: &Outcome) -> Vec<String> {
    let mut found = Differences::default();
    found.expect(plain.calls.len() == other.calls.len(), || "agents".to_owned());
    for (agent, (a, b)) in plain.calls.iter().zip(&other.calls).enumerate() {
        found.expect(a.len() == b.len(), || format!("agent {agent}: number of calls"));
        for (call, (a, b)) in a.iter().zip(b).enumerate() {
            let covered = |call: &Call| -> Vec<Said> {
                call.up.messages.iter().map(|m| said(m)).map(length_is_checked_apart).collect()
            };
            let fetch = covered(a) == [Said::Fetch];
            for (same, what) in [
                (a.up.headers == b.up.headers, "request headers"),
                (a.down.headers == b.down.headers, "status"),
                (covered(a) == covered(b), "what it says"),
                (fetch || a.down.messages.len() == b.down.messages.len(), "number of answers"),
            ] {
                found.expect(same, || format!("agent {agent}, call {call}: {what}"));
            }
        }
    }
    for (agent, calls) in other.calls.iter().enumerate() {
        for id in sizes_not_asked_for(calls) {
            found.expect(false, || format!("agent {agent}: size of the vector for {id}"));
        }
    }
    let words =
        |lines: &[String]| -> Vec<String> { lines.iter().map(|line| without_figures(line)).collect() };
    found.expect(words(&plain.log) == words(&other.log), || "the coordinator's log".to_owned());
    found.expect(plain.files.keys().eq(other.files.keys()), || {
        "the names of the coordinator's files".to_owned()
    });
    found.into_places()
}

/// Sizes of later vectors follow from earlier ones; each is held against what was asked.
fn length_is_checked_apart(said: Said) -> Said {
    match said {
        Said::Vector { rest, .. } => Said::Vector { rest, bytes: 0 },
        other => other,
    }
}

/// Whether an agent cosigns a checkpoint in this call.
pub(super) fn cosigns(call: &Call) -> bool {
    call.up.messages.iter().any(|message| matches!(said(message), Said::Witnessed { cosigned: true, .. }))
}

/// Noised payloads by assignment.
pub(super) fn vectors(calls: &[Call]) -> Vec<(String, Vec<u8>)> {
    let messages = calls.iter().flat_map(|call| &call.up.messages);
    let vector = |message: &Vec<u8>| {
        if !matches!(said(message), Said::Vector { .. }) {
            return None;
        }
        let fields = fields(message)?;
        let field = |wanted: u64| fields.iter().find(|(n, _)| *n == wanted).map(|(_, bytes)| bytes.clone());
        Some((String::from_utf8(field(1)?).ok()?, field(5)?))
    };
    messages.filter_map(vector).collect()
}

/// Vectors that don't have eight bytes for every cell or coordinate that their assignment asks for.
fn sizes_not_asked_for(calls: &[Call]) -> Vec<String> {
    let frames = calls.iter().flat_map(|call| &call.down.messages);
    let mut asked = BTreeMap::new();
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
        let query = ReleaseQuery::from_json(&document).ok().map(|query| query.cells_total());
        let round = RoundDescriptor::from_bytes(&document).ok().map(|descriptor| descriptor.len());
        if let (Some(cells), Ok(id)) = (query.or(round), String::from_utf8(id.to_vec())) {
            asked.insert(id, cells * 8);
        }
    }
    let wrong = |(id, payload): &(String, Vec<u8>)| asked.get(id) != Some(&payload.len());
    vectors(calls).into_iter().filter(wrong).map(|(id, _)| id).collect()
}

/// A line without digests and numbers: those of later steps are computed from the noised counts.
fn without_figures(line: &str) -> String {
    let words =
        line.split(' ').map(|word| if word.contains(|c: char| c.is_ascii_digit()) { "#" } else { word });
    words.collect::<Vec<_>>().join(" ")
}

/// Differences told of one comparison.
const MOST_TOLD: usize = 20;
