//! Requests through prefill and decode workers, each played by the test: what every worker is asked, in which
//! order, and what is asked of others when one fails.

#![allow(clippy::unwrap_used)]

/// Makes tests of what is to hold whether prompts are pushed to prefill workers or wait for them.
macro_rules! both_ways {
    ($($name:ident),* $(,)?) => {$(
        mod $name {
            #[tokio::test]
            async fn pushed() {
                super::$name($crate::stage::pushed()).await;
            }

            #[tokio::test]
            async fn queued() {
                super::$name($crate::stage::queued()).await;
            }
        }
    )*};
}

mod chain;
mod failures;
mod ids;
mod leaving;
mod queue;
mod stage;
#[path = "../support/mod.rs"]
#[allow(dead_code, reason = "some of it is for the tests of the front alone")]
mod support;
