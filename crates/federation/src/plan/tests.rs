//! Plans that parse, and every fault with its place.

#![allow(clippy::unwrap_used, clippy::float_cmp, reason = "tests; exact equality is meant where it stands")]

use tabmesh_privacy::budget::Rho;

use super::*;

const MINIMAL: &str = "kind: TabmeshPlan\nname: income\ntarget: person.income_over_50k\n";

/// Every field, with its default written out.
const FULL: &str = "\
kind: TabmeshPlan
name: income
target: person.income_over_50k
cohort: {min_agents: 3, max_agents: 64, tags: []}
privacy: {epsilon: 3.0, delta: 1.0e-5, release_share: 0.5, noise_placement: local}
release:
  deadline_s: 60
  grace_s: 10
  fine_bins: 128
  bins: 8
  coarse_bins: 5
  max_levels: 24
  parents: 1
  shares: {one_way: 0.1, label_pairs: 0.2, structure: 0.2, tree: 0.5}
corpus: {rows: 12000}
pretrain: {steps: 300, tables_per_step: 4, learning_rate: 5.0e-4, prior_replay: 0.25}
rounds:
  count: 20
  deadline_s: 60
  grace_s: 10
  clip_norm: auto
  optimiser: {kind: sgd, learning_rate: 4.0, momentum: 0.9}
  aggregation: fedsgd
  trim: 0.1
  adapter: {kind: forest, trees: 4, depth: 4}
  context_rows: 384
";

fn faults(text: &str) -> Vec<Fault> {
    match Plan::parse(text.as_bytes(), "plan.yaml") {
        Err(PlanError::Faulty(faults)) => faults.list().to_vec(),
        other => panic!("expected faults, got {other:?}"),
    }
}

#[test]
fn defaults_are_what_the_full_document_says_and_the_digest_is_of_the_bytes() {
    let (minimal, short) = Plan::parse(MINIMAL.as_bytes(), "a.yaml").unwrap();
    let (full, long) = Plan::parse(FULL.as_bytes(), "b.yaml").unwrap();
    assert_eq!(minimal, full);
    assert_ne!(short, long);
    assert_eq!(long, PlanDigest::of(FULL.as_bytes()));
    let json = serde_json::to_string(&full).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), full);
    assert_eq!(Plan::parse(json.as_bytes(), "c.json").unwrap().0, full);
}

#[test]
fn clip_norm_is_a_word_or_a_number() {
    let with = |text: &str| format!("{MINIMAL}rounds: {{clip_norm: {text}}}\n");
    let parsed = Plan::parse(with("0.75").as_bytes(), "p").unwrap().0;
    assert_eq!(parsed.rounds.clip_norm, ClipNorm::Fixed(0.75));
    let parsed = Plan::parse(with("2").as_bytes(), "p").unwrap().0;
    assert_eq!(parsed.rounds.clip_norm, ClipNorm::Fixed(2.0));
    assert_eq!(faults(&with("median")).len(), 1);
}

#[test]
fn an_adapter_is_a_name_or_a_map_with_its_figures() {
    let with = |text: &str| format!("{MINIMAL}rounds:\n  adapter: {text}\n");
    let read = |text: &str| Plan::parse(with(text).as_bytes(), "p").unwrap().0.rounds.adapter;
    for (text, expected) in [
        ("feature_tokens", AdapterSpec::FeatureTokens),
        ("{kind: feature_tokens}", AdapterSpec::FeatureTokens),
        ("head", AdapterSpec::Head),
        ("lora", AdapterSpec::Lora { rank: 1 }),
        ("{kind: lora, rank: 2}", AdapterSpec::Lora { rank: 2 }),
        ("{rank: 4, kind: frozen_lora}", AdapterSpec::FrozenLora { rank: 4, seed: 0 }),
        (
            "{kind: frozen_lora, seed: 18446744073709551615}",
            AdapterSpec::FrozenLora { rank: 1, seed: u64::MAX },
        ),
        ("core", AdapterSpec::Core { rank: 8 }),
        ("forest", AdapterSpec::Forest { trees: 4, depth: 4 }),
        ("{kind: forest, depth: 8}", AdapterSpec::Forest { trees: 4, depth: 8 }),
    ] {
        assert_eq!(read(text), expected, "{text}");
    }
    for text in
        ["full_weights", "{kind: lora, rang: 2}", "{kind: lora, rank: two}", "{rank: 2}", "[lora]", "3"]
    {
        let found = faults(&with(text));
        assert_eq!((found.len(), found[0].line), (1, 5), "{text}: {}", found[0].message);
    }
    let found = faults(&with("{kind: lora, rank: 65}"));
    assert_eq!((found[0].path.as_str(), found[0].line), ("rounds.adapter.rank", 5));
    for (figures, path) in
        [("trees: 33", "trees"), ("trees: 0", "trees"), ("depth: 9", "depth"), ("depth: 0", "depth")]
    {
        let found = faults(&with(&format!("{{kind: forest, {figures}}}")));
        assert_eq!(found[0].path, format!("rounds.adapter.{path}"), "{figures}");
    }
    let properties = &Plan::json_schema()["properties"]["rounds"];
    assert_eq!(properties["default"]["adapter"]["kind"], "forest");
}

