//! The tables of a scenario: sets found, domains divided as asked, and what each domain would declare.
//!
//! Tables from folders declare ranges and levels read off the members' pooled training rows, which stands outside every
//! privacy claim (see [`Declared`]); tables by contract declare for themselves. A partition is written as Parquet files, so
//! flows, rivals and rounds of small models read the same tables in the same way.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use arrow_array::cast::AsArray;
use arrow_array::types::Int8Type;
use arrow_array::{Array, RecordBatch, UInt32Array};
use arrow_cast::cast;
use arrow_schema::DataType;
use arrow_select::concat::concat_batches;
use arrow_select::take::take_record_batch;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha20Rng;
use serde_json::json;
use tabmesh_contract::batch::TypedBatch;
use tabmesh_contract::contract::Contract;
use tabmesh_federation::id::Digest;

use super::answers::entities;
use super::document::{DataSpec, Newcomers, Partition, Scenario, Shipped};
use super::learner::features::code;
use super::rounds::VirtualDomain;
use super::tampering;
use crate::quickstart::dataset;
use crate::utility::contracts::Declared;
use crate::utility::measure::union;
use crate::utility::member::{Member, Tables};
use crate::utility::newcomer::{Size, newcomer};
use crate::utility::set::Set;

/// The sets of a scenario.
pub(crate) struct Data {
    sets: Vec<Source>,
    /// Holds shipped tables for as long as they are read.
    _shipped: Option<tempfile::TempDir>,
}

/// Where the domains of one set come from.
pub(crate) enum Source {
    /// A described folder.
    Folder(Set),
    /// Contracts of one's own.
    Own { name: String, members: Vec<Member>, target: String },
}

/// The domains of one set under one seed.
pub(crate) struct World {
    /// Those that take part.
    pub(crate) members: Vec<Member>,
    /// The one that only receives.
    pub(crate) newcomer: Option<Member>,
    /// Canonical id of what is predicted.
    pub(crate) target: String,
    /// Names of the domains whose tables an adversary made.
    pub(crate) hostile: BTreeSet<String>,
    /// Holds tables made here for as long as they are read.
    _made: Vec<tempfile::TempDir>,
}

/// The domain that a scenario's seed leaves out.
fn left_out(sizes: &[Size], rows: &[u32], seed: u64) -> usize {
    let rows: Vec<usize> = rows.iter().map(|rows| *rows as usize).collect();
    newcomer(sizes, &rows, seed)
}

