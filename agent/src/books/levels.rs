//! Undeclared levels in the books: a threshold histogram, debited before it is told.

use std::collections::BTreeMap;

use tabmesh_privacy::ledger::{AccountKey, CommitRequest, Committed, Purpose};
use tabmesh_privacy::mechanism::threshold::{LEAST_DELTA, MOST_EPSILON, MOST_THRESHOLDS};
use tabmesh_privacy::mechanism::{MechanismKind, ThresholdHistogram};
use tabmesh_privacy::private::sha256;

use super::{Books, BooksError};
use crate::source::SourceError;

impl Books {
    /// Finds the levels of a column by a threshold histogram: a [`FoundLevels`](tabmesh_privacy::mechanism::FoundLevels) as JSON, debited
    /// before it is given. The same question again gets the stored answer; `counts` isn't asked then.
    ///
    /// # Errors
    /// [`BooksError`]; what is reserved and not spent is given back.
    pub fn levels(
        &mut self,
        column: &str,
        histogram: &ThresholdHistogram,
        counts: impl FnOnce() -> Result<BTreeMap<String, i64>, SourceError>,
        now_ms: i64,
    ) -> Result<Vec<u8>, BooksError> {
        let asked = format!("tabmesh levels v1\n{}\n{column}\n{:?}", self.product, histogram.event());
        let query_digest = sha256(asked.as_bytes());
        if let Some((stored, _)) = self.answered(&query_digest)? {
            return Ok(stored.into_inner());
        }
        let granted = self.ledger.state().account_of(&self.product);
        let used = granted.map_or(0, |(account, _)| self.thresholds(account));
        // Whatever is claimed of the account is claimed of what thresholds took as well, so every grant has to bear it.
        let grants = granted.into_iter().flat_map(|(_, account)| account.grants.values());
        for grant in grants {
            let (epsilon, delta) = (grant.epsilon.get(), grant.delta.get());
            if used >= MOST_THRESHOLDS || !pays_thresholds(epsilon, delta) {
                return Err(BooksError::Thresholds { product: grant.product.clone(), used, epsilon, delta });
            }
        }
        // Read before anything is reserved: a table that can't be read costs nothing.
        let counts = counts()?;
        let plan = tabmesh_store::Digest::from_bytes(query_digest).to_string();
        let reservation = match self.reserved(&plan, Purpose::Release) {
            Ok(open) => open,
            Err(_) => self.reserve(&plan, Purpose::Release, histogram.rho(), Vec::new(), now_ms)?,
        };
        let (_, mut stream) = self.next_noise(Purpose::Release)?;
        let payload = histogram.release(&counts, &mut stream);
        let request = CommitRequest { event: histogram.event(), step: 0, query_digest };
        let committed = self.store_and_commit(&reservation, request, payload, now_ms);
        // Whatever came of it, nothing more is asked under this reservation.
        self.close(&plan, now_ms)?;
        Ok(committed?.0.into_inner())
    }

    /// Threshold histograms that an account paid for.
    pub(super) fn thresholds(&self, account: &AccountKey) -> usize {
        let state = self.ledger.state();
        let of = |committed: &&Committed| {
            committed.entry.event.kind == MechanismKind::ThresholdHistogram
                && state.charged_to(committed) == Some(account)
        };
        state.commits.values().filter(of).count()
    }
}

/// Whether the surcharge of thresholds covers what they take of such a grant.
pub(super) fn pays_thresholds(epsilon: f64, delta: f64) -> bool {
    epsilon <= MOST_EPSILON && delta >= LEAST_DELTA
}
