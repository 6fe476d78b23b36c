//! Contracts and policy as an owner and an operator meet them: texts in, refusals with a place and a name out.
#![allow(clippy::unwrap_used, reason = "tests")]

mod contracts;
mod judgement;
mod policies;

use tabmesh_contract::contract::Contract;
use tabmesh_contract::error::{ContractError, Warning};

/// The short form as documented.
pub const SHORT: &str = "\
name: payments.transaction_product
version: \"1.2\"
owner: payments-domain@company.com
schema:
  - {name: transaction_id, type: string, pii: false, role: id}
  - {name: customer_id, type: string, pii: true, role: entity}
  - {name: amount, type: decimal, pii: false, feature: payment.amount, scale: log1p}
  - {name: merchant_category, type: categorical, pii: false, feature: merchant.category, categories: [grocery, travel, other]}
  - {name: is_fraud, type: categorical, pii: false, role: target, categories: [\"0\", \"1\"]}
metadata:
  cardinality: auto
  distribution_summary: required
  constraints:
    - non_null: transaction_id
    - numeric_range: {amount: [0, 1000000]}
privacy: {sensitivity: low, allow_training: true, unit: customer_id, max_rows_per_unit: 20}
quality_slo: {freshness_hours: 6, row_completeness: 0.98}
source: {type: parquet, path: transactions.parquet}
";

/// Parses a contract that is expected to be accepted.
pub fn parse(text: &str) -> (Contract, Vec<Warning>) {
    Contract::parse("contract.yaml", text).unwrap_or_else(|error| panic!("{}", error.render()))
}

/// The short form with one text replaced.
pub fn with(from: &str, to: &str) -> String {
    assert_eq!(SHORT.matches(from).count(), 1, "{from:?} stands once in the sample");
    SHORT.replace(from, to)
}

/// The refusal of the short form with one text replaced, by the parser.
pub fn refusal(from: &str, to: &str) -> ContractError {
    Contract::parse("contract.yaml", &with(from, to)).expect_err("refused")
}

/// The refusal of the short form with one text replaced, when its schema is approved.
pub fn unapproved(from: &str, to: &str) -> ContractError {
    parse(&with(from, to)).0.approved_schema().expect_err("refused")
}
