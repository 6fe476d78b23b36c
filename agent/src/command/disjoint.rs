//! `tabmesh-agent disjoint`: an owner's signed word that no unit is in its source and in another domain's.
//!
//! One owner declares, the other signs the same file; the coordinator's `disjoint:` names it. Nothing is sent from here, and no
//! budget is enforced by it: the totals that reports print of a namespace become smaller.

use std::path::Path;
use std::process::ExitCode;

use anstream::println;
use miette::{IntoDiagnostic, WrapErr, miette};
use tabmesh_privacy::ledger::{AccountKey, replay};
use tabmesh_privacy::report::{Declaration, DeclaredSource, SignedDeclaration};

use crate::domain::Domain;
use crate::{Local, books, files};

/// Writes a declaration that this agent signed.
pub(crate) fn declare(
    local: &Local,
    agent: &str,
    lineage: &str,
    reason: &str,
    file: &Path,
    now_ms: i64,
) -> miette::Result<ExitCode> {
    let own = account(&local.domain)?;
    let sources = [
        DeclaredSource { agent: local.domain.identity.to_string(), lineage: own.lineage },
        DeclaredSource { agent: agent.to_owned(), lineage: lineage.to_owned() },
    ];
    let said =
        Declaration::new(own.entity_namespace, sources, reason.to_owned(), now_ms).into_diagnostic()?;
    if file.exists() {
        return Err(miette!("{} exists; a declaration isn't overwritten", file.display()));
    }
    keep(&local.domain, SignedDeclaration::unsigned(&said), file)
}

/// Adds this agent's signature to a declaration.
pub(crate) fn sign(local: &Local, file: &Path) -> miette::Result<ExitCode> {
    let bytes = std::fs::read(file).into_diagnostic().wrap_err_with(|| file.display().to_string())?;
    let signed =
        SignedDeclaration::parse(&bytes).into_diagnostic().wrap_err_with(|| file.display().to_string())?;
    let said = signed.said().into_diagnostic()?;
    let (own, identity) = (account(&local.domain)?, local.domain.identity.to_string());
    // Whoever owns neither source is refused by the signing itself.
    if let Some(source) = said.sources.iter().find(|source| source.agent == identity)
        && (&source.lineage, &said.entity_namespace) != (&own.lineage, &own.entity_namespace)
    {
        return Err(miette!(
            "{}: names {:?} of namespace {:?} as this agent's source, its ledger counts {:?} of {:?}",
            file.display(),
            source.lineage,
            said.entity_namespace,
            own.lineage,
            own.entity_namespace
        ));
    }
    keep(&local.domain, signed, file)
}

fn keep(domain: &Domain, signed: SignedDeclaration, file: &Path) -> miette::Result<ExitCode> {
    let signed = signed.sign(&domain.identity.to_string(), &domain.signer).into_diagnostic()?;
    let said = signed.said().into_diagnostic()?;
    let text = format!("{}\n", signed.to_json());
    files::replace(file, text.as_bytes())
        .into_diagnostic()
        .wrap_err_with(|| format!("writing {}", file.display()))?;
    println!("no unit of {:?} is in both of", said.entity_namespace);
    for source in &said.sources {
        let has = signed.signatures.iter().any(|signature| signature.agent == source.agent);
        println!(
            "  {} of {}: {}",
            source.lineage,
            source.agent,
            if has { "signed" } else { "NOT SIGNED YET" }
        );
    }
    println!("because: {}", said.reason);
    println!(
        "wrote {}; it counts once both have signed and the coordinator's `disjoint:` names it",
        file.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// The account that the ledger charges for this product; what it is called there survives renames of the table.
fn account(domain: &Domain) -> miette::Result<AccountKey> {
    let entries = books::read_entries(&domain.config.data_dir.join("books"))
        .into_diagnostic()
        .wrap_err("the ledger can't be read; has this agent run yet?")?;
    let state = replay(&entries).into_diagnostic()?;
    let product = &domain.contract.name;
    let account = state.account_of(product).map(|(key, _)| key.clone());
    account.ok_or_else(|| miette!("the ledger holds no grant for {product}; has this agent run yet?"))
}
