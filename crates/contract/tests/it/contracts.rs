//! Both written forms, their agreement, and each refusal with its caret.

use tabmesh_contract::contract::{
    Contract, DomainAggregates, FeatureType, LogicalType, MAX_CONTRACT_BYTES, MAX_NAME_BYTES,
    MAX_ROWS_PER_UNIT, Purpose, Role, Sensitivity, SourceKind,
};
use tabmesh_contract::error::ContractError;
use tabmesh_contract::schema::{FeatureKind, PrivacyUnit, Scale, SchemaError};

use crate::{SHORT, parse, refusal, unapproved, with};

/// Line, column, and the text under the caret.
fn at(error: &ContractError) -> (u64, u64, &str) {
    let place = error.place().unwrap_or_else(|| panic!("no place: {error}"));
    assert_eq!(place.file(), "contract.yaml");
    (place.line(), place.column(), place.text())
}

#[test]
fn the_documented_short_form_means_what_it_says() {
    let (contract, warnings) = parse(SHORT);
    assert_eq!(contract.name, "payments.transaction_product");
    assert_eq!((contract.version.as_str(), contract.domain.as_str()), ("1.2.0", "payments"));
    assert_eq!(contract.owner, "payments-domain@company.com");
    let roles: Vec<Role> = contract.columns.iter().map(|c| c.role).collect();
    assert_eq!(roles, [Role::Id, Role::Entity, Role::Feature, Role::Feature, Role::Target]);
    let amount = contract.column("amount").unwrap();
    assert_eq!(amount.range, Some([0.0, 1e6]));
    assert_eq!((amount.scale, amount.logical_type), (Scale::Log1p, LogicalType::Number));
    assert_eq!(amount.feature.as_str(), "payment.amount");
    assert!(contract.column("transaction_id").unwrap().required);
    assert!(contract.column("customer_id").unwrap().pii);
    let privacy = &contract.privacy;
    assert_eq!(privacy.sensitivity, Sensitivity::Low);
    assert!(privacy.allow_training);
    assert_eq!(privacy.allowed_purposes.len(), 3);
    assert_eq!(privacy.unit, PrivacyUnit::Entity { column: "customer_id".into(), max_rows: 20 });
    assert_eq!(privacy.domain_aggregates, DomainAggregates::Open);
    assert_eq!(privacy.entity_namespace, "payments/customer_id");
    assert_eq!((contract.slo.freshness_hours, contract.slo.row_completeness), (Some(6.0), Some(0.98)));
    let source = contract.source.as_ref().unwrap();
    assert_eq!((source.kind, source.path.as_str()), (SourceKind::Parquet, "transactions.parquet"));
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].message().contains("max_units"));
}

#[test]
fn the_approved_schema_has_features_and_target_only() {
    let schema = parse(SHORT).0.approved_schema().unwrap();
    let ids: Vec<&str> = schema.features().iter().map(|f| f.id.as_str()).collect();
    assert_eq!(ids, ["merchant.category", "payment.amount"]);
    let FeatureKind::Categorical { levels } = &schema.features()[0].kind else { panic!() };
    assert_eq!(levels, &["grocery", "travel", "other"]);
    assert_eq!(
        (schema.target().id.as_str(), schema.target().classes.as_slice()),
        ("is_fraud", ["0".to_owned(), "1".to_owned()].as_slice())
    );
}

#[test]
fn the_digest_is_of_the_bytes_as_stored() {
    let digest = parse(SHORT).0.digest_hex();
    let expected = ring::digest::digest(&ring::digest::SHA256, SHORT.as_bytes());
    assert_eq!(digest, hex::encode(expected.as_ref()));
    assert_ne!(parse(&format!("{SHORT} \n")).0.digest_hex(), digest);
}