impl Data {
    /// Finds the sets; `base` is the scenario's folder, `data` stands in for `data.folder`.
    ///
    /// # Errors
    /// A folder or contract can't be read.
    pub(crate) fn open(spec: &DataSpec, base: &Path, data: Option<&Path>) -> Result<Self> {
        let from_base = |path: &str| base.join(path);
        if spec.shipped == Some(Shipped::CensusIncome) {
            ensure!(data.is_none(), "--data: the scenario uses shipped tables");
            let folder = tempfile::Builder::new().prefix("tabmesh-shipped-").tempdir()?;
            write_shipped(folder.path())?;
            let sets = vec![Source::Folder(Set::read(folder.path())?)];
            return Ok(Self { sets, _shipped: Some(folder) });
        }
        if let Some(folder) = &spec.folder {
            let folder = data.map_or_else(|| from_base(folder), Path::to_owned);
            let folders: Vec<PathBuf> = if spec.sets.is_empty() {
                vec![folder]
            } else {
                spec.sets.iter().map(|set| folder.join(set)).collect()
            };
            let sets = folders.iter().map(|folder| {
                let set = Set::read(folder)?;
                // Names become files of results.
                let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
                ensure!(
                    !set.name.is_empty() && set.name.chars().all(plain),
                    "{}: a set's name is made of letters, digits, '_' and '-', got {:?}",
                    folder.display(),
                    set.name
                );
                // A scenario speaks of sets by their folders, results by their names.
                let named = spec.sets.is_empty() || folder.file_name().is_some_and(|name| *name == *set.name);
                ensure!(
                    named,
                    "{}: the set in this folder calls itself {:?} in its dataset.json; name both alike",
                    folder.display(),
                    set.name
                );
                Ok(Source::Folder(set))
            });
            return Ok(Self { sets: sets.collect::<Result<_>>()?, _shipped: None });
        }
        ensure!(data.is_none(), "--data: the scenario names contracts");
        let mut members = Vec::new();
        let mut target = None;
        for own in &spec.contracts {
            let path = from_base(&own.contract);
            let text =
                std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
            let (contract, _) = Contract::parse(&path.display().to_string(), &text)
                .map_err(|error| anyhow::anyhow!("{}", error.render()))?;
            let schema = contract.approved_schema().with_context(|| format!("schema of {}", own.domain))?;
            let id = schema.target().id.to_string();
            let known = target.get_or_insert_with(|| id.clone());
            ensure!(*known == id, "{}: target is {id}, the first contract's is {known}", own.domain);
            let source = contract.source.as_ref().with_context(|| format!("{}: no source", own.domain))?;
            let train = path.parent().unwrap_or_else(|| Path::new(".")).join(&source.path).canonicalize()?;
            // The agent finds its table from its own folder: the path is made whole.
            let contract_text = absolute_source(&text, &source.path, &train)?;
            members.push(Member {
                domain: own.domain.clone(),
                product: contract.name.clone(),
                contract: contract_text,
                train,
                test: from_base(&own.test)
                    .canonicalize()
                    .with_context(|| format!("test rows of {}", own.domain))?,
            });
        }
        let target = target.context("no table")?;
        let sets = vec![Source::Own { name: "own".into(), members, target }];
        Ok(Self { sets, _shipped: None })
    }

    /// The sets, in the scenario's order.
    pub(crate) fn sets(&self) -> &[Source] {
        &self.sets
    }
}

impl Source {
    /// Its name in results.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Folder(set) => &set.name,
            Self::Own { name, .. } => name,
        }
    }

    /// Digest over all files that figures depend on.
    ///
    /// # Errors
    /// A file can't be read.
    pub(crate) fn digest(&self) -> Result<Digest> {
        let paths: Vec<PathBuf> = match self {
            Self::Folder(set) => std::iter::once(set.folder().join("dataset.json"))
                .chain(set.domains.iter().flat_map(|domain| [set.train(domain), set.test(domain)]))
                .collect(),
            Self::Own { members, .. } => {
                members.iter().flat_map(|m| [m.train.clone(), m.test.clone()]).collect()
            }
        };
        let mut all = String::new();
        if let Self::Own { members, .. } = self {
            members
                .iter()
                .for_each(|member| all.push_str(&Digest::of(member.contract.as_bytes()).to_string()));
        }
        for path in paths {
            let bytes = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            all.push_str(&Digest::of(&bytes).to_string());
        }
        Ok(Digest::of(all.as_bytes()))
    }

    /// Divides the set as a scenario asks under a seed.
    ///
    /// # Errors
    /// A table can't be read or written, or too few domains are left.
    pub(crate) fn world(&self, scenario: &Scenario, seed: u64) -> Result<World> {
        let (all, target, dealt) = match self {
            Self::Own { members, target, .. } => (members.clone(), target.clone(), None),
            Self::Folder(set) => {
                let dealt = match scenario.partition {
                    Partition::Dirichlet { .. } => {
                        Some(tempfile::Builder::new().prefix("tabmesh-dealt-").tempdir()?)
                    }
                    _ => None,
                };
                (members_of(set, scenario, seed, dealt.as_ref())?, TARGET.to_owned(), dealt)
            }
        };
        let mut members = all;
        let mut newcomer = None;
        if let Some(Newcomers { rows, .. }) = &scenario.newcomers {
            let size = |member: &Member| match self {
                Self::Folder(set) => set.size(&member.train, &member.test),
                Self::Own { .. } => member.size(),
            };
            let sizes = members.iter().map(size).collect::<Result<Vec<_>>>()?;
            newcomer = Some(members.remove(left_out(&sizes, rows, seed)));
        }
        ensure!(
            members.len() >= 2,
            "{}: {} domains take part, at least 2 needed",
            self.name(),
            members.len()
        );
        let mut made: Vec<tempfile::TempDir> = dealt.into_iter().collect();
        let mut hostile = BTreeSet::new();
        if !scenario.tampering.is_empty() {
            let folder = tempfile::Builder::new().prefix("tabmesh-tampered-").tempdir()?;
            hostile = tampering::tamper(&mut members, &scenario.tampering, folder.path(), seed)?;
            made.push(folder);
        }
        Ok(World { members, newcomer, target, hostile, _made: made })
    }
}

