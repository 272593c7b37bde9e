//! Utility calls that wait for their answer.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use serde_json::Value;
use tokio::sync::oneshot;

use crate::output::UtilityOutput;

/// Calls of one life of a worker start here times the number of lives before it, so that an answer
/// to an earlier worker's call is not taken for one of ours.
const CALLS_PER_LIFE: i64 = 1 << 32;

/// The result, or the engine's failure message.
pub(crate) type Answer = Result<Value, String>;

/// Utility calls that wait for their answer.
pub(crate) struct Utilities(Mutex<Waiting>);

struct Waiting {
    next: i64,
    /// `None` once the engine is dead: nobody waits any more.
    calls: Option<HashMap<i64, oneshot::Sender<Answer>>>,
}

/// One call that was opened.
pub(crate) struct Call {
    pub(crate) id: i64,
    /// Closed without an answer when the engine dies.
    pub(crate) answer: oneshot::Receiver<Answer>,
}

/// Returns the id of the call that an adoption makes; no other call of this life has it.
pub(crate) fn question(life: u32) -> i64 {
    i64::from(life).wrapping_mul(CALLS_PER_LIFE)
}

impl Utilities {
    /// - `life`: how many workers had this engine before.
    pub(crate) fn new(life: u32) -> Self {
        Self(Mutex::new(Waiting {
            next: question(life).wrapping_add(1),
            calls: Some(HashMap::new()),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a call; `None` if the engine is dead. A caller may go away before the answer comes.
    pub(crate) fn open(&self) -> Option<Call> {
        let (sender, answer) = oneshot::channel();
        let mut waiting = self.lock();
        let id = waiting.next;
        waiting.next += 1;
        waiting.calls.as_mut()?.insert(id, sender);
        Some(Call { id, answer })
    }

    /// Takes an answer. One that nobody waits for is dropped.
    pub(crate) fn answered(&self, output: UtilityOutput) {
        let caller = self
            .lock()
            .calls
            .as_mut()
            .and_then(|calls| calls.remove(&output.call_id));
        if let Some(caller) = caller {
            let _ = caller.send(output.result);
        }
    }

    /// Ends every call, and refuses new ones.
    pub(crate) fn close(&self) {
        self.lock().calls = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_call_gets_its_own_answer() {
        let utilities = Utilities::new(0);
        let (first, second) = (
            utilities.open().expect("open"),
            utilities.open().expect("open"),
        );
        let (a, b) = (first.id, second.id);
        utilities.answered(UtilityOutput {
            call_id: b,
            result: Ok(Value::from(2)),
        });
        utilities.answered(UtilityOutput {
            call_id: a,
            result: Err("no".into()),
        });
        assert_eq!(first.answer.await, Ok(Err("no".into())));
        assert_eq!(second.answer.await, Ok(Ok(Value::from(2))));
    }

    #[tokio::test]
    async fn the_death_of_the_engine_ends_calls_and_refuses_new_ones() {
        let utilities = Utilities::new(3);
        let call = utilities.open().expect("open");
        utilities.close();
        assert!(call.answer.await.is_err());
        assert!(utilities.open().is_none());
    }
}
