//! `tabmesh-coordinator report`: fetches the signed report, writes it, verifies files offline.

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use anstream::println;
use miette::{IntoDiagnostic, WrapErr, miette};
use tabmesh_federation::peers::PeersFile;
use tabmesh_privacy::report::{Report, SignedReport, Verified, render_html, verify};
use tabmesh_privacy::signature::VerifyingKey;
use tabmesh_proto::client::AuditorClient;

use super::files::{read, write};
use crate::cli::{Output, ReportAction};
use crate::witness::{self, Trust, Witnessed};

/// Runs one of the report commands.
pub(crate) async fn run(action: ReportAction) -> miette::Result<ExitCode> {
    match action {
        ReportAction::Write { client, html, json, product } => {
            let auditor = AuditorClient::new(client.connect().await?);
            let bytes = auditor.report_input(product.as_deref()).await.into_diagnostic()?;
            let verified = verify(&bytes, None).into_diagnostic().wrap_err("the coordinator's report")?;
            witness::verify(&verified.report, &verified.key, None).into_diagnostic()?;
            if let Some(path) = &json {
                write(path, &bytes)?;
            }
            if let Some(path) = &html {
                let signed: SignedReport = serde_json::from_slice(&bytes).into_diagnostic()?;
                write(path, render_html(&verified.report, &signed).into_diagnostic()?.as_bytes())?;
            }
            Ok(ExitCode::SUCCESS)
        }
        ReportAction::Schema => {
            println!("{}", serde_json::to_string_pretty(&Report::json_schema()).into_diagnostic()?);
            Ok(ExitCode::SUCCESS)
        }
        ReportAction::Verify { file, key, agents, cosigners, output } => {
            let trust = agents.map(|path| read_trust(&path, cosigners)).transpose()?;
            check(&file, key.as_deref(), trust.as_ref(), output)
        }
    }
}

fn check(file: &Path, key: Option<&Path>, trust: Option<&Trust>, output: Output) -> miette::Result<ExitCode> {
    let bytes = read(file)?;
    let pinned = key.map(read_key).transpose()?;
    let outcome = whole(&bytes, pinned.as_ref(), trust);
    match (&outcome, output) {
        (_, Output::Json) => println!("{}", summary(&outcome)),
        (Ok((verified, witnessed)), Output::Text) => {
            println!("verified: signature, {} hash chains, all totals", verified.report.ledgers.len());
            println!("signed by {}", verified.key);
            match witnessed {
                Some(log) => print_log(log, &verified.report),
                None => println!("audit log: no checkpoint yet; it is witnessed after a plan"),
            }
            if !verified.key_pinned {
                println!(
                    "no key was pinned: anybody could have signed; pass --key with the coordinator's public key"
                );
            }
            if trust.is_none() {
                println!(
                    "no agents' keys were given: the coordinator may have made agents up; pass --agents with the keys \
                     that their operators gave you"
                );
            }
            if verified.report.reproducible {
                println!("REPRODUCIBLE, NOT PRIVATE: noise was drawn from a fixed seed");
            }
        }
        (Err(error), Output::Text) => println!("NOT verified: {error}"),
    }
    Ok(if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

type Whole = Result<(Verified, Option<Witnessed>), Box<dyn Error>>;

/// Everything a report's file can prove: its own signature and figures, and its ledgers' place in the audit log.
fn whole(file: &[u8], pinned: Option<&VerifyingKey>, trust: Option<&Trust>) -> Whole {
    let verified = verify(file, pinned)?;
    let witnessed = witness::verify(&verified.report, &verified.key, trust)?;
    Ok((verified, witnessed))
}

fn print_log(log: &Witnessed, report: &Report) {
    let ledgers = report.ledgers.len();
    println!(
        "audit log of {} entries: cosigned by {} of {ledgers} agents, holds the ends of {} of {ledgers} ledgers",
        log.size,
        log.cosigned.len(),
        log.proven.len()
    );
    let (refused, published) = (report.refused.len(), report.published.len());
    if refused + published > 0 {
        println!(
            "  it holds {} of {refused} refused plans and {} of {published} publications; others came after the checkpoint",
            log.refused, log.published
        );
    }
    for ledger in &report.ledgers {
        let proven = log.proven.get(&ledger.agent).copied().unwrap_or_default();
        let later = (ledger.entries.len() as u64).saturating_sub(proven);
        if later > 0 {
            println!("  {}: {later} entries came after the checkpoint", ledger.agent);
        }
    }
    for agent in &log.without_ledger {
        println!(
            "  {agent}: no ledger in this report: it released nothing, or was left out; ask its operator"
        );
    }
}

fn summary(outcome: &Whole) -> serde_json::Value {
    match outcome {
        Ok((verified, witnessed)) => serde_json::json!({
            "verified": true, "key": verified.key.to_string(), "key_pinned": verified.key_pinned,
            "ledgers": verified.report.ledgers.len(), "signed_heads": verified.signed_heads,
            "reproducible": verified.report.reproducible,
            "audit_log": witnessed.as_ref().map(|log| serde_json::json!({
                "entries": log.size, "root": log.root.to_string(), "cosigned": log.cosigned,
                "proven_entries": log.proven, "proven_refusals": log.refused, "proven_publications": log.published,
                "without_ledger": log.without_ledger,
            })),
        }),
        Err(error) => serde_json::json!({ "verified": false, "error": error.to_string() }),
    }
}

fn read_trust(path: &Path, cosigners: Option<usize>) -> miette::Result<Trust> {
    let text = String::from_utf8(read(path)?)
        .map_err(|error| miette!("{}: expected text: {error}", path.display()))?;
    let agents = PeersFile::keys(&text).map_err(|error| miette!("{}: {error}", path.display()))?;
    if let Some(cosigners) = cosigners.filter(|cosigners| *cosigners > agents.len()) {
        return Err(miette!("--cosigners {cosigners}: {} lists {} agents", path.display(), agents.len()));
    }
    Ok(Trust { agents, cosigners })
}

fn read_key(path: &Path) -> miette::Result<VerifyingKey> {
    let bytes = read(path)?;
    let length = bytes.len();
    let key: [u8; 32] =
        bytes.try_into().map_err(|_| miette!("{}: expected 32 bytes, got {length}", path.display()))?;
    Ok(VerifyingKey::from_bytes(key))
}
