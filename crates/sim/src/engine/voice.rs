//! What an engine says beside the outputs of its steps.

use std::collections::BTreeMap;

use tracing::warn;

use super::{Engine, monotonic};
use crate::scheduler::{Aborted, Finish, Output};
use crate::wire::outputs::{Answer, Batch, UtilityResult};

impl Engine {
    pub(super) fn say_aborted(&mut self, aborted: Vec<Aborted>) {
        let ended = aborted.into_iter();
        let ended = ended.map(|a| Output::ended(a.id, a.client, Finish::Abort));
        self.say_ended(ended.collect());
    }

    pub(super) fn say_ended(&mut self, outputs: Vec<Output>) {
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

    pub(super) fn answer_calls(&mut self, calls: Vec<(usize, UtilityResult)>) {
        for (client, utility) in calls {
            let batch = Batch {
                timestamp: monotonic(),
                utility: Some(utility),
                ..Batch::default()
            };
            self.say(client, &batch);
        }
    }

    pub(super) fn say(&mut self, client: usize, batch: &Batch) {
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
