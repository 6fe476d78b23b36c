//! What the endpoint tells a Prometheus scraper at `GET /metrics`: requests, latency, age of the model, privacy budget.
//!
//! Whoever may ask for predictions may scrape. Figures are about machines and the ledger; none depends on a row's values.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// The product's budget, as a scraper sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct BudgetFacts {
    /// The data product.
    pub product: String,
    /// ε granted over the lifetime.
    pub epsilon_granted: f64,
    /// ε of what is spent.
    pub epsilon_spent: f64,
    /// ε if everything reserved is spent too.
    pub epsilon_charged: f64,
    /// Share of ρ spent or reserved, 0 to 1.
    pub charged_ratio: f64,
    /// Share of the window's ρ spent within it or reserved, 0 to 1, where the grant sets a window.
    pub window_ratio: Option<f64>,
}

type Labels = Vec<(&'static str, String)>;
type Level = Gauge<f64, AtomicU64>;

/// The counters of one endpoint.
pub(super) struct Metrics {
    registry: Registry,
    requests: Family<Labels, Counter>,
    rows: Family<Labels, Counter>,
    seconds: Family<Labels, Histogram, fn() -> Histogram>,
    ready: Family<Labels, Gauge>,
    model_age: Family<Labels, Gauge>,
    contact_age: Level,
    epsilon: Family<Labels, Level>,
    charged: Family<Labels, Level>,
    window: Family<Labels, Level>,
}

/// A model at the time of a scrape.
pub(super) struct ModelFacts<'a> {
    pub(super) name: &'a str,
    /// Seconds since its version was published; nothing before the first.
    pub(super) age_s: Option<i64>,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let mut registry = Registry::with_prefix("tabmesh");
        let requests = Family::default();
        registry.register("predict_requests", "Prediction requests by HTTP status", requests.clone());
        let rows = Family::default();
        registry.register("predict_rows", "Rows predicted", rows.clone());
        let seconds = Family::new_with_constructor(latencies as fn() -> Histogram);
        let help = "Time from a request's head to its answer";
        registry.register_with_unit("predict_duration", help, Unit::Seconds, seconds.clone());
        let ready = Family::default();
        registry.register("model_ready", "Whether a version is in service", ready.clone());
        let model_age = Family::default();
        let help = "Time since the version in service was published";
        registry.register_with_unit("model_age", help, Unit::Seconds, model_age.clone());
        let contact_age = Level::default();
        let help = "Time since the coordinator was last heard from; -1 if never";
        registry.register_with_unit("coordinator_contact_age", help, Unit::Seconds, contact_age.clone());
        let epsilon = Family::default();
        registry.register("epsilon", "Privacy budget of the product, by state", epsilon.clone());
        let charged = Family::default();
        let help = "Share of the product's budget (rho) that is spent or reserved";
        registry.register("epsilon_spent_ratio", help, charged.clone());
        let window = Family::default();
        let help = "Share of the budget of the grant's window (rho) that is spent within it or reserved";
        registry.register("epsilon_window_ratio", help, window.clone());
        Self { registry, requests, rows, seconds, ready, model_age, contact_age, epsilon, charged, window }
    }

    /// Counts a request that was answered with a status after a time; `rows` if it was predicted.
    pub(super) fn answered(&self, model: &str, status: u16, rows: Option<usize>, took: Duration) {
        self.requests.get_or_create(&vec![("model", model.to_owned()), ("status", status.to_string())]).inc();
        if let Some(rows) = rows {
            let labels = vec![("model", model.to_owned())];
            self.rows.get_or_create(&labels).inc_by(rows as u64);
            self.seconds.get_or_create(&labels).observe(took.as_secs_f64());
        }
    }

    /// The text of a scrape.
    pub(super) fn text(
        &self,
        models: &[ModelFacts<'_>],
        contact_age_s: Option<i64>,
        budget: Option<&BudgetFacts>,
    ) -> String {
        for model in models {
            let labels = vec![("model", model.name.to_owned())];
            self.ready.get_or_create(&labels).set(i64::from(model.age_s.is_some()));
            if let Some(age) = model.age_s {
                self.model_age.get_or_create(&labels).set(age);
            }
        }
        self.contact_age.set(contact_age_s.map_or(-1.0, |age| age as f64));
        if let Some(budget) = budget {
            for (state, value) in [
                ("granted", budget.epsilon_granted),
                ("spent", budget.epsilon_spent),
                ("spent_or_reserved", budget.epsilon_charged),
            ] {
                let labels = vec![("product", budget.product.clone()), ("state", state.to_owned())];
                self.epsilon.get_or_create(&labels).set(value);
            }
            let product = vec![("product", budget.product.clone())];
            self.charged.get_or_create(&product).set(budget.charged_ratio);
            if let Some(ratio) = budget.window_ratio {
                self.window.get_or_create(&product).set(ratio);
            }
        }
        let mut text = String::new();
        // Writing to a string doesn't fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

/// From half a millisecond to sixteen seconds.
fn latencies() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 16))
}

/// What the text is.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_holds_what_happened() {
        let metrics = Metrics::new();
        metrics.answered("income", 200, Some(3), Duration::from_millis(4));
        metrics.answered("income", 200, Some(2), Duration::from_millis(400));
        metrics.answered("income", 400, None, Duration::from_millis(1));
        let budget = BudgetFacts {
            product: "a.orders".to_owned(),
            epsilon_granted: 3.0,
            epsilon_spent: 1.0,
            epsilon_charged: 2.0,
            charged_ratio: 0.5,
            window_ratio: Some(0.75),
        };
        let models = [
            ModelFacts { name: "income", age_s: Some(60) },
            ModelFacts { name: "income-student", age_s: None },
        ];
        let text = metrics.text(&models, Some(7), Some(&budget));
        for line in [
            "tabmesh_predict_requests_total{model=\"income\",status=\"200\"} 2",
            "tabmesh_predict_requests_total{model=\"income\",status=\"400\"} 1",
            "tabmesh_predict_rows_total{model=\"income\"} 5",
            "tabmesh_predict_duration_seconds_count{model=\"income\"} 2",
            "tabmesh_model_ready{model=\"income\"} 1",
            "tabmesh_model_ready{model=\"income-student\"} 0",
            "tabmesh_model_age_seconds{model=\"income\"} 60",
            "tabmesh_coordinator_contact_age_seconds 7.0",
            "tabmesh_epsilon{product=\"a.orders\",state=\"spent_or_reserved\"} 2.0",
            "tabmesh_epsilon_spent_ratio{product=\"a.orders\"} 0.5",
            "tabmesh_epsilon_window_ratio{product=\"a.orders\"} 0.75",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "no line {line:?} in\n{text}");
        }
    }
}
