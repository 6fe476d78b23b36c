//! TLS configurations of both ends: mutual TLS 1.3 only, ring provider passed explicitly, HTTP/2 by ALPN, no session
//! resumption (a resumed session would skip a revocation made meanwhile).
//!
//! Revocation lists are checked for the peer's own certificate; one whose issuer has no list is accepted, and a list
//! past its next update refuses everybody of its issuer. Material comes from PEM files, the one interface that SPIRE,
//! cert-manager and Vault share. [`ServerTls`] and [`ClientTls`] hold the current configuration behind a watch: a
//! reload that fails keeps the last good one, a reload under another SPIFFE id is refused. The development CA is
//! refused unless development is allowed. The clock is an argument, so that expiry can be tested.

use std::{
    fmt, fs,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

pub use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier},
    crypto::{CryptoProvider, ring},
    server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier},
    version::TLS13,
};
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer,
    pem::{self, PemObject},
};
use tokio::sync::watch;

use crate::{
    identity::{DevelopmentCa, IdentityError, SpiffeId, is_development_ca},
    limits::MAX_PEM_BYTES,
};

/// Where a process finds its TLS material.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Trusted CA certificates.
    pub ca: PathBuf,
    /// Own certificate, then its intermediates.
    pub certificate: PathBuf,
    /// Own private key.
    pub key: PathBuf,
    /// Revocation lists; may be empty.
    pub crls: Vec<PathBuf>,
}

/// What a process decides about TLS beside its files.
#[derive(Debug, Clone)]
pub struct TlsPolicy {
    /// Whether the development CA is accepted.
    pub development: DevelopmentCa,
    /// The clock certificates are checked against; [`DefaultTimeProvider`] in production.
    pub time: Arc<dyn TimeProvider>,
}

/// Why TLS material can't be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file can't be read.
    #[error("cannot read {}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's text.
        reason: String,
    },
    /// A file is larger than any PEM file should be.
    #[error("{} refused: larger than {max} bytes", path.display())]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Most bytes accepted.
        max: u64,
    },
    /// PEM text does not parse.
    #[error("{what} PEM cannot be read: {reason}")]
    Pem {
        /// What it should hold.
        what: &'static str,
        /// What the parser said.
        reason: String,
    },
    /// PEM text holds nothing of the kind.
    #[error("{what} PEM holds no {what}")]
    Empty {
        /// What it should hold.
        what: &'static str,
    },
    /// The own certificate does not identify this process.
    #[error("own certificate: {0}")]
    Identity(#[from] IdentityError),
    /// A trusted CA is the development CA, outside development.
    #[error(
        "trusting the development CA refused: start with --insecure-dev to accept it, never in production"
    )]
    DevelopmentCa,
    /// A trusted CA certificate or a revocation list is unusable.
    #[error("trust anchors refused: {reason}")]
    Anchors {
        /// What the verifier said.
        reason: String,
    },
    /// Certificate and key don't fit together, or rustls refuses them otherwise.
    #[error("certificate and key refused: {0}")]
    Rustls(#[from] rustls::Error),
    /// A reload would change who this process is.
    #[error("reload refused: identity would change from {from} to {to}, restart instead")]
    IdentityChanged {
        /// Identity now.
        from: SpiffeId,
        /// Identity of the new certificate.
        to: SpiffeId,
    },
}

impl From<VerifierBuilderError> for TlsError {
    fn from(error: VerifierBuilderError) -> Self {
        Self::Anchors { reason: error.to_string() }
    }
}

/// Certificates, key and revocation lists, parsed.
pub struct TlsMaterial {
    ca: Vec<CertificateDer<'static>>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    crls: Vec<CertificateRevocationListDer<'static>>,
}

