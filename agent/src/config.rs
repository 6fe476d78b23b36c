//! The agent's configuration and its local policy file: the domain's own word on grants and limits.

use std::path::{Path, PathBuf};
use std::time::Duration;

use garde::Validate;
use miette::{Diagnostic, NamedSource};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tabmesh_federation::plan::MAX_RETRIES;
use tabmesh_federation::secagg::roster::{MAX_MEMBERS, MIN_MEMBERS};
use tabmesh_privacy::budget::{Delta, Epsilon};
use tabmesh_privacy::ledger::window::{DAY_MS, MAX_WINDOW_MS};
use tabmesh_tfm::context::{Budget, CacheKind, Plan, Precision};
use thiserror::Error;

use crate::alerts::AlertSection;
use crate::serve::batch::Batching;

/// Why a configuration or policy file is refused.
#[derive(Debug, Error, Diagnostic)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text isn't valid; the message carries line, column and a caret.
    #[error("{path} is refused: {message}")]
    #[diagnostic(help("compare with `tabmesh-agent config example`"))]
    Refused {
        /// The file.
        path: PathBuf,
        /// Where and why, with a snippet.
        message: String,
        /// The whole text, for the report.
        #[source_code]
        text: NamedSource<String>,
    },
}

/// Everything `tabmesh-agent run` needs to know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[garde(allow_unvalidated)]
pub struct Config {
    /// The domain, as in the certificate's SPIFFE id.
    #[garde(length(min = 1, max = 128))]
    pub domain: String,
    /// The agent's name, as in the certificate's SPIFFE id.
    #[garde(length(min = 1, max = 128))]
    pub name: String,
    /// Folder of ledger, payloads, artefacts and logs.
    pub data_dir: PathBuf,
    /// The data-product contract (ODCS v3 or the short manifest).
    pub contract: PathBuf,
    /// The domain's local policy: grants and limits.
    pub policy: PathBuf,
    /// Where and who the coordinator is.
    pub coordinator: CoordinatorPeer,
    /// TLS identity with the SPIFFE id `spiffe://<trust domain>/tabmesh/agent/<domain>/<name>`.
    pub tls: TlsFiles,
    /// Ed25519 key (PKCS #8 DER) that signs registration and ledger heads.
    pub signing_key: PathBuf,
    /// Identity keys of the other agents, from a source that is not the coordinator; without it plans with secure sums
    /// are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peers: Option<PathBuf>,
    /// File with the counter of answers to secure sums. Keep it where a restored backup of `data_dir` doesn't bring an
    /// old one back. Default `sum.guard` in `data_dir`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sum_guard: Option<PathBuf>,
    /// Serving of the promoted model.
    pub serve: ServeSection,
    /// Rows of context at serving time.
    #[serde(default)]
    #[garde(dive)]
    pub context: ContextSection,
    /// How the agent chooses what to serve.
    #[serde(default)]
    #[garde(dive)]
    pub promotion: PromotionSection,
    /// When and where the operator hears that the privacy budget runs out.
    #[serde(default)]
    #[garde(dive)]
    pub alerts: AlertSection,
    /// Answers leave at multiples of so many milliseconds after their assignment arrived, 1 to 60,000.
    #[serde(default = "default_send_slot_ms")]
    #[garde(range(min = 1, max = 60_000))]
    pub send_slot_ms: u64,
}

/// The coordinator this agent talks to, and nobody else.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CoordinatorPeer {
    /// `host:port`; the host must be a DNS or IP name of the server's certificate.
    pub address: String,
    /// Exact SPIFFE id the server must present.
    pub spiffe_id: String,
    /// Pinned Ed25519 public key (32 bytes in a file) that signs manifests.
    pub signing_public_key: PathBuf,
}

/// PEM files of a TLS identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// Certificate authority that the coordinator must chain to.
    pub ca: PathBuf,
    /// Own certificate chain.
    pub cert: PathBuf,
    /// Own private key.
    pub key: PathBuf,
}

/// The prediction endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServeSection {
    /// Address to bind; loopback needs no TLS, anything else does. Port 0 lets the system choose.
    pub bind: String,
    /// File to which the bound address is written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address_file: Option<PathBuf>,
    /// Model name in the protocol's paths.
    pub model_name: String,
    /// TLS for addresses beyond loopback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsFiles>,
    /// SPIFFE ids that may ask for predictions beyond loopback.
    #[serde(default)]
    pub allowed: Vec<String>,
    /// Requests that arrive together are predicted together.
    #[serde(default)]
    pub batching: BatchingSection,
}

