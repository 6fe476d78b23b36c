//! Budget alerts: says once, where the operator listens, that a share of the privacy budget is gone.
//!
//! A share counts as gone when it is spent or reserved, so an alert comes before the plan that uses it up, not after. Where the
//! grant limits the pace, the same shares of its window are watched, and said again once time has freed them. Each
//! crossing is a warning in the log and a line in `alerts.jsonl`, and is posted to the webhook of the configuration, if
//! there is one. What was said last lies in a file of its own: a restart repeats nothing and forgets nothing. An
//! alert holds figures of the ledger, nothing that depends on rows, and goes to the domain's own operator alone.

mod webhook;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use garde::Validate;
use serde::{Deserialize, Serialize};
use tabmesh_privacy::accountant::zcdp;
use tabmesh_privacy::budget::{Epsilon, Rho};
use tabmesh_privacy::ledger::Balance;
use tabmesh_privacy::ledger::window::{DAY_MS, Standing, Threshold, crossed};
use thiserror::Error;

pub use self::webhook::{Webhook, WebhookError};
use crate::files;

/// When and where the operator wants to hear of the budget.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Validate)]
#[serde(deny_unknown_fields, default)]
pub struct AlertSection {
    /// Shares of the budget in percent, spent or reserved, each 1 to 100; an empty list for no alerts.
    #[garde(length(max = MAX_THRESHOLDS), inner(range(min = 1, max = 100)))]
    pub percent: Vec<u8>,
    /// Where alerts are posted as JSON: `https://…`, or `http://` on loopback.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[garde(skip)]
    pub webhook: Option<String>,
    /// Certificates (PEM) that the webhook's server must chain to; required with `https`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[garde(skip)]
    pub webhook_ca: Option<PathBuf>,
}

impl Default for AlertSection {
    fn default() -> Self {
        Self { percent: vec![50, 80, 95], webhook: None, webhook_ca: None }
    }
}

/// Why alerts can't be set up or kept.
#[derive(Debug, Error)]
pub enum AlertError {
    /// The webhook of the configuration.
    #[error("alerts.webhook: {0}")]
    Webhook(#[from] WebhookError),
    /// A file of alerts.
    #[error("{path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system or the parser said.
        reason: String,
    },
}

/// A share of a product's budget is gone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Alert {
    /// When, in milliseconds since 1970, UTC.
    pub time_ms: i64,
    /// The data product.
    pub product: String,
    /// The share that was reached, in percent of ρ.
    pub percent: u8,
    /// Length of the window in days, where this is about the window of the grant; nothing where it is about the lifetime.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_days: Option<u64>,
    /// ε granted over the lifetime, or within the window.
    pub epsilon_granted: Epsilon,
    /// ε if everything spent there and reserved is used up.
    pub epsilon_charged: Option<Epsilon>,
    /// The δ of both.
    pub delta: f64,
    /// The same in a sentence.
    pub text: String,
}

/// What was said last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    charged: Rho,
}

/// The thresholds of one agent, and what it said so far.
pub struct Alerts {
    folder: PathBuf,
    thresholds: Vec<Threshold>,
    said: Mutex<Said>,
}

impl Alerts {
    /// Reads what was said before from `folder`.
    ///
    /// # Errors
    /// [`AlertError::File`] if the file is there and isn't one.
    pub fn open(folder: &Path, section: &AlertSection) -> Result<Self, AlertError> {
        let thresholds = section.percent.iter().filter_map(|&percent| Threshold::new(percent)).collect();
        let path = folder.join(SAID);
        let failed = |reason: String| AlertError::File { path: path.clone(), reason };
        let said = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| failed(error.to_string()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Said::default(),
            Err(error) => return Err(failed(error.to_string())),
        };
        Ok(Self { folder: folder.to_owned(), thresholds, said: Mutex::new(said) })
    }

    /// Whether this differs from what was looked at last.
    #[must_use]
    pub fn is_news(&self, charged: Rho) -> bool {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).charged != charged
    }

    /// What balance and window give cause to say, lowest share first; logged and durable when it returns.
    ///
    /// # Errors
    /// [`AlertError::File`] if it can't be written; then it is said again at the next change.
    pub fn notice(
        &self,
        balance: &Balance,
        window: Option<&Standing>,
        now_ms: i64,
    ) -> Result<Vec<Alert>, AlertError> {
        let most = Rho::from_units(u64::MAX);
        let charged = balance.spent.checked_add(balance.reserved).unwrap_or(most);
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.charged == charged {
            return Ok(Vec::new());
        }
        let crossed = crossed(&self.thresholds, said.charged, charged, balance.granted);
        let mut alerts: Vec<Alert> =
            crossed.into_iter().map(|share| alert(balance, None, share, now_ms)).collect();
        if let Some(window) = window {
            // What is new since then is all in the window, whatever has left it in the meantime.
            let new = charged.saturating_sub(said.charged);
            let before = window.charged().saturating_sub(new);
            let crossed = self::crossed(&self.thresholds, before, window.charged(), window.limit.rho);
            alerts.extend(crossed.into_iter().map(|share| alert(balance, Some(window), share, now_ms)));
        }
        let log = self.folder.join(LOG);
        for alert in &alerts {
            tracing::warn!(product = %alert.product, percent = alert.percent, "{}", alert.text);
            files::append_line(&log, alert)
                .map_err(|error| AlertError::File { path: log.clone(), reason: error.to_string() })?;
        }
        let now = Said { charged };
        let path = self.folder.join(SAID);
        serde_json::to_vec(&now)
            .map_err(|error| error.to_string())
            .and_then(|bytes| files::replace(&path, &bytes).map_err(|error| error.to_string()))
            .map_err(|reason| AlertError::File { path, reason })?;
        *said = now;
        Ok(alerts)
    }
}

