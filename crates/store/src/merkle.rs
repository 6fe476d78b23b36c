//! The Merkle tree of an append-only log (RFC 6962, section 2.1): roots, inclusion and consistency proofs.
//!
//! Leaf = SHA-256(0x00 ‖ data), node = SHA-256(0x01 ‖ left ‖ right), so a node never passes as a leaf's data; the left
//! part of n leaves is the largest power of two below n. A log entry's stored bytes are the leaf's data, never
//! serialised anew. Proofs are checked as RFC 9162, sections 2.1.3.2 and 2.1.4.2, describe.
//!
//! An inclusion proof binds the root, not the size: take both from one signed [`crate::checkpoint`].

use crate::{Digest, Hasher};

/// Hash of a leaf with this data.
#[must_use]
pub fn leaf_hash(data: &[u8]) -> Digest {
    let mut hasher = Hasher::new();
    hasher.update(&[0]);
    hasher.update(data);
    hasher.finish()
}

/// Hash of an inner node.
#[must_use]
pub fn node_hash(left: &Digest, right: &Digest) -> Digest {
    let mut bytes = [1; 65];
    let (head, tail) = bytes.split_at_mut(33);
    if let Some(head) = head.get_mut(1..) {
        head.copy_from_slice(left.as_bytes());
    }
    tail.copy_from_slice(right.as_bytes());
    Digest::of(&bytes)
}

/// Root of a log without entries.
#[must_use]
pub fn empty_root() -> Digest {
    Digest::of(&[])
}

/// Why a proof doesn't show what it claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// The index isn't below the size.
    #[error("index {index} is outside a log of {size} entries")]
    Index {
        /// Index claimed.
        index: u64,
        /// Size claimed.
        size: u64,
    },
    /// The older size is above the newer one.
    #[error("old size {old} is above new size {new}: a log never shrinks")]
    Sizes {
        /// Older size.
        old: u64,
        /// Newer size.
        new: u64,
    },
    /// Too many or too few hashes for these sizes.
    #[error("proof of {got} hashes has the wrong length for its sizes")]
    Length {
        /// Hashes given.
        got: usize,
    },
    /// The hashes lead to another root.
    #[error("proof leads to another root")]
    Root,
}

/// Root of a log read once from its first entry: memory for one hash a level.
#[derive(Debug, Clone, Default)]
pub struct RootBuilder {
    size: u64,
    /// Roots of the complete subtrees so far, largest first: one for each set bit of `size`.
    subtrees: Vec<Digest>,
}

impl RootBuilder {
    /// Starts without entries.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next entry's data.
    pub fn push(&mut self, data: &[u8]) {
        self.push_hash(leaf_hash(data));
    }

    /// Adds the next entry's leaf hash.
    pub fn push_hash(&mut self, leaf: Digest) {
        let mut hash = leaf;
        let mut below = self.size;
        // Every trailing one bit is a complete subtree that the new one completes a larger one with.
        while below & 1 == 1 {
            let Some(left) = self.subtrees.pop() else { break };
            hash = node_hash(&left, &hash);
            below >>= 1;
        }
        self.subtrees.push(hash);
        self.size += 1;
    }

    /// Entries so far.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Root over the entries so far.
    #[must_use]
    pub fn root(&self) -> Digest {
        let mut from_right = self.subtrees.iter().rev();
        let Some(smallest) = from_right.next() else { return empty_root() };
        from_right.fold(*smallest, |right, left| node_hash(left, &right))
    }
}

/// A tree that keeps the hash of every complete subtree and gives proofs: 64 bytes an entry.
#[derive(Debug, Clone, Default)]
pub struct MerkleTree {
    /// `levels[k][i]` is the root of leaves `i·2^k .. (i+1)·2^k`.
    levels: Vec<Vec<Digest>>,
}

impl MerkleTree {
    /// A tree without leaves.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next entry's data and returns its leaf hash.
    pub fn push(&mut self, data: &[u8]) -> Digest {
        let leaf = leaf_hash(data);
        let mut hash = leaf;
        for level in 0.. {
            if self.levels.len() == level {
                self.levels.push(Vec::new());
            }
            let Some(nodes) = self.levels.get_mut(level) else { break };
            nodes.push(hash);
            // A pair is complete when its right half has just been added.
            let [.., left, right] = nodes.as_slice() else { break };
            if nodes.len() % 2 == 1 {
                break;
            }
            hash = node_hash(left, right);
        }
        leaf
    }

