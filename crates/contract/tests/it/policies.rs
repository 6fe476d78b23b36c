//! The default bundle rule by rule, missing keys, broken bundles, and what a peer sees of a refusal.

use serde_json::{Value, json};
use tabmesh_contract::contract::Purpose;
use tabmesh_contract::policy::{
    Aggregation, DEFAULT_LIMITS, DEFAULT_LIMITS_FILE, DEFAULT_RULES, DEFAULT_RULES_FILE, Decision,
    DecisionKind, LICENCES, LICENCES_FILE, MAX_BUNDLE_BYTES, MAX_BUNDLE_FILES, MODEL_RULES, MODEL_RULES_FILE,
    ModelImport, ModelPurpose, PolicyBundle, PolicyError, RefusalCode, Request, input,
};

use crate::{SHORT, parse, with};

const REQUEST: Request = Request {
    purpose: Purpose::CentralAggregate,
    epsilon: 3.0,
    delta: 1e-5,
    cohort: 3,
    aggregation: Aggregation::LocalNoise,
};

fn decide(kind: DecisionKind, text: &str, request: Request) -> Decision {
    PolicyBundle::default().decide_contract(kind, &parse(text).0, Some(&request))
}

fn rules(decision: &Decision) -> Vec<&str> {
    assert_eq!(decision.rules.len(), decision.reasons.len());
    assert_eq!(decision.allow, decision.rules.is_empty());
    decision.rules.iter().map(|r| r.as_str()).collect()
}

#[test]
fn the_documented_contract_is_allowed_at_the_default_grant() {
    let (contract, _) = parse(SHORT);
    let bundle = PolicyBundle::default();
    let registration = bundle.decide_contract(DecisionKind::Registration, &contract, None);
    assert!(registration.allow, "{:?}", registration.reasons);
    for kind in [DecisionKind::Release, DecisionKind::Training] {
        let decision = bundle.decide_contract(kind, &contract, Some(&REQUEST));
        assert!(decision.allow, "{:?}", decision.reasons);
        assert_eq!(decision.bundle_digest, bundle.digest());
        assert!(decision.codes().is_empty());
    }
}

#[test]
fn each_rule_refuses_by_name() {
    let pii = with("type: decimal, pii: false", "type: decimal, pii: true, role: feature");
    let cases = [
        ("pii_feature", pii, REQUEST),
        ("undeclared_range", with("    - numeric_range: {amount: [0, 1000000]}\n", ""), REQUEST),
        (
            "training_not_allowed",
            with("allow_training: true", "allow_training: false, allowed_purposes: [central_aggregate]"),
            REQUEST,
        ),
        (
            "purpose_not_allowed",
            with("allow_training: true", "allow_training: true, allowed_purposes: [local_only]"),
            REQUEST,
        ),
        ("epsilon_above_limit", with("sensitivity: low", "sensitivity: high"), REQUEST),
        ("epsilon_above_limit", SHORT.to_owned(), Request { epsilon: 8.1, ..REQUEST }),
        ("epsilon_above_limit", SHORT.to_owned(), Request { epsilon: 0.0, ..REQUEST }),
        ("delta_above_limit", SHORT.to_owned(), Request { delta: 1.1e-5, ..REQUEST }),
        (
            "delta_above_limit",
            with("max_rows_per_unit: 20", "max_rows_per_unit: 20, max_units: 10001"),
            REQUEST,
        ),
        ("cohort_below_minimum", SHORT.to_owned(), Request { cohort: 1, ..REQUEST }),
        (
            "cohort_below_minimum",
            SHORT.to_owned(),
            Request { aggregation: Aggregation::SecureAggregation, ..REQUEST },
        ),
        (
            "confidential_aggregates",
            with("max_rows_per_unit: 20", "max_rows_per_unit: 20, domain_aggregates: confidential"),
            REQUEST,
        ),
    ];
    for (rule, text, request) in cases {
        for kind in [DecisionKind::Release, DecisionKind::Training] {
            let decision = decide(kind, &text, request);
            assert_eq!(rules(&decision), [rule], "{kind:?} {request:?}: {:?}", decision.reasons);
            assert_eq!(decision.codes(), [RefusalCode::from_name(rule).unwrap()]);
        }
    }
}

