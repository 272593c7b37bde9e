//! The engine's loop: requests in, steps in time, outputs out.

mod inbox;
mod voice;

use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::config::Config;
use crate::model::Chain;
use crate::publisher::Publisher;
use crate::scheduler::{Plan, Scheduler, Serial};
use crate::sim::Exit;
use crate::transfer::Side;
use crate::utilities::Utilities;
use crate::wire::events;
use crate::wire::outputs::{Answer, Batch, ENGINE_CORE_DEAD, Layout};

/// How far a step may lag behind its time before the clock starts anew.
const LAG: Duration = Duration::from_millis(100);

/// What happens to an engine.
#[derive(Debug)]
pub enum Input {
    /// A message from a frontend.
    Message(Vec<Bytes>),
    /// Remote KV was fetched, or not.
    Loaded(Serial, Option<(Chain, usize)>),
    /// Kept blocks are not needed any more.
    Released(String),
}

/// Why an engine stops before it is told to.
enum Stop {
    /// As an exception in a real engine's loop: it says that it is dead.
    Dead(String),
    /// Without a word.
    Vanished,
}

/// One engine behind its sockets.
pub struct Engine {
    config: Config,
    layout: Layout,
    pub(crate) scheduler: Scheduler,
    pub(crate) utilities: Utilities,
    inputs: mpsc::UnboundedReceiver<Input>,
    to_self: mpsc::UnboundedSender<Input>,
    outputs: Vec<mpsc::UnboundedSender<Vec<Bytes>>>,
    publisher: Option<Publisher>,
    side: Option<Side>,
    /// Tells the tasks that fetch KV when to do so.
    fetches: HashMap<Serial, oneshot::Sender<()>>,
    steps: u64,
    adds: u64,
    deaf: bool,
    mute: bool,
    /// Whether the last thing said was that something ran.
    ran: bool,
    /// When the step under way began.
    clock: Instant,
}

impl Engine {
    #[must_use]
    pub fn new(
        config: Config,
        inputs: mpsc::UnboundedReceiver<Input>,
        to_self: mpsc::UnboundedSender<Input>,
        outputs: Vec<mpsc::UnboundedSender<Vec<Bytes>>>,
        publisher: Option<Publisher>,
        side: Option<Side>,
    ) -> Self {
        Self {
            layout: Layout {
                version: config.wire,
                extra_fields: config.extra_fields,
                engine_index: config.dp_rank,
            },
            scheduler: Scheduler::new(config.limits.clone(), config.model.clone()),
            utilities: Utilities::new(&config),
            config,
            inputs,
            to_self,
            outputs,
            publisher,
            side,
            fetches: HashMap::new(),
            steps: 0,
            adds: 0,
            deaf: false,
            mute: false,
            ran: false,
            clock: Instant::now(),
        }
    }

    /// Runs until told to stop, or until something kills it.
    pub async fn run(mut self, stop: CancellationToken) -> Exit {
        let exit = tokio::select! {
            () = stop.cancelled() => None,
            exit = self.work() => Some(exit),
        };
        match exit {
            None => {
                let aborted = self.scheduler.abort_all();
                info!(requests = aborted.len(), "told to stop");
                self.say_aborted(aborted);
                Exit::Stopped
            }
            Some(Stop::Dead(reason)) => {
                error!(reason, "engine dies");
                for output in &self.outputs {
                    let _ = output.send(vec![Bytes::from_static(ENGINE_CORE_DEAD)]);
                }
                Exit::Dead(reason)
            }
            Some(Stop::Vanished) => Exit::Vanished,
        }
    }

    async fn work(&mut self) -> Stop {
        loop {
            while let Ok(input) = self.inputs.try_recv() {
                if let Err(stop) = self.take(input) {
                    return stop;
                }
            }
            if self.is_past(self.config.faults.hang_after_steps) {
                warn!("engine hangs");
                std::future::pending::<()>().await;
            }
            let mut plan = self.scheduler.plan(monotonic());
            for load in std::mem::take(&mut plan.loads) {
                if let Some(start) = self.fetches.remove(&load.serial) {
                    let _ = start.send(());
                }
            }
            if plan.is_empty() {
                self.finish(plan);
                let calls = self.utilities.now_idle(&mut self.scheduler);
                self.answer_calls(calls);
                match self.inputs.recv().await {
                    Some(input) => {
                        if let Err(stop) = self.take(input) {
                            return stop;
                        }
                    }
                    None => return Stop::Vanished,
                }
                self.clock = Instant::now();
                continue;
            }
            self.pass(self.config.timing.step(&plan)).await;
            self.finish(plan);
            self.steps += 1;
            if self.is_past(self.config.faults.die_after_steps) {
                return Stop::Dead("told to die after so many steps".into());
            }
            if self.is_past(self.config.faults.vanish_after_steps) {
                return Stop::Vanished;
            }
        }
    }

    fn is_past(&self, steps: Option<u64>) -> bool {
        steps.is_some_and(|steps| self.steps >= steps)
    }

    /// Lets the time of a step pass. Steps follow each other on one clock, so that the coarse timer
    /// does not add up.
    async fn pass(&mut self, cost: Duration) {
        if cost.is_zero() {
            tokio::task::yield_now().await;
            return;
        }
        self.clock += cost;
        let now = Instant::now();
        if self.clock + LAG < now {
            self.clock = now;
        }
        tokio::time::sleep_until(self.clock).await;
    }

    /// Carries a step out and tells everybody.
    fn finish(&mut self, plan: Plan) {
        let ran = !plan.is_empty();
        let outputs = self.scheduler.commit(plan);
        let said = !outputs.is_empty();
        let mut by_client: BTreeMap<usize, Vec<Answer>> = BTreeMap::new();
        for output in outputs {
            let kv_transfer_params = match (&self.side, &output.kv) {
                (Some(side), Some(handle)) => Some(side.produce(&output.id, handle)),
                _ => None,
            };
            by_client.entry(output.client).or_default().push(Answer {
                output,
                kv_transfer_params,
            });
        }
        // A real engine reports once more after its last step.
        let report = self.config.log_stats && (ran || self.ran || said);
        self.ran = ran;
        if report && by_client.is_empty() {
            by_client.insert(0, Vec::new());
        }
        let mut stats = report.then(|| self.scheduler.take_stats());
        for (client, answers) in by_client {
            let batch = Batch {
                answers,
                stats: stats.take(),
                timestamp: monotonic(),
                weight_version: Some(self.utilities.weight_version.clone()),
                ..Batch::default()
            };
            self.say(client, &batch);
        }
        if let Some(publisher) = &self.publisher
            && ran
        {
            let events = self.scheduler.take_events();
            if !events.is_empty() {
                let limits = &self.config.limits;
                let rank = self.config.dp_rank;
                publisher.publish(events::encode(wall(), &events, limits.block_size, rank));
            }
        }
    }
}

/// Seconds since this process first asked, as the engine's monotonic clock. Tokio's time, so that tests
/// may pause it.
#[must_use]
pub fn monotonic() -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

/// Seconds since 1970.
#[must_use]
pub fn wall() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |since| since.as_secs_f64())
}
