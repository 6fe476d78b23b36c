//! Agents that spoil a sum for others: who complains about whom, and whom another attempt leaves out.
//!
//! An agent whose sealed shares don't open keeps those they are for from going on. They say so in place of a vector, and are
//! no longer waited for. A complaint is a word against a word: one is believed once more agents complain about the same one than
//! may collude, so that colluders can drop out themselves but can't have an honest agent dropped.

use std::collections::{BTreeMap, BTreeSet};

use tabmesh_federation::secagg::message::Complaint;
use tabmesh_federation::secagg::roster::Seat;
use tabmesh_federation::secagg::server::Abort;

/// Who complained, and about whom.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Complaints(BTreeMap<Seat, Seat>);

impl Complaints {
    /// Takes a complaint; the first one of an agent counts.
    pub(super) fn take(&mut self, complaint: &Complaint) {
        self.0.entry(complaint.seat).or_insert(complaint.about);
    }

    /// Those who complained.
    pub(super) fn seats(&self) -> impl Iterator<Item = Seat> {
        self.0.keys().copied()
    }

    /// Whether an agent complained.
    pub(super) fn by(&self, seat: Seat) -> bool {
        self.0.contains_key(&seat)
    }

    /// Whom another attempt leaves out, if so many may collude and the one before ended like this.
    pub(super) fn left_out(&self, colluders: u32, abort: &Abort) -> BTreeSet<Seat> {
        let mut against: BTreeMap<Seat, u32> = BTreeMap::new();
        self.0.values().for_each(|about| *against.entry(*about).or_default() += 1);
        let believed = against.into_iter().filter(|(_, count)| *count > colluders).map(|(about, _)| about);
        // Shares that don't join to what their owner committed to, whichever of them are tried.
        let owner = match abort {
            Abort::WrongShares { owner } => Some(*owner),
            _ => None,
        };
        believed.chain(owner).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use tabmesh_federation::id::Digest;
    use tabmesh_federation::secagg::message::Step;

    use super::*;

    fn complaints(all: &[(u16, u16)]) -> Complaints {
        let mut complaints = Complaints::default();
        for (seat, about) in all {
            let (seat, about) = (Seat::new(*seat), Seat::new(*about));
            complaints.take(&Complaint { descriptor: Digest::of(b"d"), seat, about });
        }
        complaints
    }

    #[test]
    fn more_than_may_collude_are_believed_and_no_fewer() {
        let few = Abort::TooFew { step: Step::Mask, expected: 5, got: 2 };
        let left_out = |all: &[(u16, u16)], colluders| -> Vec<u16> {
            complaints(all).left_out(colluders, &few).into_iter().map(Seat::index).collect()
        };
        assert_eq!(left_out(&[(0, 3), (1, 3)], 2), [0_u16; 0]);
        assert_eq!(left_out(&[(0, 3), (1, 3), (2, 3), (3, 0)], 2), [3]);
        // A second complaint of the same agent is none.
        assert_eq!(left_out(&[(0, 3), (0, 4), (0, 3), (1, 3)], 2), [0_u16; 0]);
        let owner = Abort::WrongShares { owner: Seat::new(4) };
        assert_eq!(complaints(&[]).left_out(1, &owner), BTreeSet::from([Seat::new(4)]));
    }
}
