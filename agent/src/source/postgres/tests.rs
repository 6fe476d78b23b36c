//! Against a real server, started here from the programs that the machine has; without them the tests skip and say so.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use postgres::{Client, NoTls};
use tabmesh_contract::batch::TypedBatch;
use tabmesh_privacy::budget::Rho;
use tabmesh_privacy::release::{Attribute, Binning, MarginalSpec, ReleaseQuery, Resources};
use tempfile::TempDir;

use super::super::answering::Answering;
use super::super::{DomainKey, View, open_contract};
use super::*;
use crate::gate::Gate;

/// A cluster of its own in a temporary folder, listening on a socket there.
struct Server {
    folder: TempDir,
    process: Mutex<Child>,
}

impl Drop for Server {
    fn drop(&mut self) {
        // The process may have ended by itself; it is gone either way.
        let mut process = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = process.kill();
        let _ = process.wait();
    }
}

impl Server {
    fn start() -> Result<Self, String> {
        let programs = programs().ok_or("there is no `initdb` in PATH or under /usr/lib/postgresql")?;
        let folder = tempfile::Builder::new().prefix("tabmesh-pg").tempdir().map_err(|e| e.to_string())?;
        let root = Command::new("id").arg("-u").output().is_ok_and(|out| out.stdout.starts_with(b"0\n"));
        let run = |program: &str| {
            let program = programs.join(program);
            // The server refuses to run as root.
            if root {
                let mut command = Command::new("setpriv");
                command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups"]).arg(program);
                command
            } else {
                Command::new(program)
            }
        };
        if root {
            let owned = Command::new("chown").arg("postgres").arg(folder.path()).status();
            if !owned.is_ok_and(|status| status.success()) {
                return Err("this is root, and there is no user `postgres` to run a server as".to_owned());
            }
        }
        let data = folder.path().join("data");
        let made = run("initdb")
            .args(["--auth=trust", "--username=owner", "--encoding=UTF8", "--locale=C", "--no-sync", "-D"])
            .arg(&data)
            .output()
            .map_err(|error| error.to_string())?;
        if !made.status.success() {
            return Err(String::from_utf8_lossy(&made.stderr).into_owned());
        }
        let process = run("postgres")
            .args(["-c", "listen_addresses=", "-c", "fsync=off", "-k"])
            .arg(folder.path())
            .arg("-D")
            .arg(&data)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| error.to_string())?;
        let server = Self { folder, process: Mutex::new(process) };
        for _ in 0..600 {
            if server.connected("owner").is_ok() {
                return Ok(server);
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        Err("the server didn't come up within a minute".to_owned())
    }

    fn connection(&self, user: &str) -> String {
        format!("host={} dbname=postgres user={user}", self.folder.path().display())
    }

    fn connected(&self, user: &str) -> Result<Client, postgres::Error> {
        Client::connect(&self.connection(user), NoTls)
    }

    /// A table filled by its owner, which an agent's role may read, with the file that names it.
    fn table(&self, name: &str, columns: &str, lines: &[Vec<Option<String>>]) -> TempDir {
        let mut client = self.connected("owner").unwrap();
        client
            .batch_execute(&format!("DROP TABLE IF EXISTS {name}; CREATE TABLE {name} ({columns})"))
            .unwrap();
        let mut copy = client.copy_in(&format!("COPY {name} FROM STDIN")).unwrap();
        for line in lines {
            let cells: Vec<&str> = line.iter().map(|cell| cell.as_deref().unwrap_or("\\N")).collect();
            std::io::Write::write_all(&mut copy, format!("{}\n", cells.join("\t")).as_bytes()).unwrap();
        }
        copy.finish().unwrap();
        client.batch_execute(&format!("GRANT SELECT ON {name} TO agent")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        self.write_place(folder.path(), name);
        folder
    }

    fn write_place(&self, folder: &Path, table: &str) {
        let place = format!("connection: {}\ntable: {table}\n", self.connection("agent"));
        std::fs::write(folder.join("sales.pg.yaml"), place).unwrap();
    }
}

fn programs() -> Option<PathBuf> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&paths).find(|folder| folder.join("initdb").is_file());
    in_path.or_else(|| {
        let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
        versions
            .filter_map(|entry| Some(entry.ok()?.path().join("bin")))
            .find(|bin| bin.join("initdb").is_file())
    })
}

