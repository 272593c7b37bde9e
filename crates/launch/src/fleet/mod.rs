//! The processes of a running topology: who they are, what becomes of one that ends, how some come and go.
//!
//! Nothing here waits, but [`Fleet::drain`]: [`Fleet::advance`] is called over and over, and does what is due.

pub(crate) mod drain;
mod ends;
mod member;
pub(crate) mod scaling;

use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use stator_common::card::Role;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::child::{Child, Line};
use crate::cores;
use crate::gpus::Gpus;
use crate::plan::{Part, Place, Plan};
use crate::ports;
use crate::probe::Status;
use crate::state::{Process, Topology};

pub(crate) use member::{Member, State};

/// What a worker needs to end beyond the drain's grace; it gives its engine 10 s itself (`stator-engine`'s `shutdown`).
const GOODBYE: Duration = Duration::from_secs(15);

/// The processes of a topology, the processor first.
pub(crate) struct Fleet {
    plan: Plan,
    gpus: Gpus,
    lines: mpsc::Sender<Line>,
    members: Vec<Member>,
    /// Whether the topology has answered.
    serves: bool,
    /// Whether what is on disk is out of date.
    changed: bool,
}

impl Fleet {
    /// Starts everything that the plan begins with.
    ///
    /// # Errors
    /// When a process cannot be started, or there are too few GPUs; what was started is killed.
    pub(crate) fn start(plan: Plan, gpus: Gpus, lines: mpsc::Sender<Line>) -> Result<Fleet> {
        let mut fleet = Fleet {
            plan,
            gpus,
            lines,
            members: Vec::new(),
            serves: false,
            changed: true,
        };
        for part in fleet.plan.parts() {
            fleet.add(part)?;
        }
        Ok(fleet)
    }

    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    pub(crate) fn members(&self) -> &[Member] {
        &self.members
    }

    /// Says that the topology answers: from now on it goes on without one that ends.
    pub(crate) fn set_serving(&mut self) {
        self.serves = true;
    }

    /// Returns the topology for whoever reads its file, if that has changed since it was last asked for.
    pub(crate) fn take_changed(&mut self) -> Option<Topology> {
        std::mem::take(&mut self.changed).then(|| self.describe())
    }

    /// Takes note of what the processes say of themselves; in the order of [`Fleet::members`].
    pub(crate) fn observe(&mut self, statuses: &[Option<Status>]) {
        for (member, status) in self.members.iter_mut().zip(statuses) {
            member.ready = status.as_ref().is_some_and(Status::is_ready);
            member.worker = status.as_ref().and_then(|s| s.worker.clone());
            if member.ready {
                member.proven = true;
                member.starts = 0;
            }
        }
    }

    /// Says whether a topology with so many workers of each role, and the processor as it is, could serve.
    fn could_serve(&self, count: &dyn Fn(Role) -> usize) -> bool {
        let first = self.members.first().is_some_and(Member::counts);
        let pair = count(Role::Prefill) > 0 && count(Role::Decode) > 0;
        first && (count(Role::Agg) > 0 || pair)
    }

    /// Returns how many workers of a role serve, or will.
    fn count(&self, role: Role) -> usize {
        let counted = self.members.iter().filter(|m| m.counts());
        counted.filter(|m| has_role(m.part, role)).count()
    }

    /// Starts a new member.
    fn add(&mut self, part: Part) -> Result<()> {
        let gpus = self.gpus.take(&part.to_string(), self.plan.gpus(part))?;
        let taken: Vec<u16> = self.workers().map(|m| m.ordinal).collect();
        let ordinal = (0..u16::MAX)
            .find(|n| !taken.contains(n))
            .unwrap_or(u16::MAX);
        let child = self.launch(part, ordinal, &gpus)?;
        let member = Member {
            part,
            ordinal,
            gpus,
            log: child.log.clone(),
            state: State::Running(child),
            proven: false,
            ready: false,
            worker: None,
            starts: 1,
        };
        // Shown role by role, whenever it came.
        let key = |part| match part {
            Part::Processor | Part::Headless(_) => (0, 0),
            Part::Worker { role, index } => (1 + role as usize, index),
        };
        let at = self.members.partition_point(|m| key(m.part) <= key(part));
        self.members.insert(at, member);
        self.changed = true;
        Ok(())
    }

    fn launch(&self, part: Part, ordinal: u16, gpus: &[String]) -> Result<Child> {
        let place = Place {
            system_port: self.free_port()?,
            ordinal,
            gpus: gpus.to_vec(),
            in_bus_order: self.gpus.in_bus_order(),
            cores: cores::environment(&self.gpus, self.devices_with(part)),
        };
        let spec = self.plan.spec(part, place)?;
        Ok(Child::start(spec, &self.plan.dir, self.lines.clone())?)
    }

    /// Returns how many devices compute when all have started that the plan begins with, those that came, and this one.
    fn devices_with(&self, part: Part) -> usize {
        let others = self.members.iter().map(|m| m.part).filter(|p| *p != part);
        let now: usize = others.chain([part]).map(|p| self.plan.devices_of(p)).sum();
        now.max(self.plan.devices())
    }

    /// Returns a free port that no member was told to take, whether or not it has done so yet.
    fn free_port(&self) -> Result<u16> {
        let told = |port: &u16| {
            let children = self.members.iter().filter_map(Member::child);
            children
                .map(|c| c.spec.place.system_port)
                .any(|p| p == *port)
        };
        // One more than there are members holds one that none of them has.
        let free = ports::free(self.members.len() + 1).context("find free ports")?;
        let port = free.into_iter().find(|port| !told(port));
        port.context("find a free port")
    }

    /// Tells a member to end, and drops one that does not run.
    fn dismiss(&mut self, at: usize, now: Instant) {
        self.changed = true;
        let member = &mut self.members[at];
        match std::mem::replace(&mut member.state, State::Failed) {
            State::Running(child) => {
                child.signal(Signal::SIGTERM);
                let deadline = now + self.plan.up.drain_grace + GOODBYE;
                member.state = State::Leaving { child, deadline };
            }
            leaving @ (State::Leaving { .. } | State::Clearing(_)) => member.state = leaving,
            State::Waiting { .. } | State::Failed => self.forget(at),
        }
    }

    fn forget(&mut self, at: usize) {
        let gone = self.members.remove(at);
        self.gpus.give_back(&gone.gpus);
        self.changed = true;
    }

    fn workers(&self) -> impl Iterator<Item = &Member> {
        let members = self.members.iter();
        members.filter(|m| matches!(m.part, Part::Worker { .. }))
    }

    fn describe(&self) -> Topology {
        let up = &self.plan.up;
        Topology {
            name: up.name.clone(),
            launcher_pid: std::process::id(),
            launcher_started: stator_common::process::start_of(std::process::id()),
            model: self.plan.model.clone(),
            url: self.plan.url(),
            processes: self.members.iter().map(process).collect(),
        }
    }
}

fn process(member: &Member) -> Process {
    Process {
        name: member.name(),
        role: member.part.role(),
        pid: member.child().map(Child::pid),
        system_url: member.system_url(),
        log: member.log.clone(),
        gpus: member.gpus.clone(),
        note: member.note().map(str::to_owned),
    }
}

fn has_role(part: Part, wanted: Role) -> bool {
    matches!(part, Part::Worker { role, .. } if role == wanted)
}