#[test]
fn the_short_form_and_its_odcs_form_are_one_contract() {
    let (short, _) = parse(&with(
        "max_rows_per_unit: 20",
        "max_rows_per_unit: 20, max_units: 500, domain_aggregates: confidential, entity_namespace: acme/customer, allowed_purposes: [federated_adapter]",
    ));
    let yaml = short.odcs().to_yaml().unwrap();
    let (odcs, warnings) = parse(&yaml);
    assert!(warnings.is_empty(), "{warnings:?}");
    assert_eq!(short.columns, odcs.columns);
    assert_eq!(short.privacy, odcs.privacy);
    assert_eq!(short.slo, odcs.slo);
    assert_eq!(short.source, odcs.source);
    assert_eq!(short.quality, odcs.quality);
    assert_eq!(
        (&short.name, &short.version, &short.domain, &short.owner),
        (&odcs.name, &odcs.version, &odcs.domain, &odcs.owner)
    );
    assert_eq!(short.approved_schema(), odcs.approved_schema());
    assert_eq!(odcs.odcs().to_yaml().unwrap(), yaml, "canonical form is a fixed point");
    assert_eq!(odcs.privacy.allowed_purposes, [Purpose::FederatedAdapter].into());
    for line in
        ["apiVersion: v3.1.0", "kind: DataContract", "tfmSensitivity", "tfmRange", "classification: pii"]
    {
        assert!(yaml.contains(line), "{line} in\n{yaml}");
    }
}

const ODCS: &str = "\
apiVersion: v3.0.2
kind: DataContract
id: 53581432-6c55-4ba2-a65f-72344a91553a
name: hr.people
version: 2.0.1
status: active
domain: people
description: {purpose: demo, usage: none, limitations: none}
team:
  - {username: ann, role: Data Steward}
  - {username: bea, role: Data Owner}
schema:
  - name: people
    physicalType: table
    properties:
      - {name: person, logicalType: string, primaryKey: true, classification: pii}
      - {name: age, logicalType: integer, logicalTypeOptions: {minimum: 0, maximum: 120}}
      - name: grade
        logicalType: string
        quality:
          - {metric: invalidValues, arguments: {validValues: [a, b]}, mustBe: 0}
          - {type: custom, engine: soda, implementation: 'checks: []'}
      - {name: member, logicalType: boolean}
      - {name: hired, logicalType: date}
      - name: leaves
        logicalType: boolean
        customProperties: [{property: tfmRole, value: target}]
slaProperties:
  - {property: latency, value: 2, unit: d}
servers:
  - {server: prod, type: postgres, host: db, port: 5432, database: hr, schema: public}
  - {server: file, type: local, path: people.csv, format: csv}
customProperties:
  - {property: tfmSensitivity, value: high}
  - {property: tfmMaxUnits, value: 1000}
  - {property: ourOwn, value: {any: [thing]}}
";

#[test]
fn a_plain_odcs_document_is_read() {
    let (contract, warnings) = parse(ODCS);
    assert_eq!((contract.name.as_str(), contract.domain.as_str()), ("hr.people", "people"));
    assert_eq!(contract.owner, "bea");
    assert_eq!(contract.column("person").unwrap().role, Role::Id);
    assert_eq!(contract.column("age").unwrap().range, Some([0.0, 120.0]));
    assert_eq!(contract.column("grade").unwrap().categories, Some(vec!["a".into(), "b".into()]));
    assert_eq!(contract.column("grade").unwrap().feature_type, Some(FeatureType::Categorical));
    assert_eq!(contract.column("member").unwrap().categories, Some(vec!["false".into(), "true".into()]));
    assert_eq!(contract.column("hired").unwrap().role, Role::Unused);
    assert!(!contract.privacy.allow_training, "training is not allowed unless declared");
    assert_eq!(contract.privacy.allowed_purposes, [Purpose::LocalOnly].into());
    assert_eq!(contract.privacy.unit, PrivacyUnit::Row);
    assert_eq!(contract.privacy.entity_namespace, "hr.people/row");
    assert_eq!(contract.slo.freshness_hours, Some(48.0));
    assert_eq!(contract.source.as_ref().unwrap().kind, SourceKind::Csv);
    assert!(warnings.iter().any(|w| w.message().contains("`hired`")), "{warnings:?}");
    assert_eq!(contract.approved_schema().unwrap().features().len(), 3);
}

