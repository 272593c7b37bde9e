//! Workers that come and go while requests run.
//!
//! Additions come first, and removals begin when all that is new is ready and known to the processor: whatever the
//! numbers, somebody serves at every moment. Then prefill workers leave first, and the others when those are gone, so
//! that what was computed still finds who continues it.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Result, ensure};
use stator_common::card::Role;
use tokio::time::Instant;

use super::{Fleet, Member, State, has_role};
use crate::control::Replies;
use crate::plan::Part;
use crate::probe::Known;

/// What a new worker may take beyond the time that it gives its own engine.
const BEYOND_ENGINE: Duration = Duration::from_secs(5 * 60);
/// How long the processor may take to make use of workers that are ready; it looks every moment, but may itself
/// just be starting again.
const UNTIL_KNOWN: Duration = Duration::from_secs(60);

/// A change of numbers that is under way.
pub(crate) struct Scaling {
    counts: Vec<(Role, u16)>,
    added: Vec<Part>,
    /// Who leaves, stage by stage; absent until all that is new is there.
    leaving: Option<Vec<Vec<Part>>>,
    /// When those that are new must be ready.
    deadline: Instant,
    /// Since when they all are.
    ready_since: Option<Instant>,
    replies: Replies,
}

impl Fleet {
    /// Begins to bring the numbers of workers to `counts`; roles that are not named keep theirs.
    ///
    /// # Errors
    /// When the topology could not serve like that, there are too few GPUs, or a worker cannot be started. No worker
    /// leaves then, but those that had been started for it.
    pub(crate) fn scale(
        &mut self,
        counts: &[(Role, u16)],
        replies: Replies,
        now: Instant,
    ) -> Result<Scaling> {
        self.check(counts)?;
        for (role, _) in counts {
            self.forget_given_up(*role);
        }
        let added: Vec<Part> = counts
            .iter()
            .flat_map(|(role, wanted)| {
                let missing = usize::from(*wanted).saturating_sub(self.count(*role));
                let indices = self.free_indices(*role).take(missing);
                indices.map(|index| Part::Worker { role: *role, index })
            })
            .collect();
        let needs: Vec<_> = added
            .iter()
            .map(|part| (part.to_string(), self.plan.gpus(*part)))
            .collect();
        self.gpus.enough_for(&needs)?;
        for (at, part) in added.iter().enumerate() {
            if let Err(error) = self.add(*part) {
                dismiss(self, Some(&added[..at]), &replies, now);
                return Err(error);
            }
        }
        if !added.is_empty() {
            replies.say(&format!("{} starting", list(&added)));
        }
        Ok(Scaling {
            counts: counts.to_vec(),
            deadline: now
                + BEYOND_ENGINE
                + counts
                    .iter()
                    .map(|(role, _)| self.plan.engine_ready_timeout(*role))
                    .max()
                    .unwrap_or_default(),
            added,
            leaving: None,
            ready_since: None,
            replies,
        })
    }

    /// Refuses numbers with which the topology could not serve.
    fn check(&self, counts: &[(Role, u16)]) -> Result<()> {
        ensure!(
            !self.plan.up.headless,
            "a secondary node has one engine, and the first node decides about it"
        );
        ensure!(
            self.serves,
            "the topology is still starting; scale it when it answers"
        );
        for (at, (role, _)) in counts.iter().enumerate() {
            let again = counts[..at].iter().any(|(other, _)| other == role);
            ensure!(!again, "{role} is named twice");
        }
        let wanted = |role| {
            let named = counts.iter().find(|(named, _)| *named == role);
            named.map_or_else(|| self.count(role), |(_, n)| usize::from(*n))
        };
        let (prefill, decode) = (wanted(Role::Prefill), wanted(Role::Decode));
        ensure!(
            prefill > 0 || decode == 0,
            "{decode} decode workers need somebody to compute prompts: say prefill=1, or decode=0 too"
        );
        ensure!(
            decode > 0 || prefill == 0,
            "{prefill} prefill workers need somebody to continue prompts: say decode=1, or prefill=0 too"
        );
        ensure!(
            self.could_serve(&wanted),
            "nobody would serve: say agg=1 too, or end it all with stator down"
        );
        let mut growing = counts
            .iter()
            .filter(|(r, n)| usize::from(*n) > self.count(*r));
        growing.try_for_each(|(role, _)| self.plan.allows(*role))
    }

