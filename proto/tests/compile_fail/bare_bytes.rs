//! Table-derived bytes that no mechanism has noised can't be submitted.

use tabmesh_privacy::ledger::DebitReceipt;
use tabmesh_proto::{client::MeshClient, message::SubmissionTarget};

async fn send(client: MeshClient, target: SubmissionTarget, debit: DebitReceipt) {
    let exact_counts: Vec<u8> = vec![0; 8];
    let _ = client.submit_release(&target, &exact_counts, &debit).await;
}

fn main() {}
