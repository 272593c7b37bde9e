//! Prefill and decode workers behind one processor.

use crate::launcher::{Launcher, chat};
use crate::scale::Traffic;

/// One worker of each half.
const PAIR: &str = "--prefill-workers 1 --decode-workers 1";

#[tokio::test]
async fn a_prefill_and_a_decode_worker_answer_together() {
    let launcher = Launcher::ready(PAIR, "").await;
    assert_eq!(
        launcher.names().await,
        ["processor", "prefill-0", "decode-0"]
    );
    let answered = launcher.ask(&chat(5)).await;
    assert_eq!(answered.status, 200, "{answered:?}");
    assert_eq!(answered.json()["usage"]["completion_tokens"], 5);
    let output = launcher.command("down").await;
    assert!(output.status.success(), "{output:?}");
}

#[tokio::test]
async fn both_halves_grow_and_shrink_and_no_request_fails() {
    let launcher = Launcher::ready(PAIR, "").await;
    let traffic = Traffic::start(&launcher);
    traffic.goes_on().await;
    for (counts, names) in [
        (
            "prefill=2 decode=2",
            [
                "processor",
                "prefill-0",
                "prefill-1",
                "decode-0",
                "decode-1",
            ]
            .as_slice(),
        ),
        (
            "prefill=1",
            &["processor", "prefill-0", "decode-0", "decode-1"],
        ),
        ("decode=1", &["processor", "prefill-0", "decode-0"]),
        // From the halves to the whole, and back.
        ("prefill=0 decode=0 agg=1", &["processor", "agg-0"]),
        (
            "prefill=1 decode=1 agg=0",
            &["processor", "prefill-0", "decode-0"],
        ),
    ] {
        let output = launcher.command(&format!("scale {counts}")).await;
        assert!(output.status.success(), "{counts}: {output:?}");
        assert_eq!(launcher.names().await, names, "{output:?}");
        traffic.goes_on().await;
    }
    traffic.end().await;
}