    /// Number of leaves.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.levels.first().map_or(0, |leaves| leaves.len() as u64)
    }

    /// Hash of the leaf at `index`.
    #[must_use]
    pub fn leaf(&self, index: u64) -> Option<Digest> {
        self.complete(0, index)
    }

    /// Root over the first `size` leaves; nothing if there are fewer.
    #[must_use]
    pub fn root(&self, size: u64) -> Option<Digest> {
        match size {
            0 => Some(empty_root()),
            _ => self.range(0, size),
        }
    }

    /// The hashes that lead from the leaf at `index` to the root over the first `size` leaves, lowest first.
    ///
    /// Nothing if there is no such leaf.
    #[must_use]
    pub fn inclusion_proof(&self, index: u64, size: u64) -> Option<Vec<Digest>> {
        if index >= size || size > self.size() {
            return None;
        }
        let (mut start, mut count, mut proof) = (0, size, Vec::new());
        while count > 1 {
            let left = split(count);
            if index - start < left {
                proof.push(self.range(start + left, count - left)?);
                count = left;
            } else {
                proof.push(self.range(start, left)?);
                (start, count) = (start + left, count - left);
            }
        }
        proof.reverse();
        Some(proof)
    }

    /// The hashes that show that the first `old` leaves are the beginning of the first `new` ones.
    ///
    /// Empty for equal sizes and from size 0; nothing if there are fewer than `new` leaves.
    #[must_use]
    pub fn consistency_proof(&self, old: u64, new: u64) -> Option<Vec<Digest>> {
        if old > new || new > self.size() {
            return None;
        }
        if old == 0 || old == new {
            return Some(Vec::new());
        }
        let (mut start, mut old, mut count, mut proof) = (0, old, new, Vec::new());
        let mut whole = true;
        while old < count {
            let left = split(count);
            if old <= left {
                proof.push(self.range(start + left, count - left)?);
                count = left;
            } else {
                proof.push(self.range(start, left)?);
                (start, old, count) = (start + left, old - left, count - left);
                whole = false;
            }
        }
        // The old tree's own root isn't repeated where it is a subtree of the new one.
        if !whole {
            proof.push(self.range(start, count)?);
        }
        proof.reverse();
        Some(proof)
    }

    // Root over `count` ≥ 1 leaves from `start`, which is a multiple of the largest power of two within the range.
    fn range(&self, start: u64, count: u64) -> Option<Digest> {
        if count.is_power_of_two() {
            let level = count.trailing_zeros();
            return self.complete(level, start >> level);
        }
        let left = split(count);
        Some(node_hash(&self.range(start, left)?, &self.range(start + left, count - left)?))
    }

    fn complete(&self, level: u32, index: u64) -> Option<Digest> {
        let nodes = self.levels.get(usize::try_from(level).ok()?)?;
        nodes.get(usize::try_from(index).ok()?).copied()
    }
}

/// Checks that the leaf with hash `leaf` is at `index` of the log of `size` entries with this root.
///
/// # Errors
/// [`ProofError`] unless the proof leads from the leaf to the root and has exactly the length the sizes ask for.
pub fn verify_inclusion(
    leaf: &Digest,
    index: u64,
    size: u64,
    proof: &[Digest],
    root: &Digest,
) -> Result<(), ProofError> {
    if index >= size {
        return Err(ProofError::Index { index, size });
    }
    let (mut node, mut last, mut hash) = (index, size - 1, *leaf);
    for step in proof {
        if last == 0 {
            return Err(ProofError::Length { got: proof.len() });
        }
        if node & 1 == 1 || node == last {
            hash = node_hash(step, &hash);
            // On the right edge, levels without a sibling are skipped.
            while node & 1 == 0 && node != 0 {
                (node, last) = (node >> 1, last >> 1);
            }
        } else {
            hash = node_hash(&hash, step);
        }
        (node, last) = (node >> 1, last >> 1);
    }
    if last != 0 {
        return Err(ProofError::Length { got: proof.len() });
    }
    if hash == *root { Ok(()) } else { Err(ProofError::Root) }
}

/// Checks that the log of `old` entries with root `old_root` is the beginning of that of `new` entries.
///
/// Equal sizes need equal roots and no hashes; everything begins with the empty log.
///
/// # Errors
/// [`ProofError`] unless the proof leads to both roots and has exactly the length the sizes ask for.
pub fn verify_consistency(
    old: u64,
    old_root: &Digest,
    new: u64,
    new_root: &Digest,
    proof: &[Digest],
) -> Result<(), ProofError> {
    if old > new {
        return Err(ProofError::Sizes { old, new });
    }
    if old == new || old == 0 {
        if !proof.is_empty() {
            return Err(ProofError::Length { got: proof.len() });
        }
        let expected = if old == new { *new_root } else { empty_root() };
        return if *old_root == expected { Ok(()) } else { Err(ProofError::Root) };
    }
    let length = ProofError::Length { got: proof.len() };
    // Where the old log is a complete subtree, its root starts both ways and isn't in the proof.
    let (first, rest) = if old.is_power_of_two() {
        (*old_root, proof)
    } else {
        let (first, rest) = proof.split_first().ok_or(length)?;
        (*first, rest)
    };
    let (mut node, mut last) = (old - 1, new - 1);
    while node & 1 == 1 {
        (node, last) = (node >> 1, last >> 1);
    }
    let (mut from_old, mut from_new) = (first, first);
    for step in rest {
        if last == 0 {
            return Err(length);
        }
        if node & 1 == 1 || node == last {
            from_old = node_hash(step, &from_old);
            from_new = node_hash(step, &from_new);
            while node & 1 == 0 && node != 0 {
                (node, last) = (node >> 1, last >> 1);
            }
        } else {
            from_new = node_hash(&from_new, step);
        }
        (node, last) = (node >> 1, last >> 1);
    }
    if last != 0 {
        return Err(length);
    }
    if from_old == *old_root && from_new == *new_root { Ok(()) } else { Err(ProofError::Root) }
}

