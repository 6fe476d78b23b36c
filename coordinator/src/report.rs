//! The privacy-budget report over all domains, from the ledgers that agents stated.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use tabmesh_federation::manifest::Manifest;
use tabmesh_privacy::ledger::Entry;
use tabmesh_privacy::report::{
    Declaration, DeclaredSource, MAX_ATTACKS, MeasuredAttack, Period, ProductLedger, Published,
    RefusedRequest, ReportInput, SignedDeclaration, SignedHead, UnprotectedFact, build_leaving_out,
};
use tabmesh_privacy::signature::{Signature, VerifyingKey};
use tabmesh_proto::identity::SpiffeId;

use crate::error::CoordinatorError;
use crate::mesh::{Mesh, stored};
use crate::witness;

/// The signed report as JSON, of one product or of all.
///
/// # Errors
/// [`CoordinatorError`] if a mirrored ledger can't be read or doesn't verify.
pub(crate) fn signed(mesh: &Mesh, product: Option<&str>) -> Result<Vec<u8>, CoordinatorError> {
    let now_ms = mesh.now_ms();
    let (mut products, mut agents) = (Vec::new(), Vec::new());
    let mut from_ms = now_ms;
    for (agent, admitted) in mesh.catalog.all() {
        let name = &admitted.contract.name;
        if product.is_some_and(|wanted| wanted != name) {
            continue;
        }
        let (entries, signature) = mesh.mirror.chained(&agent, name)?;
        if entries.is_empty() {
            continue;
        }
        if let Some(first) = entries.first().and_then(|entry| Entry::from_json(&entry.payload).ok()) {
            from_ms = from_ms.min(first.time_ms());
        }
        let head = signature.map(|signature| SignedHead {
            signature: Signature::from_bytes(signature),
            public_key: VerifyingKey::from_bytes(admitted.public_key),
        });
        agents.push(agent.clone());
        products.push(ProductLedger { agent: agent.to_string(), product: name.clone(), entries, head });
    }
    if let Some(wanted) = product.filter(|_| products.is_empty()) {
        return Err(CoordinatorError::NotFound { what: "ledger of product", id: wanted.to_owned() });
    }
    let refused = refused(mesh, product)?;
    let mut entries: Vec<u64> = refused.iter().map(|(index, _)| *index).collect();
    let published = published(mesh)?;
    entries.extend(publications(mesh, &published)?);
    entries.sort_unstable();
    let (mut report, left_out) = build_leaving_out(ReportInput {
        deployment: mesh.config.deployment.clone(),
        period: Period { from_ms, until_ms: now_ms.saturating_add(1) },
        generated_at_ms: now_ms,
        generator: format!("tabmesh-coordinator {}", env!("CARGO_PKG_VERSION")),
        generator_digest: own_digest(),
        stated: mesh.config.stated.clone(),
        published,
        attacks: mesh.config.attacks.as_deref().map(attacks).transpose()?.unwrap_or_default(),
        trust_model: trust_model(&products),
        products,
        refused: refused.into_iter().map(|(_, request)| request).collect(),
        disjoint: disjoint(&mesh.config.disjoint, &agents)?,
        unprotected_facts: UnprotectedFact::ALL.to_vec(),
        audit: witness::of_report(mesh, &agents, &entries)?,
    })
    .map_err(|error| CoordinatorError::Step(format!("the report can't be built: {error}")))?;
    for (_, error) in left_out {
        let line =
            format!("A declaration of disjoint sources is left out, and their losses add up: {error}.");
        tracing::warn!("report: {line} tabmesh-agent disjoint writes a new one");
        report.trust_model.push(line);
    }
    Ok(report.sign(&mesh.signing_key).to_json().into_bytes())
}

/// What plans published, oldest first.
fn published(mesh: &Mesh) -> Result<Vec<Published>, CoordinatorError> {
    let mut all = Vec::new();
    for (digest, manifest) in mesh.plans.published() {
        let bytes = mesh.blobs.get(&stored(manifest))?;
        let read: Manifest = serde_json::from_slice(&bytes).map_err(CoordinatorError::stored("manifest"))?;
        let (manifest, plan_digest) = (manifest.to_string(), digest.to_string());
        all.push(Published { manifest, plan_digest, created_at_ms: read.created_ms });
    }
    all.sort_by(|a, b| (a.created_at_ms, &a.manifest).cmp(&(b.created_at_ms, &b.manifest)));
    Ok(all)
}

/// Attacks on record in a file, checked.
fn attacks(path: &Path) -> Result<Vec<MeasuredAttack>, CoordinatorError> {
    let refused = |reason: String| CoordinatorError::Attacks { path: path.to_owned(), reason };
    let bytes = std::fs::read(path).map_err(|error| refused(error.to_string()))?;
    let all: Vec<MeasuredAttack> =
        serde_json::from_slice(&bytes).map_err(|error| refused(error.to_string()))?;
    if all.len() > MAX_ATTACKS {
        return Err(refused(format!("expected at most {MAX_ATTACKS} attacks, got {}", all.len())));
    }
    for (i, attack) in all.iter().enumerate() {
        if let Some(fault) = attack.fault() {
            return Err(refused(format!("attack {i}: {fault}")));
        }
    }
    Ok(all)
}

