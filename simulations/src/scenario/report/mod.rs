//! A run as one page: tables and pictures, self-contained, without scripts or anything loaded.
//!
//! Means are plain means over the domains that count, then over seeds; standard errors are over seeds. Everything is
//! computed from a run's rows, so a page can be drawn anew from its folder, and from several parts of a run at once.

mod page;
mod plot;
pub(crate) mod summary;

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use super::compare::{DRAWS, Loaded};
use super::document::Scenario;
use super::results::{Manifest, Row, write};
use super::targets::{Judgement, judge};

/// The page of a run.
pub(crate) fn html(
    scenario: &Scenario,
    manifest: &Manifest,
    rows: &[Row],
    judgement: Option<&Judgement>,
) -> String {
    page::page(scenario, manifest, rows, judgement)
}

/// How a report is drawn from folders.
#[derive(Debug, Clone, clap::Args)]
pub struct ReportArgs {
    /// A run's folder, a folder of such folders, or several separated by commas; all of one scenario.
    pub runs: String,
    /// File of the page. Default: `report.html` in the folder.
    #[arg(long)]
    pub out: Option<PathBuf>,
}

/// Draws a report from one run or the parts of one, with `summary.csv` beside it; gives its path.
///
/// # Errors
/// A folder that isn't a run's, parts of different runs, or a page that can't be written.
pub fn report(args: &ReportArgs) -> Result<PathBuf> {
    let loaded = Loaded::read(&args.runs)?;
    let out = match &args.out {
        Some(out) => out.clone(),
        None => {
            ensure!(!args.runs.contains(','), "name the page with --out where several folders are given");
            Path::new(&args.runs).join("report.html")
        }
    };
    let judgement = match &loaded.scenario.targets {
        Some(_) => Some(judge(&loaded, DRAWS)?),
        None => None,
    };
    let page = html(&loaded.scenario, &loaded.manifest, &loaded.rows, judgement.as_ref());
    write(&out, page.as_bytes())?;
    write(&out.with_file_name("summary.csv"), summary::csv(&loaded.rows).as_bytes())?;
    Ok(out)
}
