"""Makes and checks the golden vectors of the engine's wire with vLLM's own encoder and decoder.

    python scripts/golden.py outputs    what an engine sends, and what it means, as JSON on stdout
    python scripts/golden.py requests   reads {"name": "hex"} on stdin: what Rust wrote; prints what
                                        vLLM's decoder makes of it

Run by an interpreter that has vLLM. `--sources DIR` takes vLLM's Python from an unpacked wheel
instead, over the same packages: that is how the vectors of a release without a CPU build are made.
The files are in crates/engine/tests/golden/, see README.md there.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import sys


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["outputs", "requests"])
    parser.add_argument("--sources")
    args = parser.parse_args()
    if args.sources:
        sys.path.insert(0, args.sources)
    # vLLM and its libraries print while they are imported.
    stdout, sys.stdout = sys.stdout, sys.stderr
    made = outputs() if args.what == "outputs" else requests(json.load(sys.stdin))
    stdout.write(lines(made, depth=2) + "\n")


def lines(value, depth: int) -> str:
    """JSON with the outer levels of maps on lines of their own, so that a diff shows the case."""
    if not isinstance(value, dict) or depth == 0:
        return json.dumps(value, sort_keys=True)
    entries = [f"{json.dumps(key)}: {lines(value[key], depth - 1)}" for key in sorted(value)]
    return "{\n" + ",\n".join(entries) + "\n}"


# --- what an engine sends


def outputs() -> dict:
    import vllm

    cases = {}
    for name, (message, expected) in messages().items():
        frames = encode(message)
        cases[name] = case(frames, expected)
        cases[name + ", with fields of the future"] = case(extended(frames, message), expected)
        cases[name + ", without trailing defaults"] = case(shortened(frames, message), expected)
    return {
        "vllm_version": vllm.__version__,
        "outputs": cases,
        "ready": ready(),
        "handshake": handshake(),
    }


def case(frames: list[bytes], expected: dict) -> dict:
    return {"frames": [bytes(frame).hex() for frame in frames], "expected": expected}


def encode(message) -> list[bytes]:
    from vllm.v1.serial_utils import MsgpackEncoder

    return [bytes(frame) for frame in MsgpackEncoder().encode(message)]


FUTURE = {"a": [1, None, {"b": 2.5}], "c": "d"}


def extended(frames: list[bytes], message) -> list[bytes]:
    """Adds fields behind every positional struct and keys to every map that has fixed ones."""
    import msgspec

    outputs = msgspec.msgpack.decode(frames[0])
    for output in outputs[1]:
        output += [None] * (len(message.outputs[0].__struct_fields__) - len(output))
        for position, value in enumerate(output):
            if isinstance(value, dict) and not position_is(message, position, "kv_transfer_params"):
                value["zz_future"] = FUTURE
        output += ["future", FUTURE]
    if isinstance(outputs[2], dict):
        outputs[2]["zz_future"] = FUTURE
        outputs[2]["prefix_cache_stats"]["zz_future"] = FUTURE
    if outputs[4] is not None:
        outputs[4] += ["future", FUTURE]
    outputs += [None] * (len(message.__struct_fields__) - len(outputs))
    outputs += [FUTURE, 7]
    return [msgspec.msgpack.encode(outputs), *frames[1:]]


def position_is(message, position: int, name: str) -> bool:
    return message.outputs[0].__struct_fields__[position] == name


def shortened(frames: list[bytes], message) -> list[bytes]:
    """Cuts what an older engine would not send: defaults at the end of the positional structs."""
    import msgspec

    def cut(values: list, struct) -> None:
        fields = msgspec.structs.fields(struct)
        while values[-1] in (None, 0) and values[-1] == fields[len(values) - 1].default:
            values.pop()

    outputs = msgspec.msgpack.decode(frames[0])
    for output in outputs[1]:
        cut(output, message.outputs[0])
    cut(outputs, message)
    return [msgspec.msgpack.encode(outputs), *frames[1:]]


def messages() -> dict:
    import numpy as np
    import torch
    from vllm.v1.engine import (
        EngineCoreEvent,
        EngineCoreEventType,
        EngineCoreOutput,
        EngineCoreOutputs,
        FinishReason,
        UtilityOutput,
    )
    from vllm.v1.metrics.stats import PrefillStats, PrefixCacheStats, SchedulerStats
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors
    from vllm.v1.serial_utils import UtilityResult

    def engine_id(key: int) -> str:
        return f"cmpl-{key}-{key:08x}"

    def output(key: int, tokens: list[int], expected: dict | None = None, **fields):
        made = EngineCoreOutput(request_id=engine_id(key), new_token_ids=tokens, **fields)
        return made, {"key": key, "tokens": tokens, **(expected or {})}

    def step(*outputs, expected: dict | None = None, **fields):
        made = EngineCoreOutputs(outputs=[one for one, _ in outputs], timestamp=12.5, **fields)
        return made, {"outputs": [one for _, one in outputs], **(expected or {})}

    def lists(rows: int, width: int, tokens="<i4", ranks="<i8"):
        ids = np.arange(rows * width, dtype=tokens).reshape(rows, width) * 3
        values = -np.arange(rows * width, dtype="<f4").reshape(rows, width) / 4
        return LogprobsLists(ids, values, np.arange(rows, dtype=ranks) + 1), rows_of(ids, values)

    def tensors(rows: int, width: int, tokens=torch.int32, values=torch.float32):
        ids = torch.arange(rows * width, dtype=tokens).reshape(rows, width) * 3
        logs = (-torch.arange(rows * width) / 4).to(values).reshape(rows, width)
        ranks = torch.arange(rows, dtype=torch.int64) + 1
        return LogprobsTensors(ids, logs, ranks), rows_of(ids, logs.float())

    def rows_of(ids, values) -> dict:
        return {
            "width": ids.shape[1],
            "tokens": ids.flatten().tolist(),
            "values": values.flatten().tolist(),
            "ranks": list(range(1, ids.shape[0] + 1)),
        }

    params = {
        "do_remote_prefill": True,
        "remote_block_ids": [[1, 2, 300], [70000]],
        "remote_engine_id": "e",
        "remote_port": 5600,
        "remote_blocks_expiry_time": 1.5,
        "tp_size": None,
    }
    stats = SchedulerStats(
        num_running_reqs=3,
        num_waiting_reqs=2,
        num_skipped_waiting_reqs=1,
        kv_cache_usage=0.25,
        prefix_cache_stats=PrefixCacheStats(
            requests=2, queries=100, hits=64, preempted_requests=1, preempted_queries=5
        ),
        running_lora_adapters={"a": 1},
    )
    made = {
        "nothing": step(),
        "statistics alone": step(
            scheduler_stats=stats,
            expected={
                "stats": {
                    "running": 3,
                    "waiting": 3,
                    "kv_usage": 0.25,
                    "prefix_queries": 100,
                    "prefix_hits": 64,
                    "preempted": 1,
                }
            },
        ),
        "one token": step(output(1, [17])),
        "sixteen streams": step(*[output(key, [100_000 + key]) for key in range(16)]),
        "many tokens": step(output(0xFFFFFFFF, [0, 127, 128, 255, 256, 65535, 65536, 151_935])),
        "a first token": step(
            output(
                2,
                [5],
                {"cached_tokens": 32},
                prefill_stats=PrefillStats(num_prompt_tokens=40, num_cached_tokens=32),
                events=[EngineCoreEvent(EngineCoreEventType.QUEUED, 1.0)],
                trace_headers={"traceparent": "00-1-2-3"},
            )
        ),
        "every way to finish": step(
            *[
                output(reason.value, [], {"finish": reason.name}, finish_reason=reason)
                for reason in FinishReason
            ]
        ),
        "a stop token and a stop text": step(
            output(
                1,
                [9],
                {"finish": "STOP", "stop_token": 9},
                finish_reason=FinishReason.STOP,
                stop_reason=9,
            ),
            output(
                2,
                [9],
                {"finish": "REPETITION"},
                finish_reason=FinishReason.REPETITION,
                stop_reason="repetition_detected",
            ),
        ),
        "hand-off parameters": step(
            output(
                3,
                [1],
                {"finish": "LENGTH", "kv_transfer_params": packed(params)},
                finish_reason=FinishReason.LENGTH,
                kv_transfer_params=params,
            )
        ),
        "fields that nobody reads": step(
            output(
                4,
                [1],
                pooling_output=torch.zeros(70),
                routed_experts=np.zeros((2, 3), dtype="<i2"),
                num_nans_in_logits=2,
            ),
            finished_requests={"x", "y"},
            wave_complete=3,
        ),
        "another engine": step(output(5, [1]), engine_index=3, expected={"engine_index": 3}),
        "a utility's answer": step(
            utility_output=UtilityOutput(7, result=UtilityResult(True)),
            expected={"utility": {"call_id": 7, "result": True}},
        ),
        "a utility's list": step(
            utility_output=UtilityOutput(
                2**40, result=UtilityResult([{"kind": "full_attention", "block_size": 32}, -5, 0.5])
            ),
            expected={
                "utility": {
                    "call_id": 2**40,
                    "result": [{"kind": "full_attention", "block_size": 32}, -5, 0.5],
                }
            },
        ),
        "a utility's nothing": step(
            utility_output=UtilityOutput(-1, result=UtilityResult(None)),
            expected={"utility": {"call_id": -1, "result": None}},
        ),
        "a utility's failure": step(
            utility_output=UtilityOutput(8, failure_message="no such method"),
            expected={"utility": {"call_id": 8, "failure": "no such method"}},
        ),
    }
    for name, (logprobs, expected) in {
        "log-probabilities inline": lists(1, 6),
        "log-probabilities in frames": lists(4, 21),
        "log-probabilities of other widths": lists(2, 3, "<i8", "<i4"),
    }.items():
        tokens = list(range(len(expected["ranks"])))
        made[name] = step(output(1, tokens, {"logprobs": expected}, new_logprobs=logprobs))
    for name, (logprobs, expected) in {
        "prompt log-probabilities inline": tensors(2, 2),
        "prompt log-probabilities in frames": tensors(9, 4, torch.int64),
        "prompt log-probabilities in bfloat16": tensors(3, 2, torch.int32, torch.bfloat16),
        "prompt log-probabilities in float16": tensors(3, 2, torch.int32, torch.float16),
        "no prompt log-probabilities": tensors(0, 2),
    }.items():
        made[name] = step(
            output(1, [4], {"prompt_logprobs": expected}, new_prompt_logprobs_tensors=logprobs)
        )
    both, expected = lists(2, 21)
    prompt, prompt_expected = tensors(4, 21)
    made["log-probabilities of two streams in frames"] = step(
        output(1, [0, 1], {"logprobs": expected}, new_logprobs=both),
        output(
            2, [3], {"prompt_logprobs": prompt_expected}, new_prompt_logprobs_tensors=prompt
        ),
    )
    if "error" in EngineCoreOutput.__struct_fields__:
        from vllm.outputs import RequestError

        made["a request's error"] = step(
            output(
                6,
                [],
                {
                    "finish": "ERROR",
                    "error": {"code": "engine_paused", "message": "later", "retryable": True},
                },
                finish_reason=FinishReason.ERROR,
                error=RequestError(code="engine_paused", message="later", retryable=True),
            )
        )
    return made


def packed(value) -> str:
    import msgspec

    return msgspec.msgpack.encode(value).hex()


def ready() -> dict:
    from vllm.config.kv_events import KVEventsConfig
    from vllm.v1.engine import EngineCoreReadyResponse

    given = {
        "max_model_len": 2048,
        "num_gpu_blocks": 1000,
        "block_size": 32,
        "dp_stats_address": None,
        "dtype": "bfloat16",
        "vllm_version": "0.32.0+cpu",
        "world_size": 1,
        "data_parallel_size": 1,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "data_parallel_rank": 0,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 2048,
        "instance_id": "abc",
        "supports_lora": True,
        "max_loras": 4,
        "kv_cache_size_tokens": 32_000,
        "kv_cache_max_concurrency": 15.625,
        "kv_events_config": KVEventsConfig(
            enable_kv_cache_events=True, publisher="zmq", endpoint="tcp://10.0.0.1:5557"
        ),
        "enable_sleep_mode": True,
    }
    return {"bytes": packed(EngineCoreReadyResponse(**given))}


def handshake() -> dict:
    """As v1/engine/core.py writes them, which has no type for them."""
    return {
        "hello": packed({"status": "HELLO", "local": False, "headless": True}),
        "ready": packed(
            {"status": "READY", "local": False, "headless": True, "parallel_config_hash": "x"}
        ),
    }


# --- what Rust writes


def requests(written: dict[str, str]) -> dict:
    import vllm
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder

    # What v1/engine/core.py decodes ADD with, and everything else.
    add, other = MsgpackDecoder(EngineCoreRequest), MsgpackDecoder()
    decoded = {}
    for name, text in written.items():
        data = bytes.fromhex(text)
        if name.startswith("add: "):
            decoded[name] = request(add.decode(data))
        elif name.startswith("init: "):
            decoded[name] = init(data)
        else:
            decoded[name] = plain(other.decode(data))
            if name == "utility: add_lora":
                decoded[name][3] = [lora(decoded[name][3][0])]
    return {"vllm_version": vllm.__version__, "decoded": decoded, "written": written}


def request(decoded) -> dict:
    """The fields that are not defaults, with sampling parameters as `__post_init__` leaves them."""
    fields = non_defaults(decoded)
    fields["sampling_params"] = non_defaults(decoded.sampling_params)
    if decoded.lora_request is not None:
        fields["lora_request"] = non_defaults(decoded.lora_request)
    return fields


def non_defaults(struct) -> dict:
    import msgspec

    found = {}
    for field in msgspec.structs.fields(struct):
        value = getattr(struct, field.name)
        default = field.default
        if default is msgspec.NODEFAULT and field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        same = default is not msgspec.NODEFAULT and value == default
        if not same and not empty(value):
            found[field.name] = plain(value)
    return found


def empty(value) -> bool:
    """What `__post_init__` writes in place of nothing. 0 is something."""
    return value is None or value is False or value == []


def plain(value):
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        # Private fields too: `_backend` is one.
        found = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {name: item for name, item in found.items() if not empty(item)}
    if hasattr(value, "__struct_fields__"):
        return non_defaults(value)
    return value


def init(data: bytes) -> dict:
    import msgspec
    from vllm.v1.engine.utils import EngineHandshakeMetadata

    return plain(msgspec.msgpack.decode(data, type=EngineHandshakeMetadata))


def lora(argument) -> dict:
    """As v1/engine/core.py converts the arguments of a utility call."""
    import msgspec
    from vllm.lora.request import LoRARequest

    return non_defaults(msgspec.convert(argument, type=LoRARequest))


if __name__ == "__main__":
    main()
