//! How much CPU a process has used.

use std::time::Duration;

use anyhow::{Context as _, ensure};

/// CPU time since a process started, its ended threads included.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cpu {
    /// In nanoseconds' resolution.
    pub(crate) total: Duration,
    /// Part of it spent in the kernel, in ticks' resolution (10 ms).
    pub(crate) system: Duration,
}

impl Cpu {
    /// Reads the clock of a process.
    pub(crate) fn of(pid: u32) -> anyhow::Result<Self> {
        let mut clock = 0;
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: both calls only write into the locals whose addresses they get.
        let read = unsafe {
            libc::clock_getcpuclockid(pid.cast_signed(), &raw mut clock) == 0
                && libc::clock_gettime(clock, &raw mut time) == 0
        };
        ensure!(read, "process {pid} has no CPU clock; it may have ended");
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("read stat")?;
        // The name in parentheses may hold anything; the 13th field after it is stime.
        let after = stat.rsplit_once(')').context("parse stat")?.1;
        let ticks = after.split_whitespace().nth(12).context("parse stat")?;
        let ticks: u64 = ticks.parse().context("parse stat")?;
        Ok(Self {
            total: Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32),
            system: Duration::from_millis(ticks * 10),
        })
    }

    /// Reads several and adds them up.
    pub(crate) fn of_all(pids: &[u32]) -> anyhow::Result<Self> {
        let mut sum = Self::default();
        for &pid in pids {
            let one = Self::of(pid)?;
            sum.total += one.total;
            sum.system += one.system;
        }
        Ok(sum)
    }

    /// What was used since an earlier reading.
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self {
            total: self.total.saturating_sub(earlier.total),
            system: self.system.saturating_sub(earlier.system),
        }
    }

    /// Microseconds for each of `count` things.
    pub(crate) fn micros_each(self, count: usize) -> f64 {
        self.total.as_secs_f64() * 1e6 / count.max(1) as f64
    }

    /// The kernel's share, 0 to 1.
    pub(crate) fn system_share(self) -> f64 {
        (self.system.as_secs_f64() / self.total.as_secs_f64().max(1e-9)).min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_shows_on_the_clock() {
        let pid = std::process::id();
        let before = Cpu::of(pid).unwrap();
        let mut x = 1u64;
        while Cpu::of(pid).unwrap().since(before).total < Duration::from_millis(20) {
            x = std::hint::black_box(x.wrapping_mul(31));
        }
        assert!(Cpu::of(pid).unwrap().since(before).micros_each(1) >= 20_000.0);
    }
}
