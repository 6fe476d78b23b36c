//! Who a peer is: one SPIFFE id, read from exactly one URI SAN of its certificate.
//!
//! Accepted are `spiffe://<trust-domain>/tabmesh/` followed by `agent/<domain>/<name>`, `operator/<name>`,
//! `auditor/<name>` or `coordinator`. DNS and IP names may stand beside it; any other kind of name, none or several
//! URIs, a CA certificate used as a leaf, and the development CA outside development are refused. Names in the
//! subject never identify anybody. Standard: SPIFFE-ID and X.509-SVID, <https://github.com/spiffe/spiffe>.

use std::{fmt, str::FromStr};

use rustls_pki_types::CertificateDer;
use x509_parser::{
    certificate::X509Certificate,
    extensions::GeneralName,
    prelude::{FromDer, X509Name},
};

use crate::limits::{MAX_CHAIN_CERTIFICATES, MAX_SPIFFE_ID_BYTES};

/// Subject common name of every development CA; refused unless development is allowed.
pub const DEVELOPMENT_CA_NAME: &str = "tabmesh development CA";

/// A parsed SPIFFE id of this mesh.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    trust_domain: String,
    subject: Subject,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Subject {
    Agent { domain: String, name: String },
    Operator { name: String },
    Auditor { name: String },
    Coordinator,
}

/// What a peer may be; the columns of the access table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Runs beside a domain's tables.
    Agent,
    /// Belongs to the platform team; submits and watches plans.
    Operator,
    /// Belongs to compliance; reads reports.
    Auditor,
    /// The coordinator itself.
    Coordinator,
}

impl Role {
    /// Every role.
    pub const ALL: [Self; 4] = [Self::Agent, Self::Operator, Self::Auditor, Self::Coordinator];
}

/// Whether certificates of the development CA are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DevelopmentCa {
    /// Production: refused.
    Refuse,
    /// The operator asked for insecure development mode.
    Accept,
}

/// Why an id or a certificate does not identify a peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The text is not a SPIFFE id of this mesh.
    #[error("not a tabmesh SPIFFE id: {reason}")]
    Syntax {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The certificate does not parse.
    #[error("certificate cannot be read")]
    Certificate,
    /// The peer presented no certificate.
    #[error("no certificate presented")]
    NoCertificate,
    /// The peer presented a chain that is too long.
    #[error("chain of {got} certificates refused: at most {max}")]
    ChainTooLong {
        /// Certificates presented.
        got: usize,
        /// Most certificates accepted.
        max: usize,
    },
    /// Not exactly one URI SAN.
    #[error("certificate has {got} URI names: expected exactly 1")]
    UriCount {
        /// URI names found.
        got: usize,
    },
    /// A name that is neither URI, DNS nor IP.
    #[error("certificate has a name that is neither URI, DNS nor IP")]
    ForeignName,
    /// A CA certificate used as a peer's own.
    #[error("certificate is a CA certificate: expected a leaf")]
    CaAsLeaf,
    /// Issued by the development CA, outside development.
    #[error(
        "certificate of the development CA refused: start with --insecure-dev to accept it, never in production"
    )]
    DevelopmentCa,
    /// The peer belongs to another trust domain.
    #[error("trust domain {got} refused: expected {expected}")]
    TrustDomain {
        /// Our trust domain.
        expected: String,
        /// The peer's.
        got: String,
    },
}

impl SpiffeId {
    /// Builds an agent's id.
    ///
    /// # Errors
    /// [`IdentityError::Syntax`] if a part has other characters than the standard allows.
    pub fn agent(trust_domain: &str, domain: &str, name: &str) -> Result<Self, IdentityError> {
        format!("spiffe://{trust_domain}/tabmesh/agent/{domain}/{name}").parse()
    }

    /// Builds an operator's id.
    ///
    /// # Errors
    /// As [`SpiffeId::agent`].
    pub fn operator(trust_domain: &str, name: &str) -> Result<Self, IdentityError> {
        format!("spiffe://{trust_domain}/tabmesh/operator/{name}").parse()
    }

    /// Builds an auditor's id.
    ///
    /// # Errors
    /// As [`SpiffeId::agent`].
    pub fn auditor(trust_domain: &str, name: &str) -> Result<Self, IdentityError> {
        format!("spiffe://{trust_domain}/tabmesh/auditor/{name}").parse()
    }