#[test]
fn a_secure_sum_states_its_assumptions_or_has_their_defaults() {
    let with = |privacy: &str| {
        let text = format!("{MINIMAL}cohort: {{min_agents: 5}}\nprivacy: {{{privacy}}}\n");
        Plan::parse(text.as_bytes(), "p").unwrap().0
    };
    assert_eq!(with("epsilon: 3").secure_sum(), None);
    let plan = with("noise_placement: secure_sum");
    assert_eq!(plan.secure_sum(), Some(SecureSumSpec { colluders: 1, dropouts: 1, retries: 0 }));
    assert_eq!((plan.counted(5), plan.counted(1), with("epsilon: 3").counted(5)), (Some(3), Some(0), None));
    let plan = with("noise_placement: secure_sum, secure_sum: {dropouts: 0, retries: 8}");
    assert_eq!(plan.secure_sum(), Some(SecureSumSpec { colluders: 1, dropouts: 0, retries: 8 }));
    let schema = Plan::json_schema().to_string();
    assert!(schema.contains("secure_sum") && schema.contains("noise_placement"), "{schema}");
}

#[test]
fn what_a_secure_sum_cannot_be_is_refused_by_name() {
    let secure = "noise_placement: secure_sum";
    for (cohort, privacy, rest, path, words) in [
        ("min_agents: 3", secure, "", "cohort.min_agents", "must be local"),
        (
            "min_agents: 5",
            secure,
            "rounds: {aggregation: trimmed_mean}",
            "rounds.aggregation",
            "trimmed_mean",
        ),
        ("min_agents: 5", secure, "rounds: {aggregation: fedavg}", "rounds.aggregation", "fedavg"),
        ("min_agents: 5", secure, "rounds: {deadline_s: 5}", "rounds.deadline_s", "6 steps"),
        ("min_agents: 5", secure, "release: {deadline_s: 5}", "release.deadline_s", "6 steps"),
        (
            "min_agents: 6",
            "noise_placement: secure_sum, secure_sum: {colluders: 2, dropouts: 0}",
            "",
            "privacy.secure_sum.colluders",
            "at most 1",
        ),
        (
            "min_agents: 6",
            "noise_placement: secure_sum, secure_sum: {dropouts: 2}",
            "",
            "privacy.secure_sum.dropouts",
            "at most 1",
        ),
        (
            "min_agents: 200, max_agents: 1024",
            "noise_placement: secure_sum, secure_sum: {colluders: 60, dropouts: 60}",
            "",
            "privacy.secure_sum",
            "no ring over 200 agents",
        ),
        ("min_agents: 5", "secure_sum: {dropouts: 0}", "", "privacy.secure_sum", "noise_placement"),
    ] {
        let text = format!("{MINIMAL}cohort: {{{cohort}}}\nprivacy: {{{privacy}}}\n{rest}\n");
        let found = faults(&text);
        assert_eq!(found.len(), 1, "{text}{found:?}");
        assert_eq!(found[0].path, path, "{text}");
        assert!(found[0].message.contains(words), "{}", found[0].message);
    }
    for good in ["min_agents: 4, max_agents: 1024", "min_agents: 7"] {
        let text = format!("{MINIMAL}cohort: {{{good}}}\nprivacy: {{{secure}}}\n");
        assert!(Plan::parse(text.as_bytes(), "p").is_ok(), "{good}");
    }
}