impl TlsMaterial {
    /// Reads and parses the files.
    ///
    /// # Errors
    /// [`TlsError::File`], [`TlsError::FileTooLarge`], [`TlsError::Pem`], [`TlsError::Empty`].
    pub fn read(files: &TlsFiles) -> Result<Self, TlsError> {
        let crls: Vec<Vec<u8>> = files.crls.iter().map(|path| read(path)).collect::<Result<_, _>>()?;
        Self::from_pem(&read(&files.ca)?, &read(&files.certificate)?, &read(&files.key)?, &crls)
    }

    /// Parses PEM text.
    ///
    /// # Errors
    /// [`TlsError::Pem`], [`TlsError::Empty`].
    pub fn from_pem(ca: &[u8], certificate: &[u8], key: &[u8], crls: &[Vec<u8>]) -> Result<Self, TlsError> {
        let failed = |what| move |error: pem::Error| TlsError::Pem { what, reason: error.to_string() };
        let mut lists = Vec::new();
        for crl in crls {
            lists.extend(parse("revocation list", crl)?);
        }
        Ok(Self {
            ca: parse("CA certificate", ca)?,
            chain: parse("certificate", certificate)?,
            key: PrivateKeyDer::from_pem_slice(key).map_err(failed("private key"))?,
            crls: lists,
        })
    }

    /// The own certificate's SPIFFE id.
    ///
    /// # Errors
    /// [`TlsError::DevelopmentCa`] or [`TlsError::Identity`].
    pub fn identity(&self, development: DevelopmentCa) -> Result<SpiffeId, TlsError> {
        if development == DevelopmentCa::Refuse {
            for ca in &self.ca {
                if is_development_ca(ca)? {
                    return Err(TlsError::DevelopmentCa);
                }
            }
        }
        Ok(SpiffeId::of_chain(&self.chain, development)?)
    }

    /// The own certificate, leaf first.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let mut roots = RootCertStore::empty();
        for ca in &self.ca {
            roots.add(ca.clone()).map_err(|error| TlsError::Anchors { reason: error.to_string() })?;
        }
        Ok(Arc::new(roots))
    }

    fn server_config(&self, policy: &TlsPolicy) -> Result<ServerConfig, TlsError> {
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots()?, provider())
            .with_crls(self.crls.iter().cloned())
            .only_check_end_entity_revocation()
            .allow_unknown_revocation_status()
            .enforce_revocation_expiration()
            .build()?;
        let mut config = ServerConfig::builder_with_details(provider(), Arc::clone(&policy.time))
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    fn client_config(&self, policy: &TlsPolicy) -> Result<ClientConfig, TlsError> {
        let verifier = WebPkiServerVerifier::builder_with_provider(self.roots()?, provider())
            .with_crls(self.crls.iter().cloned())
            .only_check_end_entity_revocation()
            .allow_unknown_revocation_status()
            .enforce_revocation_expiration()
            .build()?;
        let mut config = ClientConfig::builder_with_details(provider(), Arc::clone(&policy.time))
            .with_protocol_versions(&[&TLS13])?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        config.alpn_protocols = vec![ALPN_HTTP2.to_vec()];
        config.resumption = Resumption::disabled();
        Ok(config)
    }
}

impl fmt::Debug for TlsMaterial {
    /// Counts only: the key must not reach a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ca, chain, crls) = (self.ca.len(), self.chain.len(), self.crls.len());
        write!(f, "TlsMaterial {{ ca: {ca}, chain: {chain}, crls: {crls} }}")
    }
}

/// A configuration that can be replaced while connections are being accepted or opened.
#[derive(Debug)]
struct Current<C> {
    id: SpiffeId,
    policy: TlsPolicy,
    config: watch::Sender<Arc<C>>,
}

impl<C> Current<C> {
    fn new(
        material: &TlsMaterial,
        policy: TlsPolicy,
        build: fn(&TlsMaterial, &TlsPolicy) -> Result<C, TlsError>,
    ) -> Result<Self, TlsError> {
        let id = material.identity(policy.development)?;
        let config = watch::Sender::new(Arc::new(build(material, &policy)?));
        Ok(Self { id, policy, config })
    }

