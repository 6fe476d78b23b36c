//! Taking masks off the total: secrets are joined from opened shares, and each mask is computed once.
//!
//! A survivor's self mask is taken off by its seed; the masks between a dropout and its surviving neighbours by
//! the dropout's mask key. Each joined secret is held against what its owner announced (a commitment, or the
//! public key), so a wrong share that matters is noticed; other windows of shares are tried, which gets past one
//! wrong share wherever a spare one is.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::Digest;
use crate::secagg::agent::pair_sign;
use crate::secagg::descriptor::SumDescriptor;
use crate::secagg::graph::Graph;
use crate::secagg::keys::{Label, Secret, commit, pair_mask_key, self_mask_key};
use crate::secagg::mask::{RingVector, Sign};
use crate::secagg::message::{Advert, Opened};
use crate::secagg::roster::Seat;
use crate::secagg::server::Abort;
use crate::secagg::share::{Share, join};

pub(super) struct Unmask<'a> {
    pub(super) descriptor: &'a SumDescriptor,
    pub(super) digest: Digest,
    pub(super) adverts: &'a BTreeMap<Seat, Advert>,
    pub(super) graph: &'a Graph,
    pub(super) survivors: &'a BTreeSet<Seat>,
    pub(super) senders: &'a BTreeSet<Seat>,
    pub(super) opened: &'a BTreeMap<Seat, Opened>,
}

impl Unmask<'_> {
    /// The sum, and who opened wrong shares.
    pub(super) fn run(&self, mut total: RingVector) -> Result<(RingVector, BTreeSet<Seat>), Abort> {
        let mut wrong = BTreeSet::new();
        for owner in self.survivors {
            let shares: Vec<(Seat, &Share)> =
                self.opened.iter().filter_map(|(from, o)| Some((*from, o.seeds.get(owner)?))).collect();
            let commitment = self.adverts.get(owner).map(|advert| advert.seed_commitment);
            let seed = self.recover(*owner, &shares, &mut wrong, |seed| {
                commitment == Some(commit(Label::SelfSeed, &self.digest, *owner, seed.as_bytes()))
            })?;
            total.apply(&self_mask_key(&seed, &self.digest, *owner), Sign::Minus);
        }
        for owner in self.senders.difference(self.survivors) {
            let shares: Vec<(Seat, &Share)> =
                self.opened.iter().filter_map(|(from, o)| Some((*from, o.keys.get(owner)?))).collect();
            let public = self.adverts.get(owner).map(|advert| advert.mask_key);
            let secret =
                self.recover(*owner, &shares, &mut wrong, |secret| public == Some(secret.public()))?;
            for other in self.graph.neighbours(*owner).intersection(self.survivors) {
                let Some(advert) = self.adverts.get(other) else { continue };
                let agreed = secret.agree(&advert.mask_key, *other)?;
                let key = pair_mask_key(&agreed, &self.digest, *owner, *other);
                // What the survivor did to its vector, undone.
                total.apply(&key, pair_sign(*other, *owner).opposite());
            }
        }
        Ok((total, wrong))
    }

    fn recover(
        &self,
        owner: Seat,
        shares: &[(Seat, &Share)],
        wrong: &mut BTreeSet<Seat>,
        fits: impl Fn(&Secret) -> bool,
    ) -> Result<Secret, Abort> {
        let (expected, got) = (self.descriptor.share_threshold(), shares.len());
        if got < expected {
            return Err(Abort::NotEnoughShares { owner, expected, got });
        }
        let mut window: Vec<(Seat, &Share)> = shares.to_vec();
        for turn in 0..got {
            if let Some(secret) = join(&window, expected).ok().filter(&fits) {
                if turn > 0 {
                    blame(&secret, &window, expected, wrong);
                }
                return Ok(secret);
            }
            window.rotate_left(1);
        }
        Err(Abort::WrongShares { owner })
    }
}

/// Names whose share doesn't fit: with it in place of a good one, the secret is another.
fn blame(secret: &Secret, window: &[(Seat, &Share)], threshold: usize, wrong: &mut BTreeSet<Seat>) {
    let (good, rest) = window.split_at(threshold.min(window.len()));
    let Some((_, kept)) = good.split_last() else { return };
    for suspect in rest {
        let tried: Vec<(Seat, &Share)> = kept.iter().chain([suspect]).copied().collect();
        if join(&tried, threshold).ok().as_ref() != Some(secret) {
            wrong.insert(suspect.0);
        }
    }
}
