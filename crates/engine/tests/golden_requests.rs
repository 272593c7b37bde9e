//! What we write is what vLLM's own decoder reads: the bytes of every kind of request, and what
//! the decoders of two releases made of them.
//!
//! `golden/<release>/requests.json` is written by `golden_live.rs`.

mod cases;

use cases::{RELEASES, cases, hex, written};
use serde_json::Value;

#[test]
fn vllm_read_every_request_as_it_was_meant() {
    for release in RELEASES {
        let golden: Value = serde_json::from_str(release.golden).expect("JSON");
        for case in cases() {
            let name = &case.name;
            let decoded = &golden["decoded"][name];
            assert_eq!(decoded, &case.expected, "{}: {name}", release.version);
        }
    }
}

#[test]
fn requests_are_still_written_as_vllm_read_them() {
    for release in RELEASES {
        let golden: Value = serde_json::from_str(release.golden).expect("JSON");
        let written = written(release.version);
        let known = golden["written"].as_object().expect("a map");
        assert_eq!(known.len(), written.len());
        for (name, bytes) in written {
            assert_eq!(known[&name], hex(&bytes), "{}: {name}", release.version);
        }
    }
}