    /// Builds the coordinator's id.
    ///
    /// # Errors
    /// As [`SpiffeId::agent`].
    pub fn coordinator(trust_domain: &str) -> Result<Self, IdentityError> {
        format!("spiffe://{trust_domain}/tabmesh/coordinator").parse()
    }

    /// The trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// The role its path names.
    #[must_use]
    pub const fn role(&self) -> Role {
        match self.subject {
            Subject::Agent { .. } => Role::Agent,
            Subject::Operator { .. } => Role::Operator,
            Subject::Auditor { .. } => Role::Auditor,
            Subject::Coordinator => Role::Coordinator,
        }
    }

    /// The data domain of an agent.
    #[must_use]
    pub fn domain(&self) -> Option<&str> {
        match &self.subject {
            Subject::Agent { domain, .. } => Some(domain),
            _ => None,
        }
    }

    /// The name of an agent, operator or auditor.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        match &self.subject {
            Subject::Agent { name, .. } | Subject::Operator { name } | Subject::Auditor { name } => {
                Some(name)
            }
            Subject::Coordinator => None,
        }
    }

    /// Reads the id from the leaf of a chain whose signatures TLS has verified already.
    ///
    /// # Errors
    /// Every variant of [`IdentityError`] but [`IdentityError::TrustDomain`].
    pub fn of_chain(chain: &[CertificateDer<'_>], development: DevelopmentCa) -> Result<Self, IdentityError> {
        if chain.len() > MAX_CHAIN_CERTIFICATES {
            return Err(IdentityError::ChainTooLong { got: chain.len(), max: MAX_CHAIN_CERTIFICATES });
        }
        let leaf = parse(chain.first().ok_or(IdentityError::NoCertificate)?)?;
        if development == DevelopmentCa::Refuse {
            for certificate in chain {
                let certificate = parse(certificate)?;
                if is_development(certificate.issuer()) || is_development(certificate.subject()) {
                    return Err(IdentityError::DevelopmentCa);
                }
            }
        }
        if leaf.is_ca() {
            return Err(IdentityError::CaAsLeaf);
        }
        let names = leaf.subject_alternative_name().map_err(|_| IdentityError::Certificate)?;
        let names = names.map_or(&[][..], |extension| &extension.value.general_names);
        let mut uris = Vec::new();
        for name in names {
            match name {
                GeneralName::URI(uri) => uris.push(*uri),
                GeneralName::DNSName(_) | GeneralName::IPAddress(_) => {}
                _ => return Err(IdentityError::ForeignName),
            }
        }
        match uris.as_slice() {
            [uri] => uri.parse(),
            other => Err(IdentityError::UriCount { got: other.len() }),
        }
    }

    /// Refuses ids of other trust domains.
    ///
    /// # Errors
    /// [`IdentityError::TrustDomain`].
    pub fn require_trust_domain(self, expected: &str) -> Result<Self, IdentityError> {
        if self.trust_domain == expected {
            return Ok(self);
        }
        Err(IdentityError::TrustDomain { expected: expected.to_owned(), got: self.trust_domain })
    }
}

