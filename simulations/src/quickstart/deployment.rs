//! The files an operator would write by hand for a deployment: contracts, local policies, configurations, a plan.
//!
//! One function a file. Files refer to each other by relative paths, so a deployment's folder can be moved, and
//! each domain's folder holds what that domain alone would have: its table, its contract, its policy and its
//! agent's configuration. Test tables lie apart, in no agent's configuration.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tabmesh_contract::contract::DomainAggregates;
use tabmesh_contract::schema::Scale;

use crate::quickstart::dataset::{
    CLASSES, COLUMNS, Column, DOMAINS, Domain, LABEL, Participation, ROW_ID, TARGET, TARGET_DESCRIPTION,
    Values,
};
use crate::quickstart::pki::{AGENT_NAME, PkiFolder, Role, Usage};

/// Where the files of a deployment lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Names the files under a folder without looking at it.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The deployment's folder.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Folder of certificates and keys.
    #[must_use]
    pub fn certificates(&self) -> PathBuf {
        self.root.join("certs")
    }

    /// Folder of the coordinator's configuration and data.
    #[must_use]
    pub fn coordinator(&self) -> PathBuf {
        self.root.join("coordinator")
    }

    /// The coordinator's configuration.
    #[must_use]
    pub fn coordinator_config(&self) -> PathBuf {
        self.coordinator().join("coordinator.yaml")
    }

    /// Attacks on record, for the coordinator's reports.
    #[must_use]
    pub fn attacks(&self) -> PathBuf {
        self.coordinator().join(ATTACKS_FILE)
    }

    /// File to which the coordinator writes the address it listens on.
    #[must_use]
    pub fn coordinator_address(&self) -> PathBuf {
        self.coordinator().join(ADDRESS_FILE)
    }

    /// Folder of one domain's table, contract, policy, agent configuration and data.
    #[must_use]
    pub fn domain(&self, domain: &str) -> PathBuf {
        self.root.join("domains").join(domain)
    }

    /// A domain's training table.
    #[must_use]
    pub fn train_table(&self, domain: &str) -> PathBuf {
        self.domain(domain).join(TRAIN_FILE)
    }

    /// A domain's contract.
    #[must_use]
    pub fn contract(&self, domain: &str) -> PathBuf {
        self.domain(domain).join("contract.yaml")
    }

    /// A domain's local policy.
    #[must_use]
    pub fn policy(&self, domain: &str) -> PathBuf {
        self.domain(domain).join("policy.yaml")
    }

    /// A domain's agent configuration.
    #[must_use]
    pub fn agent_config(&self, domain: &str) -> PathBuf {
        self.domain(domain).join("agent.yaml")
    }

    /// The other agents' identity keys, as a domain was given them.
    #[must_use]
    pub fn peers(&self, domain: &str) -> PathBuf {
        self.domain(domain).join(PEERS_FILE)
    }

    /// The agents' identity keys, as the auditor was given them.
    #[must_use]
    pub fn auditors_peers(&self) -> PathBuf {
        self.root.join(PEERS_FILE)
    }

    /// File to which a domain's agent writes the address of its prediction endpoint.
    #[must_use]
    pub fn agent_address(&self, domain: &str) -> PathBuf {
        self.domain(domain).join(ADDRESS_FILE)
    }

    /// A domain's test table; no agent's configuration names it.
    #[must_use]
    pub fn test_table(&self, domain: &str) -> PathBuf {
        self.root.join("held_out").join(format!("{domain}.parquet"))
    }

    /// The operator's client profile.
    #[must_use]
    pub fn operator_profile(&self) -> PathBuf {
        self.root.join("operator.yaml")
    }

    /// The auditor's client profile.
    #[must_use]
    pub fn auditor_profile(&self) -> PathBuf {
        self.root.join("auditor.yaml")
    }

    /// The plan.
    #[must_use]
    pub fn plan(&self) -> PathBuf {
        self.root.join("plan.yaml")
    }
}

