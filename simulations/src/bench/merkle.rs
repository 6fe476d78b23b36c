//! `bench merkle`: how long an auditor needs for a whole log.

use anstream::println;
use tabmesh_privacy::ledger::{Journal, MemoryJournal, verify_chain};
use tabmesh_store::merkle::{MerkleTree, RootBuilder, leaf_hash, verify_inclusion};

use crate::bench::cpu_ns;
use crate::cli::Output;

/// Makes a log of entries as large as a ledger's, then verifies its hash chain, its root, and one proof in a thousand.
///
/// # Errors
/// Processor time can't be read, or something doesn't verify.
pub fn run(entries: u32, output: Output) -> anyhow::Result<()> {
    let mut journal = MemoryJournal::default();
    for i in 0..entries {
        journal.append(format!("{ENTRY}{i:012}\"}}").as_bytes())?;
    }
    let log = journal.replay()?;
    let mut tree = MerkleTree::new();
    log.iter().for_each(|entry| {
        tree.push(&entry.payload);
    });
    let size = u64::from(entries);
    let root = tree.root(size).unwrap_or_else(|| leaf_hash(&[]));

    let begun = cpu_ns()?;
    verify_chain(&log)?;
    let chained = cpu_ns()?;
    let mut builder = RootBuilder::new();
    log.iter().for_each(|entry| builder.push(&entry.payload));
    anyhow::ensure!(builder.root() == root, "the streamed root differs from the tree's");
    let rooted = cpu_ns()?;
    for (index, entry) in (0u64..).zip(&log).step_by(1000) {
        let proof = tree.inclusion_proof(index, size).unwrap_or_default();
        verify_inclusion(&leaf_hash(&entry.payload), index, size, &proof, &root)?;
    }
    let proven = cpu_ns()?;

    let seconds = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e9;
    let (chain, merkle, proofs) =
        (seconds(begun, chained), seconds(chained, rooted), seconds(rooted, proven));
    match output {
        Output::Text => println!(
            "{entries} entries verified in {:.2} CPU-seconds: hash chain {chain:.2}, Merkle root {merkle:.2}, \
             one inclusion proof in 1000 {proofs:.3}",
            chain + merkle + proofs
        ),
        Output::Json => {
            let answer = serde_json::json!({
                "entries": entries, "chain_s": chain, "root_s": merkle, "proofs_s": proofs, "root": root,
            });
            println!("{answer}");
        }
    }
    Ok(())
}

/// About as long as a commit.
const ENTRY: &str = "{\"entry\":\"refuse\",\"time_ms\":1700000000000,\"plan_digest\":\"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\",\"product\":\"person.income\",\"rule\":\"over_budget\",\"rho\":1099511627776,\"n\":\"";
