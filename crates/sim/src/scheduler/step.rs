//! Planning a step and carrying it out.

use super::state::{EventKind, Finish, KvHandle, Output, PrefillStats, State, Status};
use super::{Load, Pause, Scheduler, Serial};
use crate::model::Logprobs;
use crate::request::Transfer;

/// The work of one step.
#[derive(Debug, Default)]
pub struct Plan {
    /// Prompt tokens to compute.
    pub prefill_tokens: usize,
    /// Requests that get their next token and compute one.
    pub decode_seqs: usize,
    /// Remote KV to fetch; answered with [`Scheduler::loaded`].
    pub loads: Vec<Load>,
    work: Vec<Serial>,
}

impl Plan {
    /// Whether there is nothing to compute.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.work.is_empty()
    }
}

impl Scheduler {
    /// Chooses what the next step computes, and takes the blocks for it.
    pub fn plan(&mut self, now: f64) -> Plan {
        let mut plan = Plan::default();
        if self.pause == Pause::All {
            return plan;
        }
        let mut budget = self.limits.max_num_batched_tokens;
        let preempted = self.plan_running(&mut plan, &mut budget, now);
        // Who just gave way does not come back in the same step, unless nobody is left.
        if !preempted || plan.is_empty() {
            self.plan_waiting(&mut plan, &mut budget, now);
        }
        plan
    }

