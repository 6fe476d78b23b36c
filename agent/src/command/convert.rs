//! `tabmesh-agent convert`: a contract in the Open Data Contract Standard's form.
//!
//! The document written has the meaning of the one read: it is parsed again before anything is written.

use std::path::Path;
use std::process::ExitCode;

use anstream::print;
use miette::{IntoDiagnostic, WrapErr, miette};
use tabmesh_contract::contract::Contract;

use crate::{domain, files};

/// Writes the document to a file, or to standard output.
pub(crate) fn run(contract_path: &Path, output: Option<&Path>) -> miette::Result<ExitCode> {
    let (contract, _) = domain::read_contract(contract_path)?;
    let yaml = contract.odcs().to_yaml().map_err(|reason| miette!("writing the document: {reason}"))?;
    let (again, _) =
        Contract::parse("the converted contract", &yaml).map_err(|error| miette!("{}", error.render()))?;
    if (&again.columns, &again.privacy) != (&contract.columns, &contract.privacy) {
        return Err(miette!("the converted contract would not mean the same; nothing was written"));
    }
    match output {
        None => print!("{yaml}"),
        Some(path) => {
            files::replace(path, yaml.as_bytes())
                .into_diagnostic()
                .wrap_err_with(|| format!("writing {}", path.display()))?;
            eprintln!("wrote {}", path.display());
        }
    }
    Ok(ExitCode::SUCCESS)
}