/// How requests are put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BatchingSection {
    /// Most rows predicted together, 1 to 65,536.
    pub max_batch_rows: usize,
    /// Longest wait of a request for others, microseconds, 0 to 1,000,000; 0 predicts every request alone.
    pub max_wait_us: u64,
}

impl Default for BatchingSection {
    fn default() -> Self {
        let Batching { max_rows, max_wait } = Batching::default();
        Self {
            max_batch_rows: max_rows,
            max_wait_us: u64::try_from(max_wait.as_micros()).unwrap_or(u64::MAX),
        }
    }
}

impl From<BatchingSection> for Batching {
    fn from(section: BatchingSection) -> Self {
        Self { max_rows: section.max_batch_rows, max_wait: Duration::from_micros(section.max_wait_us) }
    }
}

/// How many rows stand in the model's context when it serves, and what they may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields, default)]
#[garde(allow_unvalidated)]
pub struct ContextSection {
    /// Own rows at most.
    pub local_rows: usize,
    /// Corpus rows at most, beside own rows, in the mixed context.
    pub corpus_rows: usize,
    /// What of the context is held.
    pub cache: CacheSection,
    /// In which numbers.
    pub precision: PrecisionSection,
    /// Most MiB held for one context, 1 to 1,048,576.
    #[garde(range(min = 1, max = MOST_MIB))]
    pub held_mib: usize,
    /// Most MiB while a context is built, held ones included, 1 to 1,048,576.
    #[garde(range(min = 1, max = MOST_MIB))]
    pub build_mib: usize,
}

impl Default for ContextSection {
    fn default() -> Self {
        Self {
            local_rows: 512,
            corpus_rows: 256,
            cache: CacheSection::Auto,
            precision: PrecisionSection::Auto,
            held_mib: DEFAULT_HELD_MIB,
            build_mib: DEFAULT_BUILD_MIB,
        }
    }
}

/// What of a context is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheSection {
    /// Keys and values if they fit, else row vectors.
    Auto,
    /// Keys and values: fast.
    Kv,
    /// Row vectors: small, and slow for single rows.
    Repr,
}

/// In which numbers a context is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrecisionSection {
    /// Single precision if it fits, else half.
    Auto,
    /// Single precision.
    F32,
    /// Half precision.
    F16,
}

impl ContextSection {
    /// What a context of `classes` classes may take, and how it may be held.
    #[must_use]
    pub fn plan(&self, classes: usize) -> Plan {
        let bytes = |mib: usize| mib.saturating_mul(1 << 20);
        Plan {
            classes,
            kind: match self.cache {
                CacheSection::Auto => None,
                CacheSection::Kv => Some(CacheKind::Kv),
                CacheSection::Repr => Some(CacheKind::Repr),
            },
            precision: match self.precision {
                PrecisionSection::Auto => None,
                PrecisionSection::F32 => Some(Precision::F32),
                PrecisionSection::F16 => Some(Precision::F16),
            },
            budget: Budget { held: bytes(self.held_mib), building: bytes(self.build_mib) },
        }
    }
}

/// How the agent chooses what to serve, on its own gate rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields, default)]
#[garde(allow_unvalidated)]
pub struct PromotionSection {
    /// Whether boosted trees and the base on own rows may be part of what is served, beside the published model.
    pub trees: bool,
    /// Parts of the gate rows that are held out in turn, 2 to 20.
    #[garde(range(min = 2, max = 20))]
    pub folds: usize,
    /// Minority units at the gate below which the shipped weights are served, 10 to 100,000.
    #[garde(range(min = 10, max = 100_000))]
    pub least_minority: usize,
}

impl Default for PromotionSection {
    fn default() -> Self {
        Self { trees: true, folds: 5, least_minority: 20 }
    }
}

