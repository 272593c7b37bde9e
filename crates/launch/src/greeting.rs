//! What a person is told once: how to ask the model, how to start an engine.

use crate::fleet::Fleet;
use crate::probe::Status;

/// Says that the topology answers, and with which command to try it.
pub(crate) fn ready(fleet: &Fleet, statuses: &[Option<Status>]) -> String {
    let plan = fleet.plan();
    let model = statuses[0]
        .as_ref()
        .and_then(|s| s.models.first().cloned())
        .unwrap_or_default();
    let key = if plan.up.api_key.is_empty() && plan.up.api_key_file.is_none() {
        ""
    } else {
        " -H \"Authorization: Bearer $STATOR_API_KEY\""
    };
    format!(
        "ready: {url}/v1 answers as model {model:?}. Try:\n  curl {url}/v1/chat/completions{key} -H 'content-type: application/json' \\\n    -d '{{\"model\": \"{model}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello\"}}]}}'",
        url = plan.url(),
    )
}

/// Says how to start the engines that workers wait for.
pub(crate) fn attach_hint(fleet: &Fleet) -> String {
    let mut text = String::from("waiting for engines; start each one with:");
    let ranks = fleet.plan().up.data_parallel_size.unwrap_or(1);
    let children = fleet.members().iter().filter_map(|member| member.child());
    for (name, port) in children.filter_map(|c| Some((&c.spec.name, c.spec.attach_port?))) {
        for port in (port..).take(usize::from(ranks)) {
            text.push_str(&format!(
                "\n  vllm serve {} --headless --data-parallel-address 127.0.0.1 --data-parallel-rpc-port {port} --data-parallel-size-local 1    # {name}",
                fleet.plan().model,
            ));
        }
    }
    if fleet.plan().disaggregated() {
        text.push_str(
            "\neach with the connector that its worker was told, for nixl:\n  \
             --kv-transfer-config '{\"kv_connector\":\"NixlConnector\",\"kv_role\":\"kv_both\"}'",
        );
    }
    text
}
