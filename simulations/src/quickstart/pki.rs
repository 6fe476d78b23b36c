//! A development PKI: one authority and a certificate, key and signing key for each process of a deployment.
//!
//! Every leaf carries exactly one SPIFFE id as its only URI SAN, beside `localhost` and the loopback addresses,
//! and is good for one direction: servers present server certificates, clients client certificates. Everything
//! expires 30 days after `now`. The authority's subject says that it is for development, so that a coordinator
//! can refuse it elsewhere. Its key is written beside the leaves: whoever can read the folder can be anybody.

use std::fs::{OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, SanType,
};
use time::{Duration, OffsetDateTime};

/// Trust domain of every SPIFFE id issued here.
pub const TRUST_DOMAIN: &str = "tabmesh.dev";
/// Common name of the authority; outside development it is to be refused.
pub const AUTHORITY_NAME: &str = "tabmesh development CA";
/// Days from `now` until authority and leaves expire.
pub const VALID_DAYS: i64 = 30;
/// Seconds before `now` from which certificates are good, for clocks that run behind.
pub const BACKDATED_S: i64 = 300;

/// Who a certificate speaks for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The coordinator.
    Coordinator,
    /// An agent of a domain.
    Agent {
        /// The domain.
        domain: String,
        /// The agent's name within the domain.
        name: String,
    },
    /// A person or job that runs plans.
    Operator {
        /// The operator's name.
        name: String,
    },
    /// A person or job that reads reports.
    Auditor {
        /// The auditor's name.
        name: String,
    },
}

impl Role {
    /// The agent of a domain under the name used in development, [`AGENT_NAME`].
    #[must_use]
    pub fn agent(domain: &str) -> Self {
        Self::Agent { domain: domain.to_owned(), name: AGENT_NAME.to_owned() }
    }

    /// The SPIFFE id.
    #[must_use]
    pub fn spiffe_id(&self) -> String {
        let path = match self {
            Self::Coordinator => "coordinator".to_owned(),
            Self::Agent { domain, name } => format!("agent/{domain}/{name}"),
            Self::Operator { name } => format!("operator/{name}"),
            Self::Auditor { name } => format!("auditor/{name}"),
        };
        format!("spiffe://{TRUST_DOMAIN}/tabmesh/{path}")
    }

    /// Stem of the role's files.
    fn stem(&self) -> String {
        match self {
            Self::Coordinator => "coordinator".to_owned(),
            Self::Agent { domain, name } => format!("agent.{domain}.{name}"),
            Self::Operator { name } => format!("operator.{name}"),
            Self::Auditor { name } => format!("auditor.{name}"),
        }
    }

    /// Directions the role needs a certificate for.
    fn usages(&self) -> &'static [Usage] {
        match self {
            Self::Coordinator => &[Usage::Server],
            // An agent dials the coordinator and answers predictions.
            Self::Agent { .. } => &[Usage::Client, Usage::Server],
            Self::Operator { .. } | Self::Auditor { .. } => &[Usage::Client],
        }
    }

    /// Names go into paths and URIs, so they are kept to characters that mean nothing in either.
    fn check(&self) -> Result<()> {
        let names: Vec<&str> = match self {
            Self::Coordinator => Vec::new(),
            Self::Agent { domain, name } => vec![domain, name],
            Self::Operator { name } | Self::Auditor { name } => vec![name],
        };
        for name in names {
            let fits = !name.is_empty()
                && name.len() <= MAX_NAME_BYTES
                && name
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-'));
            ensure!(fits, "name {name:?} is not 1 to {MAX_NAME_BYTES} characters of a-z, 0-9, '_', '-'");
        }
        Ok(())
    }
}

/// Direction of a certificate: its only extended key usage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    /// Presented by the side that listens.
    Server,
    /// Presented by the side that dials.
    Client,
}

/// A certificate authority held in memory.
pub struct Authority {
    certificate: Certificate,
    issuer: Issuer<'static, KeyPair>,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
}

/// A certificate and its private key as PEM.
#[derive(Clone)]
pub struct Leaf {
    /// The certificate.
    pub certificate_pem: String,
    /// The private key, PKCS #8; to be kept from logs and other users.
    pub key_pem: String,
}