/// The domain's local policy: what it grants, under whose name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[garde(allow_unvalidated)]
pub struct LocalPolicy {
    /// The privacy budget of the data product.
    #[garde(dive)]
    pub grant: Grant,
    /// Smallest cohort this domain takes part in.
    #[serde(default = "default_minimum_cohort")]
    #[garde(range(min = 1, max = 100_000))]
    pub minimum_cohort: usize,
    /// The floor for secure sums.
    #[serde(default)]
    #[garde(dive)]
    pub secure_sum: SecureSumFloor,
    /// Extra rules: a folder of `.rego` files instead of the built-in bundle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bundle: Option<PathBuf>,
}

/// What this domain asks of a secure sum, whatever the plan says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields, default)]
pub struct SecureSumFloor {
    /// Fewest agents in a sum, 4 to 1024. Default 4.
    #[garde(range(min = MIN_MEMBERS as u32, max = MAX_MEMBERS as u32))]
    pub min_agents: u32,
    /// Fewest different domains in a sum, 1 to 1024. Default 4.
    #[garde(range(min = 1, max = MAX_MEMBERS as u32))]
    pub min_domains: u32,
    /// Colluding agents that the plan must assume at least, 1 to 1024. Default 1.
    #[garde(range(min = 1, max = MAX_MEMBERS as u32))]
    pub colluders: u32,
    /// How many times the sum's cost this domain's own noise share alone may cost, should all others collude, 1 to
    /// 1024. Default 1024: no limit beside the others.
    #[garde(range(min = 1, max = MAX_MEMBERS as u32))]
    pub max_own_share_factor: u32,
    /// Fewest agents that this one exchanges masks with, 3 to 1023: all others of the cohort up to 128 agents, above that
    /// the neighbours on a ring. Default 3.
    #[garde(range(min = MIN_MEMBERS as u32 - 1, max = MAX_MEMBERS as u32 - 1))]
    pub min_neighbours: u32,
    /// Second attempts that a plan may set aside for at most, 0 to 8. Default 8: no limit beside the budget.
    #[garde(range(max = MAX_RETRIES))]
    pub max_retries: u32,
}

impl Default for SecureSumFloor {
    fn default() -> Self {
        Self {
            min_agents: 4,
            min_domains: 4,
            colluders: 1,
            max_own_share_factor: 1024,
            min_neighbours: 3,
            max_retries: MAX_RETRIES,
        }
    }
}

/// One grant of (ε, δ) for a data product.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[garde(allow_unvalidated)]
pub struct Grant {
    /// The data product, by its contract's name.
    pub product: String,
    /// ε, a decimal string such as "3".
    pub epsilon: Epsilon,
    /// δ, a decimal string such as "0.00001".
    pub delta: Delta,
    /// Who granted it; shown in the report.
    pub signer: String,
    /// The `source.path` that the contract had before, where the table was moved, renamed or copied: what was spent there counts
    /// on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub derived_from: Option<String>,
    /// How fast it may be spent; without one, as fast as it is left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[garde(dive, custom(within_lifetime(&self.epsilon)))]
    pub window: Option<GrantWindow>,
}

/// A limit on what may be spent within any span of so many days. It rolls, and it limits the pace alone: nothing that was
/// spent is ever given back, and the grant's ε caps the lifetime.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[garde(allow_unvalidated)]
pub struct GrantWindow {
    /// Days, 1 to 3660; a quarter of a year has 91.
    #[garde(range(min = 1, max = MAX_WINDOW_DAYS))]
    pub days: u32,
    /// ε within them at the grant's δ, a decimal string, at most the grant's own.
    pub epsilon: Epsilon,
}

fn within_lifetime(lifetime: &Epsilon) -> impl FnOnce(&Option<GrantWindow>, &()) -> garde::Result + '_ {
    move |window, ()| match window {
        Some(window) if window.epsilon > *lifetime => Err(garde::Error::new(format!(
            "its epsilon {} is above the lifetime's {lifetime}",
            window.epsilon
        ))),
        _ => Ok(()),
    }
}

