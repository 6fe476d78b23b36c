//! A round that is prepared and stored, but not announced: no agent knows of it, so nothing was spent on it.

use serde::{Deserialize, Serialize};

use crate::phase::abandon::AbandonReason;
use crate::phase::collect::{Announcement, Collection};
use crate::schedule::Moment;

/// A prepared round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Open {
    /// What will be announced.
    pub announcement: Announcement,
}

impl Open {
    /// Starts collecting. To be stored before the announcement leaves.
    #[must_use]
    pub fn opened(&self) -> Collection {
        Collection::new(self.announcement.clone())
    }

    /// Why it can't be opened any more at `now_ms`, if so.
    #[must_use]
    pub fn overdue(&self, now_ms: i64) -> Option<AbandonReason> {
        match self.announcement.window.at(now_ms) {
            Moment::Open => None,
            Moment::Grace | Moment::Over => Some(AbandonReason::NeverOpened),
        }
    }
}
