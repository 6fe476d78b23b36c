//! Certificates made per test, a recording coordinator, and a running server.
//!
//! Certificates are named `identity-ca`: `payments_acme` is the payments agent signed by acme's CA.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType, IsCa,
    KeyIdMethod, KeyPair, KeyUsagePurpose, RevocationReason, RevokedCertParams, SanType, SerialNumber,
};
use rustls_pki_types::UnixTime;
use tabmesh_proto::{
    accept::{AcceptOptions, Refusal, incoming},
    connect::{ConnectError, CoordinatorAddress, Link, TcpDial, connect},
    identity::{DevelopmentCa, SpiffeId},
    message::{
        Admission, AgentFrame, AgentSummary, AuditStatus, BlobRequest, ContractRegistration,
        CoordinatorFrame, DocumentAnswer, Hello, Id, LedgerStatement, PlanEvent, PlanSummary, PlanValidation,
        Receipt, Submission, sha256,
    },
    server::{
        Answer, AuditorService, BoxStream, ChunkStream, InboundFrames, MeshService, OpenSession,
        OperatorService, Services, chunk_stream, serve,
    },
    status::WireError,
    tls::{ClientTls, ServerTls, TimeProvider, TlsMaterial, TlsPolicy},
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

pub const TRUST_DOMAIN: &str = "acme.example";

/// 2026-01-01T00:00:00Z in seconds: the moment all certificates of these tests are judged at.
pub const NOW_S: u64 = 1_767_225_600;

#[derive(Debug)]
pub struct FixedTime(pub u64);

impl TimeProvider for FixedTime {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.0)))
    }
}

pub fn policy() -> TlsPolicy {
    TlsPolicy { development: DevelopmentCa::Refuse, time: Arc::new(FixedTime(NOW_S)) }
}

