//! How operators and auditors reach a coordinator: a profile file with address and TLS identity.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use miette::{IntoDiagnostic, WrapErr, miette};
use serde::Deserialize;
use tabmesh_proto::connect::{CoordinatorAddress, Link, TcpDial, connect};
use tabmesh_proto::identity::{DevelopmentCa, SpiffeId};
use tabmesh_proto::tls::{ClientTls, DefaultTimeProvider, TlsMaterial, TlsPolicy};

use crate::config::TlsFiles;

/// How to reach the coordinator.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Client {
    /// Client profile: address, coordinator's SPIFFE id, TLS files (see `config client-example`).
    #[arg(long = "client", env = "TABMESH_CLIENT", value_name = "FILE")]
    pub(crate) profile: PathBuf,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Profile {
    address: String,
    spiffe_id: String,
    tls: TlsFiles,
    #[serde(default)]
    insecure_dev: bool,
}

impl Client {
    /// Connects and checks who answers.
    pub(crate) async fn connect(&self) -> miette::Result<Link> {
        link(&self.profile).await
    }
}

/// Connects by a profile file; relative paths are taken from its folder.
pub(crate) async fn link(path: &Path) -> miette::Result<Link> {
    let text = std::fs::read_to_string(path)
        .into_diagnostic()
        .wrap_err_with(|| format!("client profile {}", path.display()))?;
    let profile: Profile = serde_saphyr::from_str(&text)
        .map_err(|error| miette!("client profile {}: {error}", path.display()))?;
    let folder = path.parent().unwrap_or_else(|| Path::new("."));
    let files = tabmesh_proto::tls::TlsFiles {
        ca: folder.join(&profile.tls.ca),
        certificate: folder.join(&profile.tls.cert),
        key: folder.join(&profile.tls.key),
        crls: Vec::new(),
    };
    let development = if profile.insecure_dev { DevelopmentCa::Accept } else { DevelopmentCa::Refuse };
    let policy = TlsPolicy { development, time: Arc::new(DefaultTimeProvider) };
    let tls = ClientTls::new(&TlsMaterial::read(&files).into_diagnostic()?, policy).into_diagnostic()?;
    let id: SpiffeId = profile.spiffe_id.parse().into_diagnostic()?;
    let address = CoordinatorAddress::new(&profile.address, id).into_diagnostic()?;
    connect(&address, &tls, TcpDial)
        .await
        .into_diagnostic()
        .wrap_err_with(|| format!("connecting to the coordinator at {}", profile.address))
}

/// The example of `config client-example`; a test parses it.
pub(crate) const EXAMPLE: &str = "\
# tabmesh-coordinator plan submit plan.yaml --client operator.yaml
address: mesh.acme.example:7443
spiffe_id: spiffe://acme.example/tabmesh/coordinator
tls: {ca: tls/ca.pem, cert: tls/operator.pem, key: tls/operator.key}
insecure_dev: false              # accept the development CA
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_parses() {
        let profile: Profile = serde_saphyr::from_str(EXAMPLE).unwrap();
        assert!(!profile.insecure_dev && profile.address.ends_with(":7443"));
    }
}
