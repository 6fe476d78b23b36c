//! `bench tables`: the base as it is, in context, against logistic regression and boosted trees on single tables.
//!
//! All three learn from the same rows: `n` random training rows, or all of them, and are scored on the test rows.
//! The base takes the product's own input path ([`Preprocessing::fit`] on those rows, [`Context`]); nothing is
//! trained. Declarations come from the same rows ([`RawTable::schema`]). One line a table, size, seed and model goes
//! to a file; the summary has plain means over tables and wins; a bar or a line for each table tells how far it is. A table counts for a size only if it has more
//! training rows than that; with all rows there is one seed, as the rows don't differ.

use std::{
    collections::BTreeMap,
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
    time::Instant,
};

use anstream::println;
use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha20Rng;
use serde::Serialize;
use tabmesh_contract::{batch::TypedBatch, schema::FeatureSchema};
use tabmesh_tfm::{Coding, Context, Model, Preprocessing, Serving, metrics};

use super::raw_table::{Description, RawTable};
use crate::{baseline, cli::Output, logistic};

/// What to measure on which tables.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Folder with one folder a table: `dataset.json`, `train.parquet`, `test.parquet`.
    #[arg(long)]
    pub data: PathBuf,
    /// Base model; the shipped one by default.
    #[arg(long)]
    pub base: Option<PathBuf>,
    /// Training rows; `full` = all.
    #[arg(long, value_delimiter = ',', default_value = "64,256,full", value_parser = size)]
    pub rows: Vec<Size>,
    /// Draws of training rows.
    #[arg(long, default_value_t = 5)]
    pub seeds: u64,
    /// Which models to fit.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Rival::ALL)]
    pub models: Vec<Rival>,
    /// Only these tables.
    #[arg(long, value_delimiter = ',')]
    pub tables: Vec<String>,
    /// Most test rows of a table; the first ones are taken.
    #[arg(long, default_value_t = 2000)]
    pub test_rows: usize,
    /// File that gets one JSON line a table, size, seed and model.
    #[arg(long)]
    pub lines: Option<PathBuf>,
}

/// How many training rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Size {
    /// This many.
    Rows(usize),
    /// All.
    Full,
}

impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rows(n) => n.fmt(f),
            Self::Full => f.write_str("full"),
        }
    }
}

impl Serialize for Size {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

fn size(text: &str) -> Result<Size, String> {
    match text.parse::<usize>() {
        _ if text == "full" => Ok(Size::Full),
        Ok(n) if n >= LEAST_ROWS => Ok(Size::Rows(n)),
        _ => Err(format!("expected full or a number of at least {LEAST_ROWS}, got {text:?}")),
    }
}

/// What makes the predictions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rival {
    /// The base, with the training rows in context.
    Base,
    /// Logistic regression.
    Logistic,
    /// Gradient-boosted trees.
    Trees,
}

impl Rival {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Base, Self::Logistic, Self::Trees];
}

impl std::fmt::Display for Rival {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Base => "base",
            Self::Logistic => "logistic",
            Self::Trees => "trees",
        })
    }
}

/// One measurement.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// The table.
    pub table: String,
    /// Asked-for training rows.
    pub rows: Size,
    /// Training rows used.
    pub train_rows: usize,
    /// Test rows.
    pub test_rows: usize,
    /// Feature columns.
    pub columns: usize,
    /// Draw of the training rows.
    pub seed: u64,
    /// What predicted.
    pub model: Rival,
    /// Area under the ROC curve.
    pub auc: f64,
    /// Mean negative log-likelihood, in nats.
    pub log_loss: f64,
    /// Expected calibration error, [`calibration_error`].
    pub calibration_error: f64,
    /// Wall-clock seconds for fitting and predicting.
    pub seconds: f64,
}

/// Means of one model at one size over the tables.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mean {
    /// Training rows.
    pub rows: Size,
    /// What predicted.
    pub model: Rival,
    /// Tables in the mean.
    pub tables: usize,
    /// Mean AUC.
    pub auc: f64,
    /// Mean log loss.
    pub log_loss: f64,
    /// Mean calibration error.
    pub calibration_error: f64,
    /// Tables on which this model has the highest AUC.
    pub best_auc: usize,
    /// Tables on which this model has the lowest log loss.
    pub best_log_loss: usize,
    /// Tables on which the base has a higher AUC than this model.
    pub base_ahead: usize,
}