#[test]
fn an_unknown_key_is_refused_with_a_caret_under_it() {
    let error = refusal("owner: payments-domain@company.com", "owner: a@b.c\nownr: x");
    assert_eq!(at(&error), (4, 1, "ownr"));
    let ContractError::UnknownKey { key, .. } = &error else { panic!("{error:?}") };
    assert_eq!(key, "ownr");
    assert!(error.advice().contains("did you mean `owner`?"), "{}", error.advice());
    let shown = error.render();
    for part in ["contract.yaml:4:1", "ownr: x", "^^^^", "unknown key `ownr`"] {
        assert!(shown.contains(part), "{part:?} in\n{shown}");
    }

    let error = refusal("pii: false, role: id}", "pii: false, rol: id}");
    assert_eq!(at(&error).0, 5);
    assert_eq!(at(&error).2, "rol");
    let error = refusal("sensitivity: low,", "sensitivity: low, epsilon: 3,");
    assert_eq!(at(&error).2, "epsilon");
}

#[test]
fn unknown_keys_of_odcs_are_refused_except_inside_custom_properties() {
    let refuse = |from: &str, to: &str| {
        assert!(ODCS.contains(from));
        Contract::parse("contract.yaml", &ODCS.replace(from, to)).expect_err("refused")
    };
    assert_eq!(at(&refuse("status: active", "status: active\nowner: x")).2, "owner");
    assert_eq!(at(&refuse("physicalType: table", "physicaltype: table")).2, "physicaltype");
    assert_eq!(
        at(&refuse("{property: tfmRole, value: target}", "{property: tfmRole, values: target}")).2,
        "values"
    );
    let error = refuse("property: tfmSensitivity", "property: tfmSensitvity");
    assert!(matches!(&error, ContractError::UnknownKey { key, .. } if key == "tfmSensitvity"), "{error:?}");
    assert!(error.advice().contains("did you mean `tfmSensitivity`?"), "{}", error.advice());
    let error = refuse("apiVersion: v3.0.2", "apiVersion: v2.2.2");
    assert_eq!(at(&error), (1, 13, "v2.2.2"));
    assert!(matches!(refuse("kind: DataContract", "kind: Contract"), ContractError::WrongValue { .. }));
    assert!(matches!(
        refuse("  - {property: tfmSensitivity, value: high}\n", ""),
        ContractError::MissingKey { key, .. } if key == "tfmSensitivity"
    ));
}

#[test]
fn bad_yaml_is_refused_at_its_place() {
    let error = refusal("metadata:\n", "metadata: [\n");
    assert!(matches!(error, ContractError::Syntax { .. }), "{error:?}");
    assert!(at(&error).0 >= 10, "{error}");
    let error = refusal("owner: payments-domain@company.com", "owner: a\nowner: b");
    assert!(matches!(error, ContractError::DeclaredTwice { .. }), "{error:?}");
    assert_eq!(at(&error).0, 4);
    let error = Contract::parse("contract.yaml", "- a\n- b\n").expect_err("refused");
    assert!(error.place().is_some(), "{error:?}");
    for text in ["", "---\n", "just text", "{", "\u{0}", "a: &a [*a]"] {
        assert!(Contract::parse("contract.yaml", text).is_err(), "{text:?}");
    }
}

#[test]
fn a_yaml_bomb_is_refused() {
    let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for i in 1..9 {
        let previous = vec![format!("*a{}", i - 1); 10].join(", ");
        text.push_str(&format!("a{i}: &a{i} [{previous}]\n"));
    }
    assert!(Contract::parse("contract.yaml", &text).is_err());
}