/// The domains of a folder, divided.
fn members_of(
    set: &Set,
    scenario: &Scenario,
    seed: u64,
    dealt: Option<&tempfile::TempDir>,
) -> Result<Vec<Member>> {
    // Declarations know nothing of the newcomer, which the product wouldn't either.
    let new = match &scenario.newcomers {
        Some(Newcomers { rows, .. }) if scenario.partition == Partition::Natural => {
            let size = |domain: &String| set.size(&set.train(domain), &set.test(domain));
            let sizes = set.domains.iter().map(size).collect::<Result<Vec<_>>>()?;
            Some(left_out(&sizes, rows, seed))
        }
        _ => None,
    };
    let declaring = set.domains.iter().enumerate().filter(|(i, _)| Some(*i) != new).map(|(_, d)| d);
    let declared = Declared::from_rows(set, &set.pooled(declaring)?)?;
    let mut rng = ChaCha20Rng::seed_from_u64(seed ^ PARTITION);
    match (&scenario.partition, dealt) {
        (Partition::Dirichlet { domains, alpha }, Some(folder)) => {
            let (domains, alpha) = (*domains as usize, *alpha);
            let shares = Shares::draw(domains, alpha, &mut rng);
            // A person whose rows lay in several domains would be promised each domain's ε alone.
            let entity = set.columns.iter().find(|column| set.by_entity && column.role == "entity_id");
            let mut placed = entity.map(|column| Placed { column: &column.name, domains: HashMap::new() });
            for (part, path) in [("train", Set::train as PathOf), ("test", Set::test as PathOf)] {
                let paths: Vec<PathBuf> = set.domains.iter().map(|domain| path(set, domain)).collect();
                deal(&paths, &folder.path().join(part), &shares, placed.as_mut(), &mut rng)?;
            }
            let of = |i: usize| {
                let domain = format!("part-{i:05}");
                let file = format!("{domain}.parquet");
                let at = |part: &str| folder.path().join(part).join(&file);
                declared.member(&domain, &at("train"), &at("test"), &BTreeSet::new())
            };
            Ok((0..domains).map(of).collect())
        }
        (Partition::Columns { share, core }, _) => {
            let columns = declared.features(set);
            let left_out = columns_left_out(&columns, (*share, *core), set.domains.len(), &mut rng);
            let of = |(domain, without): (&String, &BTreeSet<String>)| {
                let train = set.train(domain).canonicalize()?;
                Ok(declared.member(domain, &train, &set.test(domain), without))
            };
            set.domains.iter().zip(&left_out).map(of).collect()
        }
        _ => set
            .domains
            .iter()
            .map(|domain| {
                let train = set.train(domain).canonicalize()?;
                Ok(declared.member(domain, &train, &set.test(domain), &BTreeSet::new()))
            })
            .collect(),
    }
}

/// Columns that each domain is without: it keeps a share of them, of which a core is the same everywhere.
fn columns_left_out(
    columns: &[String],
    (share, core): (f64, f64),
    domains: usize,
    rng: &mut ChaCha20Rng,
) -> Vec<BTreeSet<String>> {
    let part = |share: f64| (columns.len() as f64 * share).round() as usize;
    let kept = part(share).clamp(1, columns.len().max(1));
    let everywhere = part(core).clamp(1, kept);
    // The first column stays everywhere, so that what all share isn't empty.
    let mut others: Vec<&String> = columns.iter().skip(1).collect();
    if everywhere > 1 {
        others.shuffle(rng);
        others.drain(..everywhere - 1);
    }
    let drawn = |_| {
        let mut others = others.clone();
        others.shuffle(rng);
        others.into_iter().skip(kept - everywhere).cloned().collect()
    };
    (0..domains).map(drawn).collect()
}

