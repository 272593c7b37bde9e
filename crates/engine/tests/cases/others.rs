//! Messages that are no requests: aborts, utility calls, the addresses of the handshake.

use super::*;

/// Everything but ADD.
pub(super) fn all() -> Vec<Case> {
    let ada = Lora {
        name: "ada".into(),
        id: 2,
        path: "/adapters/ada".into(),
    };
    vec![
        Case {
            name: "abort".into(),
            message: What::Abort(vec!["a-00000001".into(), "b-00000002".into()]),
            expected: json!(["a-00000001", "b-00000002"]),
        },
        Case {
            name: "utility: sleep".into(),
            message: What::Utility("sleep", Args::Json(vec![json!(1), json!("wait")])),
            expected: json!([0, 7, "sleep", [1, "wait"]]),
        },
        Case {
            name: "utility: add_lora".into(),
            message: What::Utility("add_lora", Args::Lora(ada)),
            expected: json!([0, -3, "add_lora", [
                {"lora_name": "ada", "lora_int_id": 2, "lora_path": "/adapters/ada"},
            ]]),
        },
        Case {
            name: "init: two clients".into(),
            message: What::Init(
                vec!["tcp://h:1".into(), "tcp://h:2".into()],
                vec!["ipc:///o".into(), "tcp://h:3".into()],
            ),
            expected: json!({
                "addresses":
                    {"inputs": ["tcp://h:1", "tcp://h:2"], "outputs": ["ipc:///o", "tcp://h:3"]},
                "parallel_config": {},
            }),
        },
    ]
}