/// What a plan asks for, as far as the quickstart varies it.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanChoices {
    /// Name for people.
    pub name: String,
    /// Canonical id of what is predicted.
    pub target: String,
    /// ε of the whole plan.
    pub epsilon: f64,
    /// δ of the whole plan.
    pub delta: f64,
    /// Agents that must take part, and no more than take part.
    pub agents: usize,
    /// Seconds a stage or round is open.
    pub deadline_s: u32,
    /// Rows of the synthetic corpus.
    pub corpus_rows: u32,
    /// Steps of continued pre-training.
    pub pretrain_steps: u32,
    /// Federated rounds.
    pub rounds: u32,
    /// What they train, as a plan says it; the plan's default if none.
    pub adapter: Option<String>,
    /// Whether the coordinator gets secure sums alone; each agent then adds a share of the noise.
    pub secure_sum: bool,
}

impl Default for PlanChoices {
    fn default() -> Self {
        Self {
            name: "census-income".into(),
            target: TARGET.into(),
            epsilon: 3.0,
            delta: 1e-5,
            agents: DOMAINS.iter().filter(|d| d.participation == Participation::Member).count(),
            deadline_s: 60,
            corpus_rows: 12_000,
            pretrain_steps: 150,
            rounds: 20,
            adapter: None,
            secure_sum: false,
        }
    }
}

/// Writes all tables, contracts and local policies: what exists before any process is started. `rows` shortens every table to
/// its first rows.
///
/// # Errors
/// A file or folder that can't be written.
pub fn write_domains(layout: &Layout, rows: Option<usize>, aggregates: DomainAggregates) -> Result<()> {
    for domain in &DOMAINS {
        domain.write_train(&layout.train_table(domain.id), rows)?;
        domain.write_test(&layout.test_table(domain.id), rows)?;
        write_contract(layout, domain, aggregates)?;
        write_policy(layout, domain.id, &product(domain), PlanChoices::default().epsilon)?;
    }
    Ok(())
}

/// Writes a domain's data-product contract in the short form.
///
/// # Errors
/// The file can't be written.
pub fn write_contract(layout: &Layout, domain: &Domain, aggregates: DomainAggregates) -> Result<()> {
    put(&layout.contract(domain.id), &contract_yaml(domain, aggregates))
}

/// Writes a domain's local policy: the grant, its signer and the smallest cohort.
///
/// # Errors
/// The file can't be written.
pub fn write_policy(layout: &Layout, domain: &str, product: &str, epsilon: f64) -> Result<()> {
    put(&layout.policy(domain), &policy_yaml(domain, product, epsilon))
}

/// Writes the coordinator's configuration; `listen` is `host:port`, where port 0 lets the system choose.
///
/// # Errors
/// The file can't be written.
pub fn write_coordinator(layout: &Layout, base_model: &Path, threads: usize, listen: &str) -> Result<()> {
    // Nothing is on record yet.
    put(&layout.attacks(), "[]\n")?;
    put(&layout.coordinator_config(), &coordinator_yaml(base_model, threads, listen))
}

/// Writes the client profiles of operator and auditor, for `tabmesh-coordinator … --client FILE`.
///
/// # Errors
/// A file can't be written.
pub fn write_clients(layout: &Layout, coordinator_address: &str) -> Result<()> {
    for (role, path) in [(operator(), layout.operator_profile()), (auditor(), layout.auditor_profile())] {
        put(&path, &client_yaml(&role, coordinator_address))?;
    }
    Ok(())
}

/// Writes a domain's agent configuration; `coordinator_address` is `host:port`. It names the domain's file of peers if
/// there is one.
///
/// # Errors
/// The file can't be written.
pub fn write_agent(layout: &Layout, domain: &str, coordinator_address: &str) -> Result<()> {
    let peers = layout.peers(domain).exists();
    put(&layout.agent_config(domain), &agent_yaml(domain, coordinator_address, peers))
}

/// Writes a domain's copy of the identity keys of some domains' agents, from the folder of certificates: what the
/// operators of the domains would have told each other.
///
/// # Errors
/// A key is missing, or the file can't be written.
pub fn write_peers(layout: &Layout, domain: &str, of: &[&str]) -> Result<()> {
    put(&layout.peers(domain), &peers_text(layout, of)?)
}

/// Writes the auditor's copy of the same keys.
///
/// # Errors
/// A key is missing, or the file can't be written.
pub fn write_auditors_peers(layout: &Layout, of: &[&str]) -> Result<()> {
    put(&layout.auditors_peers(), &peers_text(layout, of)?)
}

