//! Operating-system processes of a deployment: this program again, in the role of a coordinator or an agent.
//!
//! The child runs the coordinator's or the agent's own command line and nothing of ours. Its standard input is a pipe that
//! closes when the harness ends, however it ends, and the child stops with it.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tabmesh_federation::id::Digest;

use crate::bench;

/// Word that makes this program take a role.
const ROLE: &str = "role";

/// Runs another binary's command line if the arguments say `role coordinator …` or `role agent …`, or a part of a measurement.
#[must_use]
pub fn take_role(args: &[OsString]) -> Option<ExitCode> {
    if args.get(1)? != ROLE {
        return None;
    }
    let rest = args.iter().skip(2).cloned();
    match args.get(2)?.to_str()? {
        "coordinator" => Some(tabmesh_coordinator::cli::main(rest)),
        "agent" => Some(tabmesh_agent::cli::main(rest)),
        "bench-rounds" => Some(bench::rounds::take_part(&rest.skip(1).collect::<Vec<_>>())),
        _ => None,
    }
}

/// Starts this program anew in its own place, in the environment that long work of one process is fastest in, unless it is
/// there already; goes on as it is where that can't be done.
///
/// Federations are computed side by side, so that a matrix product gains nothing from a second thread, and waits for
/// it; and memory that a training step lets go of is the next step's.
pub fn enter_long_work(args: &[OsString]) {
    let missing: Vec<_> =
        LONG_WORK.into_iter().filter(|(name, _)| std::env::var_os(name).is_none()).collect();
    if missing.is_empty() {
        return;
    }
    if let Ok(program) = std::env::current_exe() {
        use std::os::unix::process::CommandExt;
        let error = Command::new(program).args(args.iter().skip(1)).envs(missing).exec();
        tracing::debug!(%error, "not started anew");
    }
}

/// Threads of a matrix product; bytes from which the system's allocator asks the kernel, and that it keeps.
const LONG_WORK: [(&str, &str); 4] = [
    ("RAYON_NUM_THREADS", "1"),
    ("MALLOC_MMAP_THRESHOLD_", "33554432"),
    ("MALLOC_TRIM_THRESHOLD_", "1073741824"),
    ("MALLOC_TOP_PAD_", "67108864"),
];

/// A running child.
#[derive(Debug)]
pub struct Process {
    role: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a program of this crate as `role` with the given arguments; its log is added to a file.
    ///
    /// # Errors
    /// The program or the log file can't be opened.
    pub fn start(program: &Path, name: &str, role: &str, args: &[OsString], log: &Path) -> Result<Self> {
        if let Some(folder) = log.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("log file {}", log.display()))?;
        let child = Command::new(program)
            .arg(ROLE)
            .arg(role)
            .args(args)
            .env("RAYON_NUM_THREADS", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        Ok(Self { role: name.to_owned(), child, log: log.to_owned() })
    }

    /// Name of the process in tables.
    #[must_use]
    pub fn role(&self) -> &str {
        &self.role
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Peak resident memory so far, in MiB; nothing once it has ended or where `/proc` is missing.
    #[must_use]
    pub fn peak_rss_mib(&self) -> Option<f64> {
        self.status_mib("VmHWM:")
    }

    /// Resident memory now, in MiB; nothing once it has ended or where `/proc` is missing.
    #[must_use]
    pub fn rss_mib(&self) -> Option<f64> {
        self.status_mib("VmRSS:")
    }

    fn status_mib(&self, field: &str) -> Option<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).ok()?;
        let line = status.lines().find(|line| line.starts_with(field))?;
        let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kib / 1024.0)
    }

    /// Fails with the end of its log if it has ended.
    ///
    /// # Errors
    /// The process has ended.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(5)..];
            bail!(
                "{} ended ({status}); its log {} ends:\n{}",
                self.role,
                self.log.display(),
                tail.join("\n")
            );
        }
        Ok(())
    }

    /// Waits until it has written a file, and gives the text.
    ///
    /// # Errors
    /// It ended, or the time is over.
    pub fn wait_for_file(&mut self, path: &Path, patience: Duration) -> Result<String> {
        let began = now();
        loop {
            if let Ok(text) = std::fs::read_to_string(path) {
                return Ok(text);
            }
            self.check()?;
            if began.elapsed() > patience {
                bail!("{} did not write {} within {patience:?}", self.role, path.display());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Kills it without warning, as a power cut would.
    ///
    /// # Errors
    /// The system refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Closing its standard input asks it to stop; one that doesn't within two seconds is killed.
        drop(self.child.stdin.take());
        let began = now();
        while began.elapsed() < Duration::from_secs(2) {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// SHA-256 of this program's own file, read once.
pub(crate) fn program_digest() -> Result<Digest> {
    static KNOWN: OnceLock<Digest> = OnceLock::new();
    if let Some(known) = KNOWN.get() {
        return Ok(*known);
    }
    let path = std::env::current_exe().context("finding this program's own file")?;
    let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    Ok(*KNOWN.get_or_init(|| Digest::of(&bytes)))
}

/// Milliseconds since 1970, UTC.
#[allow(
    clippy::disallowed_methods,
    reason = "the harness stands where the command line would: it gives the clock"
)]
pub(crate) fn unix_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// The stopwatch of the harness.
#[must_use]
#[allow(clippy::disallowed_methods, reason = "a stopwatch for patience and tables; no figure depends on it")]
pub fn now() -> Instant {
    Instant::now()
}
