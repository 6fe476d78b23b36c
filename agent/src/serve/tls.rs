//! Who may call: TLS 1.3 with a required client certificate, and an exact allow list of SPIFFE ids.
//!
//! A certificate must chain to the client CA, be valid by the process's clock and carry exactly one URI SAN, the SPIFFE
//! id of an agent that stands on the list (`tabmesh_proto::identity` reads it). Sharing a domain is required for the
//! list and not enough without it; a common name says nothing. Certificate files are
//! read again when they change (short-lived certificates are the rule), and the last good set stays when the new one
//! doesn't parse. Sessions are not resumed, so each connection shows its certificate.

use std::{
    collections::BTreeSet,
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use ring::digest::{SHA256, digest};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    time_provider::TimeProvider,
    version::TLS13,
};
use tabmesh_proto::identity::{DevelopmentCa, Role, SpiffeId, is_development_ca};
use tokio::{net::TcpStream, time::sleep};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{Clock, ServeConfig, ServeError, log::Caller};

/// PEM files of the endpoint's identity and of the CA that issues its callers' certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// Server certificate chain, leaf first.
    pub cert: PathBuf,
    /// Private key of the leaf.
    pub key: PathBuf,
    /// Certificates that client certificates must chain to.
    pub client_ca: PathBuf,
}

/// Accepts TLS connections and names their callers.
pub(super) struct TlsGate {
    files: TlsFiles,
    allowed: BTreeSet<SpiffeId>,
    development: DevelopmentCa,
    clock: Clock,
    current: Mutex<Loaded>,
}

struct Loaded {
    tls: Arc<ServerConfig>,
    /// Digests of the files' bytes, to see a change.
    digests: Vec<[u8; 32]>,
}

impl TlsGate {
    /// Reads the files.
    ///
    /// # Errors
    /// [`ServeError::Tls`] naming the file that can't be read, has no certificate or key, or doesn't fit the others.
    pub(super) fn load(files: &TlsFiles, config: &ServeConfig) -> Result<Self, ServeError> {
        let pem = Pem::read(files)?;
        let (clock, development) = (Arc::clone(&config.clock), config.development);
        let loaded = Loaded { tls: pem.server_config(files, &clock, development)?, digests: pem.digests() };
        let allowed = config.allowed.iter().cloned().collect();
        Ok(Self { files: files.clone(), allowed, development, clock, current: Mutex::new(loaded) })
    }

    /// Shakes hands, then looks the caller up. The inner error says why the caller is refused; it is for the agent's
    /// own log.
    ///
    /// # Errors
    /// The handshake's error: no certificate, a foreign or expired one, another TLS version.
    pub(super) async fn accept(
        &self,
        stream: TcpStream,
    ) -> io::Result<(TlsStream<TcpStream>, Result<Caller, String>)> {
        let tls = Arc::clone(&self.current.lock().unwrap_or_else(PoisonError::into_inner).tls);
        let stream = TlsAcceptor::from(tls).accept(stream).await?;
        let caller = self.authorise(stream.get_ref().1.peer_certificates().unwrap_or_default());
        Ok((stream, caller))
    }

    fn authorise(&self, chain: &[CertificateDer<'_>]) -> Result<Caller, String> {
        let id = SpiffeId::of_chain(chain, self.development).map_err(|e| e.to_string())?;
        if self.allowed.contains(&id) { Ok(Caller::Spiffe(id)) } else { Err(format!("{id} is not allowed")) }
    }

    /// Looks for changed files every [`RELOAD_EVERY`].
    pub(super) async fn reload_for_ever(&self) {
        loop {
            sleep(RELOAD_EVERY).await;
            match self.reload() {
                Ok(true) => tracing::info!(cert = %self.files.cert.display(), "tls files reloaded"),
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%error, "tls files changed but can't be used, keeping the last set")
                }
            }
        }
    }

    /// Takes changed files into use for new connections; tells whether they had changed.
    ///
    /// # Errors
    /// As [`TlsGate::load`]; the set in use stays.
    pub(super) fn reload(&self) -> Result<bool, ServeError> {
        let pem = Pem::read(&self.files)?;
        let digests = pem.digests();
        if self.current.lock().unwrap_or_else(PoisonError::into_inner).digests == digests {
            return Ok(false);
        }
        let tls = pem.server_config(&self.files, &self.clock, self.development)?;
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Loaded { tls, digests };
        Ok(true)
    }
}