#[test]
fn syntax_faults_have_line_and_column() {
    let found = faults("kind: TabmeshPlan\nname: x\ntarget: a.b\nprivacy:\n  epsilonn: 3\n");
    assert_eq!((found.len(), found[0].line, found[0].column), (1, 5, 3));
    assert!(found[0].message.contains("epsilonn"), "{}", found[0].message);
    let found = faults("kind: TabmeshPlan\nname: x\ntarget: a.b\nname: y\n");
    assert_eq!(found[0].line, 4);
    let found = faults("kind: TabmeshPlan\nname: x\ntarget: A.B\n");
    assert!(found[0].message.contains("canonical feature id"), "{}", found[0].message);
    assert_eq!(found[0].line, 3);
    assert_eq!(faults("kind: OtherPlan\nname: x\ntarget: a.b\n")[0].line, 1);
    assert_eq!(faults("name: x\ntarget: a.b\n").len(), 1);
    assert_eq!(faults("").len(), 1);
    assert_eq!(faults("[1, 2").len(), 1);
}

#[test]
fn every_fault_of_a_plan_is_listed_with_its_place() {
    let text = "\
kind: TabmeshPlan
name: Bad Name
target: a.b
privacy: {epsilon: .nan, delta: 0.5}
rounds:
  count: 201
  optimiser:
    kind: sgd
    momentum: 1.0
cohort:
  tags: [fine, NOT]
";
    let places: Vec<(u64, u64)> = faults(text).iter().map(|f| (f.line, f.column)).collect();
    assert_eq!(places, vec![(2, 7), (4, 20), (4, 33), (6, 10), (9, 15), (11, 16)]);
    let shown = Plan::parse(text.as_bytes(), "bad.yaml").unwrap_err().to_string();
    assert!(shown.contains("bad.yaml:6:10: rounds.count: "), "{shown}");
}

#[test]
fn the_report_shows_a_caret_under_the_fault() {
    let text = format!("{MINIMAL}rounds:\n  count: 500\n");
    let error = Plan::parse(text.as_bytes(), "plan.yaml").unwrap_err();
    let mut shown = String::new();
    let theme = miette::GraphicalTheme::unicode_nocolor();
    miette::GraphicalReportHandler::new_themed(theme).render_report(&mut shown, &error).unwrap();
    assert!(shown.contains("plan.yaml:5:10"), "{shown}");
    assert!(shown.contains("count: 500"), "{shown}");
}

