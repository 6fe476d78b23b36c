//! What is refused, where and why: certificates, identities, roles, versions, sizes, slow and silent peers. Each case
//! names the exact refusal, and no handler may have run.

use std::{sync::Arc, time::Duration};

use rustls::{CertificateError, ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use tabmesh_proto::{
    accept::{AcceptOptions, Refusal},
    client::{AuditorClient, ClientError, MeshClient, OperatorClient},
    connect::ConnectError,
    identity::{DEVELOPMENT_CA_NAME, DevelopmentCa, IdentityError},
    limits,
    message::Hello,
    status::WireError,
    tls::{ClientTls, ServerTls, TlsError, TlsPolicy},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::support::{
    AUDITOR, COORDINATOR, Ca, FixedTime, NOW_S, OPERATOR, PAYMENTS, Recorder, Running, policy,
};

/// A TLS client of raw rustls, for peers that don't follow our own client's rules.
struct RawClient {
    roots: Vec<String>,
    /// Certificate and key.
    identity: Option<(String, String)>,
    alpn: &'static [u8],
}

impl RawClient {
    fn of(ca: &Ca, identity: Option<(String, String)>) -> Self {
        Self { roots: vec![ca.pem()], identity, alpn: b"h2" }
    }

    /// Connects and reads until the server closes or answers; TLS 1.3 servers refuse after our handshake is over.
    async fn try_connect(&self, server: &Running) -> std::io::Result<Vec<u8>> {
        let mut roots = RootCertStore::empty();
        for pem in &self.roots {
            roots.add(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_details(provider, Arc::new(FixedTime(NOW_S)))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain =
                    CertificateDer::pem_slice_iter(certificate.as_bytes()).map(Result::unwrap).collect();
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        };
        config.alpn_protocols = vec![self.alpn.to_vec()];
        let tcp = TcpStream::connect(server.remote).await?;
        let name = ServerName::try_from("localhost").unwrap();
        let mut tls = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await?;
        let mut answer = Vec::new();
        timeout(Duration::from_secs(5), tls.read_to_end(&mut answer)).await.expect("the server closes")?;
        Ok(answer)
    }
}

fn unknown_issuer() -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer)
}

/// One row per kind of bad certificate: what the front door answers, with no handler run.
#[tokio::test]
async fn bad_client_certificates_are_refused_at_the_door() {
    let acme = Ca::new("acme root");
    let evil = Ca::new("evil root");
    let year = |not_before: i32, not_after: i32| {
        move |params: &mut rcgen::CertificateParams| {
            params.not_before = rcgen::date_time_ymd(not_before, 1, 2);
            params.not_after = rcgen::date_time_ymd(not_after, 1, 2);
        }
    };
    let foreign_domain = "spiffe://evil.example/tabmesh/agent/payments/a1";
    type Expected = fn(&Refusal) -> bool;
    let rows: [(&str, Option<(String, String)>, Expected); 9] = [
        ("no certificate", None, |refusal| *refusal == Refusal::Tls(rustls::Error::NoCertificatesPresented)),
        ("foreign CA", Some(evil.leaf(&[PAYMENTS], |_| {})), |refusal| {
            *refusal == Refusal::Tls(unknown_issuer())
        }),
        ("expired", Some(acme.leaf(&[PAYMENTS], year(2020, 2025))), |refusal| {
            matches!(
                refusal,
                Refusal::Tls(rustls::Error::InvalidCertificate(
                    CertificateError::Expired | CertificateError::ExpiredContext { .. }
                ))
            )
        }),
        ("not yet valid", Some(acme.leaf(&[PAYMENTS], year(2027, 2028))), |refusal| {
            matches!(
                refusal,
                Refusal::Tls(rustls::Error::InvalidCertificate(
                    CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }
                ))
            )
        }),
        ("two URI names", Some(acme.leaf(&[PAYMENTS, OPERATOR], |_| {})), |refusal| {
            *refusal == Refusal::Identity(IdentityError::UriCount { got: 2 })
        }),
        ("no URI name", Some(acme.leaf(&[], |_| {})), |refusal| {
            *refusal == Refusal::Identity(IdentityError::UriCount { got: 0 })
        }),
        ("not a SPIFFE id of ours", Some(acme.leaf(&["https://acme.example/a"], |_| {})), |refusal| {
            matches!(refusal, Refusal::Identity(IdentityError::Syntax { .. }))
        }),
        ("other trust domain", Some(acme.leaf(&[foreign_domain], |_| {})), |refusal| {
            let (expected, got) = ("acme.example".into(), "evil.example".into());
            *refusal == Refusal::Identity(IdentityError::TrustDomain { expected, got })
        }),
        (
            "server certificate only",
            Some(acme.leaf(&[PAYMENTS], |params| {
                params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
            })),
            |refusal| {
                matches!(
                    refusal,
                    Refusal::Tls(rustls::Error::InvalidCertificate(
                        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. }
                    ))
                )
            },
        ),
    ];
    for (case, identity, expected) in rows {
        let server = Running::of(&acme).await;
        let answer = RawClient::of(&acme, identity).try_connect(&server).await;
        assert!(answer.as_ref().map_or(true, Vec::is_empty), "{case}: the server answered {answer:?}");
        let refusal = server.refusal().await;
        assert!(expected(&refusal), "{case}: {refusal:?}");
        assert!(server.recorder.seen().is_empty(), "{case}: a handler ran");
    }
}