#[test]
fn a_pii_column_as_feature_or_target_is_refused_by_name() {
    let error = unapproved(
        "{name: customer_id, type: string, pii: true, role: entity}",
        "{name: customer_id, type: categorical, categories: [a], pii: true, role: feature}",
    );
    assert!(
        matches!(&error, ContractError::PiiFeature { column, role: "feature", .. } if column == "customer_id"),
        "{error:?}"
    );
    assert_eq!((at(&error).0, at(&error).2), (6, "feature"));
    assert!(
        error.to_string().contains("column `customer_id` is marked pii and can't be a feature"),
        "{error}"
    );
    let error = unapproved("pii: false, role: target", "pii: true, role: target");
    assert!(matches!(error, ContractError::PiiFeature { role: "target", .. }), "{error:?}");
    // Without a role, a pii column simply stays local.
    let (contract, _) = parse(&with("decimal, pii: false", "decimal, pii: true"));
    assert_eq!(contract.column("amount").unwrap().role, Role::Unused);
}

#[test]
fn undeclared_ranges_and_categories_are_refused_at_the_column() {
    let error = unapproved("    - numeric_range: {amount: [0, 1000000]}\n", "");
    assert!(
        matches!(&error, ContractError::UndeclaredRange { column, .. } if column == "amount"),
        "{error:?}"
    );
    assert_eq!((at(&error).0, at(&error).2), (7, "amount"));
    let error = unapproved(", categories: [grocery, travel, other]", "");
    assert!(matches!(error, ContractError::UndeclaredCategories { .. }), "{error:?}");
    assert_eq!(at(&error).2, "merchant_category");
    let error = unapproved(", categories: [\"0\", \"1\"]", "");
    assert!(matches!(error, ContractError::UndeclaredCategories { .. }), "{error:?}");
}

#[test]
fn ranges_must_be_two_finite_rising_bounds() {
    for bounds in ["[10, 0]", "[5, 5]"] {
        let error = refusal("[0, 1000000]", bounds);
        assert!(
            matches!(&error, ContractError::ReversedRange { column, .. } if column == "amount"),
            "{error:?}"
        );
        assert_eq!(at(&error).0, 15, "{error}");
        assert!(at(&error).2.starts_with('['), "{:?}", at(&error));
    }
    for (bounds, text) in [("[0, .inf]", ".inf"), ("[.nan, 1]", ".nan"), ("[0, 1e999]", "1e999")] {
        let error = refusal("[0, 1000000]", bounds);
        assert!(
            matches!(&error, ContractError::WrongValue { expected, .. } if expected == "a finite number"),
            "{error:?}"
        );
        assert_eq!(at(&error).2, text);
    }
    assert!(matches!(refusal("[0, 1000000]", "[0]"), ContractError::WrongValue { .. }));
    assert!(matches!(refusal("[0, 1000000]", "[a, b]"), ContractError::WrongValue { .. }));
    let twice = refusal("scale: log1p}", "scale: log1p, range: [0, 5]}");
    assert!(matches!(twice, ContractError::DeclaredTwice { .. }), "{twice:?}");
    parse(&with("scale: log1p}", "scale: log1p, range: [0, 1000000]}"));
    let error = unapproved("[0, 1000000]", "[-1, 1000000]");
    assert!(
        matches!(&error, ContractError::Schema { source: SchemaError::NegativeLog { .. }, .. }),
        "{error:?}"
    );
    assert_eq!(at(&error).2, "amount");
}

#[test]
fn two_columns_of_one_canonical_id_are_refused() {
    let error = refusal("feature: merchant.category", "feature: payment.amount");
    let ContractError::DuplicateFeature { id, first, second, .. } = &error else { panic!("{error:?}") };
    assert_eq!(
        (id.as_str(), first.as_str(), second.as_str()),
        ("payment.amount", "amount", "merchant_category")
    );
    assert_eq!((at(&error).0, at(&error).2), (8, "payment.amount"));
    let error = refusal("{name: customer_id,", "{name: amount,");
    assert!(
        matches!(error, ContractError::UnknownColumn { .. } | ContractError::DeclaredTwice { .. }),
        "{error:?}"
    );
}