/// Each limit at its edge and one past it.
#[test]
fn limits_hold_at_one_too_many() {
    let most = "a".repeat(MAX_NAME_BYTES);
    let cases: &[(&str, &str, &str)] = &[
        ("cohort: {max_agents: ", "1024}", "1025}"),
        ("cohort: {max_agents: 2, min_agents: ", "1}", "0}"),
        ("privacy: {epsilon: ", "20}", "20.001}"),
        ("privacy: {epsilon: ", "0.01}", "0}"),
        ("privacy: {delta: ", "0.001}", "0.00101}"),
        ("privacy: {delta: ", "1.0e-12}", "0}"),
        ("privacy: {release_share: ", "0.99}", "1}"),
        ("privacy: {release_share: ", "0.01}", "0}"),
        ("release: {fine_bins: ", "256}", "257}"),
        ("release: {fine_bins: ", "16}", "15}"),
        ("release: {fine_bins: 256, bins: ", "64}", "65}"),
        ("release: {coarse_bins: 2, bins: ", "2}", "1}"),
        ("release: {bins: 64, coarse_bins: ", "16}", "17}"),
        ("release: {coarse_bins: ", "2}", "1}"),
        ("release: {max_levels: ", "256}", "257}"),
        ("release: {max_levels: ", "2}", "1}"),
        ("release: {parents: ", "3}", "4}"),
        ("release: {parents: ", "1}", "0}"),
        ("release: {deadline_s: ", "604800}", "604801}"),
        ("release: {grace_s: ", "86400}", "86401}"),
        ("release: {shares: {one_way: 0.1, label_pairs: 0.2, structure: 0.2, tree: ", "0.5}}", "0.51}}"),
        ("corpus: {rows: ", "1000000}", "1000001}"),
        ("corpus: {rows: ", "100}", "99}"),
        ("pretrain: {steps: ", "100000}", "100001}"),
        ("pretrain: {tables_per_step: ", "64}", "65}"),
        ("pretrain: {tables_per_step: ", "1}", "0}"),
        ("pretrain: {learning_rate: ", "1000}", "1001}"),
        ("pretrain: {learning_rate: ", "0.1}", "0}"),
        ("pretrain: {prior_replay: ", "1}", "1.1}"),
        ("pretrain: {prior_replay: ", "0}", "-0.1}"),
        ("rounds: {count: ", "200}", "201}"),
        ("rounds: {count: ", "0}", "-1}"),
        ("rounds: {clip_norm: ", "10000}", "10001}"),
        ("rounds: {clip_norm: ", "0.0001}", "0.00009}"),
        ("rounds: {clip_norm: ", "1}", ".inf}"),
        ("rounds: {adapter: head, clip_norm: {quantile: ", "0.99}}", "0.991}}"),
        ("rounds: {adapter: head, clip_norm: {quantile: ", "0.9}}", "0.899}}"),
        ("rounds: {adapter: head, clip_norm: {quantile: 0.9, learning_rate: ", "2}}", "2.01}}"),
        ("rounds: {adapter: head, clip_norm: {quantile: 0.9, learning_rate: ", "0.01}}", "0.009}}"),
        ("rounds: {adapter: head, clip_norm: {quantile: 0.9, initial: ", "10000}}", "10001}}"),
        ("rounds: {sampling_rate: ", "1}", "1.01}"),
        ("rounds: {sampling_rate: ", "0.0001}", "0.00009}"),
        ("rounds: {noise_multiplier: ", "10000}", "10001}"),
        ("rounds: {trim: ", "0.49}", "0.5}"),
        ("rounds: {adapter: {kind: lora, rank: ", "64}}", "65}}"),
        ("rounds: {adapter: {kind: lora, rank: ", "1}}", "0}}"),
        ("rounds: {adapter: {kind: frozen_lora, seed: 3, rank: ", "64}}", "65}}"),
        ("rounds: {adapter: {kind: core, rank: ", "64}}", "65}}"),
        ("rounds: {context_rows: ", "4096}", "4097}"),
        ("rounds: {context_rows: ", "16}", "15}"),
        ("rounds: {deadline_s: ", "604800}", "604801}"),
        ("rounds: {grace_s: ", "86400}", "86401}"),
        ("rounds: {adapter: head, optimiser: {kind: sgd, momentum: ", "0}}", "1}}"),
        (
            "rounds: {adapter: head, aggregation: fedadam, optimiser: {kind: adam, learning_rate: ",
            "1000}}",
            "1001}}",
        ),
    ];
    for (field, good, bad) in cases {
        let with = |value: &str| format!("{MINIMAL}{field}{value}\n");
        let parsed = Plan::parse(with(good).as_bytes(), "p");
        assert!(parsed.is_ok(), "{field}{good}: {}", parsed.unwrap_err());
        assert_eq!(faults(&with(bad)).len(), 1, "{field}{bad}");
    }
    assert!(Plan::parse(format!("kind: TabmeshPlan\nname: {most}\ntarget: a\n").as_bytes(), "p").is_ok());
    assert_eq!(faults(&format!("kind: TabmeshPlan\nname: {most}a\ntarget: a\n")).len(), 1);
    let tags = |n: usize| format!("{MINIMAL}cohort: {{tags: [{}]}}\n", vec!["x"; n].join(", "));
    assert!(Plan::parse(tags(MAX_TAGS).as_bytes(), "p").is_ok());
    assert_eq!(faults(&tags(MAX_TAGS + 1)).len(), 1);
}

#[test]
fn oversized_and_binary_documents_are_refused_before_parsing() {
    let mut text = MINIMAL.to_owned();
    text.push_str(&"#".repeat(MAX_PLAN_BYTES - MINIMAL.len()));
    assert!(Plan::parse(text.as_bytes(), "p").is_ok());
    text.push('#');
    let got = MAX_PLAN_BYTES + 1;
    assert!(matches!(Plan::parse(text.as_bytes(), "p"), Err(PlanError::TooLarge { got: g }) if g == got));
    assert!(matches!(Plan::parse(b"kind: \xff", "p"), Err(PlanError::NotText { at: 6 })));
}

#[test]
fn contradictions_are_found() {
    for (text, path) in [
        ("cohort: {min_agents: 9, max_agents: 8}", "cohort.min_agents"),
        ("release: {fine_bins: 16, bins: 17}", "release.bins"),
        ("release: {bins: 4, coarse_bins: 5}", "release.coarse_bins"),
        ("rounds: {adapter: head, optimiser: {kind: adam}}", "rounds.aggregation"),
        ("rounds: {optimiser: {kind: sgd, learning_rate: 1}}", "rounds.optimiser"),
        ("rounds: {clip_norm: {quantile: 0.9}}", "rounds.clip_norm"),
        // 200 rounds of 32 trees with 16 leaves are 102,400 values, with 32 leaves twice as many.
        ("rounds: {count: 200, adapter: {kind: forest, trees: 32, depth: 5}}", "rounds.adapter"),
        ("rounds: {aggregation: fedadam}", "rounds.aggregation"),
        ("rounds: {noise_multiplier: 0.1}", "rounds.noise_multiplier"),
        ("privacy: {epsilon: 1.0e-9, delta: 1.0e-12}", "privacy.epsilon"),
    ] {
        let found = faults(&format!("{MINIMAL}{text}\n"));
        let paths: Vec<&str> = found.iter().map(|f| f.path.as_str()).collect();
        assert_eq!(paths, [path], "{text}");
        assert_eq!(found[0].line, 4, "{text}");
    }
}

