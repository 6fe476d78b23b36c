//! Posting an alert to the operator's webhook: HTTP/1.1, over TLS beyond loopback.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{Request, Uri, header};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore, crypto::ring::default_provider};
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::Alert;

/// Why a webhook can't be used, or an alert isn't taken.
#[derive(Debug, Error)]
pub enum WebhookError {
    /// The address isn't one.
    #[error("{url:?}: {reason}")]
    Address {
        /// The address as configured.
        url: String,
        /// What is expected.
        reason: &'static str,
    },
    /// The certificates can't be read.
    #[error("certificates {path}: {reason}")]
    Certificates {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The server can't be reached or spoken to.
    #[error("{host}: {reason}")]
    Transport {
        /// Host and port.
        host: String,
        /// What went wrong.
        reason: String,
    },
    /// The server doesn't take it.
    #[error("{host} answered {status}")]
    Status {
        /// Host and port.
        host: String,
        /// HTTP status.
        status: u16,
    },
}

/// Where alerts are posted.
#[derive(Clone)]
pub struct Webhook {
    uri: Uri,
    host: String,
    port: u16,
    tls: Option<TlsConnector>,
}

impl Webhook {
    /// Reads the address and, for `https`, the certificates that its server must chain to.
    ///
    /// # Errors
    /// [`WebhookError::Address`] for another scheme, a missing host, `http` beyond loopback or `https` without
    /// certificates; [`WebhookError::Certificates`].
    pub fn new(url: &str, ca: Option<&Path>) -> Result<Self, WebhookError> {
        let refused = |reason| WebhookError::Address { url: url.to_owned(), reason };
        let uri: Uri = url.parse().map_err(|_| refused("not a URL"))?;
        let host = uri.host().ok_or_else(|| refused("expected a host"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let (tls, default_port) = match (uri.scheme_str(), ca) {
            (Some("https"), Some(ca)) => (Some(connector(ca)?), 443),
            (Some("https"), None) => return Err(refused("https needs webhook_ca")),
            (Some("http"), _) if is_loopback(&host) => (None, 80),
            (Some("http"), _) => return Err(refused("beyond loopback expected https")),
            _ => return Err(refused("expected http or https")),
        };
        let port = uri.port_u16().unwrap_or(default_port);
        Ok(Self { uri, host, port, tls })
    }

    /// Posts an alert, again after a pause while the server doesn't take it.
    ///
    /// # Errors
    /// The last [`WebhookError`]; the alert is in the log all the same.
    pub async fn post(&self, alert: &Alert) -> Result<(), WebhookError> {
        let mut last = self.once(alert).await;
        for pause in PAUSES {
            if last.is_ok() {
                break;
            }
            tokio::time::sleep(pause).await;
            last = self.once(alert).await;
        }
        last
    }

    async fn once(&self, alert: &Alert) -> Result<(), WebhookError> {
        let exchange = async {
            let tcp = TcpStream::connect((self.host.as_str(), self.port)).await;
            let tcp = tcp.map_err(|error| self.transport(&error))?;
            match &self.tls {
                None => self.exchange(tcp, alert).await,
                Some(connector) => {
                    let name = ServerName::try_from(self.host.clone()).map_err(|e| self.transport(&e))?;
                    let stream = connector.connect(name, tcp).await.map_err(|e| self.transport(&e))?;
                    self.exchange(stream, alert).await
                }
            }
        };
        let timely = tokio::time::timeout(PATIENCE, exchange).await;
        timely.unwrap_or_else(|error| Err(self.transport(&error)))
    }

    async fn exchange<S>(&self, stream: S, alert: &Alert) -> Result<(), WebhookError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let body = serde_json::to_vec(alert).map_err(|error| self.transport(&error))?;
        let path = self.uri.path_and_query().map_or("/", |path| path.as_str());
        let request = Request::post(path)
            .header(header::HOST, self.authority())
            .header(header::CONTENT_TYPE, "application/json")
            .body(Body::from(body))
            .map_err(|error| self.transport(&error))?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.transport(&error))?;
        let driver = tokio::spawn(connection);
        let answered = sender.send_request(request).await.map_err(|error| self.transport(&error));
        driver.abort();
        let status = answered?.status();
        if status.is_success() {
            Ok(())
        } else {
            Err(WebhookError::Status { host: self.authority(), status: status.as_u16() })
        }
    }

    /// Host and port as configured, without user and password, which have no place in a log.
    fn authority(&self) -> String {
        let host = self.uri.host().unwrap_or_default();
        self.uri.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
    }