/// Measures, writes lines as they come and prints the summary.
///
/// # Errors
/// Data that can't be read, a base that doesn't load, or rows a model refuses.
pub fn run(args: &Args, output: Output) -> Result<()> {
    let bytes = match &args.base {
        Some(path) => std::fs::read(path).with_context(|| format!("reading {}", path.display()))?,
        None => crate::quickstart::deployed::BASE_MODEL.to_vec(),
    };
    let (model, _) = Model::from_safetensors(&bytes)?;
    let mut file = match &args.lines {
        Some(path) => {
            Some(std::fs::File::create(path).with_context(|| format!("creating {}", path.display()))?)
        }
        None => None,
    };
    let mut teller = Teller::default();
    let lines = measure(args, &model, &mut |seen| {
        if let (Seen::Line(line), Some(file)) = (&seen, &mut file) {
            writeln!(file, "{}", serde_json::to_string(line)?)?;
        }
        teller.tell(&seen);
        Ok(())
    })?;
    teller.bar.finish_and_clear();
    let means = summarise(&lines);
    match output {
        Output::Text => println!("{}", render(&means)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&means)?),
    }
    Ok(())
}

/// What a measurement tells while it goes on.
#[derive(Debug)]
pub enum Seen<'a> {
    /// One figure more.
    Line(&'a Line),
    /// A table begins.
    Begin {
        /// Its name.
        table: &'a str,
        /// Tables before it.
        done: usize,
        /// Tables in all.
        total: usize,
    },
    /// A table is done; its lines.
    End(&'a [Line]),
}

/// Tells people how far it is: a bar on a terminal, elsewhere a line for each table.
struct Teller {
    bar: ProgressBar,
    began: Instant,
    at: (usize, usize),
}

impl Default for Teller {
    fn default() -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = if terminal { ProgressBar::new(0) } else { ProgressBar::hidden() };
        if let Ok(style) =
            ProgressStyle::with_template("{bar:30} {pos}/{len} tables, {elapsed}, {eta} left: {msg}")
        {
            bar.set_style(style);
        }
        Self { bar, began: clock(), at: (0, 0) }
    }
}

impl Teller {
    fn tell(&mut self, seen: &Seen<'_>) {
        match seen {
            Seen::Begin { table, done, total } => {
                self.at = (done + 1, *total);
                self.bar.set_length(*total as u64);
                self.bar.set_position(*done as u64);
                self.bar.set_message((*table).to_owned());
            }
            Seen::Line(_) => self.bar.tick(),
            Seen::End(lines) if self.bar.is_hidden() => {
                let (at, total) = self.at;
                eprintln!("[{:7.1} s] {at}/{total} {}", self.began.elapsed().as_secs_f64(), shown(lines));
            }
            Seen::End(_) => {}
        }
    }
}

/// A table's name and the mean AUC of each model at each size.
fn shown(lines: &[Line]) -> String {
    let mut by: BTreeMap<Size, BTreeMap<Rival, (f64, f64)>> = BTreeMap::new();
    for line in lines {
        let (sum, count) = by.entry(line.rows).or_default().entry(line.model).or_default();
        (*sum, *count) = (*sum + line.auc, *count + 1.0);
    }
    let mut text = lines.first().map_or_else(|| "nothing to measure".to_owned(), |l| l.table.clone());
    for (size, models) in by {
        text.push_str(&format!("; {size} rows:"));
        for (model, (sum, count)) in models {
            text.push_str(&format!(" {model} {:.3}", sum / count));
        }
    }
    text
}