impl Config {
    /// Reads, parses and checks a configuration file; relative paths are taken from its folder.
    ///
    /// # Errors
    /// [`ConfigError`] names the file, the line and what was expected.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let mut config: Self = read(path)?;
        let folder = path.parent().unwrap_or_else(|| Path::new("."));
        config.resolve(folder);
        Ok(config)
    }

    fn resolve(&mut self, folder: &Path) {
        let fix = |path: &mut PathBuf| {
            if path.is_relative() {
                *path = folder.join(&*path);
            }
        };
        fix(&mut self.data_dir);
        fix(&mut self.contract);
        fix(&mut self.policy);
        fix(&mut self.coordinator.signing_public_key);
        fix(&mut self.tls.ca);
        fix(&mut self.tls.cert);
        fix(&mut self.tls.key);
        fix(&mut self.signing_key);
        for path in [&mut self.peers, &mut self.sum_guard, &mut self.alerts.webhook_ca].into_iter().flatten()
        {
            fix(path);
        }
        if let Some(path) = &mut self.serve.address_file {
            fix(path);
        }
        if let Some(tls) = &mut self.serve.tls {
            fix(&mut tls.ca);
            fix(&mut tls.cert);
            fix(&mut tls.key);
        }
    }

    /// A commented example that parses.
    #[must_use]
    pub fn example() -> &'static str {
        EXAMPLE
    }
}

impl LocalPolicy {
    /// Reads, parses and checks a local policy file.
    ///
    /// # Errors
    /// [`ConfigError`] names the file, the line and what was expected.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let mut policy: Self = read(path)?;
        let folder = path.parent().unwrap_or_else(|| Path::new("."));
        if let Some(bundle) = policy.bundle.as_mut().filter(|b| b.is_relative()) {
            *bundle = folder.join(&*bundle);
        }
        Ok(policy)
    }
}

fn read<T: DeserializeOwned + Validate<Context = ()>>(path: &Path) -> Result<T, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse(path, &text)
}

fn parse<T: DeserializeOwned + Validate<Context = ()>>(path: &Path, text: &str) -> Result<T, ConfigError> {
    let refused = |message: String| ConfigError::Refused {
        path: path.to_owned(),
        message,
        text: NamedSource::new(path.display().to_string(), text.to_owned()),
    };
    let value: T = serde_saphyr::from_str(text).map_err(|e| refused(e.to_string()))?;
    value.validate().map_err(|e| refused(e.to_string()))?;
    Ok(value)
}

fn default_send_slot_ms() -> u64 {
    100
}

fn default_minimum_cohort() -> usize {
    3
}

/// Default of [`ContextSection::held_mib`].
pub const DEFAULT_HELD_MIB: usize = 512;
/// Default of [`ContextSection::build_mib`].
pub const DEFAULT_BUILD_MIB: usize = 1024;
/// Largest memory limit, MiB.
pub const MOST_MIB: usize = 1 << 20;
/// Longest window of a grant, days.
pub const MAX_WINDOW_DAYS: u32 = (MAX_WINDOW_MS / DAY_MS) as u32;
/// The example of `config example`; a test parses it.
const EXAMPLE: &str = "\
# tabmesh-agent run --config agent.yaml
domain: payments
name: payments-1
data_dir: data
contract: contract.yaml
policy: policy.yaml
coordinator:
  address: mesh.acme.example:7443
  spiffe_id: spiffe://acme.example/tabmesh/coordinator
  signing_public_key: keys/coordinator.pub
tls: {ca: tls/ca.pem, cert: tls/agent.pem, key: tls/agent.key}
signing_key: keys/agent.pk8
# peers: peers.yaml          # identity keys of the other agents, for plans with secure sums
# sum_guard: /var/lib/tabmesh-guard/sum.guard
serve:
  bind: \"127.0.0.1:8080\"
  model_name: income
  batching: {max_batch_rows: 256, max_wait_us: 500}  # 0 us: every request alone
