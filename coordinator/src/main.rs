//! `tabmesh-coordinator`: see [`tabmesh_coordinator::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    tabmesh_coordinator::cli::main(std::env::args_os())
}