impl FromStr for SpiffeId {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let syntax = |reason| IdentityError::Syntax { reason };
        if text.len() > MAX_SPIFFE_ID_BYTES {
            return Err(syntax("too long"));
        }
        let rest = text.strip_prefix("spiffe://").ok_or_else(|| syntax("expected spiffe://"))?;
        let (trust_domain, path) = rest.split_once('/').ok_or_else(|| syntax("expected a path"))?;
        let host = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
        if trust_domain.is_empty() || !trust_domain.bytes().all(host) {
            return Err(syntax("trust domain is empty or has other characters than a-z 0-9 . - _"));
        }
        let segments: Vec<&str> = path.split('/').collect();
        for segment in &segments {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
            if segment.is_empty() || *segment == "." || *segment == ".." || !segment.bytes().all(allowed) {
                return Err(syntax(
                    "path segment is empty, relative or has other characters than A-Z a-z 0-9 . - _",
                ));
            }
        }
        let subject = match segments.as_slice() {
            ["tabmesh", "agent", domain, name] => {
                Subject::Agent { domain: (*domain).to_owned(), name: (*name).to_owned() }
            }
            ["tabmesh", "operator", name] => Subject::Operator { name: (*name).to_owned() },
            ["tabmesh", "auditor", name] => Subject::Auditor { name: (*name).to_owned() },
            ["tabmesh", "coordinator"] => Subject::Coordinator,
            _ => {
                return Err(syntax(
                    "expected tabmesh/agent/<domain>/<name>, tabmesh/operator/<name>, tabmesh/auditor/<name> or \
                     tabmesh/coordinator",
                ));
            }
        };
        Ok(Self { trust_domain: trust_domain.to_owned(), subject })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/tabmesh/", self.trust_domain)?;
        match &self.subject {
            Subject::Agent { domain, name } => write!(f, "agent/{domain}/{name}"),
            Subject::Operator { name } => write!(f, "operator/{name}"),
            Subject::Auditor { name } => write!(f, "auditor/{name}"),
            Subject::Coordinator => f.write_str("coordinator"),
        }
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Whether a CA certificate is a development CA.
///
/// # Errors
/// [`IdentityError::Certificate`] if it does not parse.
pub fn is_development_ca(certificate: &CertificateDer<'_>) -> Result<bool, IdentityError> {
    Ok(is_development(parse(certificate)?.subject()))
}

/// Seconds since 1970 after which a certificate is no longer valid; for expiry metrics.
///
/// # Errors
/// [`IdentityError::Certificate`] if it does not parse.
pub fn not_after_s(certificate: &CertificateDer<'_>) -> Result<i64, IdentityError> {
    Ok(parse(certificate)?.validity().not_after.timestamp())
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, IdentityError> {
    match X509Certificate::from_der(certificate.as_ref()) {
        Ok(([], parsed)) => Ok(parsed),
        _ => Err(IdentityError::Certificate),
    }
}

fn is_development(name: &X509Name<'_>) -> bool {
    name.iter_common_name().any(|common| common.as_str().is_ok_and(|text| text == DEVELOPMENT_CA_NAME))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DnType, IsCa, KeyPair, SanType};

    use super::*;

    fn certificate(edit: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        edit(&mut params);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    const AGENT: &str = "spiffe://acme.example/tabmesh/agent/payments/a1";

    #[test]
    fn the_four_shapes_parse_and_print_the_same() {
        for (text, role, domain, name) in [
            (AGENT, Role::Agent, Some("payments"), Some("a1")),
            ("spiffe://acme.example/tabmesh/operator/ops", Role::Operator, None, Some("ops")),
            ("spiffe://acme.example/tabmesh/auditor/risk", Role::Auditor, None, Some("risk")),
            ("spiffe://acme.example/tabmesh/coordinator", Role::Coordinator, None, None),
        ] {
            let id: SpiffeId = text.parse().unwrap();
            assert_eq!(id.to_string(), text);
            assert_eq!((id.role(), id.domain(), id.name()), (role, domain, name));
            assert_eq!(id.trust_domain(), "acme.example");
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for text in [
            "",
            "https://acme.example/tabmesh/coordinator",
            "spiffe://acme.example",
            "spiffe:///tabmesh/coordinator",
            "spiffe://ACME.example/tabmesh/coordinator",
            "spiffe://acme.example:443/tabmesh/coordinator",
            "spiffe://user@acme.example/tabmesh/coordinator",
            "spiffe://acme.example/tabmesh/coordinator/",
            "spiffe://acme.example/tabmesh//coordinator",
            "spiffe://acme.example/tabmesh/coordinator?x=1",
            "spiffe://acme.example/tabmesh/agent/payments",
            "spiffe://acme.example/tabmesh/agent/payments/../a1",
            "spiffe://acme.example/tabmesh/agent/pay%2fments/a1",
            "spiffe://acme.example/tabmesh/admin/a1",
            "spiffe://acme.example/other/coordinator",
            "spiffe://acme.example/tabmesh/coordinator\n",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text}");
        }
        let long = |n: usize| {
            let prefix = "spiffe://acme.example/tabmesh/operator/";
            format!("{prefix}{}", "x".repeat(n - prefix.len()))
        };
        assert!(long(MAX_SPIFFE_ID_BYTES).parse::<SpiffeId>().is_ok());
        assert!(long(MAX_SPIFFE_ID_BYTES + 1).parse::<SpiffeId>().is_err());
    }

    #[test]
    fn exactly_one_uri_names_the_peer() {
        let of = |sans: Vec<SanType>| {
            let leaf = certificate(|params| params.subject_alt_names = sans);
            SpiffeId::of_chain(&[leaf], DevelopmentCa::Refuse)
        };
        let dns = || SanType::DnsName("localhost".try_into().unwrap());
        let ip = || SanType::IpAddress([127, 0, 0, 1].into());
        assert_eq!(of(vec![dns(), uri(AGENT), ip()]).unwrap().to_string(), AGENT);
        assert_eq!(of(vec![]), Err(IdentityError::UriCount { got: 0 }));
        assert_eq!(of(vec![dns()]), Err(IdentityError::UriCount { got: 0 }));
        assert_eq!(of(vec![uri(AGENT), uri(AGENT)]), Err(IdentityError::UriCount { got: 2 }));
        let mail = SanType::Rfc822Name("a@acme.example".try_into().unwrap());
        assert_eq!(of(vec![uri(AGENT), mail]), Err(IdentityError::ForeignName));
        assert!(matches!(of(vec![uri("https://acme.example")]), Err(IdentityError::Syntax { .. })));
    }

    #[test]
    fn a_common_name_identifies_nobody_but_the_development_ca() {
        let named = |common: &str| {
            certificate(|params| {
                params.distinguished_name.push(DnType::CommonName, common);
                params.subject_alt_names = vec![uri(AGENT)];
            })
        };
        let development = named(DEVELOPMENT_CA_NAME);
        assert!(is_development_ca(&development).unwrap());
        assert!(!is_development_ca(&named("acme root")).unwrap());
        let chain = [named(AGENT), development];
        assert_eq!(SpiffeId::of_chain(&chain, DevelopmentCa::Refuse), Err(IdentityError::DevelopmentCa));
        assert_eq!(SpiffeId::of_chain(&chain, DevelopmentCa::Accept).unwrap().to_string(), AGENT);
        let without_uri = certificate(|params| params.distinguished_name.push(DnType::CommonName, AGENT));
        assert_eq!(
            SpiffeId::of_chain(&[without_uri], DevelopmentCa::Refuse),
            Err(IdentityError::UriCount { got: 0 })
        );
    }

    #[test]
    fn ca_certificates_long_chains_and_rubbish_are_refused() {
        let ca = certificate(|params| {
            params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            params.subject_alt_names = vec![uri(AGENT)];
        });
        let refuse = DevelopmentCa::Refuse;
        assert_eq!(SpiffeId::of_chain(std::slice::from_ref(&ca), refuse), Err(IdentityError::CaAsLeaf));
        assert_eq!(SpiffeId::of_chain(&[], refuse), Err(IdentityError::NoCertificate));
        let chain = vec![ca; MAX_CHAIN_CERTIFICATES + 1];
        let long =
            IdentityError::ChainTooLong { got: MAX_CHAIN_CERTIFICATES + 1, max: MAX_CHAIN_CERTIFICATES };
        assert_eq!(SpiffeId::of_chain(&chain, refuse), Err(long));
        let rubbish = CertificateDer::from(vec![0x30, 0x03, 1, 2, 3]);
        assert_eq!(SpiffeId::of_chain(&[rubbish], refuse), Err(IdentityError::Certificate));
    }

    #[test]
    fn other_trust_domains_are_refused() {
        let id: SpiffeId = AGENT.parse().unwrap();
        assert_eq!(id.clone().require_trust_domain("acme.example"), Ok(id.clone()));
        let expected =
            IdentityError::TrustDomain { expected: "evil.example".into(), got: "acme.example".into() };
        assert_eq!(id.require_trust_domain("evil.example"), Err(expected));
    }

    proptest! {
        #[test]
        fn whatever_parses_prints_itself(text in "spiffe://[a-z.]{1,8}/tabmesh/(agent/[a-z./]{1,8}|operator/[A-Za-z0-9_.-]{1,4}|coordinator)") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }
}
