//! Non-interference of the whole loop, with local noise and with secure sums; see `tabmesh_sim::audit::noninterference`.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use tabmesh_sim::audit::noninterference::{Placement, audit};

async fn holds(placement: Placement) {
    let findings = audit(placement, |_| ()).await.unwrap();
    assert_eq!(
        findings.iter().filter(|finding| !finding.control).count(),
        5,
        "five tables beside the plain one"
    );
    assert_eq!(
        findings.iter().filter(|finding| finding.control).count(),
        15,
        "seven leaks, seen twice, and a bit"
    );
    for finding in findings {
        assert!(finding.as_it_must(), "{finding:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn neighbouring_tables_differ_in_nothing_but_the_noised_payload() {
    holds(Placement::Local).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secure_sums_of_neighbouring_tables_differ_in_nothing_but_the_masked_payload() {
    holds(Placement::SecureSum).await;
}
