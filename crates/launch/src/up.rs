//! `stator up`: start, wait until the model answers, watch, change what is asked to be changed, drain.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use stator_common::card::Role;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc};
use tokio::time::{self, Instant, MissedTickBehavior};

use crate::checks;
use crate::child::Line;
use crate::cli::{Engine, Up};
use crate::control::{Asked, Control, Replies, Request};
use crate::fleet::{Fleet, scaling::Scaling};
use crate::greeting;
use crate::plan::{Part, Plan};
use crate::probe::{Known, Probe, Status};
use crate::state::{self, Topology};
use crate::table::{Row, Table, state_of};

/// How often the table is refreshed: often enough to look alive, cheap enough to forget.
const REFRESH: Duration = Duration::from_millis(500);

/// Runs a topology until Ctrl-C, SIGTERM or `stator down`, or until it cannot go on.
///
/// # Errors
/// When something is missing, a process cannot be started, or those that are left cannot serve; what runs is drained
/// before this returns.
pub(crate) async fn run(up: &Up) -> Result<()> {
    let Some(model) = up.model() else {
        bail!("which model? Name a folder or a Hugging Face id: stator up MODEL");
    };
    let root = state::root(up.state_dir.as_deref()).context("open the state folder")?;
    let dir = root.join(&up.name);
    if let Some(running) = Topology::load(&dir) {
        bail!(
            "a topology named {:?} runs already (pid {}); stop it or give this one another --name",
            up.name,
            running.launcher_pid
        );
    }
    let plan = Plan::new(up, model, &dir, &checks::bin()?)?;
    let gpus = checks::gpus(&plan).await;
    checks::before_start(&plan, &gpus).await?;
    state::create(&dir).with_context(|| format!("create {}", dir.display()))?;
    let interrupts = Interrupts::listen()?;
    let control = Control::listen(&dir)?;
    let (lines, printed) = mpsc::channel(256);
    let mut fleet = Fleet::start(plan, gpus, lines)?;

    let live = !up.plain && std::io::stdout().is_terminal();
    let mut session = Session {
        dir,
        table: Table::open(live),
        printed,
        interrupts,
        control,
        scaling: None,
    };
    let table = &mut session.table;
    table.print(&format!("logs: {}", session.dir.display()));
    if up.engine == Engine::Attach {
        table.print(&greeting::attach_hint(&fleet));
    } else if up.headless {
        table.print("this node's engine joins that of the first node, which takes the requests");
    }
    let (outcome, end) = match session.watch(&mut fleet).await {
        Ok(end) => (Ok(()), end),
        Err(error) => (Err(error), End::default()),
    };
    let (drained, waiting) = session.drain(fleet, end).await;
    session.table.close();
    Topology::remove(&session.dir);
    let outcome = outcome.and(drained);
    for replies in waiting {
        replies.end(outcome.as_ref().map_err(|e| format!("{e:#}")).copied());
    }
    session.control.close(&session.dir).await;
    outcome
}

/// What a running topology shows and listens to.
struct Session {
    dir: PathBuf,
    table: Table,
    printed: mpsc::Receiver<Line>,
    interrupts: Interrupts,
    control: Control,
    /// At most one change at a time.
    scaling: Option<Scaling>,
}

/// How a topology is told to end.
#[derive(Default)]
struct End {
    /// Who waits for it.
    waiting: Vec<Replies>,
    /// Without draining.
    now: bool,
}