fn peers_text(layout: &Layout, of: &[&str]) -> Result<String> {
    let pki = PkiFolder::at(layout.certificates());
    let mut text = String::from(
        "# Identity keys of the mesh's agents, handed over between their operators, not by the coordinator.\npeers:\n",
    );
    for other in of {
        let role = Role::agent(other);
        let path = pki.signing_public_key(&role);
        let key = std::fs::read(&path).with_context(|| format!("can't read {}", path.display()))?;
        line(
            &mut text,
            format_args!(
                "  - {{agent: {}, signing_public_key: {}}}",
                quoted(&role.spiffe_id()),
                quoted(&hex::encode(key))
            ),
        );
    }
    Ok(text)
}

/// Writes the plan.
///
/// # Errors
/// The file can't be written.
pub fn write_plan(layout: &Layout, choices: &PlanChoices) -> Result<()> {
    put(&layout.plan(), &plan_yaml(choices))
}

/// Name of a domain's data product.
#[must_use]
pub fn product(domain: &Domain) -> String {
    format!("{}.worker_income", domain.id)
}

/// The roles a deployment of the quickstart needs certificates for.
#[must_use]
pub fn roles() -> Vec<Role> {
    let agents = DOMAINS.iter().map(|domain| Role::agent(domain.id));
    [Role::Coordinator].into_iter().chain(agents).chain([operator(), auditor()]).collect()
}

/// The operator that submits the plan.
#[must_use]
pub fn operator() -> Role {
    Role::Operator { name: "quickstart".into() }
}

/// The auditor that reads the report.
#[must_use]
pub fn auditor() -> Role {
    Role::Auditor { name: "compliance".into() }
}

fn contract_yaml(domain: &Domain, aggregates: DomainAggregates) -> String {
    let mut text = String::new();
    let member = domain.participation == Participation::Member;
    line(
        &mut text,
        format_args!("# Contract of the data product of the domain `{}`: {}.", domain.id, domain.title),
    );
    line(&mut text, format_args!("name: {}", product(domain)));
    line(&mut text, format_args!("version: \"1.0.0\""));
    line(&mut text, format_args!("owner: data-owner@{}.example", domain.id));
    let about =
        format!("{}: employed people and whether they earn above 50,000 dollars a year", domain.title);
    line(&mut text, format_args!("description: {}", quoted(&about)));
    line(&mut text, format_args!("schema:"));
    line(&mut text, format_args!("  - {{name: {ROW_ID}, type: integer, pii: false, role: id}}"));
    for column in &COLUMNS {
        contract_column(&mut text, column);
    }
    line(&mut text, format_args!("  - name: {LABEL}"));
    line(&mut text, format_args!("    type: categorical"));
    line(&mut text, format_args!("    pii: false"));
    line(&mut text, format_args!("    role: target"));
    line(&mut text, format_args!("    feature: {TARGET}"));
    line(&mut text, format_args!("    description: {}", quoted(TARGET_DESCRIPTION)));
    line(&mut text, format_args!("    categories: [{}]", CLASSES.map(quoted).join(", ")));
    line(&mut text, format_args!("metadata:"));
    line(&mut text, format_args!("  constraints:"));
    line(&mut text, format_args!("    - non_null: [{ROW_ID}, {LABEL}]"));
    line(&mut text, format_args!("    - unique: {ROW_ID}"));
    line(
        &mut text,
        format_args!("    # The ranges are the survey's code book; they double as clipping bounds."),
    );
    line(&mut text, format_args!("    - numeric_range:"));
    for column in &COLUMNS {
        if let Values::Number { lower, upper, .. } = column.values {
            line(&mut text, format_args!("        {}: [{lower}, {upper}]", column.name));
        }
    }
    line(&mut text, format_args!("privacy:"));
    line(&mut text, format_args!("  sensitivity: medium"));
    if !member {
        line(&mut text, format_args!("  # A newcomer receives the model and gives nothing."));
    }
    line(&mut text, format_args!("  allow_training: {member}"));
    line(&mut text, format_args!("  unit: row        # a row is a person"));
    line(&mut text, format_args!("  max_units: {DECLARED_MAX_UNITS}"));
    if aggregates == DomainAggregates::Confidential {
        line(&mut text, format_args!("  domain_aggregates: confidential  # plans with secure sums only"));
    }
    line(&mut text, format_args!("quality_slo: {{row_completeness: 0.99}}"));
    line(&mut text, format_args!("source: {{type: parquet, path: {TRAIN_FILE}}}"));
    text
}

