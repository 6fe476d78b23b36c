//! The generated messages, through which anything could be sent, are out of reach.

use tabmesh_proto::pb::Submission;

fn main() {
    let _ = Submission::default();
}
