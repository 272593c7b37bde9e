//! Utility calls: what a frontend may ask of an engine beside tokens.
//!
//! Names, arguments, results and messages are those of vLLM 0.32 (v1/engine/core.py).

use std::collections::BTreeMap;

use crate::config::Config;
use crate::scheduler::{Aborted, Pause, Scheduler};
use crate::wire::WireVersion;
use crate::wire::msgpack::Value;
use crate::wire::outputs::UtilityResult;
use crate::wire::requests::{Call, decode_lora};

const NO_LORA: &str = "LoRA is not enabled. Use --enable-lora to enable LoRA.";

/// What utility calls change.
#[derive(Debug)]
pub struct Utilities {
    wire: WireVersion,
    max_loras: usize,
    loras: BTreeMap<u64, String>,
    asleep: bool,
    /// Whether a pause turns new requests away instead of keeping them (0.33's `pause_generation`).
    pub(crate) turns_away: bool,
    pub(crate) weight_version: String,
    /// Calls that are answered once nothing runs.
    waiting: Vec<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    client: usize,
    call_id: Value,
    clear_cache: bool,
    /// Whether the weights go to sleep then.
    sleep: bool,
}

enum Reply {
    Now(Value),
    Later,
}

impl Utilities {
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            wire: config.wire,
            max_loras: config.max_loras,
            loras: BTreeMap::new(),
            asleep: false,
            turns_away: false,
            weight_version: "default".into(),
            waiting: Vec::new(),
        }
    }

    /// The requests that a call ends at once: pausing or sleeping in mode `abort`.
    pub(crate) fn aborts(&self, call: &Call, scheduler: &mut Scheduler) -> Vec<Aborted> {
        let mode = match call.method.as_str() {
            "pause_scheduler" | "pause_generation" => call.args.first(),
            "sleep" => call.args.get(1),
            _ => return Vec::new(),
        };
        match mode.map_or(Some("abort"), Value::as_str) {
            Some("abort") => scheduler.abort_all(),
            _ => Vec::new(),
        }
    }

    /// Carries a call out. The answers that are due, by client.
    pub(crate) fn call(
        &mut self,
        call: Call,
        scheduler: &mut Scheduler,
    ) -> Vec<(usize, UtilityResult)> {
        let result = match self.dispatch(&call, scheduler) {
            Ok(Reply::Now(value)) => Ok(value),
            Ok(Reply::Later) => return self.now_idle(scheduler),
            Err(message) => Err(format!("Call to {} method failed: {message}", call.method)),
        };
        let result = UtilityResult {
            call_id: call.id,
            result,
        };
        vec![(call.client, result)]
    }

    /// Answers the calls that waited for the engine to be idle, if it is.
    pub(crate) fn now_idle(&mut self, scheduler: &mut Scheduler) -> Vec<(usize, UtilityResult)> {
        if scheduler.running() > 0 && scheduler.pause() != Pause::All {
            return Vec::new();
        }
        let mut answers = Vec::new();
        for waiting in std::mem::take(&mut self.waiting) {
            let mut result = Ok(Value::Nil);
            if waiting.clear_cache
                && !scheduler.reset_prefix_cache(true, crate::engine::monotonic())
            {
                result = Err("Failed to reset the KV connector cache.".to_owned());
            }
            self.asleep |= waiting.sleep;
            let result = UtilityResult {
                call_id: waiting.call_id,
                result,
            };
            answers.push((waiting.client, result));
        }
        answers
    }

    fn dispatch(&mut self, call: &Call, scheduler: &mut Scheduler) -> Result<Reply, String> {
        let now = |value: Value| Ok(Reply::Now(value));
        let flag = |index: usize| call.args.get(index).and_then(Value::as_bool);
        let paused = scheduler.pause() != Pause::Running;
        let most = arity(&call.method);
        if most.is_some_and(|most| call.args.len() > most) {
            // An assertion without a message.
            return Err(String::new());
        }
        match call.method.as_str() {
            "is_scheduler_paused" => now(paused.into()),
            "is_sleeping" => now((paused || self.asleep).into()),
            "get_supported_tasks" => now(vec!["generate".to_owned()].into()),
            "get_kv_cache_group_metadata" => now(Value::Array(vec![Value::map([
                ("group_idx", Value::Int(0)),
                ("kind", "full_attention".into()),
                ("block_size", scheduler.limits().block_size.into()),
                ("sliding_window", Value::Nil),
            ])])),
            "reset_prefix_cache" => {
                let restart = flag(0).unwrap_or(false);
                now(scheduler
                    .reset_prefix_cache(restart, crate::engine::monotonic())
                    .into())
            }
            "reset_mm_cache" | "reset_encoder_cache" | "execute_dummy_batch" | "profile" => {
                now(Value::Nil)
            }
            "pause_scheduler" => {
                let clear_cache = flag(1).unwrap_or(true);
                self.pause(call, call.args.first(), clear_cache, false, scheduler)
            }
            "pause_generation" if self.wire == WireVersion::V0_33 => {
                let clear_cache = flag(1).unwrap_or(true);
                let reply = self.pause(call, call.args.first(), clear_cache, false, scheduler)?;
                self.turns_away = scheduler.pause() == Pause::New;
                Ok(reply)
            }
            "resume_scheduler" => {
                self.turns_away = false;
                scheduler.set_pause(Pause::Running);
                now(Value::Nil)
            }
            "sleep" => {
                let level = call.args.first().map_or(Some(1), Value::as_u64);
                let level = level.ok_or("sleep level is not a number")?;
                self.pause(call, call.args.get(1), level >= 1, level >= 1, scheduler)
            }
            "wake_up" => {
                let tags = call.args.first().and_then(Value::as_array);
                let only_scheduling =
                    tags.is_some_and(|tags| tags.iter().all(|t| t.as_str() == Some("scheduling")));
                self.asleep &= only_scheduling;
                if !self.asleep {
                    self.turns_away = false;
                    scheduler.set_pause(Pause::Running);
                }
                now(match self.wire {
                    WireVersion::V0_27 => Value::Nil,
                    WireVersion::V0_32 | WireVersion::V0_33 => Value::Bool(!self.asleep),
                })
            }
            "release_kv_cache_memory" if paused && scheduler.unfinished() == 0 => now(Value::Nil),
            "release_kv_cache_memory" => {
                Err("release_kv_cache_memory() requires a completed pause first".into())
            }
            "get_weight_version" => now(self.weight_version.as_str().into()),
            "set_weight_version" => {
                let version = call.args.first().and_then(Value::as_str);
                self.weight_version = version.ok_or("weight version is not text")?.to_owned();
                now(Value::Nil)
            }
            "add_lora" | "remove_lora" | "pin_lora" | "list_loras" => {
                self.lora(call).map(Reply::Now)
            }
            "collective_rpc" => {
                let method = call.args.first().and_then(Value::as_str).unwrap_or("");
                Err(format!("Method '{method}' is not implemented."))
            }
            method => Err(format!(
                "'EngineCoreProc' object has no attribute '{method}'"
            )),
        }
    }

    fn pause(
        &mut self,
        call: &Call,
        mode: Option<&Value>,
        clear_cache: bool,
        sleep: bool,
        scheduler: &mut Scheduler,
    ) -> Result<Reply, String> {
        let mode = mode.map_or(Some("abort"), Value::as_str).unwrap_or("");
        scheduler.set_pause(match mode {
            "abort" | "wait" => Pause::New,
            "keep" => Pause::All,
            other => return Err(format!("Invalid pause mode: {other}")),
        });
        self.waiting.push(Waiting {
            client: call.client,
            call_id: call.id.clone(),
            clear_cache,
            sleep,
        });
        Ok(Reply::Later)
    }

    fn lora(&mut self, call: &Call) -> Result<Value, String> {
        if self.max_loras == 0 {
            return Err(NO_LORA.into());
        }
        let first = call.args.first();
        let id = first
            .and_then(Value::as_u64)
            .ok_or("adapter id is not a number");
        match call.method.as_str() {
            "add_lora" => {
                let request = first.ok_or("no adapter")?;
                let (id, name) =
                    decode_lora(self.wire, request).map_err(|error| error.to_string())?;
                // The least recently added one gives way.
                if self.loras.len() >= self.max_loras && !self.loras.contains_key(&id) {
                    self.loras.pop_first();
                }
                Ok(self.loras.insert(id, name).is_none().into())
            }
            "remove_lora" => Ok(self.loras.remove(&id?).is_some().into()),
            "pin_lora" => Ok(self.loras.contains_key(&id?).into()),
            _ => Ok(self.loras.keys().copied().collect::<Vec<_>>().into()),
        }
    }
}

/// How many arguments a method takes at most; `None` for those that do not look.
fn arity(method: &str) -> Option<usize> {
    Some(match method {
        "is_scheduler_paused"
        | "is_sleeping"
        | "get_supported_tasks"
        | "list_loras"
        | "get_kv_cache_group_metadata"
        | "reset_mm_cache"
        | "reset_encoder_cache"
        | "resume_scheduler"
        | "get_weight_version"
        | "release_kv_cache_memory" => 0,
        "add_lora" | "remove_lora" | "pin_lora" | "wake_up" | "set_weight_version" => 1,
        "reset_prefix_cache" | "pause_scheduler" | "pause_generation" | "sleep" => 2,
        _ => return None,
    })
}
