//! When a collection is open, and by when it must have ended.
//!
//! An update is accepted strictly before the deadline. The grace after it belongs to the coordinator: the round
//! is published or abandoned before deadline plus grace. Time is passed in; a clock that jumps back never
//! reopens anything, because every state keeps the latest time it has seen.

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A window that cannot be scheduled.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ScheduleError {
    /// Deadline or grace outside their ranges.
    #[error(
        "a window needs a deadline of 1 to {MAX_DEADLINE_S} s and a grace of 1 to {MAX_GRACE_S} s, got {deadline_s} s and {grace_s} s"
    )]
    OutOfRange {
        /// Deadline asked for, in seconds.
        deadline_s: u32,
        /// Grace asked for, in seconds.
        grace_s: u32,
    },
    /// The opening time is outside what milliseconds in an `i64` can add to.
    #[error("opening time {opened_ms} ms is out of range")]
    BadTime {
        /// Opening time, UTC milliseconds.
        opened_ms: i64,
    },
}

/// The time a collection is open, in UTC milliseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    opened_ms: i64,
    deadline_ms: i64,
    ends_ms: i64,
}

/// Where a moment falls in a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Updates are accepted.
    Open,
    /// Updates are late; the coordinator may still finish.
    Grace,
    /// Nothing may happen any more.
    Over,
}

impl Window {
    /// A window opening now.
    ///
    /// # Errors
    /// [`ScheduleError::OutOfRange`] for a deadline or grace of zero or beyond its limit;
    /// [`ScheduleError::BadTime`] for an opening time before 1970 or too far ahead.
    pub fn new(opened_ms: i64, deadline_s: u32, grace_s: u32) -> Result<Self, ScheduleError> {
        if !(1..=MAX_DEADLINE_S).contains(&deadline_s) || !(1..=MAX_GRACE_S).contains(&grace_s) {
            return Err(ScheduleError::OutOfRange { deadline_s, grace_s });
        }
        if !(0..=MAX_TIME_MS).contains(&opened_ms) {
            return Err(ScheduleError::BadTime { opened_ms });
        }
        let deadline_ms = opened_ms + i64::from(deadline_s) * 1000;
        Ok(Self { opened_ms, deadline_ms, ends_ms: deadline_ms + i64::from(grace_s) * 1000 })
    }

    /// When it opened.
    #[must_use]
    pub const fn opened_ms(&self) -> i64 {
        self.opened_ms
    }

    /// First moment at which an update is late.
    #[must_use]
    pub const fn deadline_ms(&self) -> i64 {
        self.deadline_ms
    }

    /// Milliseconds of grace.
    #[must_use]
    pub const fn grace_ms(&self) -> i64 {
        self.ends_ms - self.deadline_ms
    }

    /// First moment at which an unfinished round is abandoned.
    #[must_use]
    pub const fn ends_ms(&self) -> i64 {
        self.ends_ms
    }

    /// Where `now_ms` falls. A moment before the opening counts as open.
    #[must_use]
    pub const fn at(&self, now_ms: i64) -> Moment {
        if now_ms < self.deadline_ms {
            Moment::Open
        } else if now_ms < self.ends_ms {
            Moment::Grace
        } else {
            Moment::Over
        }
    }

    /// When a timer must next wake the state machine, if it isn't over at `now_ms`.
    #[must_use]
    pub const fn next_wake_ms(&self, now_ms: i64) -> Option<i64> {
        match self.at(now_ms) {
            Moment::Open => Some(self.deadline_ms),
            Moment::Grace => Some(self.ends_ms),
            Moment::Over => None,
        }
    }
}

/// Longest deadline: 7 days, in seconds.
pub const MAX_DEADLINE_S: u32 = 7 * 24 * 3600;
/// Longest grace: 1 day, in seconds.
pub const MAX_GRACE_S: u32 = 24 * 3600;
/// Latest opening time: the year 9999, in UTC milliseconds.
pub const MAX_TIME_MS: i64 = 253_402_300_799_999;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_deadline_itself_is_late_and_the_end_itself_is_over() {
        let window = Window::new(1_000, 60, 10).unwrap();
        assert_eq!(window.at(-5), Moment::Open);
        assert_eq!(window.at(60_999), Moment::Open);
        assert_eq!(window.at(61_000), Moment::Grace);
        assert_eq!(window.at(70_999), Moment::Grace);
        assert_eq!(window.at(71_000), Moment::Over);
        assert_eq!(window.next_wake_ms(5), Some(61_000));
        assert_eq!(window.next_wake_ms(61_000), Some(71_000));
        assert_eq!(window.next_wake_ms(71_000), None);
    }

    #[test]
    fn limits_hold_at_one_too_many() {
        assert!(Window::new(MAX_TIME_MS, MAX_DEADLINE_S, MAX_GRACE_S).is_ok());
        for (opened, deadline, grace) in
            [(0, 0, 1), (0, 1, 0), (0, MAX_DEADLINE_S + 1, 1), (0, 1, MAX_GRACE_S + 1)]
        {
            let refused = ScheduleError::OutOfRange { deadline_s: deadline, grace_s: grace };
            assert_eq!(Window::new(opened, deadline, grace), Err(refused));
        }
        for opened_ms in [-1, MAX_TIME_MS + 1] {
            assert_eq!(Window::new(opened_ms, 1, 1), Err(ScheduleError::BadTime { opened_ms }));
        }
    }
}