fn contract_column(text: &mut String, column: &Column) {
    let kind = match column.values {
        Values::Number { .. } => "integer",
        Values::Levels(_) => "categorical",
    };
    line(text, format_args!("  - name: {}", column.name));
    line(text, format_args!("    type: {kind}"));
    line(text, format_args!("    pii: false"));
    if column.sensitive {
        line(text, format_args!("    sensitive: true"));
    }
    line(text, format_args!("    role: feature"));
    line(text, format_args!("    feature: {}", column.feature));
    line(text, format_args!("    description: {}", quoted(column.description)));
    match column.values {
        Values::Number { scale, unit, .. } => {
            line(text, format_args!("    unit: {}", quoted(unit)));
            if scale == Scale::Log1p {
                line(text, format_args!("    scale: log1p"));
            }
        }
        Values::Levels(levels) => {
            line(text, format_args!("    categories:"));
            for level in levels {
                line(text, format_args!("      - {}", quoted(level)));
            }
        }
    }
}

fn policy_yaml(domain: &str, product: &str, epsilon: f64) -> String {
    format!(
        "\
# What the domain `{domain}` grants, and under whose name. The agent obeys this file before any plan.
grant:
  product: {product}
  epsilon: \"{epsilon}\"
  delta: \"0.00001\"
  signer: data-owner@{domain}.example
minimum_cohort: 3
"
    )
}

fn client_yaml(role: &Role, coordinator_address: &str) -> String {
    let pki = PkiFolder::at("certs");
    let tls = pki.tls(role, Usage::Client);
    format!(
        "\
# tabmesh-coordinator plan status --client operator.yaml; tabmesh-coordinator report write --client auditor.yaml
address: {address}
spiffe_id: {coordinator}
tls:
  ca: {ca}
  cert: {cert}
  key: {key}
insecure_dev: true
",
        address = quoted(coordinator_address),
        coordinator = Role::Coordinator.spiffe_id(),
        ca = path(&pki.authority()),
        cert = path(&tls.certificate),
        key = path(&tls.key),
    )
}

fn coordinator_yaml(base_model: &Path, threads: usize, listen: &str) -> String {
    let pki = PkiFolder::at("../certs");
    let tls = pki.tls(&Role::Coordinator, Usage::Server);
    format!(
        "\
# tabmesh-coordinator serve --config coordinator.yaml
deployment: quickstart
listen: {listen}              # with port 0 the system chooses one
address_file: {ADDRESS_FILE}
data_dir: data
tls:
  ca: {ca}
  cert: {cert}
  key: {key}
signing_key: {signing}
base_model: {base}
threads: {threads}
heartbeat_interval_ms: 1000
stated:
  curator: whoever runs this quickstart
  intended_use: to see what a deployment does; its processes are all on one machine
  description: a tabular model tuned on a synthetic corpus, with an adapter from federated rounds
  data_domain: employed people in the 1994 and 1995 supplements of the US Current Population Survey, one row a person, by industry
  security: mutual TLS with certificates of a development authority made for this run
attacks: {ATTACKS_FILE}
",
        listen = quoted(listen),
        ca = path(&pki.authority()),
        cert = path(&tls.certificate),
        key = path(&tls.key),
        signing = path(&pki.signing_key(&Role::Coordinator)),
        base = path(base_model),
    )
}

fn agent_yaml(domain: &str, coordinator_address: &str, peers: bool) -> String {
    let peers = if peers { format!("peers: {PEERS_FILE}\n") } else { String::new() };
    let pki = PkiFolder::at("../../certs");
    let role = Role::agent(domain);
    let tls = pki.tls(&role, Usage::Client);
    format!(
        "\
# tabmesh-agent run --config agent.yaml
domain: {domain}
name: {AGENT_NAME}
data_dir: data
contract: contract.yaml
policy: policy.yaml
coordinator:
  address: {address}
  spiffe_id: {coordinator}
  signing_public_key: {coordinator_key}
tls:
  ca: {ca}
  cert: {cert}
  key: {key}
signing_key: {signing}
{peers}serve:
  bind: 127.0.0.1:0
  address_file: {ADDRESS_FILE}
  model_name: income
",
        address = quoted(coordinator_address),
        coordinator = Role::Coordinator.spiffe_id(),
        coordinator_key = path(&pki.signing_public_key(&Role::Coordinator)),
        ca = path(&pki.authority()),
        cert = path(&tls.certificate),
        key = path(&tls.key),
        signing = path(&pki.signing_key(&role)),
    )
}

