//! Noised bytes without the receipt of their ledger entry can't be submitted.

use tabmesh_privacy::private::Private;
use tabmesh_proto::{client::MeshClient, message::SubmissionTarget};

async fn send(client: MeshClient, target: SubmissionTarget, payload: Private<Vec<u8>>) {
    let _ = client.submit_update(&target, &payload, &()).await;
}

fn main() {}
