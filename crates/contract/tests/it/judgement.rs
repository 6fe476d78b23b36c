//! Quality rules and service levels, judged on a profile of a few rows.

use tabmesh_contract::contract::Contract;
use tabmesh_contract::profile::{Cell, TableProfile};
use tabmesh_contract::quality::{self, Measure, Metric, Must, Severity, Unit, Verdict};
use tabmesh_contract::slo::{self, Objective};

use crate::parse;

fn contract(quality: &str) -> Contract {
    let text = format!(
        "apiVersion: v3.1.0
kind: DataContract
id: a.b
version: 1.0.0
status: active
schema:
  - name: b
    properties:
      - name: x
        logicalType: number
        required: true
        customProperties: [{{property: tfmRange, value: [0, 10]}}]
        quality: [{quality}]
      - {{name: k, logicalType: string, unique: true}}
      - {{name: at, logicalType: timestamp, customProperties: [{{property: tfmRole, value: time}}]}}
slaProperties: [{{property: latency, value: 2, unit: h}}]
customProperties:
  - {{property: tfmSensitivity, value: low}}
  - {{property: tfmRowCompleteness, value: 0.75}}
"
    );
    parse(&text).0
}

/// Four rows: x = 1, 11, null, 1; k = a, b, b, N/A; newest at 10 h.
fn profile(contract: &Contract) -> TableProfile {
    let mut profile = TableProfile::new(contract);
    let hour = 3_600_000;
    profile.push_row(&[Cell::Number(1.0), Cell::Text("a"), Cell::TimeMs(9 * hour)]);
    profile.push_row(&[Cell::Number(11.0), Cell::Text("b"), Cell::TimeMs(10 * hour)]);
    profile.push_row(&[Cell::Null, Cell::Text("b"), Cell::Null]);
    profile.push_row(&[Cell::Number(1.0), Cell::Text("N/A"), Cell::TimeMs(3 * hour)]);
    profile
}

#[test]
fn declarations_imply_rules() {
    let contract = contract("");
    let implied: Vec<(&str, Metric, Severity)> = contract
        .quality
        .iter()
        .map(|rule| {
            let Measure::Library { metric, unit: Unit::Rows, must: Must::Be(_), .. } = rule.measure else {
                panic!()
            };
            (rule.column.as_deref().unwrap(), metric, rule.severity)
        })
        .collect();
    assert_eq!(
        implied,
        [
            ("x", Metric::NullValues, Severity::Error),
            ("x", Metric::InvalidValues, Severity::Error),
            ("k", Metric::DuplicateValues, Severity::Error),
        ]
    );
    let outcomes = quality::judge(&contract.quality, &profile(&contract));
    let measured: Vec<Option<f64>> = outcomes.iter().map(|o| o.measured).collect();
    assert_eq!(measured, [Some(1.0), Some(1.0), Some(1.0)]);
    assert!(outcomes.iter().all(|o| o.verdict == Verdict::Failed));
}

#[test]
fn every_metric_and_operator_is_judged() {
    for (entry, measured, passed) in [
        ("{metric: nullValues, mustBe: 1}", 1.0, true),
        ("{metric: nullValues, mustNotBe: 1}", 1.0, false),
        ("{metric: nullValues, unit: percent, mustBeLessOrEqualTo: 25}", 25.0, true),
        ("{metric: nullValues, unit: percent, mustBeLessThan: 25}", 25.0, false),
        ("{metric: missingValues, mustBeGreaterThan: 0}", 1.0, true),
        ("{metric: invalidValues, mustBeBetween: [1, 2]}", 1.0, true),
        ("{metric: invalidValues, mustNotBeBetween: [1, 2]}", 1.0, false),
        ("{metric: duplicateValues, mustBeGreaterOrEqualTo: 1}", 1.0, true),
        ("{metric: rowCount, mustBeGreaterThan: 4}", 4.0, false),
        ("{rule: rowCount, mustBe: 4}", 4.0, true),
    ] {
        let contract = contract(entry);
        let profile = profile(&contract);
        let outcomes: Vec<_> = quality::judge(&contract.quality, &profile);
        let outcome = &outcomes[2];
        assert_eq!(outcome.measured.map(f64::to_bits), Some(f64::to_bits(measured)), "{entry}");
        assert_eq!(outcome.verdict == Verdict::Passed, passed, "{entry}");
    }
}

#[test]
fn other_engines_are_skipped_and_never_passed() {
    for entry in [
        "{type: sql, query: 'select 1', mustBe: 1}",
        "{type: custom, engine: soda, implementation: 'x'}",
        "{type: text, description: complete}",
        "{metric: invalidValues, arguments: {pattern: '^a'}, mustBe: 0}",
    ] {
        let contract = contract(entry);
        let outcomes = quality::judge(&contract.quality, &profile(&contract));
        assert!(matches!(outcomes[2].verdict, Verdict::Skipped(_)), "{entry}: {:?}", outcomes[2]);
    }
}

#[test]
fn unclear_rules_are_refused_with_a_place() {
    for entry in [
        "{metric: nulls, mustBe: 0}",
        "{metric: nullValues}",
        "{metric: nullValues, mustBe: 0, mustNotBe: 1}",
        "{metric: nullValues, mustBe: zero}",
        "{metric: nullValues, unit: kilograms, mustBe: 0}",
    ] {
        let text = "apiVersion: v3.1.0\nkind: DataContract\nid: a.b\nversion: 1.0.0\nschema:\n  - name: b\n    properties:\n      - {name: x, logicalType: number}\n    quality:\n      - ENTRY\ncustomProperties: [{property: tfmSensitivity, value: low}]\n";
        let error = Contract::parse("contract.yaml", &text.replace("ENTRY", entry)).expect_err(entry);
        assert_eq!(error.place().map(|p| p.line()), Some(10), "{error}");
    }
}

#[test]
fn service_levels_are_judged_against_the_clock() {
    let contract = contract("");
    let profile = profile(&contract);
    let hour = 3_600_000;
    let at = |now| {
        let outcomes = slo::judge(&contract.slo, &profile, now);
        assert_eq!(
            outcomes.iter().map(|o| o.objective).collect::<Vec<_>>(),
            [Objective::Freshness, Objective::RowCompleteness]
        );
        assert_eq!(outcomes[1].verdict, Verdict::Passed, "3 of 4 rows are complete");
        outcomes[0].verdict.clone()
    };
    assert_eq!(at(12 * hour), Verdict::Passed);
    assert_eq!(at(12 * hour + 1), Verdict::Failed);
    assert_eq!(at(0), Verdict::Passed, "a clock behind the data sees age 0");
    let empty = TableProfile::new(&contract);
    assert!(
        slo::judge(&contract.slo, &empty, 0)
            .iter()
            .all(|o| matches!(o.verdict, Verdict::Skipped(_)) && o.measured.is_none())
    );
}