#[test]
fn bad_levels_are_refused() {
    let error = refusal("sensitivity: low", "sensitivity: extreme");
    let ContractError::WrongValue { expected, got, .. } = &error else { panic!("{error:?}") };
    assert_eq!((expected.as_str(), got.as_str()), ("one of low, medium, high", "`extreme`"));
    assert_eq!(at(&error).2, "extreme");
    let error = unapproved("[grocery, travel, other]", "[grocery, travel, grocery]");
    assert!(
        matches!(&error, ContractError::Schema { source: SchemaError::BadLevels { .. }, .. }),
        "{error:?}"
    );
    assert_eq!(at(&error).2, "merchant_category");
    for (from, to, text) in [
        ("role: id", "role: ids", "ids"),
        ("scale: log1p", "scale: log2", "log2"),
        ("type: decimal", "type: money", "money"),
        ("{type: parquet", "{type: excel", "excel"),
        ("allow_training: true", "allow_training: maybe", "maybe"),
        ("allow_training: true", "allow_training: yes", "yes"),
        ("row_completeness: 0.98", "row_completeness: 98", "98"),
        ("freshness_hours: 6", "freshness_hours: 0", "0"),
        ("max_rows_per_unit: 20", "max_rows_per_unit: 0", "0"),
    ] {
        let error = refusal(from, to);
        assert!(matches!(error, ContractError::WrongValue { .. }), "{to}: {error:?}");
        assert_eq!(at(&error).2, text, "{to}: {error}");
    }
    let error = refusal("feature: payment.amount", "feature: Payment Amount");
    assert!(matches!(&error, ContractError::Schema { source: SchemaError::BadId { .. }, .. }), "{error:?}");
}

#[test]
fn exactly_one_target_is_needed() {
    let error = unapproved(", role: target, categories: [\"0\", \"1\"]}", ", categories: [\"0\", \"1\"]}");
    assert!(matches!(error, ContractError::TargetCount { got: 0, .. }), "{error:?}");
    let error = unapproved("feature: merchant.category", "role: target");
    assert!(matches!(error, ContractError::TargetCount { got: 2, .. }), "{error:?}");
    assert_eq!(at(&error).0, 9);
}

#[test]
fn references_to_columns_are_checked() {
    for (from, to) in [
        ("- non_null: transaction_id", "- non_null: transaction"),
        ("numeric_range: {amount:", "numeric_range: {amounts:"),
        ("unit: customer_id", "unit: client_id"),
    ] {
        let error = refusal(from, to);
        let ContractError::UnknownColumn { declared, .. } = &error else { panic!("{to}: {error:?}") };
        assert_eq!(declared.len(), 5);
        assert!(to.contains(at(&error).2), "{error}");
    }
    assert!(matches!(
        refusal(", max_rows_per_unit: 20", ""),
        ContractError::MissingKey { key, .. } if key == "max_rows_per_unit"
    ));
}

#[test]
fn a_missing_key_is_named() {
    for (from, key) in
        [("owner: payments-domain@company.com\n", "owner"), ("sensitivity: low, ", "sensitivity")]
    {
        let error = refusal(from, "");
        assert!(matches!(&error, ContractError::MissingKey { key: got, .. } if got == key), "{error:?}");
    }
}

#[test]
fn an_unquoted_version_is_read_with_a_warning() {
    let (contract, warnings) = parse(&with("version: \"1.2\"", "version: 1.10"));
    assert_eq!(contract.version, "1.10.0", "the digits as written, not as a float");
    let warning = warnings.iter().find(|w| w.message().contains("YAML number")).unwrap();
    assert_eq!((warning.place().line(), warning.place().text()), (2, "1.10"));
    assert!(warning.render().contains("contract.yaml:2:10"), "{}", warning.render());
    let (contract, warnings) = parse(&with("version: \"1.2\"", "version: 3.1.4-rc.1"));
    assert_eq!((contract.version.as_str(), warnings.len()), ("3.1.4-rc.1", 1));
}

