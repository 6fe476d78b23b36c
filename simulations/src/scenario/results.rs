//! What a run leaves behind: a folder with the scenario, a manifest, one file of rows a task, and all rows together.
//!
//! Beside them lie the answers on test rows, if a scenario keeps them, and the adapters and forests that flows published. A
//! task's file appears whole or not at all, so a run that was killed goes on where it was; the manifest names scenario,
//! program, base model and tables by digest, and rows of another scenario, program or data are never mixed in. Times aren't
//! in rows: equal scenario, seed and program give equal bytes.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tabmesh_federation::id::Digest;

use super::answers::{self, Answered};
use super::document::Scenario;
use crate::utility::federation::Learnt;

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Name of the set of tables.
    pub set: String,
    /// Seed.
    pub seed: u64,
    /// `rivals`, or the name of a flow or federation.
    pub arm: String,
    /// What predicted; for a federation, `model`.
    pub method: String,
    /// Round, from 1, where the figure belongs to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round: Option<u32>,
    /// The domain, or `*` for all of them together.
    pub domain: String,
    /// A newcomer's number of own rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<u32>,
    /// Whether the domain counts in means: it has enough test rows of each class and is no attacker.
    pub counted: bool,
    /// Who adds the noise that the method carries.
    pub noise: Noise,
    /// Name of the figure.
    pub metric: String,
    /// Its value.
    pub value: f64,
}

/// Who adds noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Noise {
    /// Nobody: nothing private, or nothing left the domain.
    None,
    /// Each agent all of it: nobody is trusted.
    Local,
    /// Each agent a share; only the sum is seen.
    SecureSum,
}

impl Noise {
    /// For people.
    #[must_use]
    pub const fn shown(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Local => "local",
            Self::SecureSum => "secure sum",
        }
    }
}

/// What rows were made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of the folder's format.
    pub format: u32,
    /// Name of the scenario.
    pub scenario: String,
    /// SHA-256 of its text.
    pub scenario_digest: Digest,
    /// Version of the program.
    pub program: String,
    /// SHA-256 of its file: another build may give other figures.
    pub program_digest: Digest,
    /// SHA-256 of the shipped base model.
    pub base_model: Digest,
    /// Seeds run.
    pub seeds: u32,
    /// Sets and digests of their tables.
    pub sets: Vec<SetDigest>,
    /// All tasks of the scenario.
    pub tasks: usize,
    /// Which part of the tasks is done here: number, from 1, and number of parts.
    pub shard: Shard,
    /// Commit of the work tree that the scenario lay in when the run began, with `+changes` where files differed from it; none
    /// outside of one. It tells where to look; what made the figures is the program by its digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// Whether flows ran as processes of the operating system.
    #[serde(default)]
    pub real: bool,
}

/// A set's tables.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetDigest {
    /// Its name.
    pub name: String,
    /// SHA-256 over its files.
    pub digest: Digest,
}

/// One part of `of`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// From 1.
    pub part: u32,
    /// How many parts there are.
    pub of: u32,
}

impl Shard {
    /// All of it.
    pub const WHOLE: Self = Self { part: 1, of: 1 };

    /// Whether a task is done in this part.
    #[must_use]
    pub fn has(self, task: usize) -> bool {
        task % (self.of.max(1) as usize) + 1 == self.part as usize
    }
}

impl std::str::FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("expected I/N with 1 <= I <= N <= {MAX_SHARDS}, got {text:?}");
        let (part, of) = text.split_once('/').ok_or_else(refuse)?;
        let (part, of) = (part.parse().map_err(|_| refuse())?, of.parse().map_err(|_| refuse())?);
        if (1..=MAX_SHARDS).contains(&of) && (1..=of).contains(&part) {
            Ok(Self { part, of })
        } else {
            Err(refuse())
        }
    }
}

/// A run's folder.
#[derive(Debug, Clone)]
pub struct RunFolder {
    root: PathBuf,
}