#[test]
fn limits_hold_at_their_edge() {
    let confidential =
        with("max_rows_per_unit: 20", "max_rows_per_unit: 20, domain_aggregates: confidential");
    for (text, request) in [
        (SHORT.to_owned(), Request { epsilon: 8.0, ..REQUEST }),
        (with("sensitivity: low", "sensitivity: medium"), REQUEST),
        (with("sensitivity: low", "sensitivity: high"), Request { epsilon: 1.0, ..REQUEST }),
        (with("max_rows_per_unit: 20", "max_rows_per_unit: 20, max_units: 10000"), REQUEST),
        (SHORT.to_owned(), Request { cohort: 2, ..REQUEST }),
        (confidential, Request { cohort: 4, aggregation: Aggregation::SecureAggregation, ..REQUEST }),
    ] {
        let decision = decide(DecisionKind::Release, &text, request);
        assert!(decision.allow, "{request:?}: {:?}", decision.reasons);
    }
}

#[test]
fn reasons_say_names_and_numbers_and_codes_do_not() {
    let decision = decide(DecisionKind::Release, &with("sensitivity: low", "sensitivity: high"), REQUEST);
    assert_eq!(decision.reasons, ["epsilon 3 is above 1, the limit at sensitivity high"]);
    let log = decision.log_entry();
    assert_eq!(log["refusals"][0]["rule"], "epsilon_above_limit");
    assert_eq!(log["bundle_sha256"].as_str().unwrap().len(), 64);
    assert_eq!(serde_json::to_value(decision.codes()).unwrap(), json!(["epsilon_above_limit"]));
    let pii = with("type: decimal, pii: false", "type: decimal, pii: true, role: feature");
    let decision = decide(DecisionKind::Registration, &pii, REQUEST);
    assert!(decision.reasons[0].contains("amount"), "{:?}", decision.reasons);
}

/// A policy that compares with a limit that isn't there must not open.
#[test]
fn a_missing_key_anywhere_refuses() {
    let document = input(&parse(SHORT).0, Some(&REQUEST));
    let bundle = PolicyBundle::default();
    assert!(bundle.decide(DecisionKind::Release, &document).allow);
    for (path, rule) in [
        ("/contract/columns", "pii_feature"),
        ("/contract/columns/2/pii", "pii_feature"),
        ("/contract/columns/2/role", ""),
        ("/contract/columns/2/declared", "undeclared_range"),
        ("/contract/privacy/sensitivity", "epsilon_above_limit"),
        ("/contract/privacy/allow_training", "training_not_allowed"),
        ("/contract/privacy/allowed_purposes", "purpose_not_allowed"),
        ("/contract/privacy/domain_aggregates", "confidential_aggregates"),
        ("/request/purpose", "purpose_not_allowed"),
        ("/request/epsilon", "epsilon_above_limit"),
        ("/request/delta", "delta_above_limit"),
        ("/request/cohort", "cohort_below_minimum"),
        ("/request/aggregation", "cohort_below_minimum"),
        ("/request", "epsilon_above_limit"),
        ("/contract/privacy", "epsilon_above_limit"),
        ("/contract", "pii_feature"),
    ] {
        let mut without = document.clone();
        let (parent, key) = path.rsplit_once('/').unwrap();
        without.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(key).unwrap();
        let decision = bundle.decide(DecisionKind::Release, &without);
        let optional = rule.is_empty();
        assert!(optional || !decision.allow, "{path}");
        assert!(optional || rules(&decision).contains(&rule), "{path}: {:?}", decision.rules);
        for wrong in [Value::Null, json!("8"), json!(true), json!([]), json!({})] {
            let mut changed = document.clone();
            *changed.pointer_mut(path).unwrap() = wrong.clone();
            let decision = bundle.decide(DecisionKind::Release, &changed);
            let same = document.pointer(path) == Some(&wrong);
            assert!(same || optional || !decision.allow, "{path} = {wrong}");
        }
    }
    for nothing in [json!({}), json!([]), Value::Null, json!("x")] {
        for kind in [DecisionKind::Registration, DecisionKind::Release, DecisionKind::Training] {
            assert!(!bundle.decide(kind, &nothing).allow, "{kind:?} {nothing}");
        }
    }
}