    fn transport(&self, error: &dyn std::fmt::Display) -> WebhookError {
        WebhookError::Transport { host: self.authority(), reason: error.to_string() }
    }
}

fn connector(ca: &Path) -> Result<TlsConnector, WebhookError> {
    let refused = |reason: String| WebhookError::Certificates { path: ca.display().to_string(), reason };
    let mut roots = RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(ca).map_err(|error| refused(error.to_string()))?;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| refused(error.to_string()))?;
        roots.add(certificate).map_err(|error| refused(error.to_string()))?;
    }
    if roots.is_empty() {
        return Err(refused("no certificate in it".to_owned()));
    }
    let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| refused(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(TlsConnector::from(Arc::new(config)))
}

fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Longest time for one try.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pauses between tries.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(10)];

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::sync::Mutex;

    use axum::{Router, http::StatusCode, routing::post};
    use tabmesh_privacy::budget::Epsilon;
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    use super::*;

    fn alert() -> Alert {
        Alert {
            time_ms: 1,
            product: "a.orders".to_owned(),
            percent: 80,
            window_days: None,
            epsilon_granted: Epsilon::new(3.0).unwrap(),
            epsilon_charged: None,
            delta: 1e-5,
            text: "words".to_owned(),
        }
    }

    /// A server that keeps what is posted to `/hook`, and refuses the first so many.
    async fn hook(refusals: usize) -> (std::net::SocketAddr, Arc<Mutex<Vec<Alert>>>) {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let left = Arc::new(Mutex::new(refusals));
        let keep = {
            let heard = Arc::clone(&heard);
            async move |body: axum::Json<Alert>| {
                let mut left = left.lock().unwrap();
                if *left > 0 {
                    *left -= 1;
                    return StatusCode::SERVICE_UNAVAILABLE;
                }
                heard.lock().unwrap().push(body.0);
                StatusCode::NO_CONTENT
            }
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let routes = Router::new().route("/hook", post(keep));
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let service = hyper_util::service::TowerToHyperService::new(routes.clone());
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        (address, heard)
    }

    #[tokio::test]
    async fn an_alert_arrives_and_a_refusal_is_tried_again() {
        for refusals in [0, 1] {
            let (address, heard) = hook(refusals).await;
            let webhook = Webhook::new(&format!("http://{address}/hook"), None).unwrap();
            webhook.post(&alert()).await.unwrap();
            assert_eq!(*heard.lock().unwrap(), [alert()]);
        }
        let (address, _) = hook(0).await;
        let nowhere = Webhook::new(&format!("http://{address}/other"), None).unwrap();
        let refused = nowhere.once(&alert()).await;
        assert!(matches!(refused, Err(WebhookError::Status { status: 404, .. })), "{refused:?}");
    }

    #[tokio::test]
    async fn tls_is_spoken_with_the_configured_authority_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let own = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let foreign = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let (trusted, other) = (folder.path().join("ca.pem"), folder.path().join("other.pem"));
        std::fs::write(&trusted, own.cert.pem()).unwrap();
        std::fs::write(&other, foreign.cert.pem()).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(own.signing_key.serialize_der()).unwrap();
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![own.cert.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let Ok(stream) = acceptor.accept(stream).await else { continue };
                let routes = Router::new().route("/", post(async || StatusCode::OK));
                let service = hyper_util::service::TowerToHyperService::new(routes);
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        let url = format!("https://localhost:{port}");
        Webhook::new(&url, Some(&trusted)).unwrap().once(&alert()).await.unwrap();
        let refused = Webhook::new(&url, Some(&other)).unwrap().once(&alert()).await;
        assert!(matches!(refused, Err(WebhookError::Transport { .. })), "{refused:?}");
    }

    #[test]
    fn addresses_are_checked_when_the_agent_starts() {
        let refused = |url: &str, word: &str| {
            let error = Webhook::new(url, None).err().unwrap().to_string();
            assert!(error.contains(word), "{error}");
        };
        refused("http://hooks.example/x", "https");
        refused("https://hooks.example/x", "webhook_ca");
        refused("ftp://127.0.0.1/", "http or https");
        refused("/hook", "host");
        assert!(Webhook::new("http://[::1]:9000/hook", None).is_ok());
        let missing = Webhook::new("https://hooks.example", Some(Path::new("no-such.pem")));
        assert!(matches!(missing, Err(WebhookError::Certificates { .. })));
    }
}