/// A plan as an operator would write it.
#[must_use]
pub fn plan_yaml(choices: &PlanChoices) -> String {
    let PlanChoices { name, target, epsilon, delta, agents, deadline_s, .. } = choices;
    let PlanChoices { corpus_rows, pretrain_steps, rounds, adapter, secure_sum, .. } = choices;
    let placement = if *secure_sum {
        ", noise_placement: secure_sum, secure_sum: {colluders: 1, dropouts: 1}"
    } else {
        ""
    };
    let adapter = adapter.as_ref().map_or(String::new(), |adapter| format!(", adapter: {adapter}"));
    format!(
        "\
# tabmesh-coordinator plan submit plan.yaml
kind: TabmeshPlan
name: {name}
target: {target}
cohort: {{min_agents: {agents}, max_agents: {agents}}}
privacy: {{epsilon: {epsilon}, delta: {delta}{placement}}}
release: {{deadline_s: {deadline_s}}}
corpus: {{rows: {corpus_rows}}}
pretrain: {{steps: {pretrain_steps}}}
rounds: {{count: {rounds}, deadline_s: {deadline_s}{adapter}}}
",
        name = quoted(name),
    )
}

fn put(path: &Path, text: &str) -> Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("can't make folder {}", folder.display()))?;
    }
    std::fs::write(path, text).with_context(|| format!("can't write {}", path.display()))
}

/// Appends a line.
fn line(text: &mut String, content: std::fmt::Arguments<'_>) {
    // Writing to a String can't fail.
    let _ = writeln!(text, "{content}");
}

/// A text as a double-quoted YAML scalar: JSON's escapes are a part of YAML's.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn path(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}