/// The server of these tests; nothing, with the reason printed, where there can't be one.
fn server() -> Option<&'static Server> {
    static SERVER: OnceLock<Option<Server>> = OnceLock::new();
    let started = SERVER.get_or_init(|| match Server::start() {
        Ok(server) => {
            let role = "CREATE ROLE agent LOGIN; CREATE TYPE kind AS ENUM ('grocery', 'travel', 'casino', 'odd\\one')";
            server.connected("owner").unwrap().batch_execute(role).unwrap();
            Some(server)
        }
        Err(reason) => {
            let required = std::env::var_os("TABMESH_REQUIRE_POSTGRES").is_some();
            assert!(!required, "no PostgreSQL server can be started: {reason}");
            eprintln!("skipped: no PostgreSQL server can be started: {reason}");
            None
        }
    });
    started.as_ref()
}

/// A budget is kept for the table: two files that name it, one with its schema and a port, are one source.
#[test]
fn a_table_is_the_same_place_whatever_file_names_it() {
    let folder = tempfile::tempdir().unwrap();
    let places = |file: &str, text: &str| {
        let path = folder.path().join(file);
        std::fs::write(&path, text).unwrap();
        PostgresSource::new(path).places()
    };
    let first =
        places("a.yaml", "connection: host=/run/pg dbname=shop user=agent password=x\ntable: sales\n");
    let same = places(
        "b.yaml",
        "connection: host=localhost port=5432 user=owner dbname=shop\ntable: public.sales\n",
    );
    assert!(!first.is_disjoint(&same), "{first:?} {same:?}");
    assert!(first.iter().all(|place| !place.contains("password")));
    for other in [
        "connection: host=/run/pg dbname=shop user=agent\ntable: archive.sales\n",
        "connection: host=/run/pg dbname=other user=agent\ntable: sales\n",
        "connection: host=/run/pg port=5433 dbname=shop user=agent\ntable: sales\n",
    ] {
        assert!(first.is_disjoint(&places("c.yaml", other)), "{other}");
    }
}

fn contract(unit: &str) -> Contract {
    let role = if unit.contains("customer") { ", role: entity" } else { "" };
    let text = format!(
        "name: shop.sales
version: '1.0.0'
owner: shop@example.com
schema:
  - {{name: tid, type: integer, role: id, unique: true}}
  - {{name: customer, type: string, pii: true{role}}}
  - {{name: label, type: integer, role: target, feature: sale.fraud, categories: ['0', '1']}}
  - {{name: amount, type: decimal, range: [0, 100], feature: sale.amount}}
  - {{name: rate, type: decimal, range: [0, 1], feature: sale.rate}}
  - {{name: pieces, type: integer, range: [0, 9], feature: sale.pieces}}
  - {{name: category, type: categorical, categories: [grocery, travel], feature: sale.category}}
  - {{name: online, type: boolean, feature: sale.online}}
  - {{name: at, type: timestamp, role: time}}
privacy: {{sensitivity: low, allow_training: true, {unit}, max_units: 1000000}}
source: {{type: postgres, path: sales.pg.yaml}}
"
    );
    Contract::parse("contract.yaml", &text).unwrap_or_else(|error| panic!("{}", error.render())).0
}

const COLUMNS: &str = "\"label\" int4, tid int8, customer varchar(9), amount numeric, rate float4, pieces numeric, category kind, \
                       online bool, at timestamptz, \"another \"\"one\"\"\" bytea";

