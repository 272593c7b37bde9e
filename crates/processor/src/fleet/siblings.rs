//! The choices of one prompt: they need the same KV, each for itself.
//!
//! An engine hands KV on once. So every choice has a hand-off of its own, but only the first computes the
//! prompt: the others wait for it and go to the same engine, which then has the prompt in its cache.

use std::future::Future;

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use stator_common::WorkerId;
use stator_router::Verdict;
use tokio::sync::OnceCell;

use crate::pool::DispatchError;

/// What the choices of one prompt know of each other.
#[derive(Debug, Default)]
pub(crate) struct Siblings {
    /// The worker that has computed the prompt.
    computed_by: OnceCell<WorkerId>,
    /// Whether one of them is under way.
    begun: AtomicBool,
    /// Who computes the prompt: decided once.
    verdict: OnceLock<Verdict>,
}

impl Siblings {
    /// Says whether the caller comes after another choice, whose work on the prompt it will find done.
    pub(super) fn follows(&self) -> bool {
        self.begun.swap(true, Ordering::Relaxed)
    }

    /// Returns who computes the prompt, as the first choice decided.
    pub(super) fn verdict(&self, decide: impl FnOnce() -> Verdict) -> Verdict {
        *self.verdict.get_or_init(decide)
    }

    /// Computes the prompt as the first of its choices, or else after the first: then `compute` is told where
    /// the prompt is cached.
    ///
    /// A first choice that fails or is dropped leaves its place to the next one. Cancel safe.
    ///
    /// # Errors
    /// Those of `compute`.
    pub(super) async fn compute<T, F>(
        &self,
        compute: impl Fn(Option<WorkerId>) -> F,
        worker: impl Fn(&T) -> WorkerId,
    ) -> Result<T, DispatchError>
    where
        F: Future<Output = Result<T, DispatchError>>,
    {
        let mut first = None;
        let computed_by = self
            .computed_by
            .get_or_try_init(|| async {
                let computed = compute(None).await?;
                let id = worker(&computed);
                first = Some(computed);
                Ok::<_, DispatchError>(id)
            })
            .await?;
        match first {
            Some(computed) => Ok(computed),
            None => compute(Some(computed_by.clone())).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use futures::future::join3;
    use stator_common::Code;

    use super::*;

    #[tokio::test]
    async fn the_first_computes_alone_and_the_others_follow_to_its_worker() {
        let siblings = Siblings::default();
        let asked = RefCell::new(Vec::new());
        let compute = |preferred: Option<WorkerId>| {
            asked.borrow_mut().push(preferred);
            async {
                tokio::task::yield_now().await;
                Ok(WorkerId("w".to_owned()))
            }
        };
        let one = || siblings.compute(compute, WorkerId::clone);
        let (a, b, c) = join3(one(), one(), one()).await;
        assert!(a.is_ok() && b.is_ok() && c.is_ok());
        let at = Some(WorkerId("w".to_owned()));
        assert_eq!(*asked.borrow(), [None, at.clone(), at]);
    }

    #[tokio::test]
    async fn a_first_choice_that_fails_or_leaves_makes_room_for_the_next() {
        let siblings = Siblings::default();
        let id = |worker: &WorkerId| worker.clone();
        let failed = siblings.compute(
            |_| async { Err(DispatchError::new(Code::Unavailable, "gone")) },
            id,
        );
        assert!(failed.await.is_err());
        let mut left = Box::pin(siblings.compute(|_| std::future::pending(), id));
        assert!(futures::poll!(&mut left).is_pending());
        drop(left);
        let next = siblings.compute(
            |preferred| async move {
                assert_eq!(preferred, None);
                Ok(WorkerId("w".to_owned()))
            },
            id,
        );
        assert!(next.await.is_ok());
    }
}