/// Name of a domain's training table in its folder.
const TRAIN_FILE: &str = "train.parquet";
/// Name of the file with other agents' keys, in a domain's folder.
const PEERS_FILE: &str = "peers.yaml";
/// Attacks on record, beside the coordinator's configuration.
const ATTACKS_FILE: &str = "attacks.json";
/// Name of the file that holds a bound address.
const ADDRESS_FILE: &str = "address";
/// Units each domain declares as its largest number; δ = 1e-5 is a tenth of its inverse.
pub const DECLARED_MAX_UNITS: u32 = 10_000;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::collections::BTreeSet;

    use tabmesh_contract::contract::Contract;
    use tabmesh_federation::plan::{AdapterSpec, Plan, SecureSumSpec};

    use super::*;
    use crate::quickstart::{dataset, pki};

    fn domain(id: &str) -> &'static Domain {
        DOMAINS.iter().find(|d| d.id == id).unwrap()
    }

    fn contract(id: &str) -> Contract {
        let parsed = [DomainAggregates::Confidential, DomainAggregates::Open].map(|aggregates| {
            let yaml = contract_yaml(domain(id), aggregates);
            let (contract, warnings) =
                Contract::parse("contract.yaml", &yaml).unwrap_or_else(|e| panic!("{}", e.render()));
            assert!(warnings.is_empty(), "{warnings:?}");
            assert_eq!(contract.privacy.domain_aggregates, aggregates);
            contract
        });
        let [_, open] = parsed;
        open
    }

    #[test]
    fn every_contract_promises_the_shared_schema() {
        for domain in &DOMAINS {
            let contract = contract(domain.id);
            assert_eq!(contract.domain, domain.id);
            assert_eq!(contract.name, product(domain));
            assert_eq!(contract.approved_schema().unwrap(), dataset::schema().unwrap());
            let target = contract.columns.iter().find(|c| c.name == LABEL).unwrap();
            assert!(target.required && target.feature.as_str() == TARGET);
            let sensitive: Vec<_> =
                contract.columns.iter().filter(|c| c.sensitive).map(|c| &c.name).collect();
            assert_eq!(sensitive, ["age", "marital_stat", "sex"]);
            assert_eq!(contract.privacy.max_units, Some(DECLARED_MAX_UNITS.into()));
            assert_eq!(contract.source.unwrap().path, TRAIN_FILE);
        }
    }

    #[test]
    fn only_members_allow_training() {
        let allowed: BTreeSet<_> =
            DOMAINS.iter().filter(|d| contract(d.id).privacy.allow_training).map(|d| d.id).collect();
        assert_eq!(allowed, dataset::members().map(|d| d.id).collect());
    }

    #[test]
    fn the_plan_parses_and_asks_for_what_was_chosen() {
        let choices = PlanChoices { rounds: 7, corpus_rows: 4321, deadline_s: 30, ..PlanChoices::default() };
        let (plan, _) = Plan::parse(plan_yaml(&choices).as_bytes(), "plan.yaml").unwrap();
        assert_eq!((plan.rounds.count, plan.corpus.rows, plan.rounds.deadline_s), (7, 4321, 30));
        assert_eq!((plan.privacy.epsilon, plan.privacy.delta), (3.0, 1e-5));
        assert_eq!((plan.cohort.min_agents, plan.cohort.max_agents), (5, 5));
        assert!(plan.cohort.tags.is_empty());
        assert_eq!(plan.target.as_str(), TARGET);
        assert_eq!(plan.rounds.adapter, AdapterSpec::Forest { trees: 4, depth: 4 });
        let adapter = Some("{kind: lora, rank: 2}".to_owned());
        let (plan, _) = Plan::parse(plan_yaml(&PlanChoices { adapter, ..choices }).as_bytes(), "p").unwrap();
        assert_eq!(plan.rounds.adapter, AdapterSpec::Lora { rank: 2 });
        assert_eq!(plan.secure_sum(), None);
        let secure = PlanChoices { secure_sum: true, ..PlanChoices::default() };
        let (plan, _) = Plan::parse(plan_yaml(&secure).as_bytes(), "p").unwrap();
        assert_eq!(plan.secure_sum(), Some(SecureSumSpec { colluders: 1, dropouts: 1, retries: 0 }));
    }

    #[test]
    fn configurations_name_files_that_exist() {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout::at(root.path());
        pki::write(&layout.certificates(), &roles(), time::OffsetDateTime::UNIX_EPOCH).unwrap();
        write_domains(&layout, None, DomainAggregates::Open).unwrap();
        let base = root.path().join("base.safetensors");
        std::fs::write(&base, b"weights").unwrap();
        write_coordinator(&layout, &base, 2, "127.0.0.1:0").unwrap();
        write_plan(&layout, &PlanChoices::default()).unwrap();

        let config = tabmesh_coordinator::config::Config::load(&layout.coordinator_config()).unwrap();
        let named =
            [&config.tls.ca, &config.tls.cert, &config.tls.key, &config.signing_key, &config.base_model];
        assert!(named.iter().all(|path| path.exists()), "{config:?}");
        assert_eq!(config.address_file, Some(layout.coordinator_address()));

        for domain in &DOMAINS {
            write_peers(&layout, domain.id, &DOMAINS.map(|domain| domain.id)).unwrap();
            write_agent(&layout, domain.id, "127.0.0.1:7443").unwrap();
            let config = tabmesh_agent::config::Config::load(&layout.agent_config(domain.id)).unwrap();
            let named = [
                &config.contract,
                &config.policy,
                &config.tls.ca,
                &config.tls.cert,
                &config.tls.key,
                &config.signing_key,
                &config.coordinator.signing_public_key,
                config.peers.as_ref().unwrap(),
            ];
            assert!(named.iter().all(|path| path.exists()), "{config:?}");
            assert_eq!(config.serve.address_file, Some(layout.agent_address(domain.id)));
            let policy = tabmesh_agent::config::LocalPolicy::load(&config.policy).unwrap();
            assert_eq!(policy.grant.product, product(domain));
            assert!(layout.train_table(domain.id).exists() && layout.test_table(domain.id).exists());
        }
    }

    #[test]
    fn no_file_of_a_domain_names_its_test_table() {
        for domain in &DOMAINS {
            let policy = policy_yaml(domain.id, &product(domain), 3.0);
            for text in
                [contract_yaml(domain, DomainAggregates::Open), policy, agent_yaml(domain.id, "h:1", true)]
            {
                assert!(!text.contains("held_out"), "{text}");
            }
        }
    }

    #[test]
    fn awkward_names_stay_one_scalar() {
        assert_eq!(quoted("a: \"b\" # c"), r#""a: \"b\" # c""#);
        assert_eq!(path(Path::new("/a b/c")), r#""/a b/c""#);
    }
}