    /// Forgets the workers of a role that were given up.
    fn forget_given_up(&mut self, role: Role) {
        let given_up = |m: &Member| has_role(m.part, role) && matches!(m.state, State::Failed);
        while let Some(at) = self.members.iter().position(given_up) {
            self.forget(at);
        }
    }

    /// Returns the indices that no worker of a role has, the lowest first.
    fn free_indices(&self, wanted: Role) -> impl Iterator<Item = u16> + use<> {
        let taken: HashSet<u16> = self
            .workers()
            .filter_map(|member| match member.part {
                Part::Worker { role, index } if role == wanted => Some(index),
                Part::Worker { .. } | Part::Processor | Part::Headless(_) => None,
            })
            .collect();
        (0..u16::MAX).filter(move |index| !taken.contains(index))
    }

    /// Returns who of a role leaves if `keep` shall stay: those that are not ready, then the highest indices.
    fn surplus(&self, role: Role, keep: usize) -> Vec<Part> {
        let of_role = |m: &&Member| has_role(m.part, role) && m.counts();
        let mut members: Vec<_> = self.workers().filter(of_role).collect();
        // They are in the order of their indices, and sorting keeps that.
        members.sort_by_key(|member| !member.ready);
        members.iter().skip(keep).map(|m| m.part).collect()
    }

    fn position(&self, part: Part) -> Option<usize> {
        self.members.iter().position(|member| member.part == part)
    }
}

impl Scaling {
    /// Says whether it waits for new workers.
    pub(crate) fn is_joining(&self) -> bool {
        self.leaving.is_none()
    }

    /// Returns who waits for its end.
    pub(crate) fn replies(&self) -> &Replies {
        &self.replies
    }

    /// Goes on; returns how it ended, if it has.
    ///
    /// Those that are new have a deadline, so that one that never serves does not keep other changes from being made.
    /// They stay when it has passed.
    pub(crate) fn advance(
        &mut self,
        fleet: &mut Fleet,
        known: &Known,
        now: Instant,
    ) -> Option<Result<(), String>> {
        if let Some(stages) = &mut self.leaving {
            while let Some(stage) = stages.first() {
                if stage.iter().any(|part| fleet.position(*part).is_some()) {
                    return None;
                }
                stages.remove(0);
                dismiss(fleet, stages.first().map(Vec::as_slice), &self.replies, now);
            }
            return Some(Ok(()));
        }
        match self.joined(fleet, known, now) {
            Ok(true) => {}
            Ok(false) => return None,
            Err(why) => return Some(Err(format!("{why}; nobody was removed"))),
        }
        if !self.added.is_empty() {
            self.replies.say(&format!("{} ready", list(&self.added)));
        }
        let mut prefill = Vec::new();
        let mut others = Vec::new();
        for (role, keep) in &self.counts {
            let surplus = fleet.surplus(*role, usize::from(*keep));
            match role {
                Role::Prefill => prefill.extend(surplus),
                Role::Agg | Role::Decode | Role::Encode => others.extend(surplus),
            }
        }
        // An empty stage is over at once.
        let stages = vec![prefill, others];
        dismiss(fleet, stages.first().map(Vec::as_slice), &self.replies, now);
        self.leaving = Some(stages);
        None
    }

    /// Says whether all that is new is ready and known to the processor, or why it will not be.
    fn joined(&mut self, fleet: &Fleet, known: &Known, now: Instant) -> Result<bool, String> {
        let mut ready = Vec::new();
        for part in &self.added {
            let member = fleet.position(*part).map(|at| &fleet.members[at]);
            let Some(member) = member else {
                return Err(format!("{part} ended before it was ready"));
            };
            match member.state {
                State::Failed => {
                    return Err(format!("{part} was given up; see {}", member.log.display()));
                }
                State::Leaving { .. } | State::Clearing(_) => {
                    return Err(format!("{part} is told to end"));
                }
                State::Running(_) | State::Waiting { .. } => {}
            }
            if let Some(id) = member.worker.as_ref().filter(|_| member.ready) {
                ready.push((part, id));
            } else if now >= self.deadline {
                return Err(format!("{part} is not ready after a long time"));
            }
        }
        if ready.len() < self.added.len() {
            self.ready_since = None;
            return Ok(false);
        }
        let since = *self.ready_since.get_or_insert(now);
        let unknown = ready.iter().find(|(_, id)| !known.ready.contains(*id));
        let Some((part, id)) = unknown else {
            return Ok(true);
        };
        if now < since + UNTIL_KNOWN {
            return Ok(false);
        }
        Err(match known.refused.get(*id) {
            Some(reason) => format!("{part} is ready, but the processor does not use it: {reason}"),
            None => format!("{part} is ready, but the processor cannot send it requests"),
        })
    }
}

