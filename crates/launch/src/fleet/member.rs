//! One process of a topology, through its starts and ends.

use std::path::PathBuf;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::child::Child;
use crate::plan::Part;

/// Pauses before a process is started again: 1 s, doubled from start to start.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Starts in a row that did not make a process ready, after which it is given up.
const MOST_STARTS: u32 = 5;

/// A process of a topology, whether it runs or not.
pub(crate) struct Member {
    pub(crate) part: Part,
    /// Its number among all workers; another one has it only after this one is gone.
    pub(crate) ordinal: u16,
    pub(crate) gpus: Vec<String>,
    pub(crate) log: PathBuf,
    pub(crate) state: State,
    /// Whether it has ever been ready.
    pub(crate) proven: bool,
    /// Whether it was when last asked.
    pub(crate) ready: bool,
    /// Its id in discovery, as it says itself; another one after each start.
    pub(crate) worker: Option<String>,
    /// Starts since it was last ready.
    pub(crate) starts: u32,
}

/// What becomes of a process.
pub(crate) enum State {
    Running(Child),
    /// Told to end; killed at the deadline.
    Leaving {
        child: Child,
        deadline: Instant,
    },
    /// Gone; what it left running is being ended.
    Clearing(JoinHandle<()>),
    /// Ended by itself; is started again then.
    Waiting {
        until: Instant,
    },
    /// Ended by itself too often.
    Failed,
}

impl Member {
    pub(crate) fn name(&self) -> String {
        self.part.to_string()
    }

    /// Returns the process, if there is one.
    pub(crate) fn child(&self) -> Option<&Child> {
        match &self.state {
            State::Running(child) | State::Leaving { child, .. } => Some(child),
            State::Clearing(_) | State::Waiting { .. } | State::Failed => None,
        }
    }

    /// Returns the base URL of its system routes, if there is a process to ask.
    pub(crate) fn system_url(&self) -> Option<String> {
        let port = self.child()?.spec.place.system_port;
        Some(format!("http://127.0.0.1:{port}"))
    }

    /// Says whether it serves, or will again.
    pub(crate) fn counts(&self) -> bool {
        match self.state {
            State::Running(_) | State::Waiting { .. } => true,
            State::Leaving { .. } | State::Clearing(_) | State::Failed => false,
        }
    }

    /// Says what becomes of it where it cannot say so itself.
    pub(crate) fn note(&self) -> Option<&'static str> {
        match self.state {
            State::Running(_) => None,
            State::Leaving { .. } | State::Clearing(_) => Some("draining"),
            State::Waiting { .. } => Some("ended, starts again"),
            State::Failed => Some("failed"),
        }
    }

    /// Decides what follows an end by itself; returns the pause until the next start, if there is one.
    pub(crate) fn ended(&mut self, now: Instant) -> Option<Duration> {
        self.ready = false;
        self.worker = None;
        if self.starts >= MOST_STARTS {
            self.state = State::Failed;
            return None;
        }
        let pause = LONGEST_PAUSE.min(FIRST_PAUSE * 2_u32.pow(self.starts));
        self.state = State::Waiting { until: now + pause };
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member() -> Member {
        Member {
            part: Part::Processor,
            ordinal: 0,
            gpus: Vec::new(),
            log: PathBuf::new(),
            state: State::Failed,
            proven: true,
            ready: true,
            worker: None,
            starts: 0,
        }
    }

    #[test]
    fn pauses_grow_and_a_process_that_never_gets_ready_is_given_up() {
        let mut member = member();
        let mut pauses = Vec::new();
        while let Some(pause) = member.ended(Instant::now()) {
            pauses.push(pause.as_secs());
            member.starts += 1;
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16]);
        assert!(!member.counts());
    }
}
