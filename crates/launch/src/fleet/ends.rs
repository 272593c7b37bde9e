//! What becomes of a process that ends.
//!
//! Until the topology has answered for the first time, a process that ends by itself ends everything: what is wrong then
//! is wrong with the command line or the machine, and the person is still looking. Afterwards requests depend on the
//! others: what had been ready once is started again, after a pause that grows, until it has failed five times in a
//! row. The topology ends when those that are left cannot serve. A worker that was added later and never got ready is
//! dropped.

use std::process::ExitStatus;

use anyhow::{Result, bail, ensure};
use nix::sys::signal::Signal;
use tokio::time::Instant;

use super::{Fleet, Member, State};
use crate::child::{self, Child};
use crate::plan::Part;

impl Fleet {
    /// Does what is due: takes note of ends, starts again, kills what did not leave in time.
    ///
    /// - result: what a person wants to know of it.
    ///
    /// # Errors
    /// When the topology cannot go on.
    pub(crate) fn advance(&mut self, now: Instant) -> Result<Vec<String>> {
        let mut notices = Vec::new();
        let mut at = 0;
        while at < self.members.len() {
            let member = &mut self.members[at];
            let name = member.name();
            let goes = match &mut member.state {
                State::Running(child) => match child.try_wait()? {
                    Some(status) => {
                        let how = last_words(child, status);
                        !self.ended(at, &how, now, &mut notices)?
                    }
                    None => false,
                },
                State::Leaving { child, deadline } => {
                    let ended = child.try_wait()?;
                    if ended.is_none() && *deadline <= now {
                        child.signal(Signal::SIGKILL);
                    }
                    ended.is_some_and(|status| {
                        notices.push(match status.success() {
                            true => format!("{name} is gone"),
                            false => format!("{name} {} while it drained", child::describe(status)),
                        });
                        !self.clear(at)
                    })
                }
                State::Clearing(task) => task.is_finished(),
                State::Waiting { until } if *until <= now => match self.restart(at) {
                    Ok(()) => false,
                    Err(error) => {
                        let how = format!("{name} cannot be started: {error:#}");
                        !self.ended(at, &how, now, &mut notices)?
                    }
                },
                State::Waiting { .. } | State::Failed => false,
            };
            if goes {
                self.forget(at);
            } else {
                at += 1;
            }
        }
        Ok(notices)
    }

    /// Decides about a process that ended by itself; returns whether it stays a member.
    fn ended(
        &mut self,
        at: usize,
        how: &str,
        now: Instant,
        notices: &mut Vec<String>,
    ) -> Result<bool> {
        if !self.serves {
            bail!("{how}");
        }
        self.changed = true;
        let member = &mut self.members[at];
        if !member.proven {
            notices.push(how.to_owned());
            return Ok(false);
        }
        let name = member.name();
        match member.ended(now) {
            Some(pause) => {
                let pause = humantime::format_duration(pause);
                notices.push(format!("{how}\n{name} is started again in {pause}"));
                return Ok(true);
            }
            None => notices.push(format!("{how}\n{name} is given up")),
        }
        ensure!(
            self.could_serve(&|role| self.count(role)),
            "{how}\n{name} is given up, and without it nothing is served"
        );
        Ok(true)
    }

    fn restart(&mut self, at: usize) -> Result<()> {
        let Member {
            part,
            ordinal,
            ref gpus,
            ..
        } = self.members[at];
        let gpus = gpus.clone();
        self.members[at].starts += 1;
        let child = self.launch(part, ordinal, &gpus)?;
        self.members[at].state = State::Running(child);
        self.changed = true;
        Ok(())
    }

    /// Begins to end engines that a removed worker left running; says whether there may be any.
    fn clear(&mut self, at: usize) -> bool {
        let member = &mut self.members[at];
        let keeps = self.plan.up.engine_keep && matches!(member.part, Part::Worker { .. });
        if keeps {
            let run_dirs = self.plan.run_dirs(member.part);
            let log = member.log.clone();
            member.state = State::Clearing(tokio::spawn(async move {
                for run_dir in run_dirs {
                    if let Err(error) = stator_engine::end_left(&run_dir).await {
                        child::note(
                            &log,
                            &format!("cannot end the engine of {}: {error}", run_dir.display()),
                        );
                    }
                }
            }));
        }
        keeps
    }
}

/// Says how a process ended, with the end of its log.
fn last_words(child: &Child, status: ExitStatus) -> String {
    format!(
        "{} {}; its last lines ({}):\n{}",
        child.spec.name,
        child::describe(status),
        child.log.display(),
        child.last_lines()
    )
}