fn dismiss(fleet: &mut Fleet, stage: Option<&[Part]>, replies: &Replies, now: Instant) {
    let Some(stage) = stage.filter(|stage| !stage.is_empty()) else {
        return;
    };
    replies.say(&format!("{} draining", list(stage)));
    for part in stage {
        if let Some(at) = fleet.position(*part) {
            fleet.dismiss(at, now);
        }
    }
}

fn list(parts: &[Part]) -> String {
    let names: Vec<String> = parts.iter().map(Part::to_string).collect();
    let verb = if parts.len() == 1 { "is" } else { "are" };
    format!("{} {verb}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use clap::Parser;
    use tokio::sync::mpsc;

    use super::*;
    use crate::cli::{Cli, Command};
    use crate::gpus::Gpus;
    use crate::plan::Plan;

    const NEW: Part = Part::Worker {
        role: Role::Agg,
        index: 1,
    };

    fn fleet(state: State) -> Fleet {
        let Command::Up(up) = Cli::try_parse_from(["stator", "up", "m"]).unwrap().command else {
            panic!("not `up`");
        };
        let member = |part, state| Member {
            part,
            ordinal: 0,
            gpus: Vec::new(),
            log: PathBuf::new(),
            state,
            proven: true,
            ready: false,
            worker: Some("id".to_owned()),
            starts: 0,
        };
        let until = Instant::now();
        Fleet {
            plan: Plan::new(&up, "m", Path::new("/t"), Path::new("/b")).unwrap(),
            gpus: Gpus::default(),
            lines: mpsc::channel(1).0,
            members: vec![
                member(Part::Processor, State::Waiting { until }),
                member(NEW, state),
            ],
            serves: true,
            changed: false,
        }
    }

    fn scaling(now: Instant) -> Scaling {
        Scaling {
            counts: vec![(Role::Agg, 2)],
            added: vec![NEW],
            leaving: None,
            deadline: now + BEYOND_ENGINE,
            ready_since: None,
            replies: Replies::to_nobody(),
        }
    }

    #[test]
    fn a_change_ends_when_what_is_new_was_given_up_or_is_never_ready() {
        let now = Instant::now();
        let mut failed = fleet(State::Failed);
        let ended = scaling(now).advance(&mut failed, &Known::default(), now);
        assert!(ended.unwrap().unwrap_err().contains("given up"));

        let mut waits = fleet(State::Waiting { until: now });
        let mut change = scaling(now);
        let mut at = |time| change.advance(&mut waits, &Known::default(), time);
        assert!(at(now).is_none());
        let ended = at(now + BEYOND_ENGINE);
        assert!(ended.unwrap().unwrap_err().contains("not ready after"));
    }

    #[test]
    fn a_change_ends_when_the_processor_does_not_use_what_is_new() {
        let now = Instant::now();
        let mut fleet = fleet(State::Waiting { until: now });
        fleet.members[1].ready = true;
        let mut change = scaling(now);
        let refused = Known {
            refused: [("id".to_owned(), "it disagrees".to_owned())].into(),
            ..Known::default()
        };
        assert!(change.advance(&mut fleet, &refused, now).is_none());
        let later = now + UNTIL_KNOWN;
        let ended = change.advance(&mut fleet, &refused, later);
        assert!(ended.unwrap().unwrap_err().contains("it disagrees"));

        let known = Known {
            ready: ["id".to_owned()].into(),
            ..Known::default()
        };
        let mut change = scaling(now);
        assert!(change.advance(&mut fleet, &known, now).is_none());
        assert!(!change.is_joining());
    }
}
