//! `tabmesh-agent promotion`: what this agent serves, why, and what else it could have served. Read from local records.

use std::process::ExitCode;

use anstream::println;
use comfy_table::{CellAlignment, Table};
use miette::{IntoDiagnostic, WrapErr, miette};

use crate::choose::Promotion;
use crate::cli::Output;
use crate::config::Config;
use crate::serving::PROMOTIONS;

/// Shows the last promotion.
pub(crate) fn run(config: &Config, output: Output) -> miette::Result<ExitCode> {
    let path = config.data_dir.join(PROMOTIONS);
    let text = std::fs::read_to_string(&path)
        .into_diagnostic()
        .wrap_err_with(|| format!("{}: has this agent promoted a model yet?", path.display()))?;
    let line = text.lines().last().ok_or_else(|| miette!("{} is empty", path.display()))?;
    let promotion: Promotion = serde_json::from_str(line)
        .into_diagnostic()
        .wrap_err_with(|| format!("{}: the last record is not one of this version", path.display()))?;
    match output {
        Output::Json => println!("{}", serde_json::to_string_pretty(&promotion).into_diagnostic()?),
        Output::Text => print(&promotion),
    }
    Ok(ExitCode::SUCCESS)
}

fn print(promotion: &Promotion) {
    let Promotion {
        manifest,
        served,
        calibration,
        reason,
        gate_rows,
        gate_minority,
        gate_uses,
        log_loss,
        ..
    } = promotion;
    println!("publication {manifest}");
    println!("{reason}");
    let mut table = Table::new();
    table.set_header(["", "weight", "log loss at the gate"]);
    let loss_of = |name: &str| log_loss.iter().find(|(known, _)| known == name).map(|(_, loss)| *loss);
    let figure = |loss: Option<f64>| loss.map_or_else(|| "-".to_owned(), |loss| format!("{loss:.4}"));
    for share in &served.shares {
        let name = share.member.to_string();
        let loss = figure(loss_of(&name));
        table.add_row([name, format!("{:.3}", share.weight), loss]);
    }
    for (name, loss) in log_loss {
        if !served.shares.iter().any(|share| share.member.to_string() == *name) {
            table.add_row([name.clone(), "-".to_owned(), figure(Some(*loss))]);
        }
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{table}");
    println!("calibrated with slope {:.3}, intercept {:.3}", calibration.slope, calibration.intercept);
    println!(
        "{gate_rows} gate rows, {gate_minority} units of the rarer class among them; chosen on before: {gate_uses} times"
    );
}