    /// Gives every running request its next tokens; true if one had to give up its blocks.
    fn plan_running(&mut self, plan: &mut Plan, budget: &mut usize, now: f64) -> bool {
        let mut preempted = false;
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            let serial = self.running[index];
            let count = {
                let state = &self.requests[&serial];
                (state.tokens.len() - state.computed).min(*budget)
            };
            while !self.grow(serial, count) {
                preempted = true;
                let victim = self.victim();
                self.running.retain(|&other| other != victim);
                if let Some(at) = plan.work.iter().position(|&other| other == victim) {
                    plan.work.remove(at);
                    index -= 1;
                }
                self.preempt(victim, now);
                if victim == serial {
                    return true;
                }
            }
            self.advance(serial, count, plan, budget);
            index += 1;
        }
        preempted
    }

    fn plan_waiting(&mut self, plan: &mut Plan, budget: &mut usize, now: f64) {
        while *budget > 0 && self.running.len() < self.limits.max_num_seqs {
            let fetched = self.fetched.front().copied();
            // A pause keeps those out who have nothing yet.
            let next = match self.pause {
                Pause::Running => fetched.or_else(|| self.waiting.front().copied()),
                Pause::New | Pause::All => fetched,
            };
            let Some(serial) = next else {
                return;
            };
            if fetched.is_none() {
                self.reuse(serial);
            }
            let state = &self.requests[&serial];
            if let Transfer::Fetch(params) = &state.request.transfer {
                let load = Load {
                    serial,
                    params: params.clone(),
                };
                // The blocks are taken before the fetch, as they are what is fetched into.
                let count = state.prompt_len() - state.computed;
                if !self.grow(serial, count) {
                    self.give_back(serial);
                    return;
                }
                self.waiting.pop_front();
                self.first_scheduled(serial, count, now);
                self.state(serial).status = Status::Loading;
                plan.loads.push(load);
                continue;
            }
            let count = (state.tokens.len() - state.computed).min(*budget);
            if !self.grow(serial, count) {
                if fetched.is_none() {
                    self.give_back(serial);
                }
                return;
            }
            if fetched.is_none() {
                self.waiting.pop_front();
                self.first_scheduled(serial, 0, now);
            } else {
                self.fetched.pop_front();
            }
            self.state(serial).status = Status::Running;
            self.running.push(serial);
            self.advance(serial, count, plan, budget);
        }
    }

    /// Takes the blocks of the longest prefix that is cached.
    fn reuse(&mut self, serial: Serial) {
        let block_size = self.limits.block_size;
        let (caching, requests, pool) =
            (self.limits.prefix_caching, &mut self.requests, &self.pool);
        let Some(state) = requests.get_mut(&serial) else {
            return;
        };
        let mut hits = Vec::new();
        if caching && !state.request.sampling.skip_reading_prefix_cache {
            // The last token is always computed: there must be something to sample from.
            for block in 0..(state.tokens.len() - 1) / block_size {
                match pool.lookup(state.hash(block, block_size)) {
                    Some(id) => hits.push(id),
                    None => break,
                }
            }
        }
        self.pool.take(&hits);
        state.computed = hits.len() * block_size;
        state.cached = state.computed;
        state.stored = hits.len();
        state.blocks = hits;
    }

    /// Undoes [`Scheduler::reuse`] for a request that has to wait on.
    fn give_back(&mut self, serial: Serial) {
        let state = self.state(serial);
        let blocks = std::mem::take(&mut state.blocks);
        (state.computed, state.stored) = (0, 0);
        self.pool.release(&blocks);
    }

    /// Takes the blocks for `count` more tokens; false, and none taken, if there are too few.
    fn grow(&mut self, serial: Serial, count: usize) -> bool {
        let block_size = self.limits.block_size;
        let Some(state) = self.requests.get_mut(&serial) else {
            return false;
        };
        let need = (state.computed + count).div_ceil(block_size);
        let more = need.saturating_sub(state.blocks.len());
        match self.pool.allocate(more) {
            Some(blocks) => {
                state.blocks.extend(blocks);
                true
            }
            None => false,
        }
    }

    fn advance(&mut self, serial: Serial, count: usize, plan: &mut Plan, budget: &mut usize) {
        let block_size = self.limits.block_size;
        let Some(state) = self.requests.get_mut(&serial) else {
            return;
        };
        if state.computed + count == state.tokens.len() && count == 1 && state.answered {
            plan.decode_seqs += 1;
        } else {
            plan.prefill_tokens += count;
        }
        state.computed += count;
        state.store(&mut self.pool, block_size);
        plan.work.push(serial);
        *budget -= count;
    }

    fn first_scheduled(&mut self, serial: Serial, external: usize, now: f64) {
        let block_size = self.limits.block_size;
        let caching = self.limits.prefix_caching;
        let state = self.state(serial);
        state.event(EventKind::Scheduled, now);
        if state.preemptions > 0 || state.prefill.is_some() {
            return;
        }
        let (prompt, local) = (state.prompt_len(), state.cached);
        let findable = if caching {
            prompt / block_size * block_size
        } else {
            0
        };
        state.prefill = Some(PrefillStats {
            prompt,
            local_cached: local,
            external_cached: external,
            created: findable.saturating_sub(local + external),
        });
        if caching {
            self.stats.cache_requests += 1;
            self.stats.cache_queries += prompt;
            self.stats.cache_hits += local;
        }
    }

    fn victim(&self) -> Serial {
        let last = self.running.last().copied();
        let victim = if self.limits.by_priority {
            self.running
                .iter()
                .copied()
                .max_by_key(|&serial| (self.requests[&serial].request.priority, serial))
        } else {
            last
        };
        victim.expect("somebody runs while blocks are asked for")
    }

    /// Takes a request's blocks away; it starts again from what the cache still has.
    pub(super) fn preempt(&mut self, serial: Serial, now: f64) {
        let state = self.state(serial);
        let blocks = std::mem::take(&mut state.blocks);
        (state.computed, state.stored) = (0, 0);
        state.status = Status::Waiting;
        state.preemptions += 1;
        state.event(EventKind::Preempted, now);
        self.pool.release(&blocks);
        self.enqueue(serial);
    }

    /// Carries a planned step out: every request whose tokens are all computed gets its next one.
    ///
    /// Requests that were aborted since are passed over.
    pub fn commit(&mut self, plan: Plan) -> Vec<Output> {
        let mut outputs = std::mem::take(&mut self.extra);
        for serial in plan.work {
            let Some(state) = self.requests.get_mut(&serial) else {
                continue;
            };
            if state.status != Status::Running || state.computed < state.tokens.len() {
                continue;
            }
            let sampling = &state.request.sampling;
            let token = self.model.next(state.chain, sampling, state.output());
            let logprobs = sampling.logprobs.map(|top| {
                let top = usize::try_from(top).unwrap_or(self.limits.vocab as usize);
                vec![
                    self.model
                        .logprobs(state.chain, token, top, self.limits.vocab),
                ]
            });
            state.tokens.push(token);
            state.chain = state.chain.extend(token);
            let first = !std::mem::replace(&mut state.answered, true);
            let (finish, stop_token) = ending(state, self.limits.max_model_len);
            let prompt_logprobs = first
                .then(|| prompt_logprobs(&self.model, self.limits.vocab, state))
                .flatten();
            let mut output = Output {
                id: state.request.id.clone(),
                client: state.request.client,
                tokens: vec![token],
                logprobs,
                prompt_logprobs,
                finish,
                stop_token,
                events: state.take_events(),
                kv: None,
                prefill: if first { state.prefill } else { None },
                refusal: None,
            };
            if finish.is_some() {
                output.kv = self.end(serial);
            }
            outputs.push(output);
        }
        outputs
    }

    /// Lets go of a request that has ended; its blocks stay if another engine is to fetch them.
    fn end(&mut self, serial: Serial) -> Option<KvHandle> {
        let state = self.remove(serial);
        if state.request.transfer != Transfer::Produce {
            self.pool.release(&state.blocks);
            return None;
        }
        let tokens = state.computed.min(state.prompt_len());
        let start = self
            .model
            .start(state.request.lora.as_ref().map(|(_, name)| name.as_str()));
        let handle = KvHandle {
            blocks: state.blocks.clone(),
            tokens,
            chain: start.extend_all(&state.tokens[..tokens]),
            cached: state.prefill.map_or(0, |stats| stats.local_cached),
        };
        self.pinned.insert(state.request.id, state.blocks);
        Some(handle)
    }

    fn state(&mut self, serial: Serial) -> &mut State {
        self.requests
            .get_mut(&serial)
            .expect("a queued serial number names a request")
    }
}

/// Whether the last token ends the answer; the order of the rules is vLLM's
/// (v1/core/sched/utils.py, `check_stop`).
fn ending(state: &State, max_model_len: usize) -> (Option<Finish>, Option<u32>) {
    let sampling = &state.request.sampling;
    let Some(&token) = state.tokens.last() else {
        return (None, None);
    };
    if sampling.eos == Some(token) {
        (Some(Finish::Stop), None)
    } else if sampling.stop_token_ids.contains(&token) {
        (Some(Finish::Stop), Some(token))
    } else if state.tokens.len() >= max_model_len
        || state.output().len() >= sampling.max_tokens as usize
    {
        (Some(Finish::Length), None)
    } else {
        (None, None)
    }
}

fn prompt_logprobs(
    model: &crate::model::Model,
    vocab: u32,
    state: &State,
) -> Option<Vec<Logprobs>> {
    let top = state.request.sampling.prompt_logprobs?;
    let top = usize::try_from(top).unwrap_or(vocab as usize);
    let lora = state.request.lora.as_ref().map(|(_, name)| name.as_str());
    let mut chain = model.start(lora);
    let rows = state.request.prompt.windows(2).map(|pair| {
        chain = chain.extend(pair[0]);
        model.logprobs(chain, pair[1], top, vocab)
    });
    Some(rows.collect())
}
