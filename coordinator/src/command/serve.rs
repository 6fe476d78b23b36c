//! `tabmesh-coordinator serve`: binds, tells its address, serves until it is told to stop.

use std::path::Path;
use std::process::ExitCode;

use miette::{IntoDiagnostic, WrapErr};
use rand::TryRngCore;
use rand::rngs::OsRng;
use tokio::net::TcpListener;

use crate::config::Config;
use crate::mesh::Clock;
use crate::report::declaration;
use crate::{Surroundings, Switches, open_records, run as serve};

/// Serves until Ctrl-C, SIGTERM, or the closing of standard input.
pub(crate) async fn run(
    config: Config,
    switches: Switches,
    clock: Clock,
    until_stdin_closes: bool,
) -> miette::Result<ExitCode> {
    // What reports will need is refused here, where an operator sees it, and not by the first report; and before anybody is told
    // where to connect.
    config.disjoint.iter().try_for_each(|path| declaration(path).map(drop))?;
    let listener = TcpListener::bind(&config.listen)
        .await
        .into_diagnostic()
        .wrap_err_with(|| format!("listening on {}", config.listen))?;
    let local = listener.local_addr().into_diagnostic()?;
    let records = open_records(&config)?;
    if let Some(path) = &config.address_file {
        tell(path, &local.to_string()).into_diagnostic().wrap_err_with(|| path.display().to_string())?;
    }
    tracing::info!(address = %local, "listening");
    let surroundings = Surroundings { records, clock, ids: Box::new(OsRng.unwrap_err()) };
    serve(config, switches, listener, surroundings, stop(until_stdin_closes)).await?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the address beside and renames, so that a reader sees all of it or nothing.
fn tell(path: &Path, address: &str) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let beside = path.with_extension("writing");
    std::fs::write(&beside, address)?;
    std::fs::rename(&beside, path)
}

pub(crate) async fn stop(until_stdin_closes: bool) {
    let stdin = async {
        if until_stdin_closes {
            let (closed, ended) = tokio::sync::oneshot::channel();
            // A thread of its own: a read of standard input can't be cancelled, and must not keep the runtime.
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
                let _ = closed.send(());
            });
            let _ = ended.await;
        } else {
            std::future::pending::<()>().await;
        }
    };
    let terminated = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = terminated => {}
        () = stdin => {}
    }
}