impl Session {
    /// Shows the topology until it shall end.
    ///
    /// # Errors
    /// When it cannot go on.
    async fn watch(&mut self, fleet: &mut Fleet) -> Result<End> {
        let probe = Probe::new();
        let mut announced = false;
        let mut tick = time::interval(REFRESH);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.interrupts.next() => return Ok(End::default()),
                Some(line) = self.printed.recv() => self.table.child(&line),
                asked = self.control.next() => match asked.request {
                    Request::Down { now } => {
                        return Ok(End { waiting: vec![asked.replies], now });
                    }
                    Request::Scale { counts, wait } => {
                        self.scale(fleet, &counts, &asked.replies, wait);
                    }
                },
                _ = tick.tick() => {
                    for notice in fleet.advance(Instant::now())? {
                        self.table.print(&notice);
                    }
                    let statuses = statuses(fleet, &probe).await;
                    fleet.observe(&statuses);
                    self.table.show(&rows(fleet, &statuses));
                    if !announced {
                        unrefused(fleet, &probe).await?;
                    }
                    if !announced && serves(fleet, &statuses) {
                        announced = true;
                        fleet.set_serving();
                        self.table.print(&greeting::ready(fleet, &statuses));
                    }
                    self.go_on(fleet, &probe).await;
                    if let Some(topology) = fleet.take_changed() {
                        topology.save(&self.dir).context("write the state file")?;
                    }
                }
            }
        }
    }

    fn scale(&mut self, fleet: &mut Fleet, counts: &[(Role, u16)], replies: &Replies, wait: bool) {
        if self.scaling.is_some() {
            replies.end(Err(
                "another change is under way; try again when it is done".into(),
            ));
            return;
        }
        match fleet.scale(counts, replies.clone(), Instant::now()) {
            Ok(scaling) => {
                if !wait {
                    replies.end(Ok(()));
                }
                self.scaling = Some(scaling);
            }
            Err(error) => replies.end(Err(format!("{error:#}"))),
        }
    }

    /// Goes on with a change of numbers that is under way.
    async fn go_on(&mut self, fleet: &mut Fleet, probe: &Probe) {
        let Some(scaling) = &mut self.scaling else {
            return;
        };
        let processor = fleet.members().first().and_then(|m| m.system_url());
        let known = match processor {
            Some(url) if scaling.is_joining() => probe.workers(&url).await,
            Some(_) | None => Known::default(),
        };
        if let Some(outcome) = scaling.advance(fleet, &known, Instant::now()) {
            match &outcome {
                Ok(()) => self.table.print("scaled"),
                Err(reason) => self.table.print(&format!("not scaled: {reason}")),
            }
            scaling.replies().end(outcome);
            self.scaling = None;
        }
    }

    /// Drains the topology; returns who waits for its end, too.
    ///
    /// # Errors
    /// As [`Fleet::drain`].
    async fn drain(&mut self, fleet: Fleet, end: End) -> (Result<()>, Vec<Replies>) {
        let End { mut waiting, now } = end;
        self.table.print("draining; a second Ctrl-C ends at once");
        let at_once = Notify::new();
        if now {
            at_once.notify_one();
        }
        let drained = fleet.drain(at_once.notified());
        tokio::pin!(drained);
        loop {
            tokio::select! {
                outcome = &mut drained => return (outcome, waiting),
                () = self.interrupts.next() => at_once.notify_one(),
                Some(line) = self.printed.recv() => self.table.child(&line),
                Asked { request, replies } = self.control.next() => match request {
                    Request::Down { now } => {
                        waiting.push(replies);
                        if now {
                            at_once.notify_one();
                        }
                    }
                    Request::Scale { .. } => replies.end(Err("the topology is draining".into())),
                },
            }
        }
    }
}

async fn statuses(fleet: &Fleet, probe: &Probe) -> Vec<Option<Status>> {
    let urls = fleet.members().iter().map(|member| member.system_url());
    let mut tasks = tokio::task::JoinSet::new();
    for (index, url) in urls.enumerate() {
        let probe = probe.clone();
        tasks.spawn(async move {
            let status = match url {
                Some(url) => probe.status(&url).await,
                None => None,
            };
            (index, status)
        });
    }
    let mut statuses = vec![None; fleet.members().len()];
    while let Some(Ok((index, status))) = tasks.join_next().await {
        statuses[index] = status;
    }
    statuses
}

fn rows<'a>(fleet: &Fleet, statuses: &'a [Option<Status>]) -> Vec<Row<'a>> {
    let members = fleet.members().iter().zip(statuses);
    members
        .map(|(member, status)| Row {
            name: member.name(),
            state: match (member.note(), status) {
                (Some(note), _) => note.to_owned(),
                (None, Some(status)) => state_of(status),
                (None, None) if matches!(member.part, Part::Headless(_)) => "running".to_owned(),
                (None, None) => "starting".to_owned(),
            },
            status: status.as_ref(),
        })
        .collect()
}

/// Says whether every process is ready and the processor has a model that answers. A secondary node answers nobody.
fn serves(fleet: &Fleet, statuses: &[Option<Status>]) -> bool {
    let ready = fleet.members().iter().all(|member| member.ready);
    ready && statuses[0].as_ref().is_some_and(|s| !s.models.is_empty())
}

/// Says which worker the processor does not use, and why: a topology of which it is part will not serve as it was meant
/// to, however long one waits.
async fn unrefused(fleet: &Fleet, probe: &Probe) -> Result<()> {
    let Some(url) = fleet
        .members()
        .first()
        .and_then(|member| member.system_url())
    else {
        return Ok(());
    };
    // Nobody is refused before it is ready.
    if !fleet.members().iter().skip(1).any(|member| member.ready) {
        return Ok(());
    }
    let known = probe.workers(&url).await;
    for member in fleet.members() {
        let refused = member.worker.as_ref().and_then(|id| known.refused.get(id));
        if let Some(reason) = refused {
            bail!("the processor does not use {}: {reason}", member.name());
        }
    }
    Ok(())
}

/// Ctrl-C and SIGTERM, as events.
struct Interrupts {
    int: tokio::signal::unix::Signal,
    term: tokio::signal::unix::Signal,
}

impl Interrupts {
    fn listen() -> Result<Interrupts> {
        Ok(Interrupts {
            int: signal(SignalKind::interrupt()).context("listen for SIGINT")?,
            term: signal(SignalKind::terminate()).context("listen for SIGTERM")?,
        })
    }

    /// Waits for the next one. Cancel safe.
    async fn next(&mut self) {
        tokio::select! {
            _ = self.int.recv() => {}
            _ = self.term.recv() => {}
        }
    }
}