impl Authority {
    /// Makes an authority that is valid until [`VALID_DAYS`] after `now`.
    ///
    /// # Errors
    /// The system gives no randomness.
    pub fn new(now: OffsetDateTime) -> Result<Self> {
        let (not_before, not_after) =
            (now - Duration::seconds(BACKDATED_S), now + Duration::days(VALID_DAYS));
        let mut params = CertificateParams::default();
        params.distinguished_name = subject(AUTHORITY_NAME);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = (not_before, not_after);
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).context("can't make the authority's key")?;
        let certificate = params.self_signed(&key).context("can't sign the authority's certificate")?;
        Ok(Self { certificate, issuer: Issuer::new(params, key), not_before, not_after })
    }

    /// The authority's certificate as PEM.
    #[must_use]
    pub fn certificate_pem(&self) -> String {
        self.certificate.pem()
    }

    /// Issues a certificate for one role and direction, with the authority's own validity.
    ///
    /// # Errors
    /// A name outside `[a-z0-9_-]{1,64}`, or no randomness.
    pub fn issue(&self, role: &Role, usage: Usage) -> Result<Leaf> {
        role.check()?;
        let id = role.spiffe_id();
        let hosts = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
        let mut params = CertificateParams::new(hosts).context("host names are refused")?;
        params
            .subject_alt_names
            .push(SanType::URI(id.as_str().try_into().context("the SPIFFE id is refused")?));
        params.distinguished_name = subject(&role.stem());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match usage {
            Usage::Server => ExtendedKeyUsagePurpose::ServerAuth,
            Usage::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        params.use_authority_key_identifier_extension = true;
        (params.not_before, params.not_after) = (self.not_before, self.not_after);
        let key =
            KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).with_context(|| format!("no key for {id}"))?;
        let certificate = params
            .signed_by(&key, &self.issuer)
            .with_context(|| format!("can't sign the certificate of {id}"))?;
        Ok(Leaf { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }
}

/// Files of one certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsPaths {
    /// Certificate, PEM.
    pub certificate: PathBuf,
    /// Private key, PEM, readable by its owner alone.
    pub key: PathBuf,
}

/// A folder that [`write`] filled, and the names of what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PkiFolder {
    folder: PathBuf,
}

impl PkiFolder {
    /// Names the files of a folder without looking at it.
    #[must_use]
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The authority's certificate, PEM.
    #[must_use]
    pub fn authority(&self) -> PathBuf {
        self.folder.join("ca.pem")
    }

    /// Certificate and key of a role for one direction.
    #[must_use]
    pub fn tls(&self, role: &Role, usage: Usage) -> TlsPaths {
        let direction = match usage {
            Usage::Server => "server",
            Usage::Client => "client",
        };
        let stem = role.stem();
        TlsPaths {
            certificate: self.folder.join(format!("{stem}.{direction}.pem")),
            key: self.folder.join(format!("{stem}.{direction}.key")),
        }
    }

    /// Ed25519 signing key of a role, PKCS #8 DER.
    #[must_use]
    pub fn signing_key(&self, role: &Role) -> PathBuf {
        self.folder.join(format!("{}.signing.key", role.stem()))
    }

    /// Ed25519 public key of a role, 32 bytes, for verifiers to pin.
    #[must_use]
    pub fn signing_public_key(&self, role: &Role) -> PathBuf {
        self.folder.join(format!("{}.signing.pub", role.stem()))
    }
}

/// Makes a new authority and writes it, with certificates and signing keys for all `roles`, to `folder`.
///
/// Files of an earlier call are replaced, so older leaves no longer chain to the authority. Private keys have mode
/// 0600, the folder 0700 if it is made here.
///
/// # Errors
/// A name that is refused, no randomness, or a file that can't be written.
pub fn write(folder: &Path, roles: &[Role], now: OffsetDateTime) -> Result<PkiFolder> {
    for role in roles {
        role.check()?;
    }
    let authority = Authority::new(now)?;
    let pki = PkiFolder::at(folder);
    if !folder.exists() {
        std::fs::create_dir_all(folder).with_context(|| format!("can't make folder {}", folder.display()))?;
        std::fs::set_permissions(folder, Permissions::from_mode(0o700))
            .with_context(|| format!("can't close folder {}", folder.display()))?;
    }
    put(&pki.authority(), authority.certificate_pem().as_bytes(), PUBLIC)?;
    put(&folder.join("ca.key"), authority.issuer.key().serialize_pem().as_bytes(), PRIVATE)?;
    for role in roles {
        for &usage in role.usages() {
            let leaf = authority.issue(role, usage)?;
            let paths = pki.tls(role, usage);
            put(&paths.certificate, leaf.certificate_pem.as_bytes(), PUBLIC)?;
            put(&paths.key, leaf.key_pem.as_bytes(), PRIVATE)?;
        }
        let signing = KeyPair::generate_for(&PKCS_ED25519).context("can't make a signing key")?;
        put(&pki.signing_key(role), signing.serialized_der(), PRIVATE)?;
        put(&pki.signing_public_key(role), signing.public_key_raw(), PUBLIC)?;
    }
    Ok(pki)
}