#[test]
fn a_missing_limit_refuses() {
    let document = input(&parse(SHORT).0, Some(&REQUEST));
    for (pointer, rule) in [
        ("/limits/epsilon/low", "epsilon_above_limit"),
        ("/limits/epsilon", "epsilon_above_limit"),
        ("/limits/delta_factor", "delta_above_limit"),
        ("/limits/max_units_if_undeclared", "delta_above_limit"),
        ("/limits/cohort/local_noise", "cohort_below_minimum"),
        ("/limits", "epsilon_above_limit"),
    ] {
        let mut limits: Value = serde_json::from_str(DEFAULT_LIMITS).unwrap();
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        limits.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(key).unwrap();
        let limits = limits.to_string();
        let bundle =
            PolicyBundle::from_files(&[(DEFAULT_RULES_FILE, DEFAULT_RULES), (DEFAULT_LIMITS_FILE, &limits)])
                .unwrap();
        let decision = bundle.decide(DecisionKind::Release, &document);
        assert!(rules(&decision).contains(&rule), "{pointer}: {:?}", decision.rules);
        assert_ne!(bundle.digest(), PolicyBundle::default().digest());
    }
}

fn bundle(rego: &str) -> Result<PolicyBundle, PolicyError> {
    PolicyBundle::from_files(&[("own.rego", rego)])
}