#[tokio::test]
async fn other_protocols_than_http2_are_refused() {
    let ca = Ca::new("acme root");
    let server = Running::of(&ca).await;
    let leaf = ca.leaf(&[PAYMENTS], |_| {});
    let http1 = RawClient { alpn: b"http/1.1", ..RawClient::of(&ca, Some(leaf)) };
    assert!(http1.try_connect(&server).await.is_err());
    assert_eq!(server.refusal().await, Refusal::Tls(rustls::Error::NoApplicationProtocol));
}

#[tokio::test]
async fn the_right_ca_with_the_wrong_role_reaches_no_handler() {
    let ca = Ca::new("acme root");
    let server = Running::of(&ca).await;
    let role = || ClientError::Refused(WireError::Role);

    let operator = server.connect(&ca.material(&[OPERATOR])).await.unwrap();
    assert_eq!(MeshClient::new(operator.clone()).session("0.1.0").await.map(drop), Err(role()));
    let blob = MeshClient::new(operator).fetch_blob(&[0; 32], 0, |_| Ok::<(), String>(())).await;
    assert_eq!(blob, Err(role()));

    let agent = server.connect(&ca.material(&[PAYMENTS])).await.unwrap();
    assert_eq!(OperatorClient::new(agent.clone()).submit_plan(b"x".to_vec()).await, Err(role()));
    assert_eq!(AuditorClient::new(agent.clone()).report_input(None).await, Err(role()));
    assert_eq!(AuditorClient::new(agent).status().await, Err(role()));

    let auditor = server.connect(&ca.material(&[AUDITOR])).await.unwrap();
    assert_eq!(OperatorClient::new(auditor).cancel_plan(&"p".parse().unwrap()).await, Err(role()));

    // Not even the coordinator's own certificate opens anything.
    let coordinator = server.connect(&ca.material(&[COORDINATOR])).await.unwrap();
    assert_eq!(AuditorClient::new(coordinator).status().await, Err(role()));
    assert!(server.recorder.seen().is_empty());
}

#[tokio::test]
async fn an_agent_s_certificate_presented_by_a_server_is_refused() {
    let ca = Ca::new("acme root");
    let impostor = Running::start(&ca.material(&[PAYMENTS]), Recorder::new(), AcceptOptions::default()).await;
    let refused = impostor.connect(&ca.material(&[PAYMENTS])).await.map(drop);
    let (expected, got) = (COORDINATOR.parse().unwrap(), PAYMENTS.parse().unwrap());
    assert_eq!(refused, Err(ConnectError::WrongServer { expected, got }));
    assert!(impostor.recorder.seen().is_empty());
}

#[tokio::test]
async fn a_server_of_a_foreign_ca_or_another_host_is_refused() {
    let (acme, evil) = (Ca::new("acme root"), Ca::new("evil root"));
    let server = Running::of(&evil).await;
    let refused = server.connect(&acme.material(&[PAYMENTS])).await.map(drop);
    assert_eq!(refused, Err(ConnectError::Tls(unknown_issuer())));

    let elsewhere = acme.material_with(
        &[COORDINATOR],
        |params| params.subject_alt_names.retain(|name| matches!(name, rcgen::SanType::URI(_))),
        &[],
    );
    let server = Running::start(&elsewhere, Recorder::new(), AcceptOptions::default()).await;
    let refused = server.connect(&acme.material(&[PAYMENTS])).await.map(drop);
    assert!(
        matches!(
            refused,
            Err(ConnectError::Tls(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }
            )))
        ),
        "{refused:?}"
    );
}