/// In the order of the table, not of the contract. Every 97th row has no customer; amounts are out of a double's range,
/// missing, or on an edge; pieces aren't always whole; categories and labels aren't always declared.
fn lines(rows: usize, repeat: usize) -> Vec<Vec<Option<String>>> {
    let line = |i: usize| {
        let mixed = i.wrapping_mul(2_654_435_761) >> 7;
        let some = |text: String| (!text.is_empty()).then_some(text);
        let amount = match mixed % 23 {
            0 => String::new(),
            1 => "NaN".to_owned(),
            2 => "1e400".to_owned(),
            3 => "-1e-400".to_owned(),
            4 => "20".to_owned(),
            n => format!("{}.{}", n * 17 % 101, mixed % 10),
        };
        let pieces = ["0", "1", "2.5", "4", ""][mixed % 53 % 5];
        let category = ["grocery", "travel", "casino", "odd\\\\one", ""][mixed % 11 % 5];
        let customer = match i % 97 {
            0 => String::new(),
            1 => format!("a\\tb\\\\{}", i / repeat),
            _ => format!("c{}", i / repeat),
        };
        vec![
            some(["0", "1", "1", "2", ""][mixed % 61 % 5].to_owned()),
            some(i.to_string()),
            some(customer),
            some(amount),
            some(["0.1", "0.2", "0.3", "Infinity", ""][mixed % 29 % 5].to_owned()),
            some(pieces.to_owned()),
            some(category.to_owned()),
            some(["t", "f", ""][mixed % 3].to_owned()),
            some(if mixed.is_multiple_of(7) { String::new() } else { "2026-01-02 03:04:05.5+02".to_owned() }),
            some("\\\\x00".to_owned()),
        ]
    };
    (0..rows).map(line).collect()
}

fn query() -> ReleaseQuery {
    let edges =
        |edges: &[f64], upper: f64| Binning::Edges { lower: 0.0, upper, log1p: false, edges: edges.to_vec() };
    let feature = |id: &str, binning| Attribute { id: id.to_owned(), binning, merge: None };
    let mut category = feature("sale.category", Binning::Levels { levels: 2 });
    category.merge = Some(vec![0, 1, 1, 2]);
    let attributes = vec![
        feature("sale.amount", edges(&[3.0, 20.0, 55.5], 100.0)),
        // The double nearest to a tenth, which the single nearest to it isn't.
        feature("sale.rate", edges(&[0.1, 0.2], 1.0)),
        feature("sale.pieces", edges(&[1.0, 3.0], 9.0)),
        category,
        feature("sale.online", Binning::Levels { levels: 2 }),
        Attribute::label(2),
    ];
    let marginals = [vec![5], vec![0, 5], vec![1, 0], vec![2, 3], vec![4, 3, 5], vec![1]];
    ReleaseQuery {
        plan_digest: "p".to_owned(),
        stage: 1,
        stage_name: "tree".to_owned(),
        attributes,
        marginals: marginals.into_iter().map(|attributes| MarginalSpec { attributes }).collect(),
        rho: Rho::from_f64_round_down(0.01).unwrap(),
        max_rows_per_unit: 1,
    }
}