/// Reads a file of two owners' declaration. Both have signed it; by which keys is for the report to hold against their ledgers.
///
/// # Errors
/// [`CoordinatorError::Disjoint`] with the file and what is wrong.
pub(crate) fn declaration(path: &Path) -> Result<(SignedDeclaration, Declaration), CoordinatorError> {
    let refused = |reason: String| CoordinatorError::Disjoint { path: path.to_owned(), reason };
    let bytes = std::fs::read(path).map_err(|error| refused(error.to_string()))?;
    let signed = SignedDeclaration::parse(&bytes).map_err(|error| refused(error.to_string()))?;
    let as_stated = |agent: &str| {
        let own = signed.signatures.iter().find(|signature| signature.agent == agent);
        own.map(|signature| signature.public_key)
    };
    let said = signed.counted(as_stated).map_err(|error| refused(error.to_string()))?;
    Ok((signed, said))
}

/// Declarations of disjoint sources between agents of the report; the report itself leaves out those that don't count.
fn disjoint(files: &[PathBuf], agents: &[SpiffeId]) -> Result<Vec<SignedDeclaration>, CoordinatorError> {
    let mut counted = Vec::new();
    for path in files {
        let (signed, said) = declaration(path)?;
        let in_report =
            |source: &DeclaredSource| agents.iter().any(|agent| agent.to_string() == source.agent);
        if said.sources.iter().all(in_report) {
            counted.push(signed);
        }
    }
    Ok(counted)
}

/// Plans that policy refused when they were handed in, with their places in the audit log; of one product or of all.
fn refused(mesh: &Mesh, product: Option<&str>) -> Result<Vec<(u64, RefusedRequest)>, CoordinatorError> {
    let mut all = Vec::new();
    each_entry(mesh, PLAN_REFUSED, |index, read| {
        let facts: PlanRefusal =
            serde_json::from_value(read.facts).map_err(CoordinatorError::stored("refusal of a plan"))?;
        if product.is_none_or(|wanted| wanted == facts.product) {
            let PlanRefusal { plan_digest, product, rules, .. } = facts;
            all.push((index, RefusedRequest { time_ms: read.time_ms, plan_digest, product, rules }));
        }
        Ok(())
    })?;
    Ok(all)
}

/// Places of these publications in the audit log.
fn publications(mesh: &Mesh, published: &[Published]) -> Result<Vec<u64>, CoordinatorError> {
    let mut all = Vec::new();
    each_entry(mesh, PUBLISHED, |index, read| {
        let manifest = read.facts.get("manifest").and_then(|manifest| manifest.as_str());
        if published.iter().any(|line| Some(line.manifest.as_str()) == manifest) {
            all.push(index);
        }
        Ok(())
    })?;
    Ok(all)
}

/// Calls `f` with the place and content of each entry of an action, oldest first.
fn each_entry(
    mesh: &Mesh,
    action: &str,
    mut f: impl FnMut(u64, AuditEntry) -> Result<(), CoordinatorError>,
) -> Result<(), CoordinatorError> {
    for (index, entry) in (0_u64..).zip(mesh.audit_log().entries()) {
        let read: AuditEntry =
            serde_json::from_slice(&entry?.payload).map_err(CoordinatorError::stored("audit entry"))?;
        if read.action == action {
            f(index, read)?;
        }
    }
    Ok(())
}

/// An entry of the audit log as it is read back.
#[derive(Deserialize)]
pub(crate) struct AuditEntry {
    pub(crate) time_ms: i64,
    pub(crate) action: String,
    pub(crate) facts: serde_json::Value,
}

/// What the audit log says of a plan that policy refused.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct PlanRefusal {
    /// Digest of the plan.
    pub(crate) plan_digest: String,
    /// The product whose contract it doesn't fit.
    pub(crate) product: String,
    /// Rules that refused it.
    pub(crate) rules: Vec<String>,
    /// The whole decision.
    pub(crate) decision: serde_json::Value,
}

/// Name of that entry.
pub(crate) const PLAN_REFUSED: &str = "plan_refused";
/// Name of the entry that a publication leaves.
pub(crate) const PUBLISHED: &str = "publish";

/// SHA-256 of this program's file, read once; none where the system doesn't tell which file it is.
fn own_digest() -> Option<String> {
    static KNOWN: OnceLock<Option<String>> = OnceLock::new();
    let read = || {
        let bytes = std::fs::read(std::env::current_exe().ok()?).ok()?;
        Some(tabmesh_store::Digest::of(&bytes).to_string())
    };
    KNOWN.get_or_init(read).clone()
}

/// Who is trusted for what, in sentences; the debits say which noise there was.
fn trust_model(products: &[ProductLedger]) -> Vec<String> {
    let commits = products.iter().flat_map(|product| &product.entries).filter_map(|entry| {
        match Entry::from_json(&entry.payload) {
            Ok(Entry::Commit(commit)) => Some(commit.event.shares.is_some()),
            _ => None,
        }
    });
    let placements: BTreeSet<bool> = commits.collect();
    let mut lines = vec![AGENTS];
    if placements != BTreeSet::from([true]) {
        lines.push(LOCAL_NOISE);
    }
    if placements.contains(&true) {
        lines.extend(SECURE_SUMS);
    }
    lines.push(STATED);
    lines.into_iter().map(str::to_owned).collect()
}

const AGENTS: &str =
    "Each agent is trusted by its own domain alone: it reads the rows, adds the noise and keeps the ledger.";
const LOCAL_NOISE: &str = "Under local noise nobody has to trust the coordinator or the others' noise: every vector is differentially private in \
     full before it leaves its domain. The coordinator sees each domain's noised vector.";
const SECURE_SUMS: [&str; 2] = [
    "In a secure sum the coordinator is trusted with nothing but to deliver: it sees masked vectors and their sum, and agents \
     sign who is in the sum before they unmask it.",
    "In a secure sum each agent trusts that, beside the coordinator, no more of the others collude than the debit names, \
     and that the identity keys in its own list of peers are theirs.",
];
const STATED: &str = "The figures below are the agents' own statements; the coordinator checked that each ledger only ever grew.";
