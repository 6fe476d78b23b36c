//! Range checks of plan fields, for the validation derive. NaN passes no range here.

use crate::schedule::{MAX_DEADLINE_S, MAX_GRACE_S};

/// A check that a number lies in `[lower, upper]`.
pub(crate) fn between(lower: f64, upper: f64) -> impl FnOnce(&f64, &()) -> garde::Result {
    move |value, ()| {
        if (lower..=upper).contains(value) {
            Ok(())
        } else {
            Err(garde::Error::new(format!("must be in [{lower}, {upper}], got {value}")))
        }
    }
}

/// A number in `(0, 1000]`.
pub(crate) fn learning_rate(value: &f64, (): &()) -> garde::Result {
    if *value > 0.0 && *value <= MAX_LEARNING_RATE {
        Ok(())
    } else {
        Err(garde::Error::new(format!("must be above 0 and at most {MAX_LEARNING_RATE}, got {value}")))
    }
}

/// A number in `[0, 1)`.
pub(crate) fn below_one(value: &f64, (): &()) -> garde::Result {
    if (0.0..1.0).contains(value) {
        Ok(())
    } else {
        Err(garde::Error::new(format!("must be at least 0 and below 1, got {value}")))
    }
}

/// A number in `(0, 1)`.
pub(crate) fn open_unit(value: &f64, (): &()) -> garde::Result {
    if *value > 0.0 && *value < 1.0 {
        Ok(())
    } else {
        Err(garde::Error::new(format!("must be above 0 and below 1, got {value}")))
    }
}

/// A number in `[0, 0.5)`.
pub(crate) fn below_half(value: &f64, (): &()) -> garde::Result {
    if (0.0..0.5).contains(value) {
        Ok(())
    } else {
        Err(garde::Error::new(format!("must be at least 0 and below 0.5, got {value}")))
    }
}

/// Seconds of a deadline.
pub(crate) fn deadline(value: &u32, (): &()) -> garde::Result {
    whole(*value, MAX_DEADLINE_S)
}

/// Seconds of a grace.
pub(crate) fn grace(value: &u32, (): &()) -> garde::Result {
    whole(*value, MAX_GRACE_S)
}

/// A name of 1 to `most` characters out of `a-z`, `0-9`, `_`, `-`.
pub(crate) fn name(most: usize) -> impl FnOnce(&String, &()) -> garde::Result {
    move |text, ()| {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-');
        if (1..=most).contains(&text.len()) && text.bytes().all(plain) {
            Ok(())
        } else {
            Err(garde::Error::new(format!(
                "must be 1 to {most} characters of a-z, 0-9, '_', '-', got {text:?}"
            )))
        }
    }
}

fn whole(value: u32, most: u32) -> garde::Result {
    if (1..=most).contains(&value) {
        Ok(())
    } else {
        Err(garde::Error::new(format!("must be 1 to {most} s, got {value}")))
    }
}

/// Largest learning rate of any optimiser.
const MAX_LEARNING_RATE: f64 = 1000.0;