#[test]
fn budget_shares_never_exceed_the_whole() {
    let check = |text: &str| {
        let plan = Plan::parse(format!("{MINIMAL}{text}\n").as_bytes(), "p").unwrap().0;
        let budget = plan.budget().unwrap();
        let stages: u64 = budget.per_stage.iter().map(|rho| rho.units()).sum();
        assert!(stages <= budget.release.units());
        assert_eq!(budget.release.units() + budget.rounds.units(), budget.total.units());
        assert!(budget.per_round.units() * u64::from(plan.rounds.count) <= budget.rounds.units());
        (plan, budget)
    };
    let (_, budget) = check("");
    // All of it is given out but for rounding: one unit a share.
    assert!(budget.per_stage.iter().map(|rho| rho.units()).sum::<u64>() + 4 >= budget.release.units());
    assert!(budget.per_round.units() * 20 + 20 > budget.rounds.units());
    check("privacy: {epsilon: 0.037, delta: 1.0e-9, release_share: 0.3337}");
    check("rounds: {count: 199}");
    // Without rounds the release has it all, whatever their figures say.
    for text in ["rounds: {count: 0}", "rounds: {count: 0, noise_multiplier: 0.1}"] {
        let (_, budget) = check(text);
        assert_eq!((budget.release, budget.rounds, budget.per_round), (budget.total, Rho::ZERO, Rho::ZERO));
    }
    let (_, tight) = check("rounds: {count: 7, noise_multiplier: 9.5}");
    let expected = 0.5 / (9.5 * 9.5);
    assert!((tight.per_round.as_f64() - expected).abs() < 1e-11);
}

/// Second attempts are paid for in advance: all of them together with every stage and round stay within the plan's budget.
#[test]
fn what_second_attempts_may_cost_is_set_aside() {
    let with = |retries: u32, release: &str| {
        let text = format!(
            "{MINIMAL}cohort: {{min_agents: 4}}\nrounds: {{count: 6}}\nrelease: {{{release}}}\nprivacy: {{noise_placement: secure_sum, secure_sum: {{retries: {retries}}}}}\n"
        );
        Plan::parse(text.as_bytes(), "p").unwrap().0.budget().unwrap()
    };
    let none = with(0, "");
    for retries in [1, 2, MAX_RETRIES] {
        let budget = with(retries, "");
        assert_eq!((budget.release, budget.rounds), (none.release, none.rounds));
        let dearest = budget.per_stage.iter().max().unwrap().units();
        let stages: u64 = budget.per_stage.iter().map(|rho| rho.units()).sum();
        let most = stages + dearest * u64::from(retries);
        assert!(most <= budget.release.units() && most + 16 >= budget.release.units(), "{retries}");
        let most = budget.per_round.units() * u64::from(6 + retries);
        assert!(most <= budget.rounds.units() && most + 16 >= budget.rounds.units(), "{retries}");
    }
    // A release that gives little out has room for a second attempt already.
    let small = "shares: {one_way: 0.1, label_pairs: 0.1, structure: 0.1, tree: 0.1}";
    assert_eq!(with(2, small).per_stage, with(0, small).per_stage);
    let text = format!(
        "{MINIMAL}cohort: {{min_agents: 4}}\n{}",
        "privacy: {noise_placement: secure_sum, secure_sum: {retries: 9}}\n"
    );
    assert_eq!(faults(&text)[0].path, "privacy.secure_sum.retries");
}

#[test]
fn the_json_schema_knows_every_field_and_forbids_others() {
    let schema = Plan::json_schema();
    assert_eq!(schema["additionalProperties"], serde_json::Value::Bool(false));
    let required: Vec<&str> =
        schema["required"].as_array().unwrap().iter().filter_map(|v| v.as_str()).collect();
    assert_eq!(required, ["kind", "name", "target"]);
    let full: serde_json::Value = serde_json::to_value(Plan::parse(FULL.as_bytes(), "p").unwrap().0).unwrap();
    for key in full.as_object().unwrap().keys() {
        assert!(schema["properties"].get(key).is_some(), "{key}");
    }
    assert_eq!(schema["properties"]["rounds"]["default"]["count"], 20);
}