type PathOf = fn(&Set, &str) -> PathBuf;

/// Each class's shares over domains.
struct Shares([Vec<f64>; 2]);

impl Shares {
    /// One draw of a symmetric Dirichlet distribution for each class.
    fn draw(domains: usize, alpha: f64, rng: &mut ChaCha20Rng) -> Self {
        let mut class = || {
            // On the log scale: at small concentrations most weights are below the smallest float.
            let logs: Vec<f64> = (0..domains).map(|_| log_gamma_draw(alpha, rng)).collect();
            let top = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = logs.iter().map(|l| (l - top).exp()).collect();
            let total: f64 = weights.iter().sum();
            weights.into_iter().map(|w| w / total).collect::<Vec<f64>>()
        };
        Self([class(), class()])
    }

    /// Domain of each row: a class's rows, in an order drawn anew, are cut where its cumulated shares say.
    fn assign(&self, labels: &[u8], rng: &mut ChaCha20Rng) -> Vec<usize> {
        let mut domains = vec![0; labels.len()];
        for (class, shares) in (0_u8..).zip(&self.0) {
            let mut rows: Vec<usize> = (0..labels.len()).filter(|i| labels.get(*i) == Some(&class)).collect();
            rows.shuffle(rng);
            let (mut upto, mut at) = (0.0, 0_usize);
            let n = rows.len();
            for (domain, share) in shares.iter().enumerate() {
                upto += share;
                let end =
                    if domain + 1 == shares.len() { n } else { ((upto * n as f64).round() as usize).min(n) };
                for row in rows.get(at..end.max(at)).unwrap_or_default() {
                    if let Some(place) = domains.get_mut(*row) {
                        *place = domain;
                    }
                }
                at = end.max(at);
            }
        }
        domains
    }
}

/// Logarithm of a draw of the gamma distribution with shape `alpha` and scale 1: Marsaglia and Tsang 2000, for shapes below
/// one by their note (a draw at `alpha + 1` times U^(1/alpha)).
fn log_gamma_draw(alpha: f64, rng: &mut ChaCha20Rng) -> f64 {
    if alpha < 1.0 {
        let uniform: f64 = rng.random_range(f64::MIN_POSITIVE..1.0);
        return log_gamma_draw(alpha + 1.0, rng) + uniform.ln() / alpha;
    }
    let d = alpha - 1.0 / 3.0;
    let c = 1.0 / (9.0 * d).sqrt();
    loop {
        // Box and Muller.
        let (u, v): (f64, f64) = (rng.random_range(f64::MIN_POSITIVE..1.0), rng.random());
        let x = (-2.0 * u.ln()).sqrt() * (2.0 * std::f64::consts::PI * v).cos();
        let cube = (1.0 + c * x).powi(3);
        let w: f64 = rng.random_range(f64::MIN_POSITIVE..1.0);
        if cube > 0.0 && w.ln() < 0.5 * x * x + d - d * cube + d * cube.ln() {
            return (d * cube).ln();
        }
    }
}

/// Where entities are, by the text of their column: each with all its rows, of training and test tables, in one domain.
struct Placed<'a> {
    column: &'a str,
    domains: HashMap<String, usize>,
}