/// The three files' bytes.
struct Pem {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Vec<u8>,
}

impl Pem {
    fn read(files: &TlsFiles) -> Result<Self, ServeError> {
        let read = |path: &Path| fs::read(path).map_err(|e| refused(path, &e));
        Ok(Self { cert: read(&files.cert)?, key: read(&files.key)?, client_ca: read(&files.client_ca)? })
    }

    fn digests(&self) -> Vec<[u8; 32]> {
        let of = |bytes: &Vec<u8>| {
            let mut fixed = [0; 32];
            fixed.copy_from_slice(digest(&SHA256, bytes).as_ref());
            fixed
        };
        [&self.cert, &self.key, &self.client_ca].map(of).to_vec()
    }

    fn server_config(
        &self,
        files: &TlsFiles,
        clock: &Clock,
        development: DevelopmentCa,
    ) -> Result<Arc<ServerConfig>, ServeError> {
        let provider = Arc::new(default_provider());
        let mut roots = RootCertStore::empty();
        for root in certificates(&self.client_ca, &files.client_ca)? {
            let is_development = is_development_ca(&root).map_err(|e| refused(&files.client_ca, &e))?;
            if is_development && development == DevelopmentCa::Refuse {
                return Err(refused(
                    &files.client_ca,
                    &"a development CA is refused outside development mode",
                ));
            }
            roots.add(root).map_err(|e| refused(&files.client_ca, &e))?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .build()
            .map_err(|e| refused(&files.client_ca, &e))?;
        let chain = certificates(&self.cert, &files.cert)?;
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|e| refused(&files.key, &e))?;
        let mut config =
            ServerConfig::builder_with_details(provider, Arc::new(ProcessTime(Arc::clone(clock))))
                .with_protocol_versions(&[&TLS13])
                .map_err(|e| refused(&files.cert, &e))?
                .with_client_cert_verifier(verifier)
                .with_single_cert(chain, key)
                .map_err(|e| refused(&files.cert, &e))?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

fn certificates(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, ServeError> {
    let found =
        CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>().map_err(|e| refused(path, &e))?;
    if found.is_empty() { Err(refused(path, &"no certificate in it")) } else { Ok(found) }
}

fn refused(path: &Path, reason: &dyn fmt::Display) -> ServeError {
    ServeError::Tls { path: path.display().to_string(), reason: reason.to_string() }
}

/// The process's clock for certificate validity.
struct ProcessTime(Clock);

impl TimeProvider for ProcessTime {
    fn current_time(&self) -> Option<UnixTime> {
        u64::try_from((self.0)()).ok().map(|ms| UnixTime::since_unix_epoch(Duration::from_millis(ms)))
    }
}

impl fmt::Debug for ProcessTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProcessTime")
    }
}

/// Checks an entry of the allow list: only agents of `domain` may hear about its rows.
///
/// # Errors
/// Why not, in words.
pub(super) fn check_allowed(id: &SpiffeId, domain: &str) -> Result<(), String> {
    match (id.role(), id.domain()) {
        (Role::Agent, Some(of)) if of == domain => Ok(()),
        (Role::Agent, of) => {
            Err(format!("it is an agent of domain {}, expected {domain}", of.unwrap_or_default()))
        }
        (role, _) => {
            Err(format!("its role is {role:?}, predictions from real rows are for agents of {domain}"))
        }
    }
}

/// How often certificate files are looked at.
const RELOAD_EVERY: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn only_agents_of_this_domain_can_be_allowed() {
        let check = |path: &str| {
            let id: SpiffeId = format!("spiffe://acme.example/tabmesh/{path}").parse().unwrap();
            check_allowed(&id, "payments")
        };
        assert_eq!(check("agent/payments/scoring"), Ok(()));
        assert_eq!(
            check("agent/risk/a1"),
            Err("it is an agent of domain risk, expected payments".to_owned())
        );
        for (path, role) in
            [("coordinator", "Coordinator"), ("operator/o", "Operator"), ("auditor/b", "Auditor")]
        {
            let says = format!("its role is {role}, predictions from real rows are for agents of payments");
            assert_eq!(check(path), Err(says));
        }
    }
}