const ALLOW_REST: &str = "
registration := {\"allow\": true, \"refusals\": []}
training := {\"allow\": true, \"refusals\": []}
";

#[test]
fn anything_but_a_derived_allow_refuses() {
    for (release, code) in [
        ("release := {\"allow\": true, \"refusals\": []} if input.never", RefusalCode::Undefined),
        ("release := {\"allow\": false}", RefusalCode::Undefined),
        ("release := true", RefusalCode::PolicyError),
        ("release := {\"allow\": \"yes\"}", RefusalCode::PolicyError),
        ("release := {\"refusals\": []}", RefusalCode::PolicyError),
        (
            "release := {\"allow\": true, \"refusals\": [{\"rule\": \"x\", \"reason\": \"y\"}]}",
            RefusalCode::PolicyError,
        ),
        ("release := {\"allow\": true, \"also\": 1}", RefusalCode::PolicyError),
        (
            "release := {\"allow\": false, \"refusals\": [{\"rule\": \"house_rule\", \"reason\": \"r\"}]}",
            RefusalCode::LocalRule,
        ),
    ] {
        let bundle = bundle(&format!("package tabmesh\nimport rego.v1\n{ALLOW_REST}{release}")).unwrap();
        let decision = bundle.decide(DecisionKind::Release, &json!({}));
        assert!(!decision.allow, "{release}");
        assert_eq!(decision.codes(), [code], "{release}: {:?}", decision.reasons);
        assert!(bundle.decide(DecisionKind::Training, &json!({})).allow);
    }
}

#[test]
fn an_error_while_deciding_refuses() {
    let rego = format!(
        "package tabmesh\nimport rego.v1\n{ALLOW_REST}
release := {{\"allow\": true, \"refusals\": []}} if input.x == 1
else := {{\"allow\": 1 / input.x == 1, \"refusals\": []}} if to_number(input.y) == 1
"
    );
    if let Ok(bundle) = bundle(&rego) {
        assert!(!bundle.decide(DecisionKind::Release, &json!({ "y": "not a number" })).allow);
    }
    let clash = format!(
        "package tabmesh\nimport rego.v1\n{ALLOW_REST}release := {{\"allow\": true}} if input.a\nrelease := {{\"allow\": false}} if input.b\n"
    );
    let decision = bundle(&clash).unwrap().decide(DecisionKind::Release, &json!({ "a": true, "b": true }));
    assert_eq!(decision.codes(), [RefusalCode::PolicyError], "{decision:?}");
}

#[test]
fn broken_bundles_are_refused_when_loaded() {
    assert!(matches!(bundle("package tabmesh\nregistration :="), Err(PolicyError::File { .. })));
    assert!(matches!(
        bundle("package tabmesh\nimport rego.v1\nrelease := {\"allow\": true}"),
        Err(PolicyError::Entry { entry: "data.tabmesh.registration", .. })
    ));
    let unknown = format!(
        "package tabmesh\nimport rego.v1\n{ALLOW_REST}release := http.send({{\"url\": \"http://x\"}})"
    );
    assert!(matches!(bundle(&unknown), Err(PolicyError::Entry { .. } | PolicyError::File { .. })));
    assert!(matches!(
        PolicyBundle::from_files(&[("rules.txt", "x")]),
        Err(PolicyError::Extension { file }) if file == "rules.txt"
    ));
    assert!(matches!(
        PolicyBundle::from_files(&[("limits.json", "{")]),
        Err(PolicyError::File { file, .. }) if file == "limits.json"
    ));
    assert!(matches!(PolicyBundle::from_files(&[]), Err(PolicyError::Size { files: 0, bytes: 0 })));
    let names: Vec<String> = (0..=MAX_BUNDLE_FILES).map(|i| format!("{i}.json")).collect();
    let many: Vec<(&str, &str)> = names.iter().map(|n| (n.as_str(), "{}")).collect();
    assert!(matches!(PolicyBundle::from_files(&many), Err(PolicyError::Size { files: 65, .. })));
    let large = format!("{{}}{}", " ".repeat(MAX_BUNDLE_BYTES - 1));
    assert!(matches!(PolicyBundle::from_files(&[("a.json", &large)]), Err(PolicyError::Size { .. })));
}

#[test]
fn the_digest_is_of_names_and_texts_in_any_order() {
    let one = [
        (DEFAULT_RULES_FILE, DEFAULT_RULES),
        (DEFAULT_LIMITS_FILE, DEFAULT_LIMITS),
        (MODEL_RULES_FILE, MODEL_RULES),
        (LICENCES_FILE, LICENCES),
    ];
    let mut two = one;
    two.reverse();
    let digest = PolicyBundle::from_files(&one).unwrap().digest();
    assert_eq!(digest, PolicyBundle::from_files(&two).unwrap().digest());
    assert_eq!(digest, PolicyBundle::default().digest());
}

#[test]
fn a_bundle_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<PolicyBundle>();
}

#[test]
fn models_come_in_by_licence_purpose_and_source() {
    let bundle = PolicyBundle::default();
    let import = ModelImport {
        digest: "00",
        licence: "CC-BY-NC-4.0",
        source: "https://example.org/weights",
        purpose: ModelPurpose::Research,
    };
    assert!(bundle.decide_model(&import).allow);
    let commercial = bundle.decide_model(&ModelImport { purpose: ModelPurpose::Commercial, ..import });
    assert_eq!(rules(&commercial), ["licence_forbids_purpose"]);
    assert_eq!(commercial.reasons, ["licence CC-BY-NC-4.0 does not permit purpose commercial"]);
    let free = ModelImport { licence: "BSD-3-Clause", purpose: ModelPurpose::Commercial, ..import };
    assert!(bundle.decide_model(&free).allow);
    let unknown = bundle.decide_model(&ModelImport { licence: "bsd", ..free });
    assert_eq!(rules(&unknown), ["licence_forbids_purpose", "licence_unknown"]);
    let unnamed = bundle.decide_model(&ModelImport { source: " ", ..free });
    assert_eq!(rules(&unnamed), ["source_undeclared"]);
    // Rules for models don't weaken the others, and a bundle without them brings in nothing.
    assert!(!bundle.decide(DecisionKind::Model, &json!({})).allow);
    let without = PolicyBundle::from_files(&[
        (DEFAULT_RULES_FILE, DEFAULT_RULES),
        (DEFAULT_LIMITS_FILE, DEFAULT_LIMITS),
    ]);
    assert!(without.is_ok_and(|bundle| !bundle.decide_model(&free).allow));
}