impl RunFolder {
    /// Makes a folder for a run, or takes one up that holds a part of the same run.
    ///
    /// # Errors
    /// It holds another run, or something else; files can't be written.
    pub fn open(root: &Path, scenario_text: &str, manifest: &Manifest) -> Result<Self> {
        let folder = Self { root: root.to_owned() };
        if folder.manifest_path().exists() {
            let found = folder.manifest()?;
            let differs = |what: &str| {
                format!(
                    "{} holds a run with another {what}; choose another folder with --out",
                    root.display()
                )
            };
            ensure!(found.scenario_digest == manifest.scenario_digest, differs("scenario"));
            ensure!(found.program == manifest.program, differs("program version"));
            ensure!(found.program_digest == manifest.program_digest, differs("build of the program"));
            ensure!(found.base_model == manifest.base_model, differs("base model"));
            ensure!(found.sets == manifest.sets, differs("set of tables"));
            ensure!(found.shard == manifest.shard, differs("shard"));
            ensure!(found.real == manifest.real, differs("--real"));
            let same_place = Manifest { commit: manifest.commit.clone(), ..found };
            ensure!(same_place == *manifest, differs("manifest"));
            return Ok(folder);
        }
        if root.exists() {
            // A run that was killed at its very start has left some of these.
            let own = |name: &std::ffi::OsString| {
                name == "tasks" || name == "answers" || name == "adapters" || name == "scenario.yaml"
            };
            let names = std::fs::read_dir(root)?.filter_map(Result::ok).map(|entry| entry.file_name());
            if let Some(strange) = names.into_iter().find(|name| !own(name)) {
                let strange = strange.display();
                bail!("{} is neither empty nor a run's folder: it holds {strange}", root.display());
            }
        }
        for made in [folder.tasks(), folder.kept("answers"), folder.kept("adapters")] {
            std::fs::create_dir_all(made).with_context(|| format!("making {}", root.display()))?;
        }
        write(&root.join("scenario.yaml"), scenario_text.as_bytes())?;
        write(&folder.manifest_path(), &serde_json::to_vec_pretty(manifest)?)?;
        Ok(folder)
    }

    /// A folder that holds a run.
    ///
    /// # Errors
    /// It doesn't.
    pub fn existing(root: &Path) -> Result<Self> {
        let folder = Self { root: root.to_owned() };
        ensure!(
            folder.manifest_path().is_file(),
            "{} is not a run's folder: it has no manifest.json",
            root.display()
        );
        Ok(folder)
    }

    /// Where it is.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What its rows were made from.
    ///
    /// # Errors
    /// The manifest can't be read, or has another format.
    pub fn manifest(&self) -> Result<Manifest> {
        let path = self.manifest_path();
        let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let manifest: Manifest = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is not a manifest", path.display()))?;
        ensure!(
            manifest.format == FORMAT,
            "{}: format {}, this program reads {FORMAT}",
            path.display(),
            manifest.format
        );
        Ok(manifest)
    }

    /// The scenario that was run.
    ///
    /// # Errors
    /// It can't be read.
    pub fn scenario(&self) -> Result<Scenario> {
        Ok(Scenario::load(&self.root.join("scenario.yaml"))?.0)
    }

    /// Whether a task's rows are here.
    #[must_use]
    pub fn has(&self, task: &str) -> bool {
        self.task(task).is_file()
    }

    /// Stores a task's rows, whole or not at all.
    ///
    /// # Errors
    /// A figure that is no number; the file can't be written.
    pub fn store(&self, task: &str, rows: &[Row]) -> Result<()> {
        write(&self.task(task), &lines(rows)?)
    }

    /// Stores what a task's methods answered on test rows; to be done before its rows are stored.
    ///
    /// # Errors
    /// The file can't be written.
    pub(crate) fn store_answers(&self, task: &str, all: &[Answered]) -> Result<()> {
        write(&self.kept("answers").join(format!("{task}.parquet")), &answers::to_parquet(all)?)
    }

    /// The answers that were kept of some arms.
    ///
    /// # Errors
    /// They can't be read.
    pub(crate) fn answers(&self, arms: &BTreeSet<String>) -> Result<Vec<Answered>> {
        let mut all = Vec::new();
        for path in files(&self.kept("answers"), "parquet")? {
            // SET.SEED.ARM; no name has a dot.
            let arm = path.file_stem().and_then(|stem| stem.to_str()?.rsplit('.').next());
            if arm.is_some_and(|arm| arms.contains(arm)) {
                all.extend(answers::read(&path)?);
            }
        }
        Ok(all)
    }

    /// Stores the adapter or forest that a flow published; to be done before its rows are stored.
    ///
    /// # Errors
    /// The file can't be written.
    pub(crate) fn store_adapter(&self, task: &str, learnt: &Learnt) -> Result<()> {
        write(&self.kept("adapters").join(format!("{task}.{}", learnt.ending)), &learnt.bytes)
    }

    /// A task's rows.
    ///
    /// # Errors
    /// They can't be read.
    pub fn rows(&self, task: &str) -> Result<Vec<Row>> {
        read_lines(&self.task(task))
    }

    /// Writes all rows of the tasks, in their order, into one file.
    ///
    /// # Errors
    /// A task's rows can't be read, or the file can't be written.
    pub fn gather(&self, tasks: &[String]) -> Result<Vec<Row>> {
        let mut all = Vec::new();
        for task in tasks {
            all.extend(self.rows(task)?);
        }
        write(&self.results_path(), &lines(&all)?)?;
        Ok(all)
    }

    /// All rows that are here, of an unfinished run too.
    ///
    /// # Errors
    /// They can't be read.
    pub fn all_rows(&self) -> Result<Vec<Row>> {
        let mut all = Vec::new();
        for path in files(&self.tasks(), "jsonl")? {
            all.extend(read_lines(&path)?);
        }
        Ok(all)
    }

