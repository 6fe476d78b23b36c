//! `tabmesh-sim`: see [`tabmesh_sim::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    tabmesh_sim::cli::main(std::env::args_os().collect())
}
