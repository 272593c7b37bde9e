//! The engine's loop: requests in, steps in time, outputs out.

use std::collections::{BTreeMap, HashMap};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use crate::config::Config;
use crate::model::Chain;
use crate::publisher::Publisher;
use crate::request::{Request, Transfer};
use crate::scheduler::{Aborted, Finish, Output, Plan, Refusal, Scheduler, Serial};
use crate::sim::Exit;
use crate::transfer::{self, Side};
use crate::utilities::Utilities;
use crate::wire::events;
use crate::wire::outputs::{Answer, Batch, ENGINE_CORE_DEAD, Layout, UtilityResult};
use crate::wire::requests::{self, Add};

/// How far a step may lag behind its time before the clock starts anew.
const LAG: Duration = Duration::from_millis(100);

/// What a request is told while generation is paused.
const PAUSED: Refusal = Refusal {
    code: "engine_paused",
    message: "Generation is paused. Please retry after it resumes.",
    retryable: true,
};

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

    fn take(&mut self, input: Input) -> Result<(), Stop> {
        match input {
            Input::Message(frames) => {
                if self.deaf {
                    return Ok(());
                }
                match self.message(&frames) {
                    Ok(result) => return result,
                    Err(error) => {
                        error!(%error, "input thread ends, the engine hears nothing any more");
                        self.deaf = true;
                    }
                }
            }
            Input::Loaded(serial, result) => self.scheduler.loaded(serial, result),
            Input::Released(id) => {
                self.scheduler.unpin(&id);
            }
        }
        Ok(())
    }

    fn message(&mut self, frames: &[Bytes]) -> Result<Result<(), Stop>, requests::InputError> {
        let (kind, data) = match frames {
            [kind, data, ..] => (kind, data),
            _ => return Err(requests::InputError::Type("message")),
        };
        match kind.as_ref() {
            [0] => {
                let add = requests::decode_add(self.config.wire, data)?;
                self.adds += 1;
                if self
                    .config
                    .faults
                    .deaf_after_adds
                    .is_some_and(|adds| self.adds > adds)
                {
                    return Err(requests::InputError::Type("anything, as told"));
                }
                match add {
                    Add::Request(request) => return Ok(self.add(*request)),
                    Add::Refused { id, client } => {
                        let output = Output::ended(id.into(), client, Finish::Error);
                        self.say_ended(vec![output]);
                    }
                }
            }
            [1] => {
                for id in requests::decode_abort(data)? {
                    if let Some(aborted) = self.scheduler.abort(&id) {
                        debug!(id, "aborted");
                        drop(aborted.unfetched);
                    }
                }
            }
            [2] => {
                // START_DP_WAVE: an engine that is independent of others has no waves.
                super::wire::msgpack::decode(data)?;
            }
            [3] => {
                let call = requests::decode_utility(data)?;
                let aborted = self.utilities.aborts(&call, &mut self.scheduler);
                self.say_aborted(aborted);
                let calls = self.utilities.call(call, &mut self.scheduler);
                self.answer_calls(calls);
            }
            _ => return Err(requests::InputError::Type("message type")),
        }
        Ok(Ok(()))
    }

    /// Takes a request up. What a real engine dies of, this one dies of.
    fn add(&mut self, request: Request) -> Result<(), Stop> {
        let limits = &self.config.limits;
        let id = request.id.clone();
        if request.client >= self.outputs.len() {
            warn!(
                client = request.client,
                "output thread ends, the engine says nothing any more"
            );
            self.mute = true;
            return Ok(());
        }
        if request.prompt.is_empty() {
            return Err(Stop::Dead(format!("request {id} has an empty prompt")));
        }
        if request.prompt.len() > limits.max_model_len {
            let len = request.prompt.len();
            return Err(Stop::Dead(format!("request {id} has {len} prompt tokens")));
        }
        if let Some(token) = request.prompt.iter().find(|&&token| token >= limits.vocab) {
            return Err(Stop::Dead(format!("request {id} has token {token}")));
        }
        if self.utilities.turns_away && !request.abort_immediately {
            self.say_ended(vec![Output {
                refusal: Some(PAUSED),
                ..Output::ended(id, request.client, Finish::Error)
            }]);
            return Ok(());
        }
        let fetch = match &request.transfer {
            Transfer::Fetch(params) => self.config.connector.clone().zip(Some(params.clone())),
            Transfer::None | Transfer::Produce => None,
        };
        let abort = request.abort_immediately;
        let serial = match self.scheduler.add(request, monotonic()) {
            Ok(serial) => serial,
            Err(error) => return Err(Stop::Dead(error.to_string())),
        };
        if let Some((connector, params)) = fetch {
            let (start, started) = oneshot::channel();
            let (to_self, timing) = (self.to_self.clone(), self.config.timing);
            tokio::spawn(async move {
                match transfer::fetch(params, started, connector.failure_delay).await {
                    None => {}
                    Some(Ok((chain, tokens))) => {
                        tokio::time::sleep(timing.transfer(tokens)).await;
                        let _ = to_self.send(Input::Loaded(serial, Some((chain, tokens))));
                    }
                    Some(Err(error)) => {
                        warn!(%error, "cannot fetch KV");
                        let _ = to_self.send(Input::Loaded(serial, None));
                    }
                }
            });
            self.fetches.insert(serial, start);
        }
        if abort {
            self.scheduler.abort(&id);
        }
        // Dropping the sender of a request that is gone frees its KV where it was made.
        let scheduler = &self.scheduler;
        self.fetches.retain(|&serial, _| scheduler.is_live(serial));
        Ok(())
    }

    fn say_aborted(&mut self, aborted: Vec<Aborted>) {
        let ended = aborted.into_iter();
        let ended = ended.map(|a| Output::ended(a.id, a.client, Finish::Abort));
        self.say_ended(ended.collect());
    }

    fn say_ended(&mut self, outputs: Vec<Output>) {
        let mut by_client: BTreeMap<usize, Vec<Answer>> = BTreeMap::new();
        for output in outputs {
            by_client.entry(output.client).or_default().push(Answer {
                output,
                kv_transfer_params: None,
            });
        }
        for (client, answers) in by_client {
            let batch = Batch {
                answers,
                timestamp: monotonic(),
                list_finished: true,
                ..Batch::default()
            };
            self.say(client, &batch);
        }
    }

    fn answer_calls(&mut self, calls: Vec<(usize, UtilityResult)>) {
        for (client, utility) in calls {
            let batch = Batch {
                timestamp: monotonic(),
                utility: Some(utility),
                ..Batch::default()
            };
            self.say(client, &batch);
        }
    }

    fn say(&mut self, client: usize, batch: &Batch) {
        let Some(output) = self.outputs.get(client) else {
            warn!(
                client,
                "output thread ends, the engine says nothing any more"
            );
            self.mute = true;
            return;
        };
        if !self.mute {
            let _ = output.send(self.layout.encode(batch));
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
