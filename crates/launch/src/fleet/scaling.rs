//! Workers that come and go while requests run.
//!
//! Additions come first, and removals begin when all that is new is ready and known to the processor: whatever the
//! numbers, somebody serves at every moment. Then prefill workers leave first, and the others when those are gone, so
//! that what was computed still finds who continues it.

use std::collections::HashSet;

use anyhow::{Result, ensure};
use stator_common::card::Role;
use tokio::time::Instant;

use super::{Fleet, Member, State, has_role};
use crate::control::Replies;
use crate::plan::Part;

/// A change of numbers that is under way.
pub(crate) struct Scaling {
    counts: Vec<(Role, u16)>,
    added: Vec<Part>,
    /// Who leaves, stage by stage; absent until all that is new is there.
    leaving: Option<Vec<Vec<Part>>>,
    replies: Replies,
}

impl Fleet {
    /// Begins to bring the numbers of workers to `counts`; roles that are not named keep theirs.
    ///
    /// # Errors
    /// When the topology could not serve like that, or there are too few GPUs; no worker comes or goes then.
    pub(crate) fn scale(&mut self, counts: &[(Role, u16)], replies: Replies) -> Result<Scaling> {
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
        for part in &added {
            self.add(*part)?;
        }
        if !added.is_empty() {
            replies.say(&format!("{} starting", list(&added)));
        }
        Ok(Scaling {
            counts: counts.to_vec(),
            added,
            leaving: None,
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
                Part::Worker { .. } | Part::Processor | Part::Headless => None,
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
    /// - `known`: the workers that the processor can send requests to.
    pub(crate) fn advance(
        &mut self,
        fleet: &mut Fleet,
        known: &HashSet<String>,
        now: Instant,
    ) -> Option<Result<(), String>> {
        if let Some(stages) = &mut self.leaving {
            while let Some(stage) = stages.first() {
                if stage.iter().any(|part| fleet.position(*part).is_some()) {
                    return None;
                }
                stages.remove(0);
                dismiss(fleet, stages.first(), &self.replies, now);
            }
            return Some(Ok(()));
        }
        for part in &self.added {
            let Some(at) = fleet.position(*part) else {
                return Some(Err(format!(
                    "{part} ended before it was ready; nobody was removed"
                )));
            };
            let member = &fleet.members[at];
            let id = member.worker.as_ref();
            if !member.ready || !id.is_some_and(|id| known.contains(id)) {
                return None;
            }
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
        dismiss(fleet, stages.first(), &self.replies, now);
        self.leaving = Some(stages);
        None
    }
}

fn dismiss(fleet: &mut Fleet, stage: Option<&Vec<Part>>, replies: &Replies, now: Instant) {
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