/// Writes a file with a mode; the mode holds from the first byte on.
fn put(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let refused = || format!("can't write {}", path.display());
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(refused);
        }
        _ => {}
    }
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(path).with_context(refused)?;
    file.write_all(bytes).with_context(refused)
}

fn subject(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "tabmesh development");
    name.push(DnType::CommonName, common_name);
    name
}

/// Name of an agent within its domain in development deployments.
pub const AGENT_NAME: &str = "agent-1";
/// Longest domain, agent, operator or auditor name, in bytes.
pub const MAX_NAME_BYTES: usize = 64;
/// Mode of what only its owner may read.
const PRIVATE: u32 = 0o600;
/// Mode of what anybody may read.
const PUBLIC: u32 = 0o644;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::sync::Arc;

    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
    use rustls::server::WebPkiClientVerifier;
    use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
    use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

    use super::*;

    fn chain(leaf: &Leaf) -> Vec<CertificateDer<'static>> {
        vec![CertificateDer::from_pem_slice(leaf.certificate_pem.as_bytes()).unwrap()]
    }

    fn key(leaf: &Leaf) -> PrivateKeyDer<'static> {
        PrivateKeyDer::from_pem_slice(leaf.key_pem.as_bytes()).unwrap()
    }

    /// A mutual TLS handshake in memory, both sides trusting their own authority.
    fn handshake(
        server: (&Authority, &Leaf),
        client: (&Authority, &Leaf),
        name: &'static str,
    ) -> Result<(), rustls::Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let roots = |authority: &Authority| {
            let mut roots = RootCertStore::empty();
            roots.add(authority.certificate.der().clone()).unwrap();
            Arc::new(roots)
        };
        let verifier = WebPkiClientVerifier::builder_with_provider(roots(server.0), Arc::clone(&provider))
            .build()
            .unwrap();
        let server_config = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain(server.1), key(server.1))?;
        let client_config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots(client.0))
            .with_client_auth_cert(chain(client.1), key(client.1))?;
        let mut listening = ServerConnection::new(Arc::new(server_config))?;
        let mut dialling =
            ClientConnection::new(Arc::new(client_config), ServerName::try_from(name).unwrap())?;
        for _ in 0..8 {
            let mut wire = Vec::new();
            dialling.write_tls(&mut wire).unwrap();
            listening.read_tls(&mut wire.as_slice()).unwrap();
            listening.process_new_packets()?;
            let mut wire = Vec::new();
            listening.write_tls(&mut wire).unwrap();
            dialling.read_tls(&mut wire.as_slice()).unwrap();
            dialling.process_new_packets()?;
        }
        assert!(!listening.is_handshaking() && !dialling.is_handshaking());
        Ok(())
    }

    fn now() -> OffsetDateTime {
        OffsetDateTime::now_utc()
    }

    #[test]
    fn an_agent_and_the_coordinator_shake_hands() {
        let authority = Authority::new(now()).unwrap();
        let coordinator = authority.issue(&Role::Coordinator, Usage::Server).unwrap();
        let agent = authority.issue(&Role::agent("finance"), Usage::Client).unwrap();
        for name in ["localhost", "127.0.0.1"] {
            assert_eq!(handshake((&authority, &coordinator), (&authority, &agent), name), Ok(()));
        }
        assert!(handshake((&authority, &coordinator), (&authority, &agent), "mesh.example").is_err());
    }

    #[test]
    fn a_certificate_serves_one_direction_only() {
        let authority = Authority::new(now()).unwrap();
        let agent = Role::agent("finance");
        let listening = authority.issue(&agent, Usage::Server).unwrap();
        let dialling = authority.issue(&agent, Usage::Client).unwrap();
        assert_eq!(handshake((&authority, &listening), (&authority, &dialling), "localhost"), Ok(()));
        assert!(handshake((&authority, &listening), (&authority, &listening), "localhost").is_err());
        assert!(handshake((&authority, &dialling), (&authority, &dialling), "localhost").is_err());
    }

    #[test]
    fn another_authority_of_the_same_name_is_not_trusted() {
        let (ours, theirs) = (Authority::new(now()).unwrap(), Authority::new(now()).unwrap());
        let coordinator = ours.issue(&Role::Coordinator, Usage::Server).unwrap();
        let stranger = theirs.issue(&Role::agent("finance"), Usage::Client).unwrap();
        assert!(handshake((&ours, &coordinator), (&ours, &stranger), "localhost").is_err());
    }

    #[test]
    fn certificates_expire_30_days_after_the_given_time() {
        let authority = Authority::new(now() - Duration::days(VALID_DAYS + 1)).unwrap();
        let coordinator = authority.issue(&Role::Coordinator, Usage::Server).unwrap();
        let agent = authority.issue(&Role::agent("finance"), Usage::Client).unwrap();
        assert!(handshake((&authority, &coordinator), (&authority, &agent), "localhost").is_err());

        let at = OffsetDateTime::from_unix_timestamp(1_800_000_000).unwrap();
        let leaf = Authority::new(at).unwrap().issue(&Role::Coordinator, Usage::Server).unwrap();
        let chain = chain(&leaf);
        let (_, parsed) = X509Certificate::from_der(&chain[0]).unwrap();
        assert_eq!(parsed.validity().not_after.timestamp(), 1_800_000_000 + 30 * 86_400);
        assert_eq!(parsed.validity().not_before.timestamp(), 1_800_000_000 - 300);
    }

    #[test]
    fn a_leaf_has_exactly_one_uri_and_it_is_the_spiffe_id() {
        let authority = Authority::new(now()).unwrap();
        let role = Role::Operator { name: "ops-1".into() };
        let chain = chain(&authority.issue(&role, Usage::Client).unwrap());
        let (_, parsed) = X509Certificate::from_der(&chain[0]).unwrap();
        let names = &parsed.subject_alternative_name().unwrap().unwrap().value.general_names;
        let uris: Vec<_> = names
            .iter()
            .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
            .collect();
        assert_eq!(uris, ["spiffe://tabmesh.dev/tabmesh/operator/ops-1"]);
        assert_eq!(names.len(), 4, "localhost, two loopback addresses and the id");
        assert!(!parsed.is_ca());
        assert!(parsed.issuer().to_string().contains(AUTHORITY_NAME));
    }

    #[test]
    fn names_that_mean_something_in_paths_or_uris_are_refused() {
        let authority = Authority::new(now()).unwrap();
        for name in ["", "a/b", "..", "Ops", "a b", "a%2f", &"x".repeat(MAX_NAME_BYTES + 1)] {
            let role = Role::Operator { name: name.to_owned() };
            assert!(authority.issue(&role, Usage::Client).is_err(), "{name:?}");
        }
        let longest = Role::Operator { name: "x".repeat(MAX_NAME_BYTES) };
        assert!(authority.issue(&longest, Usage::Client).is_ok());
    }

    #[test]
    fn a_folder_holds_all_files_with_closed_keys_and_can_be_renewed() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("certs");
        let roles = [Role::Coordinator, Role::agent("retail"), Role::Auditor { name: "audit".into() }];
        let first = write(&folder, &roles, now()).unwrap();
        let before = std::fs::read(first.authority()).unwrap();
        let pki = write(&folder, &roles, now()).unwrap();
        assert_eq!(pki, first);
        assert_ne!(std::fs::read(pki.authority()).unwrap(), before);

        let mut names = Vec::new();
        for entry in std::fs::read_dir(&folder).unwrap() {
            let entry = entry.unwrap();
            let (name, mode) =
                (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().permissions().mode());
            let secret = name.ends_with(".key");
            assert_eq!(mode & 0o777, if secret { 0o600 } else { 0o644 }, "{name}");
            names.push(name);
        }
        // Authority 2; coordinator one direction, agent two, auditor one; a signing pair each.
        assert_eq!(names.len(), 2 + 2 + 4 + 2 + 3 * 2);
        assert_eq!(std::fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
        for role in &roles {
            for &usage in role.usages() {
                let paths = pki.tls(role, usage);
                assert!(CertificateDer::from_pem_file(paths.certificate).is_ok());
                assert!(PrivateKeyDer::from_pem_file(paths.key).is_ok());
            }
            assert_eq!(std::fs::read(pki.signing_public_key(role)).unwrap().len(), 32);
        }
    }

    #[test]
    fn signing_keys_sign_and_verify() {
        let folder = tempfile::tempdir().unwrap();
        let pki = write(folder.path(), &[Role::Coordinator], now()).unwrap();
        let der = std::fs::read(pki.signing_key(&Role::Coordinator)).unwrap();
        let key = ring::signature::Ed25519KeyPair::from_pkcs8(&der).unwrap();
        let public = std::fs::read(pki.signing_public_key(&Role::Coordinator)).unwrap();
        let verifier = ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, public);
        assert!(verifier.verify(b"head", key.sign(b"head").as_ref()).is_ok());
        assert!(verifier.verify(b"tail", key.sign(b"head").as_ref()).is_err());
    }
}