fn alert(balance: &Balance, window: Option<&Standing>, share: Threshold, now_ms: i64) -> Alert {
    let delta = balance.grant.delta;
    let (granted, charged, days) = match window {
        None => (balance.grant.epsilon, balance.epsilon_charged, None),
        Some(window) => {
            let charged = window.charged();
            let epsilon = (charged > Rho::ZERO).then(|| zcdp::epsilon(charged, delta));
            (window.limit.epsilon, epsilon, Some(window.limit.length_ms.div_ceil(DAY_MS)))
        }
    };
    let of = days.map_or_else(String::new, |days| format!(" for {days} days"));
    let text = format!(
        "{} % of the privacy budget of {}{of} is spent or reserved: epsilon {:.3} of {granted} (delta {delta})",
        share.percent(),
        balance.product,
        charged.map_or(0.0, Epsilon::get),
    );
    Alert {
        time_ms: now_ms,
        product: balance.product.clone(),
        percent: share.percent(),
        window_days: days,
        epsilon_granted: granted,
        epsilon_charged: charged,
        delta: delta.get(),
        text,
    }
}

/// Most thresholds of a configuration.
pub const MAX_THRESHOLDS: usize = 20;
/// Every alert, a JSON line each.
const LOG: &str = "alerts.jsonl";
/// What was said last.
const SAID: &str = "alerts-said.json";

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use rand::SeedableRng;
    use rand_chacha::ChaCha20Rng;
    use tabmesh_privacy::budget::Delta;
    use tabmesh_privacy::ledger::window::standing;
    use tabmesh_privacy::ledger::{
        CommitRequest, GrantRequest, Ledger, MemoryJournal, Pace, PlanRequest, Purpose,
    };
    use tabmesh_privacy::mechanism::{DiscreteGaussian, EventShape, Noise};

    use super::*;

    fn ledger() -> Ledger<MemoryJournal> {
        paced(None)
    }

    fn paced(pace: Option<Pace>) -> Ledger<MemoryJournal> {
        let mut ledger = Ledger::open(MemoryJournal::default()).unwrap();
        let grant = GrantRequest {
            product: "a.orders".to_owned(),
            entity_namespace: "customers".to_owned(),
            lineage: "db.orders".to_owned(),
            unit: "row".to_owned(),
            epsilon: Epsilon::new(3.0).unwrap(),
            delta: Delta::new(1e-5).unwrap(),
            signer: "owner".to_owned(),
        };
        ledger.grant_at_pace(grant, pace, 1).unwrap();
        ledger
    }

    fn reserve(ledger: &mut Ledger<MemoryJournal>, plan: &str, percent: u64) {
        let granted = ledger.balance("a.orders").unwrap().granted.units();
        // Rounded up, so that the share is reached.
        let rho = Rho::from_units((granted * percent).div_ceil(100));
        let request = PlanRequest {
            plan_digest: plan.to_owned(),
            product: "a.orders".to_owned(),
            purpose: Purpose::Release,
            rho,
            approvals: Vec::new(),
            planned: Vec::new(),
        };
        ledger.reserve(request, 2).unwrap();
    }

    fn heard(alerts: &Alerts, ledger: &Ledger<MemoryJournal>) -> Vec<u8> {
        let said = alerts.notice(&ledger.balance("a.orders").unwrap(), None, 5).unwrap();
        said.iter().map(|alert| alert.percent).collect()
    }

    #[test]
    fn each_share_is_said_once_also_over_restarts() {
        let folder = tempfile::tempdir().unwrap();
        let section = AlertSection::default();
        let open = || Alerts::open(folder.path(), &section).unwrap();
        let mut ledger = ledger();
        assert_eq!(heard(&open(), &ledger), [0; 0]);
        reserve(&mut ledger, "one", 40);
        assert_eq!(heard(&open(), &ledger), [0; 0]);
        reserve(&mut ledger, "two", 45);
        // A process that ended before it could speak speaks when it starts.
        let alerts = open();
        assert_eq!(heard(&alerts, &ledger), [50, 80]);
        assert_eq!(heard(&alerts, &ledger), [0; 0]);
        assert_eq!(heard(&open(), &ledger), [0; 0]);
        reserve(&mut ledger, "three", 12);
        assert_eq!(heard(&open(), &ledger), [95]);
        let lines = std::fs::read_to_string(folder.path().join(LOG)).unwrap();
        let last: Alert = serde_json::from_str(lines.lines().last().unwrap()).unwrap();
        assert_eq!((lines.lines().count(), last.percent), (3, 95));
        assert!(last.text.contains("95 %") && last.text.contains("a.orders"), "{}", last.text);
    }

    #[test]
    fn what_is_refunded_and_spent_again_is_said_again() {
        let folder = tempfile::tempdir().unwrap();
        let alerts = Alerts::open(folder.path(), &AlertSection::default()).unwrap();
        let mut ledger = ledger();
        reserve(&mut ledger, "one", 60);
        assert_eq!(heard(&alerts, &ledger), [50]);
        let open = ledger.find_reservation("one", "a.orders", Purpose::Release).unwrap();
        ledger.close(&open, 3).unwrap();
        assert_eq!(heard(&alerts, &ledger), [0; 0]);
        reserve(&mut ledger, "two", 60);
        assert_eq!(heard(&alerts, &ledger), [50]);
    }

    /// Two plans of two quarters: each takes most of its quarter, neither half of the lifetime; the agent slept in between.
    #[test]
    fn shares_of_a_window_are_said_and_said_again_when_time_has_freed_them() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Alerts::open(folder.path(), &AlertSection::default()).unwrap();
        let pace = Pace { length_ms: 91 * DAY_MS, epsilon: Epsilon::new(1.0).unwrap() };
        let mut ledger = paced(Some(pace));
        let said = |ledger: &Ledger<MemoryJournal>, now_ms: i64| -> Vec<(u8, Option<u64>)> {
            let window = standing(ledger.state(), "a.orders", now_ms).unwrap();
            let balance = ledger.balance("a.orders").unwrap();
            let said = open().notice(&balance, Some(&window), now_ms).unwrap();
            said.iter().map(|alert| (alert.percent, alert.window_days)).collect()
        };
        let limit = standing(ledger.state(), "a.orders", 1).unwrap().limit.rho;
        let share = limit.units() as f64 / ledger.balance("a.orders").unwrap().granted.units() as f64;
        assert!(share < 0.2, "{share}");
        let day = i64::try_from(DAY_MS).unwrap();
        for (query, quarter) in [(1, 0), (2, 2)] {
            let now_ms = 10 + quarter * 91 * day;
            let mut reserve = |name: &str, units: u64| {
                let plan = PlanRequest {
                    plan_digest: format!("{name}{query}"),
                    product: "a.orders".to_owned(),
                    purpose: Purpose::Release,
                    rho: Rho::from_units(units),
                    approvals: Vec::new(),
                    planned: Vec::new(),
                };
                ledger.reserve(plan, now_ms).unwrap()
            };
            let most = reserve("most", limit.units() * 85 / 100);
            let expected: &[_] = &[(50, Some(91)), (80, Some(91))];
            assert_eq!(said(&ledger, now_ms), expected, "quarter {quarter}");
            assert_eq!(said(&ledger, now_ms + day), []);
            // Spent, so that it leaves the window by time alone.
            let mechanism =
                DiscreteGaussian::from_rho(1 << 20, Rho::from_units(limit.units() * 84 / 100)).unwrap();
            let shape = EventShape { rows_per_unit: 1, marginals: 1, dimension: 1 };
            let event = mechanism.event(shape);
            let request = CommitRequest { event, step: 1, query_digest: [query; 32] };
            let noised = mechanism.privatize(&[1], &mut ChaCha20Rng::seed_from_u64(query.into())).encode();
            ledger.commit(&most, request, &noised, now_ms).unwrap();
            ledger.close(&most, now_ms).unwrap();
            assert_eq!(said(&ledger, now_ms + day), []);
        }
        let lines = std::fs::read_to_string(folder.path().join(LOG)).unwrap();
        assert!(lines.lines().count() == 4 && lines.contains("of a.orders for 91 days is"), "{lines}");
    }

    #[test]
    fn a_damaged_memory_is_named_and_no_thresholds_are_no_alerts() {
        let folder = tempfile::tempdir().unwrap();
        let none = AlertSection { percent: Vec::new(), ..AlertSection::default() };
        let mut ledger = ledger();
        reserve(&mut ledger, "one", 100);
        assert_eq!(heard(&Alerts::open(folder.path(), &none).unwrap(), &ledger), [0; 0]);
        std::fs::write(folder.path().join(SAID), b"{\"charged\":").unwrap();
        assert!(matches!(Alerts::open(folder.path(), &none), Err(AlertError::File { .. })));
    }

    #[test]
    fn limits_of_the_section_hold_at_one_above() {
        let valid = |percent: Vec<u8>| AlertSection { percent, ..AlertSection::default() }.validate().is_ok();
        assert!(valid(vec![1, 100]) && valid(vec![50; MAX_THRESHOLDS]) && valid(Vec::new()));
        assert!(!valid(vec![0]) && !valid(vec![101]) && !valid(vec![50; MAX_THRESHOLDS + 1]));
    }
}
