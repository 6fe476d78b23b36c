//! The coordinator's configuration: one YAML file, unknown keys refused, paths relative to the file.

use std::path::{Path, PathBuf};

use garde::Validate;
use miette::{Diagnostic, NamedSource};
use serde::{Deserialize, Serialize};
use tabmesh_privacy::report::{MAX_DECLARATIONS, MAX_STATED_BYTES, Stated};
use thiserror::Error;

/// Why a configuration is refused.
#[derive(Debug, Error, Diagnostic)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read configuration {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text isn't a valid configuration; the message carries line, column and a caret.
    #[error("configuration {path} is refused: {message}")]
    #[diagnostic(help("compare with `tabmesh-coordinator config example`"))]
    Refused {
        /// The file.
        path: PathBuf,
        /// Where and why, with a snippet.
        message: String,
        /// The whole text, for the report.
        #[source_code]
        text: NamedSource<String>,
    },
    /// A key that must hold 64 hexadecimal digits holds something else.
    #[error("{field} must be 64 hexadecimal digits, got {got:?}")]
    BadKey {
        /// The configuration field.
        field: &'static str,
        /// The text found.
        got: String,
    },
}

/// Everything `tabmesh-coordinator serve` needs to know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields)]
#[garde(allow_unvalidated)]
pub struct Config {
    /// Name of the deployment, shown in reports.
    #[garde(length(min = 1, max = 128))]
    pub deployment: String,
    /// Address to listen on, e.g. `10.0.0.5:7443`; port 0 lets the system choose.
    #[garde(length(min = 3, max = 256))]
    pub listen: String,
    /// File to which the bound address is written once the coordinator accepts connections.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address_file: Option<PathBuf>,
    /// Folder of records, blobs, logs and checkpoints.
    pub data_dir: PathBuf,
    /// TLS identity; the certificate carries the SPIFFE id `spiffe://<trust domain>/tabmesh/coordinator`.
    pub tls: TlsFiles,
    /// Ed25519 key (PKCS #8 DER) that signs manifests and reports.
    pub signing_key: PathBuf,
    /// The base model to continue from (safetensors).
    pub base_model: PathBuf,
    /// Folder of `.rego` files; the built-in policy bundle when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_bundle: Option<PathBuf>,
    /// Threads for pre-training.
    #[serde(default = "default_threads")]
    #[garde(range(min = 1, max = 256))]
    pub threads: usize,
    /// Interval of session heartbeats, in milliseconds.
    #[serde(default = "default_heartbeat_interval_ms")]
    #[garde(range(min = 50, max = 600_000))]
    pub heartbeat_interval_ms: u64,
    /// What reports say of the deployment beside their figures: who answers for it, what for, on which legal ground.
    #[serde(default)]
    #[garde(custom(stated_texts))]
    pub stated: Stated,
    /// Results of `tabmesh-sim audit --record`, shown in reports; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attacks: Option<PathBuf>,
    /// Owners' declarations that their sources have no unit in common (`tabmesh-agent disjoint`), for reports.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[garde(length(max = MAX_DECLARATIONS))]
    pub disjoint: Vec<PathBuf>,
    /// Loopback address at which `GET /metrics` answers a Prometheus scraper; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<String>,
}

/// PEM files of a TLS identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// Certificate authority that peers must chain to.
    pub ca: PathBuf,
    /// Own certificate chain.
    pub cert: PathBuf,
    /// Own private key.
    pub key: PathBuf,
}

impl Config {
    /// Reads, parses and checks a configuration file; relative paths are taken from its folder.
    ///
    /// # Errors
    /// [`ConfigError`] names the file, the line and what was expected.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let mut config = Self::parse(path, &text)?;
        let folder = path.parent().unwrap_or_else(|| Path::new("."));
        config.resolve(folder);
        Ok(config)
    }

    /// Parses and checks the text of a configuration.
    ///
    /// # Errors
    /// [`ConfigError::Refused`] with line, column and a caret.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let refused = |message: String| ConfigError::Refused {
            path: path.to_owned(),
            message,
            text: NamedSource::new(path.display().to_string(), text.to_owned()),
        };
        let config: Self = serde_saphyr::from_str(text).map_err(|e| refused(e.to_string()))?;
        config.validate().map_err(|e| refused(e.to_string()))?;
        Ok(config)
    }

    fn resolve(&mut self, folder: &Path) {
        let fix = |path: &mut PathBuf| {
            if path.is_relative() {
                *path = folder.join(&*path);
            }
        };
        fix(&mut self.data_dir);
        fix(&mut self.tls.ca);
        fix(&mut self.tls.cert);
        fix(&mut self.tls.key);
        fix(&mut self.signing_key);
        fix(&mut self.base_model);
        if let Some(path) = &mut self.address_file {
            fix(path);
        }
        for path in [&mut self.policy_bundle, &mut self.attacks].into_iter().flatten() {
            fix(path);
        }
        self.disjoint.iter_mut().for_each(fix);
    }

    /// A commented example that parses.
    #[must_use]
    pub fn example() -> &'static str {
        EXAMPLE
    }
}