/// The largest power of two below `count` ≥ 2.
fn split(count: u64) -> u64 {
    1 << (63 - (count - 1).leading_zeros())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    /// RFC 6962, section 2.1, as printed: the naive twin.
    fn naive_root(leaves: &[Digest]) -> Digest {
        match leaves {
            [] => empty_root(),
            [leaf] => *leaf,
            _ => {
                let (left, right) = leaves.split_at(split(leaves.len() as u64) as usize);
                node_hash(&naive_root(left), &naive_root(right))
            }
        }
    }

    fn naive_path(index: usize, leaves: &[Digest]) -> Vec<Digest> {
        if leaves.len() == 1 {
            return Vec::new();
        }
        let at = split(leaves.len() as u64) as usize;
        let (left, right) = leaves.split_at(at);
        let (mut path, other) =
            if index < at { (naive_path(index, left), right) } else { (naive_path(index - at, right), left) };
        path.push(naive_root(other));
        path
    }

    fn naive_consistency(old: usize, leaves: &[Digest], whole: bool) -> Vec<Digest> {
        if old == leaves.len() {
            return if whole { Vec::new() } else { vec![naive_root(leaves)] };
        }
        let at = split(leaves.len() as u64) as usize;
        let (left, right) = leaves.split_at(at);
        let (mut path, other) = if old <= at {
            (naive_consistency(old, left, whole), right)
        } else {
            (naive_consistency(old - at, right, false), left)
        };
        path.push(naive_root(other));
        path
    }

    fn golden() -> Value {
        serde_json::from_str(include_str!("../tests/fixtures/merkle.json")).unwrap()
    }

    fn digest(value: &Value) -> Digest {
        value.as_str().unwrap().parse().unwrap()
    }

    fn digests(value: &Value) -> Vec<Digest> {
        value.as_array().unwrap().iter().map(digest).collect()
    }

    fn number(value: &Value) -> u64 {
        value.as_u64().unwrap()
    }

    fn tree(leaves: impl IntoIterator<Item = Vec<u8>>) -> MerkleTree {
        let mut tree = MerkleTree::new();
        leaves.into_iter().for_each(|leaf| {
            tree.push(&leaf);
        });
        tree
    }

    fn check(tree: &MerkleTree, vectors: &Value) {
        for row in vectors["roots"].as_array().unwrap() {
            assert_eq!(tree.root(number(&row["size"])).unwrap(), digest(&row["root"]), "{row}");
        }
        for row in vectors["inclusion"].as_array().unwrap() {
            let (index, size, proof) = (number(&row["index"]), number(&row["size"]), digests(&row["proof"]));
            assert_eq!(tree.leaf(index).unwrap(), digest(&row["leaf_hash"]), "{row}");
            assert_eq!(tree.inclusion_proof(index, size).unwrap(), proof, "{row}");
            let (leaf, root) = (digest(&row["leaf_hash"]), digest(&row["root"]));
            assert_eq!(verify_inclusion(&leaf, index, size, &proof, &root), Ok(()), "{row}");
        }
        for row in vectors["consistency"].as_array().unwrap() {
            let (old, new, proof) =
                (number(&row["old_size"]), number(&row["new_size"]), digests(&row["proof"]));
            assert_eq!(tree.consistency_proof(old, new).unwrap(), proof, "{row}");
            let (old_root, new_root) = (digest(&row["old_root"]), digest(&row["new_root"]));
            assert_eq!(verify_consistency(old, &old_root, new, &new_root, &proof), Ok(()), "{row}");
        }
    }

    #[test]
    fn every_golden_root_and_proof_is_met() {
        let golden = golden();
        let leaves = golden["leaves"].as_array().unwrap();
        check(&tree(leaves.iter().map(|leaf| hex::decode(leaf.as_str().unwrap()).unwrap())), &golden);
        check(&tree((0..1000).map(|i| format!("leaf-{i}").into_bytes())), &golden["large"]);
    }

    #[test]
    fn every_tampered_golden_proof_fails() {
        let golden = golden();
        let rows = golden["must_fail"].as_array().unwrap();
        assert_eq!(rows.len(), 25);
        for row in rows {
            let proof = digests(&row["proof"]);
            let answer = if row["kind"] == "inclusion" {
                let (leaf, root) = (digest(&row["leaf_hash"]), digest(&row["root"]));
                verify_inclusion(&leaf, number(&row["index"]), number(&row["size"]), &proof, &root)
            } else {
                let (old_root, new_root) = (digest(&row["old_root"]), digest(&row["new_root"]));
                let (old, new) = (number(&row["old_size"]), number(&row["new_size"]));
                verify_consistency(old, &old_root, new, &new_root, &proof)
            };
            assert!(answer.is_err(), "{row}");
        }
    }

    #[test]
    fn nothing_is_proven_of_what_is_not_there() {
        let tree = tree((0..5u8).map(|i| vec![i]));
        assert_eq!(tree.root(6), None);
        assert_eq!(tree.inclusion_proof(4, 4), None);
        assert_eq!(tree.inclusion_proof(5, 6), None);
        assert_eq!(tree.consistency_proof(3, 6), None);
        assert_eq!(tree.consistency_proof(4, 3), None);
        let (root, empty) = (tree.root(5).unwrap(), empty_root());
        assert_eq!(verify_consistency(0, &empty, 5, &root, &[]), Ok(()));
        assert_eq!(verify_consistency(0, &root, 5, &root, &[]), Err(ProofError::Root));
        let huge = verify_inclusion(&root, u64::MAX - 1, u64::MAX, &[root; 64], &root);
        assert!(huge.is_err());
        assert!(verify_consistency(u64::MAX - 1, &root, u64::MAX, &root, &[root; 80]).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        // The kept tree, the streamed root and the naive twin agree; every proof verifies, and none of its changes does.
        #[test]
        fn trees_agree_with_the_naive_twin(size in 1usize..140, a in 0usize..1000, b in 0usize..1000, flip in 0usize..256) {
            let tree = tree((0..size).map(|i| i.to_le_bytes().to_vec()));
            let leaves: Vec<Digest> = (0..size).map(|i| leaf_hash(&i.to_le_bytes())).collect();
            let mut builder = RootBuilder::new();
            leaves.iter().for_each(|leaf| builder.push_hash(*leaf));
            let root = naive_root(&leaves);
            prop_assert_eq!(builder.root(), root);
            prop_assert_eq!(tree.root(size as u64), Some(root));

            let (index, old) = (a % size, 1 + b % size);
            let path = naive_path(index, &leaves);
            prop_assert_eq!(&tree.inclusion_proof(index as u64, size as u64).unwrap(), &path);
            let leaf = leaves[index];
            let includes = |leaf: &Digest, index: usize, size: usize, path: &[Digest]| {
                verify_inclusion(leaf, index as u64, size as u64, path, &root).is_ok()
            };
            prop_assert!(includes(&leaf, index, size, &path));

            let old_root = naive_root(&leaves[..old]);
            let steps = naive_consistency(old, &leaves, true);
            prop_assert_eq!(&tree.consistency_proof(old as u64, size as u64).unwrap(), &steps);
            let continues = |old: usize, size: usize, steps: &[Digest]| {
                verify_consistency(old as u64, &old_root, size as u64, &root, steps).is_ok()
            };
            prop_assert!(continues(old, size, &steps));

            let flipped = |digest: &Digest| {
                let mut bytes = *digest.as_bytes();
                bytes[flip / 8] ^= 1 << (flip % 8);
                Digest::from_bytes(bytes)
            };
            prop_assert!(!includes(&flipped(&leaf), index, size, &path));
            if size > 1 {
                prop_assert!(!includes(&leaf, (index + 1) % size, size, &path));
                prop_assert!(!includes(&leaf, index, 2 * size, &path), "a proof of another depth");
            }
            for at in 0..path.len() {
                let mut wrong = path.clone();
                wrong[at] = flipped(&wrong[at]);
                prop_assert!(!includes(&leaf, index, size, &wrong));
                wrong.remove(at);
                prop_assert!(!includes(&leaf, index, size, &wrong));
            }
            let longer = [&path[..], &[root]].concat();
            prop_assert!(!includes(&leaf, index, size, &longer));

            if old < size {
                prop_assert!(!continues(old + 1, size, &steps), "wrong old size");
                for at in 0..steps.len() {
                    let mut wrong = steps.clone();
                    wrong[at] = flipped(&wrong[at]);
                    prop_assert!(!continues(old, size, &wrong));
                    wrong.remove(at);
                    prop_assert!(!continues(old, size, &wrong));
                }
            }
            let longer = [&steps[..], &[root]].concat();
            prop_assert!(!continues(old, size, &longer));
        }
    }
}
