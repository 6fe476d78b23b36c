//! The privacy-budget report over all domains, from the ledgers that agents stated.

use tabmesh_privacy::ledger::{ChainedEntry, Entry};
use tabmesh_privacy::report::{Period, ProductLedger, ReportInput, SignedHead, UnprotectedFact, build};
use tabmesh_privacy::signature::{Signature, VerifyingKey};

use crate::error::CoordinatorError;
use crate::mesh::Mesh;

/// The signed report as JSON, of one product or of all.
///
/// # Errors
/// [`CoordinatorError`] if a mirrored ledger can't be read or doesn't verify.
pub(crate) fn signed(mesh: &Mesh, product: Option<&str>) -> Result<Vec<u8>, CoordinatorError> {
    let now_ms = mesh.now_ms();
    let mut products = Vec::new();
    let mut from_ms = now_ms;
    for (agent, admitted) in mesh.catalog.all() {
        let name = &admitted.contract.name;
        if product.is_some_and(|wanted| wanted != name) {
            continue;
        }
        let (entries, signature) = mesh.mirror.entries(&agent, name)?;
        if entries.is_empty() {
            continue;
        }
        let entries: Vec<ChainedEntry> = entries
            .into_iter()
            .map(|entry| ChainedEntry {
                seq: entry.seq,
                prev: *entry.prev.as_bytes(),
                hash: *entry.hash.as_bytes(),
                payload: entry.payload,
            })
            .collect();
        if let Some(first) = entries.first().and_then(|entry| Entry::from_json(&entry.payload).ok()) {
            from_ms = from_ms.min(first.time_ms());
        }
        let head = signature.map(|signature| SignedHead {
            signature: Signature::from_bytes(signature),
            public_key: VerifyingKey::from_bytes(admitted.public_key),
        });
        products.push(ProductLedger { agent: agent.to_string(), product: name.clone(), entries, head });
    }
    if let Some(wanted) = product.filter(|_| products.is_empty()) {
        return Err(CoordinatorError::NotFound { what: "ledger of product", id: wanted.to_owned() });
    }
    let report = build(ReportInput {
        deployment: mesh.config.deployment.clone(),
        period: Period { from_ms, until_ms: now_ms.saturating_add(1) },
        generated_at_ms: now_ms,
        generator: format!("tabmesh-coordinator {}", env!("CARGO_PKG_VERSION")),
        trust_model: TRUST_MODEL.iter().map(|&line| line.to_owned()).collect(),
        products,
        refused: Vec::new(),
        unprotected_facts: UnprotectedFact::ALL.to_vec(),
    })
    .map_err(|error| CoordinatorError::Step(format!("the report can't be built: {error}")))?;
    Ok(report.sign(&mesh.signing_key).to_json().into_bytes())
}

/// Who is trusted for what, in sentences.
const TRUST_MODEL: [&str; 4] = [
    "Each agent is trusted by its own domain alone: it reads the rows, adds the noise and keeps the ledger.",
    "The coordinator is not trusted with rows: every vector is differentially private before it leaves its domain.",
    "Noise is added in each agent, so nobody has to trust the others' noise; the coordinator sees each domain's vector.",
    "The figures below are the agents' own statements; the coordinator checked that each ledger only ever grew.",
];