impl Placed<'_> {
    /// Domain of each row: that of its entity, which is dealt out by the class of its first row; rows without one go each alone.
    fn assign(
        &mut self,
        rows: &RecordBatch,
        labels: &[u8],
        shares: &Shares,
        rng: &mut ChaCha20Rng,
    ) -> Result<Vec<usize>> {
        let column =
            rows.column_by_name(self.column).with_context(|| format!("no column {}", self.column))?;
        let text = cast(column, &DataType::Utf8)?;
        let text = text.as_string::<i32>();
        let mut first: Vec<usize> = Vec::new();
        let mut group: Vec<Result<usize, usize>> = Vec::with_capacity(labels.len());
        let mut fresh: HashMap<&str, usize> = HashMap::new();
        for row in 0..labels.len() {
            let name = (!text.is_null(row)).then(|| text.value(row));
            if let Some(domain) = name.and_then(|name| self.domains.get(name)) {
                group.push(Err(*domain));
                continue;
            }
            let number = first.len();
            let number = match name {
                Some(name) => *fresh.entry(name).or_insert(number),
                None => number,
            };
            if number == first.len() {
                first.push(row);
            }
            group.push(Ok(number));
        }
        let classes: Vec<u8> =
            first.iter().map(|row| labels.get(*row).copied().unwrap_or_default()).collect();
        let dealt = shares.assign(&classes, rng);
        let domain_of = |number: usize| dealt.get(number).copied().unwrap_or_default();
        self.domains.extend(fresh.into_iter().map(|(name, number)| (name.to_owned(), domain_of(number))));
        Ok(group.into_iter().map(|of| of.map_or_else(|domain| domain, domain_of)).collect())
    }
}

/// Deals the rows of tables out to one file a domain; those of an entity together, where units are entities.
fn deal(
    tables: &[PathBuf],
    folder: &Path,
    shares: &Shares,
    placed: Option<&mut Placed<'_>>,
    rng: &mut ChaCha20Rng,
) -> Result<()> {
    std::fs::create_dir_all(folder)?;
    let mut batches: Vec<RecordBatch> = Vec::new();
    for table in tables {
        let file = File::open(table).with_context(|| format!("opening {}", table.display()))?;
        for batch in ParquetRecordBatchReaderBuilder::try_new(file)?.build()? {
            batches.push(batch?);
        }
    }
    let schema = batches.first().context("no rows to deal out")?.schema();
    let all = concat_batches(&schema, &batches)?;
    let labels = all.column_by_name("label").context("no column label")?;
    let labels = labels.as_primitive_opt::<Int8Type>().context("labels are not 8-bit numbers")?;
    let labels: Vec<u8> = labels.iter().map(|label| u8::from(label == Some(1))).collect();
    let mut rows: Vec<Vec<u32>> = vec![Vec::new(); shares.0[0].len()];
    let domains = match placed {
        Some(placed) => placed.assign(&all, &labels, shares, rng)?,
        None => shares.assign(&labels, rng),
    };
    for (row, domain) in (0_u32..).zip(domains) {
        if let Some(rows) = rows.get_mut(domain) {
            rows.push(row);
        }
    }
    for (domain, rows) in rows.into_iter().enumerate() {
        let part = take_record_batch(&all, &UInt32Array::from(rows))?;
        let file = File::create(folder.join(format!("part-{domain:05}.parquet")))?;
        let mut writer = ArrowWriter::try_new(file, part.schema(), None)?;
        writer.write(&part)?;
        writer.close()?;
    }
    Ok(())
}

/// Rows of all members as numbers, for rounds of a small model.
///
/// # Errors
/// A table can't be read, or members disagree about a feature.
pub(crate) fn virtual_domains(members: &[Member]) -> Result<Vec<VirtualDomain>> {
    let tables = members.iter().map(Member::tables).collect::<Result<Vec<_>>>()?;
    let schema = union(&tables)?;
    let mut domains = Vec::with_capacity(members.len());
    for (member, Tables { schema: own, train, test, .. }) in members.iter().zip(&tables) {
        let onto = |rows: &TypedBatch| tabmesh_agent::train::onto(rows, own, &schema);
        let labelled: Vec<usize> = (0..train.rows()).filter(|row| train.labels[*row].is_some()).collect();
        let mut units: std::collections::BTreeMap<_, Vec<usize>> = std::collections::BTreeMap::new();
        for (at, row) in labelled.iter().enumerate() {
            units.entry(train.units[*row]).or_default().push(at);
        }
        let tested: Vec<usize> = (0..test.rows()).collect();
        domains.push(VirtualDomain {
            domain: member.domain.clone(),
            train: code(&schema, &onto(train), &labelled),
            units: units.into_values().collect(),
            test: code(&schema, &onto(test), &tested),
            entities: Arc::new(entities(test)),
        });
    }
    Ok(domains)
}