fn stated_texts(stated: &Stated, (): &()) -> garde::Result {
    match stated.fault() {
        None => Ok(()),
        Some(heading) => {
            Err(garde::Error::new(format!("{heading}: expected 1 to {MAX_STATED_BYTES} bytes of text")))
        }
    }
}

fn default_threads() -> usize {
    2
}

fn default_heartbeat_interval_ms() -> u64 {
    5_000
}

/// The example of `config example`; a test parses it.
const EXAMPLE: &str = "\
# tabmesh-coordinator serve --config coordinator.yaml
deployment: acme-mesh
listen: 10.0.0.5:7443            # port 0 lets the system choose
address_file: run/address        # optional: where the bound address is written
data_dir: data
tls: {ca: tls/ca.pem, cert: tls/coordinator.pem, key: tls/coordinator.key}
signing_key: keys/coordinator.pk8
base_model: models/base.safetensors
threads: 2
heartbeat_interval_ms: 5000
stated:                          # in every report; each line optional
  curator: Acme Ltd, data office
  contact: dpo@acme.example
  intended_use: fraud scores inside each domain
  description: one tabular model with an adapter, and a synthetic corpus of 12,000 rows
  data_domain: card payments of the last two years, one row a payment
  legal_basis: legitimate interest, assessment 2026-14
  recipients: [domains of the mesh]
  security: mTLS between all processes, agents are outbound only
# attacks: audits.json           # results of tabmesh-sim audit --record, shown in reports
# disjoint: [retail-and-travel.json]  # two owners' signed word (tabmesh-agent disjoint), for the totals of reports
# metrics_listen: 127.0.0.1:9464 # GET /metrics for Prometheus; rules in deploy/alerts.yaml
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_parses() {
        let config = Config::parse(Path::new("example.yaml"), Config::example()).unwrap();
        assert_eq!(config.deployment, "acme-mesh");
        assert_eq!(config.policy_bundle, None);
    }

    #[test]
    fn an_unknown_key_is_named_with_its_line() {
        let text = format!("{}colour: blue\n", Config::example());
        let error = Config::parse(Path::new("c.yaml"), &text).unwrap_err().to_string();
        let line = text.lines().count().to_string();
        assert!(error.contains("colour") && error.contains(&line), "{error}");
    }

    #[test]
    fn what_is_stated_has_a_length() {
        let with = |text: &str| {
            let text = Config::example().replace("Acme Ltd, data office", text);
            Config::parse(Path::new("c.yaml"), &text)
        };
        assert!(with(&"x".repeat(MAX_STATED_BYTES)).is_ok());
        for bad in ["' '".to_owned(), "x".repeat(MAX_STATED_BYTES + 1)] {
            let error = with(&bad).unwrap_err().to_string();
            assert!(error.contains("curator"), "{error}");
        }
    }

    #[test]
    fn declarations_have_a_number_and_are_taken_from_the_files_folder() {
        let with = |count: usize| {
            let list = vec!["a.json"; count].join(", ");
            Config::parse(Path::new("c.yaml"), &format!("{}disjoint: [{list}]\n", Config::example()))
        };
        assert_eq!(with(MAX_DECLARATIONS).unwrap().disjoint.len(), MAX_DECLARATIONS);
        let error = with(MAX_DECLARATIONS + 1).unwrap_err().to_string();
        assert!(error.contains("disjoint"), "{error}");
        let mut config = with(1).unwrap();
        config.resolve(Path::new("/etc/mesh"));
        assert_eq!(config.disjoint, [Path::new("/etc/mesh/a.json")]);
    }

    #[test]
    fn a_zero_thread_count_is_refused() {
        let text = Config::example().replace("threads: 2", "threads: 0");
        let error = Config::parse(Path::new("c.yaml"), &text).unwrap_err().to_string();
        assert!(error.contains("threads"), "{error}");
    }

    #[test]
    fn paths_are_taken_from_the_files_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("coordinator.yaml");
        std::fs::write(&path, Config::example()).unwrap();
        assert_eq!(Config::load(&path).unwrap().data_dir, folder.path().join("data"));
    }
}
