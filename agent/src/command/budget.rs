//! `tabmesh-agent budget`: where the domain's privacy budget stands, and its signed report.

use std::path::Path;
use std::process::ExitCode;

use anstream::println;
use comfy_table::Table;
use miette::{IntoDiagnostic, WrapErr, miette};
use tabmesh_privacy::ledger::Entry;
use tabmesh_privacy::report::{
    Period, ProductLedger, ProductSection, ReportInput, SignedHead, Stated, UnprotectedFact, build,
    render_html,
};
use tabmesh_privacy::signature::SigningKey;

use crate::books;
use crate::cli::Output;
use crate::config::Config;
use crate::domain;

/// Reads the ledger (without locking a running agent out) and shows or writes the report.
pub(crate) fn run(
    config: &Config,
    html: Option<&Path>,
    json: Option<&Path>,
    output: Output,
    now_ms: i64,
) -> miette::Result<ExitCode> {
    let (contract, _) = domain::read_contract(&config.contract)?;
    let entries = books::read_entries(&config.data_dir.join("books"))
        .into_diagnostic()
        .wrap_err("the ledger can't be read; has this agent run yet?")?;
    let first_ms = entries
        .first()
        .and_then(|entry| Entry::from_json(&entry.payload).ok())
        .map_or(now_ms, |entry| entry.time_ms());
    let pkcs8 = std::fs::read(&config.signing_key)
        .into_diagnostic()
        .wrap_err_with(|| format!("signing key {}", config.signing_key.display()))?;
    let key = SigningKey::from_pkcs8(&pkcs8).into_diagnostic()?;
    let agent = format!("agent {}/{}", config.domain, config.name);
    let head = entries.last().map(|head| SignedHead::sign(&key, &agent, head));
    let report = build(ReportInput {
        deployment: format!("{} (the domain's own view)", config.domain),
        period: Period { from_ms: first_ms, until_ms: now_ms.saturating_add(1) },
        generated_at_ms: now_ms,
        generator: format!("tabmesh-agent {}", env!("CARGO_PKG_VERSION")),
        generator_digest: None,
        // What the deployment states, published and was attacked with is the coordinator's to say.
        stated: Stated::default(),
        published: Vec::new(),
        attacks: Vec::new(),
        trust_model: vec!["This report is the agent's own reading of its own ledger.".to_owned()],
        products: vec![ProductLedger { agent, product: contract.name, entries, head }],
        // What the coordinator refused, no agent saw; what owners declare together concerns more ledgers than this one.
        refused: Vec::new(),
        disjoint: Vec::new(),
        unprotected_facts: UnprotectedFact::ALL.to_vec(),
        // The log is the coordinator's; its report has the proof.
        audit: None,
    })
    .into_diagnostic()?;
    let signed = report.sign(&key);
    if let Some(path) = json {
        write(path, signed.to_json().as_bytes())?;
    }
    if let Some(path) = html {
        write(path, render_html(&report, &signed).into_diagnostic()?.as_bytes())?;
    }
    let section =
        report.products.first().ok_or_else(|| miette!("the ledger holds no grant for this product"))?;
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(section).into_diagnostic()?),
        Output::Text => print(section, report.reproducible),
    }
    Ok(ExitCode::SUCCESS)
}

fn print(section: &ProductSection, reproducible: bool) {
    let figure = |epsilon: Option<tabmesh_privacy::budget::Epsilon>| {
        epsilon.map_or_else(|| "0".to_owned(), |e| format!("{:.4}", e.get()))
    };
    println!("{}: one {}, {}", section.product, section.unit, section.adjacency);
    let mut table = Table::new();
    table.set_header(["", "epsilon", "rho"]);
    table.add_row(["granted".into(), section.granted.epsilon.to_string(), section.granted.rho.to_string()]);
    for (name, spending) in [
        ("spent", &section.spent),
        ("spent or reserved", &section.charged),
        ("left, if spent alone", &section.left),
        ("releases alone", &section.by_step.release),
        ("rounds alone", &section.by_step.rounds),
    ] {
        table.add_row([name.to_owned(), figure(spending.epsilon), spending.rho.to_string()]);
    }
    println!("{table}");
    println!("delta {}; granted by {}", section.granted.delta, section.granted.signer);
    if let Some(window) = &section.granted.window {
        println!(
            "within any {} days: epsilon {} (rho {}); in those that end now epsilon {} is spent (rho {}), rho {} is left",
            window.days(),
            window.epsilon,
            window.rho,
            figure(window.spent.epsilon),
            window.spent.rho,
            window.left
        );
        println!(
            "nothing spent is ever given back: over the lifetime epsilon is {}",
            figure(section.spent.epsilon)
        );
    }
    println!("{}", section.odds_spent.sentence());
    if reproducible {
        println!("REPRODUCIBLE, NOT PRIVATE: noise was drawn from a fixed seed");
    }
}

fn write(path: &Path, bytes: &[u8]) -> miette::Result<()> {
    crate::files::replace(path, bytes).into_diagnostic().wrap_err_with(|| path.display().to_string())
}