#[test]
fn column_keys_are_accepted_in_both_spellings() {
    let camel = SHORT
        .replace(", role: id}", ", tfmRole: id}")
        .replace("feature: payment.amount, scale: log1p", "tfmFeature: payment.amount, tfmScale: log1p")
        .replace("categories: [grocery", "tfmCategories: [grocery");
    assert_eq!(parse(&camel).0.columns, parse(SHORT).0.columns);
    let own_unit = with(", unit: customer_id, max_rows_per_unit: 20", "").replace(
        "pii: true, role: entity",
        "pii: true, role: entity, tfmPrivacyUnit: true, tfmMaxRowsPerUnit: 20",
    );
    assert_eq!(parse(&own_unit).0.privacy, parse(SHORT).0.privacy);
}

#[test]
fn a_delimiter_survives_the_canonical_form() {
    let (contract, _) = parse(&with(
        "{type: parquet, path: transactions.parquet}",
        "{type: csv, path: t.csv, delimiter: \";\"}",
    ));
    assert_eq!(contract.source.as_ref().unwrap().delimiter, Some(b';'));
    let (again, _) = parse(&contract.odcs().to_yaml().unwrap());
    assert_eq!(again.source, contract.source);
    let error =
        refusal("{type: parquet, path: transactions.parquet}", "{type: csv, path: t.csv, delimiter: \";;\"}");
    assert!(matches!(&error, ContractError::WrongValue { what, .. } if what == "delimiter"), "{error:?}");
    assert!(at(&error).2.contains(";;"), "{:?}", at(&error));
}

#[test]
fn limits_hold_at_their_edge() {
    let padding = MAX_CONTRACT_BYTES - SHORT.len();
    let full = format!("{SHORT}#{}", " ".repeat(padding - 1));
    assert_eq!(full.len(), MAX_CONTRACT_BYTES);
    parse(&full);
    let error = Contract::parse("contract.yaml", &format!("{full} ")).expect_err("refused");
    assert_eq!(
        error,
        ContractError::TooLarge {
            file: "contract.yaml".into(),
            got: MAX_CONTRACT_BYTES + 1,
            limit: MAX_CONTRACT_BYTES
        }
    );
    let named = |bytes: usize| with("payments.transaction_product", &"n".repeat(bytes));
    parse(&named(MAX_NAME_BYTES));
    assert!(Contract::parse("contract.yaml", &named(MAX_NAME_BYTES + 1)).is_err());
    let rows = |n: u64| with("max_rows_per_unit: 20", &format!("max_rows_per_unit: {n}"));
    parse(&rows(MAX_ROWS_PER_UNIT));
    assert!(Contract::parse("contract.yaml", &rows(MAX_ROWS_PER_UNIT + 1)).is_err());
}

proptest::proptest! {
    /// No text makes the parser panic, and every refusal points into the text.
    #[test]
    fn any_text_is_parsed_or_refused(
        line in 0usize..20,
        patch in "[ -~\\n{}\\[\\]:,\"'&*#é]{0,12}",
    ) {
        let mut lines: Vec<&str> = SHORT.lines().collect();
        let line = line.min(lines.len() - 1);
        lines[line] = &patch;
        let text = lines.join("\n");
        match Contract::parse("contract.yaml", &text) {
            Ok((contract, _)) => {
                let _ = contract.approved_schema();
                let again = contract.odcs().to_yaml().unwrap();
                proptest::prop_assert!(Contract::parse("contract.yaml", &again).is_ok(), "{}", again);
            }
            Err(error) => proptest::prop_assert!(!error.render().is_empty()),
        }
    }
}