/// The shipped tables as a described folder.
fn write_shipped(folder: &Path) -> Result<()> {
    let feature = |column: &dataset::Column| {
        let physical = match column.values {
            dataset::Values::Number { .. } => "int64",
            dataset::Values::Levels(_) => "string",
        };
        let role = if column.sensitive { "sensitive" } else { "feature" };
        json!({"name": column.name, "type": physical, "role": role})
    };
    let own = [
        json!({"name": dataset::ROW_ID, "type": "int64", "role": "row_id"}),
        json!({"name": dataset::LABEL, "type": "int8", "role": "label"}),
    ];
    let columns: Vec<_> = own.into_iter().chain(dataset::COLUMNS.iter().map(feature)).collect();
    let domains: Vec<_> = dataset::DOMAINS.iter().map(|domain| json!({"name": domain.id})).collect();
    let description = json!({
        "name": "census_income", "kind": "domains", "task": "binary", "privacy_unit": "row_id (person)",
        "columns": columns, "domains": domains,
    });
    std::fs::write(folder.join("dataset.json"), serde_json::to_vec_pretty(&description)?)?;
    for domain in &dataset::DOMAINS {
        domain.write_train(&folder.join("train").join(format!("{}.parquet", domain.id)), None)?;
        domain.write_test(&folder.join("test").join(format!("{}.parquet", domain.id)), None)?;
    }
    Ok(())
}

/// A contract's text with its source's path made whole.
fn absolute_source(text: &str, path: &str, whole: &Path) -> Result<String> {
    if Path::new(path) == whole {
        return Ok(text.to_owned());
    }
    let places: Vec<usize> = text.match_indices(path).map(|(at, _)| at).collect();
    match places.as_slice() {
        [at] => {
            let whole = whole.display().to_string();
            Ok(format!("{}{whole}{}", &text[..*at], &text[at + path.len()..]))
        }
        _ => bail!(
            "the source path {path} stands {} times in the contract; write it as an absolute path",
            places.len()
        ),
    }
}

