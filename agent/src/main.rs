//! `tabmesh-agent`: see [`tabmesh_agent::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    tabmesh_agent::cli::main(std::env::args_os())
}