/// A certificate authority.
pub struct Ca {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Ca {
    pub fn new(common_name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    pub fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A leaf with these URI names beside `localhost` and `127.0.0.1`; certificate and key as PEM.
    pub fn leaf(&self, uris: &[&str], edit: impl FnOnce(&mut CertificateParams)) -> (String, String) {
        let mut params = CertificateParams::new(vec!["localhost".into(), "127.0.0.1".into()]).unwrap();
        for uri in uris {
            params.subject_alt_names.push(SanType::URI((*uri).try_into().unwrap()));
        }
        edit(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    /// A revocation list over these serial numbers.
    pub fn revoke(&self, serials: &[u64]) -> Vec<u8> {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: rcgen::date_time_ymd(2025, 12, 1),
            reason_code: Some(RevocationReason::KeyCompromise),
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: rcgen::date_time_ymd(2025, 12, 1),
            next_update: rcgen::date_time_ymd(2026, 6, 1),
            crl_number: SerialNumber::from(1u64),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().pem().unwrap().into_bytes()
    }

    /// Material of a process that this CA certified and that trusts this CA.
    pub fn material(&self, uris: &[&str]) -> TlsMaterial {
        self.material_with(uris, |_| {}, &[])
    }

    pub fn material_with(
        &self,
        uris: &[&str],
        edit: impl FnOnce(&mut CertificateParams),
        crls: &[Vec<u8>],
    ) -> TlsMaterial {
        let (certificate, key) = self.leaf(uris, edit);
        TlsMaterial::from_pem(self.pem().as_bytes(), certificate.as_bytes(), key.as_bytes(), crls).unwrap()
    }
}

pub const COORDINATOR: &str = "spiffe://acme.example/tabmesh/coordinator";
pub const PAYMENTS: &str = "spiffe://acme.example/tabmesh/agent/payments/a1";
pub const OPERATOR: &str = "spiffe://acme.example/tabmesh/operator/ops";
pub const AUDITOR: &str = "spiffe://acme.example/tabmesh/auditor/risk";

/// What the coordinator of these tests saw.
#[derive(Debug, Clone, PartialEq)]
pub enum Seen {
    Hello(Hello),
    Frame(Result<AgentFrame, WireError>),
    SessionGone,
    Contract(ContractRegistration),
    Release(Submission),
    Update(Submission),
    Sum(DocumentAnswer),
    Witness(DocumentAnswer),
    Ledger(LedgerStatement),
    Plan(Vec<u8>),
}

/// Records every call that reached a handler, with its caller.
pub struct Recorder {
    pub seen: Mutex<Vec<(SpiffeId, Seen)>>,
    pub blob: Vec<u8>,
    /// Cuts each blob transfer after this many chunks.
    pub cut_after: Option<usize>,
    pub heartbeat_interval: Duration,
    pub to_agent: Mutex<Option<mpsc::Sender<CoordinatorFrame>>>,
}

impl Recorder {
    pub fn new() -> Self {
        Self {
            seen: Mutex::new(Vec::new()),
            blob: (0..700_000u32).map(|i| (i % 253) as u8).collect(),
            cut_after: None,
            heartbeat_interval: Duration::from_secs(5),
            to_agent: Mutex::new(None),
        }
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().iter().map(|(_, seen)| seen.clone()).collect()
    }

    /// Waits until something was seen.
    pub async fn wait_for(&self, what: &Seen) {
        for _ in 0..500 {
            if self.seen().contains(what) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("never seen: {what:?}, but {:?}", self.seen());
    }

    /// Says something in the newest session; dropping the returned sender ends it.
    pub fn to_agent(&self) -> mpsc::Sender<CoordinatorFrame> {
        self.to_agent.lock().unwrap().take().unwrap()
    }

    fn note(&self, peer: &SpiffeId, seen: Seen) {
        self.seen.lock().unwrap().push((peer.clone(), seen));
    }

    fn receipt(&self, digest: [u8; 32]) -> Receipt {
        Receipt { receipt_id: "r-1".parse().unwrap(), digest, accepted_ms: 5 }
    }

    fn plan(&self, yaml: &[u8]) -> PlanSummary {
        PlanSummary {
            plan_id: "p-1".parse().unwrap(),
            name: "churn".into(),
            phase: "release".into(),
            progress: 0.5,
            created_ms: 1,
            updated_ms: 2,
            document: yaml.to_vec(),
        }
    }
}

/// A recorder that the three services share.
pub struct Shared(pub Arc<Recorder>);

impl std::ops::Deref for Shared {
    type Target = Recorder;

    fn deref(&self) -> &Recorder {
        &self.0
    }
}

impl MeshService for Shared {
    async fn session(&self, peer: SpiffeId, hello: Hello, mut inbound: InboundFrames) -> Answer<OpenSession> {
        self.note(&peer, Seen::Hello(hello));
        let (sender, frames) = mpsc::channel(8);
        *self.to_agent.lock().unwrap() = Some(sender);
        let recorder = Arc::clone(&self.0);
        tokio::spawn(async move {
            while let Some(frame) = inbound.next().await {
                recorder.note(&peer, Seen::Frame(frame));
            }
            recorder.note(&peer, Seen::SessionGone);
        });
        Ok(OpenSession {
            session_id: "s-1".parse().unwrap(),
            heartbeat_interval: self.heartbeat_interval,
            frames: Box::pin(ReceiverStream::new(frames)),
        })
    }

    async fn register_contract(
        &self,
        peer: SpiffeId,
        registration: ContractRegistration,
    ) -> Answer<Admission> {
        registration.verify(&peer).map_err(|_| WireError::Signature)?;
        let contract_digest = registration.contract_digest();
        self.note(&peer, Seen::Contract(registration));
        Ok(Admission { admitted: true, refusals: vec![], contract_digest })
    }

    async fn submit_release(&self, peer: SpiffeId, submission: Submission) -> Answer<Receipt> {
        let digest = submission.payload_digest;
        self.note(&peer, Seen::Release(submission));
        Ok(self.receipt(digest))
    }

    async fn submit_update(&self, peer: SpiffeId, submission: Submission) -> Answer<Receipt> {
        self.note(&peer, Seen::Update(submission));
        Ok(self.receipt([0; 32]))
    }

    async fn answer_sum(&self, peer: SpiffeId, answer: DocumentAnswer) -> Answer<Receipt> {
        let digest = answer.digest;
        self.note(&peer, Seen::Sum(answer));
        Ok(self.receipt(digest))
    }

    async fn answer_witness(&self, peer: SpiffeId, answer: DocumentAnswer) -> Answer<Receipt> {
        let digest = answer.digest;
        self.note(&peer, Seen::Witness(answer));
        Ok(self.receipt(digest))
    }

    async fn mirror_ledger(&self, peer: SpiffeId, statement: LedgerStatement) -> Answer<Receipt> {
        let (_, head) = statement.head().ok_or(WireError::Malformed)?;
        self.note(&peer, Seen::Ledger(statement));
        Ok(self.receipt(head))
    }

    async fn fetch_blob(&self, _: SpiffeId, request: BlobRequest) -> Answer<ChunkStream> {
        if request.digest != sha256(&self.blob) {
            return Err(WireError::NotFound);
        }
        let recorder = Arc::clone(&self.0);
        let total = self.blob.len() as u64;
        let chunks = chunk_stream(total, request.offset, move |offset, length| {
            Ok(recorder.blob[offset as usize..][..length].to_vec())
        });
        match self.cut_after {
            Some(chunk) => Ok(Box::pin(chunks.take(chunk))),
            None => Ok(chunks),
        }
    }
}

impl OperatorService for Shared {
    async fn submit_plan(&self, peer: SpiffeId, yaml: Vec<u8>) -> Answer<PlanSummary> {
        let plan = self.plan(&yaml);
        self.note(&peer, Seen::Plan(yaml));
        Ok(plan)
    }

    async fn validate_plan(&self, _: SpiffeId, yaml: Vec<u8>) -> Answer<PlanValidation> {
        Ok(PlanValidation { valid: !yaml.is_empty(), findings: vec![] })
    }

    async fn plan_status(&self, _: SpiffeId, plan_id: Id) -> Answer<PlanSummary> {
        let plan = self.plan(b"{}");
        if plan.plan_id == plan_id { Ok(plan) } else { Err(WireError::NotFound) }
    }

    async fn watch_plan(&self, _: SpiffeId, _: Id, after_seq: u64) -> Answer<BoxStream<Answer<PlanEvent>>> {
        let event = |seq| PlanEvent {
            seq,
            time_ms: 1,
            phase: "release".into(),
            detail: "stage 1".into(),
            progress: seq as f64 / 4.0,
        };
        let past = tokio_stream::iter((after_seq + 1..=2).map(move |seq| Ok(event(seq))));
        Ok(Box::pin(past.chain(tokio_stream::pending())))
    }

    async fn cancel_plan(&self, _: SpiffeId, _: Id) -> Answer<PlanSummary> {
        Err(WireError::StalePlan)
    }

    async fn list_agents(&self, _: SpiffeId) -> Answer<Vec<AgentSummary>> {
        Ok(vec![AgentSummary {
            spiffe_id: PAYMENTS.parse().unwrap(),
            connected: true,
            product_version: "0.1.0".into(),
            last_seen_ms: 7,
            products: vec!["cards".into()],
        }])
    }

    async fn list_plans(&self, _: SpiffeId) -> Answer<Vec<PlanSummary>> {
        Ok(vec![self.plan(b"")])
    }
}

impl AuditorService for Shared {
    async fn report_input(&self, _: SpiffeId, product: Option<String>) -> Answer<ChunkStream> {
        let json = format!("{{\"product\":{product:?}}}").into_bytes();
        let total = json.len() as u64;
        Ok(chunk_stream(total, 0, move |offset, length| Ok(json[offset as usize..][..length].to_vec())))
    }

    async fn status(&self, _: SpiffeId) -> Answer<AuditStatus> {
        Ok(AuditStatus {
            coordinator_version: "0.1.0".into(),
            audit_entries: 3,
            audit_head: [9; 32],
            products: 1,
            plans: 1,
        })
    }
}

/// A server on a port of the system's choice.
pub struct Running {
    pub remote: SocketAddr,
    pub recorder: Arc<Recorder>,
    pub tls: Arc<ServerTls>,
    refusals: Arc<Mutex<Vec<Refusal>>>,
    stop: Option<oneshot::Sender<()>>,
    served: tokio::task::JoinHandle<()>,
}

impl Running {
    pub async fn start(material: &TlsMaterial, recorder: Recorder, options: AcceptOptions) -> Self {
        let tls = Arc::new(ServerTls::new(material, policy()).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let remote = listener.local_addr().unwrap();
        let refusals = Arc::new(Mutex::new(Vec::new()));
        let noted = Arc::clone(&refusals);
        let observer = move |_, refusal: &Refusal| noted.lock().unwrap().push(refusal.clone());
        let options = AcceptOptions { observer: Some(Arc::new(observer)), ..options };
        let connections = incoming(listener, &tls, options);
        let recorder = Arc::new(recorder);
        let service = Arc::new(Shared(Arc::clone(&recorder)));
        let services =
            Services { mesh: Arc::clone(&service), operator: Arc::clone(&service), auditor: service };
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(async move {
            serve(connections, services, async move { drop(stopped.await) }).await.unwrap();
        });
        Self { remote, recorder, tls, refusals, stop: Some(stop), served }
    }

    pub async fn of(ca: &Ca) -> Self {
        Self::start(&ca.material(&[COORDINATOR]), Recorder::new(), AcceptOptions::default()).await
    }

    pub async fn connect(&self, material: &TlsMaterial) -> Result<Link, ConnectError> {
        self.connect_with(&ClientTls::new(material, policy()).unwrap()).await
    }

    pub async fn connect_with(&self, tls: &ClientTls) -> Result<Link, ConnectError> {
        let coordinator = SpiffeId::coordinator(TRUST_DOMAIN).unwrap();
        let address = CoordinatorAddress::new(&self.remote.to_string(), coordinator).unwrap();
        connect(&address, tls, TcpDial).await
    }

    /// The first refusal of the front door.
    pub async fn refusal(&self) -> Refusal {
        for _ in 0..500 {
            if let Some(refusal) = self.refusals.lock().unwrap().first() {
                return refusal.clone();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("nothing was refused");
    }

    /// Asks the server to stop and waits until it has.
    pub async fn stop(mut self) {
        drop(self.stop.take());
        self.served.await.unwrap();
    }

    /// Asks the server to stop.
    pub fn begin_stop(&mut self) {
        drop(self.stop.take());
    }
}