/// Canonical id of the target that folders declare.
const TARGET: &str = "target.label";
/// Sets the stream of partitions apart from that of the experiment.
const PARTITION: u64 = 0x7061_7274_6974_696f;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn domains_keep_a_core_and_a_part_of_the_rest_of_their_own() {
        let columns: Vec<String> = (0..12).map(|i| format!("c{i:02}")).collect();
        let of =
            |shares, domains| columns_left_out(&columns, shares, domains, &mut ChaCha20Rng::seed_from_u64(3));
        let kept = |left_out: &BTreeSet<String>| -> BTreeSet<String> {
            columns.iter().filter(|column| !left_out.contains(*column)).cloned().collect()
        };
        for (core, everywhere) in [(0.0, 1), (0.5, 6), (2.0 / 3.0, 8)] {
            let all: Vec<BTreeSet<String>> = of((2.0 / 3.0, core), 40).iter().map(kept).collect();
            assert!(all.iter().all(|own| own.len() == 8 && own.contains("c00")), "core {core}");
            let common = all.iter().skip(1).fold(all[0].clone(), |common, own| &common & own);
            assert_eq!(common.len(), everywhere, "core {core}");
            assert_eq!(all.iter().collect::<BTreeSet<_>>().len() > 1, everywhere < 8, "core {core}");
        }
        assert!(of((1.0, 0.0), 3).iter().all(BTreeSet::is_empty));
    }

    /// α = 0.05, 1 and 50: mean and variance of log-free shares of ten domains over 4000 draws, within five standard errors of
    /// Dirichlet's 1/k and (1/k)(1 − 1/k)/(kα + 1). Error rate below 1e-5, fixed seed.
    #[test]
    fn shares_have_the_moments_of_the_dirichlet_distribution() {
        let mut rng = ChaCha20Rng::seed_from_u64(3);
        for alpha in [0.05, 1.0, 50.0] {
            let firsts: Vec<f64> = (0..4000).map(|_| Shares::draw(10, alpha, &mut rng).0[0][0]).collect();
            let n = firsts.len() as f64;
            let mean = firsts.iter().sum::<f64>() / n;
            let variance = firsts.iter().map(|f| (f - mean).powi(2)).sum::<f64>() / n;
            let expected = 0.09 / (10.0 * alpha + 1.0);
            assert!((mean - 0.1).abs() < 5.0 * (expected / n).sqrt(), "{alpha}: {mean}");
            let fourth = firsts.iter().map(|f| (f - mean).powi(4)).sum::<f64>() / n;
            let error = ((fourth - variance * variance) / n).sqrt();
            assert!((variance - expected).abs() < 5.0 * error, "{alpha}: {variance} {expected}");
        }
    }

    /// 60 people of five rows each, and rows without one; in the test table half of the people are new.
    #[test]
    fn all_rows_of_an_entity_go_to_one_domain_in_training_and_test() {
        use arrow_array::{ArrayRef, StringArray};
        let rows = |from: usize| {
            let of = |row: usize| (row % 61 != 60).then(|| format!("p{}", from + row % 61));
            let people: StringArray = (0..305).map(of).collect();
            let labels: Vec<u8> = (0..305).map(|row| u8::from(row % 61 % 3 == 0)).collect();
            (RecordBatch::try_from_iter([("person", Arc::new(people) as ArrayRef)]).unwrap(), labels)
        };
        let shares = Shares([vec![0.5, 0.5, 0.0], vec![0.0, 0.25, 0.75]]);
        let mut placed = Placed { column: "person", domains: HashMap::new() };
        let mut rng = ChaCha20Rng::seed_from_u64(5);
        let mut seen: HashMap<String, BTreeSet<usize>> = HashMap::new();
        for from in [0, 30] {
            let (batch, labels) = rows(from);
            let domains = placed.assign(&batch, &labels, &shares, &mut rng).unwrap();
            assert_eq!(domains.len(), labels.len());
            let people = batch.column(0).as_string::<i32>();
            for (row, domain) in domains.iter().enumerate().filter(|(row, _)| !people.is_null(*row)) {
                seen.entry(people.value(row).to_owned()).or_default().insert(*domain);
            }
            // The third domain has entities of class 1 alone.
            assert!(
                domains.iter().zip(&labels).all(|(domain, label)| from > 0 || *domain < 2 || *label == 1)
            );
        }
        assert_eq!(seen.len(), 90);
        assert!(seen.values().all(|domains| domains.len() == 1), "{seen:?}");
        assert_eq!(seen.values().flatten().collect::<BTreeSet<_>>().len(), 3);
    }

    #[test]
    fn every_row_goes_to_one_domain_by_its_class() {
        let mut rng = ChaCha20Rng::seed_from_u64(4);
        let shares = Shares([vec![0.5, 0.5, 0.0], vec![0.0, 0.25, 0.75]]);
        let labels: Vec<u8> = (0..120).map(|i| u8::from(i % 3 == 0)).collect();
        let domains = shares.assign(&labels, &mut rng);
        let count = |class: u8, domain: usize| {
            labels.iter().zip(&domains).filter(|(l, d)| **l == class && **d == domain).count()
        };
        assert_eq!([count(0, 0), count(0, 1), count(0, 2)], [40, 40, 0]);
        assert_eq!([count(1, 0), count(1, 1), count(1, 2)], [0, 10, 30]);
    }

    #[test]
    fn a_source_path_is_made_whole_in_one_place_only() {
        let whole = Path::new("/x/rows.parquet");
        let text = "source: {type: parquet, path: rows.parquet}\n";
        let made = absolute_source(text, "rows.parquet", whole).unwrap();
        assert_eq!(made, "source: {type: parquet, path: /x/rows.parquet}\n");
        assert!(absolute_source("a: rows.parquet\nb: rows.parquet\n", "rows.parquet", whole).is_err());
    }
}
