//! A receipt can't be made from a committed entry that nobody committed.

use tabmesh_privacy::ledger::{Committed, DebitReceipt};

fn receipt(committed: Committed) -> DebitReceipt {
    DebitReceipt { committed }
}

fn main() {
    let _ = receipt;
}
