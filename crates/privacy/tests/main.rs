//! Integration tests: what code outside the crate can't do.

#[test]
fn private_values_and_receipts_cannot_be_made_outside() {
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}