/// Counts by the source's own way, and whether the server made them; then by streaming.
fn both(contract: &Contract, folder: &Path) -> (Vec<i64>, bool, Vec<i64>) {
    let schema = contract.approved_schema().unwrap();
    let postgres = PostgresSource::new(folder.join("sales.pg.yaml"));
    let counted = AtomicBool::new(false);
    let counts = |source: &dyn Source| {
        let view = View::new(source, contract, &schema, DomainKey::new(&[3; 32])).unwrap();
        view.marginals(&query(), &Gate::new(b"gate"), Resources::default()).unwrap()
    };
    let watched = |request: &MarginalRequest<'_>| {
        counted.store(count::in_server(&postgres, request)?.is_some(), Ordering::Relaxed);
        postgres.marginals(request)
    };
    let own = counts(&Answering { inner: &postgres, answer: watched });
    let streamed =
        counts(&Answering { inner: &postgres, answer: |request: &MarginalRequest<'_>| request.stream() });
    (own, counted.load(Ordering::Relaxed), streamed)
}

#[test]
fn the_server_counts_what_streaming_counts() {
    let Some(server) = server() else { return };
    for (name, unit, repeat, by_itself) in [
        ("by_row", "unit: row", 1, true),
        ("by_two", "unit: customer, max_rows_per_unit: 9", 2, true),
        // Rows without a customer are one unit of more rows than may count: only the agent can choose among them.
        ("by_one", "unit: customer, max_rows_per_unit: 2", 2, false),
    ] {
        let folder = server.table(name, COLUMNS, &lines(if by_itself { 800 } else { 5_000 }, repeat));
        let contract = contract(unit);
        let source = open_contract(&contract, folder.path()).unwrap();
        source.schema_check(&contract).unwrap();
        let (own, in_server, streamed) = both(&contract, folder.path());
        assert_eq!(in_server, by_itself, "{name}");
        assert!(own.iter().filter(|count| **count > 0).count() > 25, "{own:?}");
        assert_eq!(own, streamed, "{name}");
    }
}

#[test]
fn rows_come_as_they_are_declared() {
    let Some(server) = server() else { return };
    let folder = server.table("streamed", COLUMNS, &lines(20_000, 2));
    let contract = contract("unit: row");
    let schema = contract.approved_schema().unwrap();
    let source = open_contract(&contract, folder.path()).unwrap();
    let view = View::new(&*source, &contract, &schema, DomainKey::new(&[3; 32])).unwrap();
    let mut all = TypedBatch::empty(&schema);
    let mut times = Vec::new();
    for rows in view.rows().unwrap() {
        let rows = rows.unwrap();
        all.append(&rows.batch);
        times.extend(rows.times_ms);
    }
    assert_eq!(all.rows(), 20_000);
    // 2026-01-02 01:04:05.5 UTC; a server gives rows in an order of its own.
    let without = lines(20_000, 2).iter().filter(|line| line[8].is_none()).count();
    let (given, null): (Vec<Option<i64>>, Vec<Option<i64>>) = times.into_iter().partition(Option::is_some);
    assert_eq!((given.len(), null.len()), (20_000 - without, without));
    assert!(given.iter().all(|at| *at == Some(1_767_315_845_500)), "{:?}", given.first());
    let labelled = all.labels.iter().flatten().count();
    let expected =
        lines(20_000, 2).iter().filter(|line| matches!(line[0].as_deref(), Some("0" | "1"))).count();
    assert_eq!(labelled, expected);
    // An empty table is a stream without rows, and refused when a contract is checked.
    let folder = server.table("nothing", COLUMNS, &[]);
    let source = open_contract(&contract, folder.path()).unwrap();
    assert!(matches!(source.schema_check(&contract), Err(SourceError::NoRows { .. })));
    assert_eq!(source.batches(&contract).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_read_is_named_without_a_cell_or_a_password() {
    let contract = contract("unit: row");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sales.pg.yaml");
    let said = |place: &str| {
        std::fs::write(&path, place).unwrap();
        open_contract(&contract, folder.path()).unwrap().schema_check(&contract).unwrap_err().to_string()
    };
    for (place, words) in [
        ("connection: host=/nowhere user=a password=hunter2\ntable: t\n", "can't read"),
        (
            "connection: host=db.acme.example user=a password=hunter2\ntable: t\n",
            "db.acme.example isn't this machine",
        ),
        (
            "connection: host=localhost hostaddr=10.1.2.3 user=a password=hunter2\ntable: t\n",
            "10.1.2.3 isn't this machine",
        ),
        ("connection: hostaddr=10.1.2.3 user=a password=hunter2\ntable: t\n", "10.1.2.3 isn't this machine"),
        ("connection: hast=/tmp password=hunter2\ntable: t\n", "write it as libpq does"),
        ("connection: user=a password=hunter2\ntable: t\n", "names no host"),
        ("connection: host=/tmp user=a\ntable: a.b.c\n", "schema.name"),
        ("connection: host=/tmp user=a password=hunter2\ntable: t\ncolour: red\n", "colour"),
        ("connection: [host=/tmp user=a password=hunter2]\ntable: t\n", "expected"),
    ] {
        let error = said(place);
        assert!(
            error.contains(words) && error.contains("sales.pg.yaml") && !error.contains("hunter2"),
            "{error}"
        );
    }
    let Some(server) = server() else { return };
    server.write_place(folder.path(), "no_such_table");
    let error =
        open_contract(&contract, folder.path()).unwrap().schema_check(&contract).unwrap_err().to_string();
    assert!(error.contains("42P01"), "{error}");
    let wrong = server.table("wrong", &COLUMNS.replace("amount numeric", "amount text"), &lines(3, 1));
    let error =
        open_contract(&contract, wrong.path()).unwrap().schema_check(&contract).unwrap_err().to_string();
    assert!(error.contains("`amount`") && error.contains("found text"), "{error}");
    // The agent's role reads its table and nothing else.
    let hidden = server.table("hidden", COLUMNS, &lines(3, 1));
    server.connected("owner").unwrap().batch_execute("REVOKE SELECT ON hidden FROM agent").unwrap();
    let error =
        open_contract(&contract, hidden.path()).unwrap().schema_check(&contract).unwrap_err().to_string();
    assert!(error.contains("42501"), "{error}");
}
