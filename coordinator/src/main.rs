//! `tabmesh-coordinator`: see [`tabmesh_coordinator::cli`].

use std::process::ExitCode;

/// Training allocates and frees large tensors all the time, which the system's allocator gives back and asks for again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    tabmesh_coordinator::cli::main(std::env::args_os())
}