#[tokio::test]
async fn the_development_ca_needs_development_mode_on_both_ends() {
    let ca = Ca::new(DEVELOPMENT_CA_NAME);
    let server = ca.material(&[COORDINATOR]);
    assert_eq!(ServerTls::new(&server, policy()).map(drop), Err(TlsError::DevelopmentCa));
    let client = ca.material(&[PAYMENTS]);
    assert_eq!(ClientTls::new(&client, policy()).map(drop), Err(TlsError::DevelopmentCa));
    let development = TlsPolicy { development: DevelopmentCa::Accept, ..policy() };
    assert_eq!(ServerTls::new(&server, development.clone()).unwrap().id().to_string(), COORDINATOR);
    assert!(ClientTls::new(&client, development).is_ok());
}

#[tokio::test]
async fn another_protocol_version_is_refused_at_hello() {
    let ca = Ca::new("acme root");
    let server = Running::of(&ca).await;
    let client = MeshClient::new(server.connect(&ca.material(&[PAYMENTS])).await.unwrap());
    for protocol_version in [0, 2, u32::MAX] {
        let hello = Hello { protocol_version, product_version: "9.9.9".into() };
        let refused = client.session_with(hello).await.map(drop);
        assert_eq!(refused, Err(ClientError::Refused(WireError::ProtocolVersion)));
    }
    let nameless = Hello { protocol_version: 1, product_version: String::new() };
    let refused = client.session_with(nameless).await.map(drop);
    assert_eq!(refused, Err(ClientError::Refused(WireError::Malformed)));
    assert!(server.recorder.seen().is_empty(), "the service never heard of them");
}

#[tokio::test]
async fn messages_above_the_limit_are_refused() {
    let ca = Ca::new("acme root");
    let server = Running::of(&ca).await;
    let operator = OperatorClient::new(server.connect(&ca.material(&[OPERATOR])).await.unwrap());
    operator.submit_plan(vec![b'x'; limits::MAX_PLAN_BYTES]).await.unwrap();
    let too_large = Err(ClientError::Refused(WireError::TooLarge));
    assert_eq!(operator.submit_plan(vec![b'x'; limits::MAX_PLAN_BYTES + 1]).await, too_large);
    // Above the service's message limit: refused by its length, before the body is read.
    let refused = operator.submit_plan(vec![b'x'; limits::MAX_CONTROL_MESSAGE_BYTES + 1]).await;
    assert_eq!(refused, too_large);
    assert_eq!(server.recorder.seen().len(), 1);
}

#[tokio::test]
async fn slow_and_silent_peers_are_closed() {
    let ca = Ca::new("acme root");
    let options = AcceptOptions {
        handshake_timeout: Duration::from_millis(200),
        header_timeout: Duration::from_millis(200),
        ..AcceptOptions::default()
    };
    let server = Running::start(&ca.material(&[COORDINATOR]), Recorder::new(), options).await;
    // TCP open and nothing said; half a hello.
    for said in [&b""[..], &b"\x16\x03\x01\x02\x00\x01"[..]] {
        let mut tcp = TcpStream::connect(server.remote).await.unwrap();
        tcp.write_all(said).await.unwrap();
        let mut answer = Vec::new();
        let closed = timeout(Duration::from_secs(5), tcp.read_to_end(&mut answer)).await;
        assert!(closed.is_ok(), "the server waits for ever");
        assert_eq!(server.refusal().await, Refusal::HandshakeTimeout);
    }
    // A whole handshake, then silence.
    let silent = RawClient::of(&ca, Some(ca.leaf(&[PAYMENTS], |_| {})));
    drop(silent.try_connect(&server).await);
    // An honest peer is served all the while.
    let client = MeshClient::new(server.connect(&ca.material(&[PAYMENTS])).await.unwrap());
    client.session("0.1.0").await.unwrap();
}

#[tokio::test]
async fn connections_above_the_limit_are_closed_at_once() {
    let ca = Ca::new("acme root");
    let options = AcceptOptions { max_connections: 1, ..AcceptOptions::default() };
    let server = Running::start(&ca.material(&[COORDINATOR]), Recorder::new(), options).await;
    let first = MeshClient::new(server.connect(&ca.material(&[PAYMENTS])).await.unwrap());
    first.session("0.1.0").await.unwrap();
    let refused = server.connect(&ca.material(&[PAYMENTS])).await.map(drop).unwrap_err();
    assert!(ClientError::Connect(refused.clone()).is_retryable(), "{refused:?}");
    assert_eq!(server.refusal().await, Refusal::Connections);
}
