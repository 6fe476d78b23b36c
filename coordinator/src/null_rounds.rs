//! Rounds of a zero adapter without a plan's release and corpus: what measures the exchange itself.
//!
//! Descriptors, outbox, collections, aggregation and the server's step are those of every plan; only what a round is
//! about is missing. No plan of an operator comes here.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tabmesh_federation::descriptor::RoundInputs;
use tabmesh_federation::id::{AgentId, Digest as NamedDigest, PlanDigest, RoundId};
use tabmesh_federation::plan::Plan;
use tabmesh_proto::accept::Listener;
use tabmesh_proto::tls::ServerTls;
use tabmesh_tfm::adapter::{Kind, Layout};

use crate::config::Config;
use crate::error::CoordinatorError;
use crate::mesh::{Mesh, stored};
use crate::pipeline::rounds::{AdapterState, RoundEnd, announce, collect, finish, read};
use crate::pipeline::{agent_id, collection_id};
use crate::{Surroundings, Switches, answer, open, server_tls};

/// A coordinator that runs such rounds with whoever is connected.
pub struct NullRounds {
    mesh: Arc<Mesh>,
    tls: Arc<ServerTls>,
    plan: Plan,
    digest: PlanDigest,
    state: AdapterState,
    last: Option<RoundId>,
}

impl NullRounds {
    /// Opens the coordinator; the plan gives the number of rounds, their cost and their deadline, `len` the number of
    /// values of an update.
    ///
    /// # Errors
    /// [`CoordinatorError`] if files of the configuration can't be used or the plan isn't one.
    pub fn open(
        config: Config,
        switches: Switches,
        surroundings: Surroundings,
        plan: &[u8],
        len: usize,
    ) -> Result<Self, CoordinatorError> {
        let tls = Arc::new(server_tls(&config, switches)?);
        let mesh = Arc::new(open(config, switches, surroundings, tls.id().clone())?);
        let (plan, digest) =
            Plan::parse(plan, "plan").map_err(|error| CoordinatorError::Step(error.to_string()))?;
        let layout = Layout { kind: Kind::FeatureTokens, keys: vec!["null".to_owned()], width: len };
        let state = AdapterState::initial(layout, &vec![0.0; len], 1.0, &plan);
        Ok(Self { mesh, tls, plan, digest, state, last: None })
    }

    /// Answers agents until `shutdown`; to be polled beside [`Self::round`].
    pub fn answering<L: Listener, F: Future<Output = ()> + Send + 'static>(
        &self,
        listener: L,
        shutdown: F,
    ) -> impl Future<Output = Result<(), CoordinatorError>> + Send + use<L, F> {
        let (mesh, tls) = (Arc::clone(&self.mesh), Arc::clone(&self.tls));
        async move { answer(mesh, &tls, listener, shutdown).await }
    }

    /// Waits until `agents` agents are connected and gives them.
    ///
    /// # Errors
    /// [`CoordinatorError`] if an agent has no usable name.
    pub async fn connected(&self, agents: usize) -> Result<BTreeSet<AgentId>, CoordinatorError> {
        loop {
            let admitted = self.mesh.catalog.all();
            let connected = admitted.iter().filter(|(agent, _)| self.mesh.outbox.facts(agent).connected);
            let roster = connected.map(|(agent, _)| agent_id(agent)).collect::<Result<BTreeSet<_>, _>>()?;
            if roster.len() >= agents {
                return Ok(roster);
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Runs one round: asked, collected durably from the whole roster, aggregated, stepped.
    ///
    /// # Errors
    /// [`CoordinatorError`] if the round is abandoned or something breaks.
    pub async fn round(&mut self, index: u32, roster: &BTreeSet<AgentId>) -> Result<(), CoordinatorError> {
        let nothing = NamedDigest::of(b"null round");
        let inputs = RoundInputs {
            id: collection_id(&self.mesh, self.last),
            index,
            attempt: 1,
            base: nothing,
            context: nothing,
            preprocessing: nothing,
            adapter_keys: self.state.keys.clone(),
            width: u32::try_from(self.state.width).unwrap_or(u32::MAX),
            adapter_values: self.state.values.iter().map(|v| *v as f32).collect(),
            clip_norm: self.state.clip_norm,
            roster: roster.clone(),
            opened_ms: self.mesh.now_ms(),
            noisy_total: UNITS * roster.len() as f64,
            noisy_total_sd: 0.0,
        };
        let round = announce(&self.mesh, inputs, &self.plan, self.digest)?;
        let descriptor = collect(&self.mesh, round, roster).await?;
        let totals = roster.iter().map(|agent| (agent.clone(), UNITS)).collect();
        let after = match finish(&self.mesh, &self.plan, totals, &descriptor, &self.state, round) {
            Ok(after) => after,
            Err(RoundEnd::Abandoned(cause)) => return Err(CoordinatorError::Step(cause.to_string())),
            Err(RoundEnd::Failed(error)) => return Err(error),
        };
        self.mesh.collections.close(round);
        self.mesh.collections.discard(round)?;
        self.state = read(&self.mesh, stored(after))?;
        self.last = Some(round);
        Ok(())
    }
}

/// Units each agent stands for.
const UNITS: f64 = 1000.0;
/// Pause between two looks at who is connected.
const POLL: Duration = Duration::from_millis(2);
