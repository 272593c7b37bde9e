//! The date that templates show (`strftime_now`), from a clock that the caller reads.

use std::fmt::Write;

use chrono::DateTime;
use minijinja::{Error, ErrorKind};

/// A moment, and the offset of local time at it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LocalTime {
    /// Seconds since the epoch.
    pub unix_seconds: i64,
    /// Seconds by which local time is ahead of UTC.
    pub utc_offset_seconds: i32,
}

impl LocalTime {
    /// Formats the moment as Python's `datetime.now().strftime` does, without a time zone.
    pub(super) fn strftime(self, format: &str) -> Result<String, Error> {
        let refuse = |reason: &str| Error::new(ErrorKind::InvalidOperation, reason.to_owned());
        let local = self
            .unix_seconds
            .saturating_add(i64::from(self.utc_offset_seconds));
        let local = DateTime::from_timestamp(local, 0)
            .ok_or_else(|| refuse("the clock is out of range"))?;
        let mut text = String::new();
        // Writing fails for a directive that does not exist; `to_string` would panic.
        write!(text, "{}", local.naive_utc().format(format))
            .map_err(|_| refuse("strftime_now: unknown directive"))?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_local_and_bad_directives_are_refused() {
        // 2024-02-29 23:30 UTC is the first of March two hours further east.
        let time = LocalTime {
            unix_seconds: 1_709_249_400,
            utc_offset_seconds: 7_200,
        };
        assert_eq!(
            time.strftime("%d %b %Y, %H:%M %-d").unwrap(),
            "01 Mar 2024, 01:30 1"
        );
        assert!(time.strftime("%!").is_err());
    }
}
