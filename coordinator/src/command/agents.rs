//! `tabmesh-coordinator agents`: who is admitted, and who is connected.

use std::process::ExitCode;

use anstream::println;
use comfy_table::Table;
use miette::IntoDiagnostic;
use tabmesh_proto::client::OperatorClient;

use super::client::Client;
use crate::cli::Output;

/// Lists admitted agents.
pub(crate) async fn run(client: &Client, output: Output) -> miette::Result<ExitCode> {
    let operator = OperatorClient::new(client.connect().await?);
    let agents = operator.list_agents().await.into_diagnostic()?;
    match output {
        Output::Json => {
            let list: Vec<_> = agents
                .iter()
                .map(|agent| {
                    serde_json::json!({
                        "spiffe_id": agent.spiffe_id.to_string(),
                        "connected": agent.connected,
                        "version": agent.product_version,
                        "last_seen_ms": agent.last_seen_ms,
                        "products": agent.products,
                    })
                })
                .collect();
            println!("{}", serde_json::to_string_pretty(&list).into_diagnostic()?);
        }
        Output::Text => {
            let mut table = Table::new();
            table.set_header(["agent", "products", "connected", "version"]);
            for agent in &agents {
                table.add_row([
                    agent.spiffe_id.to_string(),
                    agent.products.join(", "),
                    if agent.connected { "yes" } else { "no" }.to_owned(),
                    agent.product_version.clone(),
                ]);
            }
            println!("{table}");
        }
    }
    Ok(ExitCode::SUCCESS)
}