    fn replace(
        &self,
        material: &TlsMaterial,
        build: fn(&TlsMaterial, &TlsPolicy) -> Result<C, TlsError>,
    ) -> Result<(), TlsError> {
        let to = material.identity(self.policy.development)?;
        if to != self.id {
            return Err(TlsError::IdentityChanged { from: self.id.clone(), to });
        }
        let config = build(material, &self.policy)?;
        self.config.send_replace(Arc::new(config));
        Ok(())
    }
}

/// The server's side, reloadable: new connections use the newest configuration.
#[derive(Debug)]
pub struct ServerTls(Current<ServerConfig>);

impl ServerTls {
    /// Builds the first configuration.
    ///
    /// # Errors
    /// Any [`TlsError`] about the material.
    pub fn new(material: &TlsMaterial, policy: TlsPolicy) -> Result<Self, TlsError> {
        Current::new(material, policy, TlsMaterial::server_config).map(Self)
    }

    /// Replaces the configuration for connections accepted from now on; on failure the last good one stays.
    ///
    /// # Errors
    /// [`TlsError::IdentityChanged`] or any error about the material.
    pub fn reload(&self, material: &TlsMaterial) -> Result<(), TlsError> {
        self.0.replace(material, TlsMaterial::server_config)
    }

    /// Who this process is.
    #[must_use]
    pub const fn id(&self) -> &SpiffeId {
        &self.0.id
    }

    /// Whether peers of the development CA are accepted.
    #[must_use]
    pub const fn development(&self) -> DevelopmentCa {
        self.0.policy.development
    }

    /// The configuration, as it changes.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<ServerConfig>> {
        self.0.config.subscribe()
    }
}

/// The client's side, reloadable: the next connection uses the newest configuration.
#[derive(Debug)]
pub struct ClientTls(Current<ClientConfig>);

impl ClientTls {
    /// Builds the first configuration.
    ///
    /// # Errors
    /// Any [`TlsError`] about the material.
    pub fn new(material: &TlsMaterial, policy: TlsPolicy) -> Result<Self, TlsError> {
        Current::new(material, policy, TlsMaterial::client_config).map(Self)
    }

    /// Replaces the configuration for connections opened from now on; on failure the last good one stays.
    ///
    /// # Errors
    /// [`TlsError::IdentityChanged`] or any error about the material.
    pub fn reload(&self, material: &TlsMaterial) -> Result<(), TlsError> {
        self.0.replace(material, TlsMaterial::client_config)
    }

    /// Who this process is.
    #[must_use]
    pub const fn id(&self) -> &SpiffeId {
        &self.0.id
    }

    /// Whether peers of the development CA are accepted.
    #[must_use]
    pub const fn development(&self) -> DevelopmentCa {
        self.0.policy.development
    }

    /// The configuration, as it changes.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<ClientConfig>> {
        self.0.config.subscribe()
    }
}

/// The one cryptography provider, passed explicitly: no process-wide default is installed or needed.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn parse<T: PemObject>(what: &'static str, text: &[u8]) -> Result<Vec<T>, TlsError> {
    let items: Result<Vec<T>, pem::Error> = T::pem_slice_iter(text).collect();
    let items = items.map_err(|error| TlsError::Pem { what, reason: error.to_string() })?;
    if items.is_empty() { Err(TlsError::Empty { what }) } else { Ok(items) }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |error: std::io::Error| TlsError::File { path: path.to_owned(), reason: error.to_string() };
    let mut bytes = Vec::new();
    fs::File::open(path).map_err(failed)?.take(MAX_PEM_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_PEM_BYTES {
        return Err(TlsError::FileTooLarge { path: path.to_owned(), max: MAX_PEM_BYTES });
    }
    Ok(bytes)
}

pub(crate) const ALPN_HTTP2: &[u8] = b"h2";