context: {local_rows: 512, corpus_rows: 256, cache: auto, precision: auto, held_mib: 512, build_mib: 1024}
promotion: {trees: true, folds: 5, least_minority: 20}
alerts: {percent: [50, 80, 95]}  # webhook: https://hooks.acme.example/budget, webhook_ca: tls/hooks-ca.pem
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_parses() {
        let config: Config = parse(Path::new("agent.yaml"), Config::example()).unwrap();
        assert_eq!(config.context, ContextSection::default());
        assert_eq!(config.serve.batching, BatchingSection::default());
        assert_eq!(config.promotion, PromotionSection::default());
    }

    #[test]
    fn memory_limits_hold_at_one_above() {
        let parsed = |held: usize, build: usize| {
            let old = "held_mib: 512, build_mib: 1024";
            assert!(Config::example().contains(old));
            let new = format!("held_mib: {held}, build_mib: {build}");
            parse::<Config>(Path::new("agent.yaml"), &Config::example().replace(old, &new)).is_ok()
        };
        assert!(parsed(1, MOST_MIB) && parsed(MOST_MIB, 1));
        assert!(!parsed(MOST_MIB + 1, 1) && !parsed(1, MOST_MIB + 1) && !parsed(0, 1) && !parsed(1, 0));
    }

    #[test]
    fn a_plan_is_what_the_file_says() {
        let section = ContextSection { cache: CacheSection::Repr, held_mib: 3, ..ContextSection::default() };
        let plan = section.plan(2);
        assert_eq!((plan.kind, plan.precision), (Some(CacheKind::Repr), None));
        assert_eq!((plan.budget.held, plan.budget.building), (3 << 20, DEFAULT_BUILD_MIB << 20));
    }

    #[test]
    fn limits_of_the_promotion_are_checked() {
        for (key, good, bad) in [("folds", [2, 20], [1, 21]), ("least_minority", [10, 100_000], [9, 100_001])]
        {
            let parsed = |value: usize| {
                let text =
                    Config::example().replace("promotion: {trees: true, folds: 5, least_minority: 20}", "");
                parse::<Config>(Path::new("agent.yaml"), &format!("{text}promotion: {{{key}: {value}}}\n"))
            };
            assert!(good.into_iter().all(|value| parsed(value).is_ok()), "{key}");
            assert!(bad.into_iter().all(|value| parsed(value).is_err()), "{key}");
        }
    }

    #[test]
    fn an_unknown_key_is_named() {
        let text = format!("{}\nlisten: 0.0.0.0:1\n", Config::example());
        let error = parse::<Config>(Path::new("agent.yaml"), &text).unwrap_err().to_string();
        assert!(error.contains("listen"), "{error}");
    }

    #[test]
    fn limits_of_the_floor_for_secure_sums_hold_at_one_above() {
        let grant = "grant: {product: a.b, epsilon: \"3\", delta: \"0.00001\", signer: o}";
        let parsed = |key: &str, value: u32| {
            let text = format!("{grant}\nsecure_sum: {{{key}: {value}}}");
            parse::<LocalPolicy>(Path::new("policy.yaml"), &text).is_ok()
        };
        assert!(parsed("min_agents", 4) && !parsed("min_agents", 3));
        for key in ["min_agents", "min_domains", "colluders", "max_own_share_factor"] {
            assert!(parsed(key, 1024) && !parsed(key, 1025) && !parsed(key, 0), "{key}");
        }
        assert!(parsed("min_neighbours", 3) && parsed("min_neighbours", 1023));
        assert!(!parsed("min_neighbours", 2) && !parsed("min_neighbours", 1024));
        assert!(parsed("max_retries", 0) && parsed("max_retries", 8) && !parsed("max_retries", 9));
    }

    #[test]
    fn a_window_is_within_its_limits_and_the_lifetime() {
        let parsed = |days: u32, epsilon: &str| {
            let window = format!("window: {{days: {days}, epsilon: \"{epsilon}\"}}");
            let grant = format!("product: a.b, epsilon: \"3\", delta: \"0.00001\", signer: o, {window}");
            parse::<LocalPolicy>(Path::new("policy.yaml"), &format!("grant: {{{grant}}}"))
        };
        let policy = parsed(91, "1").unwrap();
        assert_eq!(policy.grant.window.unwrap().days, 91);
        assert!(parsed(1, "3").is_ok() && parsed(MAX_WINDOW_DAYS, "0.1").is_ok());
        for (days, epsilon, word) in
            [(0, "1", "days"), (MAX_WINDOW_DAYS + 1, "1", "days"), (91, "3.01", "lifetime")]
        {
            let refused = parsed(days, epsilon).unwrap_err().to_string();
            assert!(refused.contains(word), "{refused}");
        }
    }

    #[test]
    fn a_policy_needs_a_grant_with_a_signer() {
        let text = "grant: {product: a.b, epsilon: \"3\", delta: \"0.00001\"}";
        let error = parse::<LocalPolicy>(Path::new("policy.yaml"), text).unwrap_err().to_string();
        assert!(error.contains("signer"), "{error}");
    }
}