    /// The file of all rows.
    #[must_use]
    pub fn results_path(&self) -> PathBuf {
        self.root.join("results.jsonl")
    }

    /// The report.
    #[must_use]
    pub fn report_path(&self) -> PathBuf {
        self.root.join("report.html")
    }

    /// Means of all figures, as comma-separated values.
    #[must_use]
    pub fn summary_path(&self) -> PathBuf {
        self.root.join("summary.csv")
    }

    /// What came of the targets.
    #[must_use]
    pub fn targets_path(&self) -> PathBuf {
        self.root.join("targets.json")
    }

    fn manifest_path(&self) -> PathBuf {
        self.root.join("manifest.json")
    }

    fn tasks(&self) -> PathBuf {
        self.root.join("tasks")
    }

    fn kept(&self, what: &str) -> PathBuf {
        self.root.join(what)
    }

    fn task(&self, name: &str) -> PathBuf {
        self.tasks().join(format!("{name}.jsonl"))
    }
}

/// Files of a folder with an extension, by name; none if there is no folder.
fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    paths.sort();
    Ok(paths)
}

fn lines(rows: &[Row]) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    for row in rows {
        ensure!(row.value.is_finite(), "{} of {}/{} is no number", row.metric, row.arm, row.method);
        serde_json::to_writer(&mut text, row)?;
        text.push(b'\n');
    }
    Ok(text)
}

fn read_lines(path: &Path) -> Result<Vec<Row>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    text.lines()
        .enumerate()
        .map(|(i, line)| {
            serde_json::from_str(line).with_context(|| format!("{}:{}: not a row", path.display(), i + 1))
        })
        .collect()
}

/// Writes a file so that a reader, or a run that goes on, sees all of it or nothing.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    tabmesh_agent::files::replace(path, bytes).with_context(|| format!("writing {}", path.display()))
}

/// Version of the folder's format.
pub const FORMAT: u32 = 3;
/// Most parts of a run.
pub const MAX_SHARDS: u32 = 1024;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn manifest(text: &str) -> Manifest {
        Manifest {
            format: FORMAT,
            scenario: "s".into(),
            scenario_digest: Digest::of(text.as_bytes()),
            program: "1".into(),
            base_model: Digest::of(b"base"),
            seeds: 1,
            sets: vec![SetDigest { name: "a".into(), digest: Digest::of(b"a") }],
            tasks: 2,
            shard: Shard::WHOLE,
            program_digest: Digest::of(b"program"),
            commit: None,
            real: false,
        }
    }

    fn row(value: f64) -> Row {
        Row {
            set: "a".into(),
            seed: 0,
            arm: "f".into(),
            method: "model".into(),
            round: Some(3),
            domain: "d".into(),
            rows: None,
            counted: true,
            noise: Noise::None,
            metric: "auc".into(),
            value,
        }
    }

    #[test]
    fn a_folder_is_taken_up_by_the_same_run_alone() {
        let root = tempfile::tempdir().unwrap();
        let folder = RunFolder::open(root.path(), "text", &manifest("text")).unwrap();
        assert!(!folder.has("t1"));
        folder.store("t1", &[row(0.5), row(0.25)]).unwrap();
        let again = RunFolder::open(root.path(), "text", &manifest("text")).unwrap();
        assert!(again.has("t1"));
        assert_eq!(again.rows("t1").unwrap(), [row(0.5), row(0.25)]);
        let other = RunFolder::open(root.path(), "other", &manifest("other")).unwrap_err();
        assert!(other.to_string().contains("another scenario"), "{other}");
        let other = Manifest { shard: Shard { part: 1, of: 2 }, ..manifest("text") };
        assert!(RunFolder::open(root.path(), "text", &other).is_err());
        assert!(RunFolder::existing(tempfile::tempdir().unwrap().path()).is_err());
    }

    #[test]
    fn a_folder_with_other_things_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("letter.txt"), b"dear").unwrap();
        let refused = RunFolder::open(root.path(), "text", &manifest("text")).unwrap_err();
        assert!(refused.to_string().contains("letter.txt"), "{refused}");
    }

    #[test]
    fn figures_are_numbers_and_shards_have_their_form() {
        let root = tempfile::tempdir().unwrap();
        let folder = RunFolder::open(root.path(), "text", &manifest("text")).unwrap();
        assert!(folder.store("t", &[row(f64::NAN)]).is_err() && !folder.has("t"));
        assert_eq!("2/3".parse(), Ok(Shard { part: 2, of: 3 }));
        for bad in ["0/3", "4/3", "1", "1/1025", "a/b"] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
        let parts: Vec<Shard> = (1..=3).map(|part| Shard { part, of: 3 }).collect();
        for task in 0..10 {
            assert_eq!(parts.iter().filter(|shard| shard.has(task)).count(), 1);
        }
    }
}