/// All measurements, in order of tables, sizes, seeds and models.
///
/// # Errors
/// As [`run`].
pub fn measure(
    args: &Args,
    model: &Model,
    seen: &mut dyn FnMut(Seen<'_>) -> Result<()>,
) -> Result<Vec<Line>> {
    let mut folders: Vec<PathBuf> = std::fs::read_dir(&args.data)
        .with_context(|| format!("listing {}", args.data.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    folders.retain(|folder| folder.join("dataset.json").is_file());
    folders.sort();
    ensure!(!folders.is_empty(), "{} has no folder with a dataset.json", args.data.display());
    let mut chosen = Vec::new();
    for folder in folders {
        let description = Description::read(&folder)?;
        let asked = args.tables.is_empty() || args.tables.contains(&description.name);
        if description.task == "binary" && asked {
            chosen.push((description, folder));
        }
    }
    let mut lines = Vec::new();
    for (done, (description, folder)) in chosen.iter().enumerate() {
        seen(Seen::Begin { table: &description.name, done, total: chosen.len() })?;
        let first = lines.len();
        table(args, model, description, folder, &mut |line| {
            seen(Seen::Line(&line))?;
            lines.push(line);
            Ok(())
        })
        .with_context(|| format!("table {}", description.name))?;
        seen(Seen::End(&lines[first..]))?;
    }
    ensure!(!lines.is_empty(), "none of the tables could be measured");
    Ok(lines)
}

fn table(
    args: &Args,
    model: &Model,
    description: &Description,
    folder: &Path,
    seen: &mut dyn FnMut(Line) -> Result<()>,
) -> Result<()> {
    let train = description.rows(&folder.join("train.parquet"))?;
    let test = description.rows(&folder.join("test.parquet"))?;
    let held: Vec<usize> = (0..test.rows().min(args.test_rows)).collect();
    let labels: Vec<u8> = held.iter().map(|i| test.labels[*i]).collect();
    for size in &args.rows {
        let draws = if *size == Size::Full { 1 } else { args.seeds };
        for seed in 0..draws {
            let Some(indices) = sample(&train, *size, seed) else { continue };
            let schema = train.schema(&indices)?;
            let (own, queries) = (train.typed(&schema, &indices)?, test.typed(&schema, &held)?);
            for rival in &args.models {
                let began = clock();
                let p = match rival {
                    Rival::Base => in_context(model, &schema, &own, &queries, usize::MAX)?,
                    Rival::Logistic => logistic::fit_predict(&own, &queries, &schema, seed)?,
                    Rival::Trees => baseline::fit_predict(&own, None, &queries, &schema, seed)?,
                };
                let Some(auc) = metrics::roc_auc(&p, &labels) else { continue };
                seen(Line {
                    table: description.name.clone(),
                    rows: *size,
                    train_rows: indices.len(),
                    test_rows: labels.len(),
                    columns: schema.features().len(),
                    seed,
                    model: *rival,
                    auc,
                    log_loss: metrics::log_loss(&p, &labels).unwrap_or(f64::NAN),
                    calibration_error: calibration_error(&p, &labels),
                    seconds: began.elapsed().as_secs_f64(),
                })?;
            }
        }
    }
    Ok(())
}

#[allow(
    clippy::disallowed_methods,
    reason = "a benchmark measures wall-clock time; no figure of merit reads it"
)]
fn clock() -> Instant {
    Instant::now()
}

/// Probability of class 1 of each query row by the product's own path: own rows code the columns, and at most `most` of them,
/// the first ones, stand in the context.
///
/// # Errors
/// Rows that don't fit the schema.
pub fn in_context(
    model: &Model,
    schema: &FeatureSchema,
    own: &TypedBatch,
    queries: &TypedBatch,
    most: usize,
) -> Result<Vec<f64>> {
    let preprocessing = Preprocessing::fit(schema, own)?;
    let shown: Vec<usize> = (0..own.rows().min(most)).collect();
    let context = Context::build(model, &preprocessing.encode(&own.take(&shown), Coding::OwnRow)?)?;
    let queries = preprocessing.encode(queries, Coding::Foreign)?;
    Ok(context.predict(&queries, Serving::default())?.into_iter().map(|p| p[1]).collect())
}

/// Random training rows with at least two of each class; `None` if the table has no more rows than asked for, or if
/// [`DRAWS`] draws have too few of a class.
fn sample(train: &RawTable, size: Size, seed: u64) -> Option<Vec<usize>> {
    let mut all: Vec<usize> = (0..train.rows()).collect();
    let Size::Rows(n) = size else { return Some(all) };
    if train.rows() <= n {
        return None;
    }
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    (0..DRAWS).find_map(|_| {
        all.shuffle(&mut rng);
        let drawn = &all[..n];
        let ones = drawn.iter().filter(|i| train.labels[**i] == 1).count();
        (ones >= 2 && n - ones >= 2).then(|| drawn.to_vec())
    })
}

/// Mean distance between the share of class 1 and the mean probability over [`BINS`] equal bins of probability,
/// weighted by rows (Naeini, Cooper and Hauskrecht, AAAI 2015). 0 for no rows.
#[must_use]
pub fn calibration_error(probabilities: &[f64], labels: &[u8]) -> f64 {
    let mut bins = [(0f64, 0f64, 0f64); BINS];
    for (p, label) in probabilities.iter().zip(labels) {
        let bin = &mut bins[((p * BINS as f64) as usize).min(BINS - 1)];
        *bin = (bin.0 + 1.0, bin.1 + p, bin.2 + f64::from(*label));
    }
    let rows: f64 = bins.iter().map(|b| b.0).sum();
    bins.iter().map(|b| (b.1 - b.2).abs()).sum::<f64>() / rows.max(1.0)
}

/// Means over seeds, then over the tables that every model was measured on.
#[must_use]
pub fn summarise(lines: &[Line]) -> Vec<Mean> {
    // Size, table, model: sums and number of seeds.
    let mut by: BTreeMap<Size, BTreeMap<&str, BTreeMap<Rival, [f64; 4]>>> = BTreeMap::new();
    for line in lines {
        let sums =
            by.entry(line.rows).or_default().entry(&line.table).or_default().entry(line.model).or_default();
        let add = [line.auc, line.log_loss, line.calibration_error, 1.0];
        sums.iter_mut().zip(add).for_each(|(s, v)| *s += v);
    }
    let models: std::collections::BTreeSet<Rival> = lines.iter().map(|l| l.model).collect();
    let mut means = Vec::new();
    for (rows, tables) in by {
        let tables: Vec<BTreeMap<Rival, [f64; 3]>> = tables
            .into_values()
            .filter(|t| t.len() == models.len())
            .map(|t| t.into_iter().map(|(m, s)| (m, [s[0] / s[3], s[1] / s[3], s[2] / s[3]])).collect())
            .collect();
        let count = tables.len().max(1) as f64;
        for &model in &models {
            let mean = |k: usize| tables.iter().map(|t| t[&model][k]).sum::<f64>() / count;
            let best = |better: &dyn Fn(&[f64; 3], &[f64; 3]) -> bool| {
                tables
                    .iter()
                    .filter(|t| t.iter().all(|(m, other)| *m == model || better(&t[&model], other)))
                    .count()
            };
            let behind = |t: &&BTreeMap<Rival, [f64; 3]>| {
                t.get(&Rival::Base).is_some_and(|base| base[0] > t[&model][0])
            };
            means.push(Mean {
                rows,
                model,
                tables: tables.len(),
                auc: mean(0),
                log_loss: mean(1),
                calibration_error: mean(2),
                best_auc: best(&|a, b| a[0] > b[0]),
                best_log_loss: best(&|a, b| a[1] < b[1]),
                base_ahead: tables.iter().filter(behind).count(),
            });
        }
    }
    means
}

fn render(means: &[Mean]) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header([
        "rows",
        "model",
        "tables",
        "AUC",
        "log loss",
        "ECE",
        "best AUC",
        "best log loss",
        "base ahead",
    ]);
    for m in means {
        table.add_row([
            m.rows.to_string(),
            m.model.to_string(),
            m.tables.to_string(),
            format!("{:.4}", m.auc),
            format!("{:.4}", m.log_loss),
            format!("{:.4}", m.calibration_error),
            m.best_auc.to_string(),
            m.best_log_loss.to_string(),
            m.base_ahead.to_string(),
        ]);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// Fewest training rows that can be asked for.
const LEAST_ROWS: usize = 16;
/// Draws of training rows before a table is given up.
const DRAWS: usize = 50;
/// Bins of the calibration error.
const BINS: usize = 10;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::bench::raw_table::tests::write_folder;

    fn line(table: &str, model: Rival, auc: f64, log_loss: f64) -> Line {
        Line {
            table: table.into(),
            rows: Size::Rows(64),
            train_rows: 64,
            test_rows: 10,
            columns: 2,
            seed: 0,
            model,
            auc,
            log_loss,
            calibration_error: 0.1,
            seconds: 0.0,
        }
    }

    #[test]
    fn means_and_wins_by_hand() {
        let lines = [
            line("a", Rival::Base, 0.8, 0.5),
            line("a", Rival::Base, 0.6, 0.3),
            line("a", Rival::Trees, 0.65, 0.6),
            line("b", Rival::Base, 0.5, 0.9),
            line("b", Rival::Trees, 0.9, 0.2),
            // Without trees: in no mean.
            line("c", Rival::Base, 1.0, 0.0),
        ];
        let means = summarise(&lines);
        let base = means.iter().find(|m| m.model == Rival::Base).unwrap();
        assert_eq!((base.tables, base.best_auc, base.best_log_loss), (2, 1, 1));
        assert!((base.auc - 0.6).abs() < 1e-12 && (base.log_loss - 0.65).abs() < 1e-12);
        let trees = means.iter().find(|m| m.model == Rival::Trees).unwrap();
        assert_eq!((trees.best_auc, trees.base_ahead), (1, 1));
        assert!(render(&means).contains("0.6000"));
        assert_eq!(shown(&lines[..3]), "a; 64 rows: base 0.700 trees 0.650");
    }

    #[test]
    fn calibration_error_by_hand() {
        // Bin of .15: share 0 of 1 row; bin of .8: share 1/2, mean .82 of two rows.
        let error = calibration_error(&[0.15, 0.80, 0.84], &[0, 1, 0]);
        assert!((error - (0.15 + 2.0 * 0.32) / 3.0).abs() < 1e-12);
        assert!(calibration_error(&[1.0, 0.0], &[1, 0]) < 1e-12);
    }

    /// The whole measurement on a made-up table: all three models find the signal, and lines repeat exactly.
    #[test]
    fn measures_a_folder_and_repeats_itself() {
        let dir = tempfile::tempdir().unwrap();
        write_folder(&dir.path().join("made_up"), 150);
        let args = Args {
            data: dir.path().to_owned(),
            base: None,
            rows: vec![Size::Rows(64), Size::Full, Size::Rows(150)],
            seeds: 2,
            models: Rival::ALL.to_vec(),
            tables: Vec::new(),
            test_rows: 100,
            lines: None,
        };
        let (model, _) = Model::from_safetensors(crate::quickstart::deployed::BASE_MODEL).unwrap();
        let mut told = Vec::new();
        let mut note = |seen: Seen<'_>| {
            told.push(match seen {
                Seen::Begin { table, done: 0, total: 1 } => table.to_owned(),
                Seen::End(lines) => lines.len().to_string(),
                Seen::Line(_) => return Ok(()),
                Seen::Begin { .. } => "another table".into(),
            });
            Ok(())
        };
        let lines = measure(&args, &model, &mut note).unwrap();
        assert_eq!(told, ["made_up", "9"]);
        // Two draws of 64 rows and one of all; the table has no more than 150 rows, so that size is left out.
        assert_eq!(lines.len(), 9);
        assert!(lines.iter().all(|l| l.auc > 0.75 && l.log_loss < 0.7 && l.test_rows == 100), "{lines:?}");
        let again = measure(&args, &model, &mut |_| Ok(())).unwrap();
        let figures = |lines: &[Line]| lines.iter().map(|l| (l.auc, l.log_loss)).collect::<Vec<_>>();
        assert_eq!(figures(&lines), figures(&again));
        assert!(measure(&Args { tables: vec!["other".into()], ..args }, &model, &mut |_| Ok(())).is_err());
    }

    #[test]
    fn sizes_are_parsed_with_their_limit() {
        assert_eq!((size("full"), size("16")), (Ok(Size::Full), Ok(Size::Rows(16))));
        assert!(size("15").is_err() && size("-1").is_err());
    }
}
