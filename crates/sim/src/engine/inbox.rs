//! What a frontend sends: taken up, refused, or died of.

use bytes::Bytes;
use tokio::sync::oneshot;
use tracing::{error, warn};

use super::{Engine, Input, Stop, monotonic};
use crate::request::{Request, Transfer};
use crate::scheduler::{Finish, Output, Refusal};
use crate::transfer;
use crate::wire::requests::{self, Add};

/// What a request is told while generation is paused.
const PAUSED: Refusal = Refusal {
    code: "engine_paused",
    message: "Generation is paused. Please retry after it resumes.",
    retryable: true,
};

impl Engine {
    /// Takes in what happened.
    pub(super) fn take(&mut self, input: Input) -> Result<(), Stop> {
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
                // A real engine takes steps for as long as it keeps KV, and reports after the last one.
                self.ran = true;
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
                    self.scheduler.abort(&id);
                }
                self.forget_fetches();
            }
            [2] => {
                // START_DP_WAVE: an engine that is independent of others has no waves.
                crate::wire::msgpack::decode(data)?;
            }
            [3] => {
                let call = requests::decode_utility(data)?;
                let aborted = self.utilities.aborts(&call, &mut self.scheduler);
                self.say_aborted(aborted);
                self.forget_fetches();
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
        self.forget_fetches();
        Ok(())
    }

    /// Gives up the KV of requests that are gone: dropping the sender frees it where it was made.
    fn forget_fetches(&mut self) {
        let scheduler = &self.scheduler;
        self.fetches.retain(|&serial, _| scheduler.is_live(serial));
    }
}
