"""Makes golden vectors of KV events with vLLM's own structs and msgspec's encoder.

    python scripts/golden_events.py [--sources DIR] > crates/engine/tests/golden/vX_Y/events.json

Run by an interpreter that has vLLM. `--sources DIR` takes `vllm/distributed/kv_events.py` from an unpacked wheel
of another release, over the installed packages. See crates/engine/tests/golden/README.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

DIGEST = bytes(range(1, 33))
HASH = int.from_bytes(DIGEST[-8:], "big")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sources", type=Path)
    args = parser.parse_args()
    # vLLM and its libraries print while they are imported.
    stdout, sys.stdout = sys.stdout, sys.stderr
    module = load(args.sources)
    cases = {name: case(module, *made) for name, made in batches(module).items()}
    lines = [f"{json.dumps(name)}: {json.dumps(cases[name], sort_keys=True)}" for name in sorted(cases)]
    stdout.write("{\n" + ",\n".join(lines) + "\n}\n")


def load(sources: Path | None):
    if sources is None:
        from vllm.distributed import kv_events

        return kv_events
    path = sources / "vllm" / "distributed" / "kv_events.py"
    spec = importlib.util.spec_from_file_location("kv_events_of_sources", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def case(module, events: list, expected: list, rank: int | None) -> dict:
    import msgspec

    batch = module.KVEventBatch(ts=1.5, events=events, data_parallel_rank=rank)
    data = msgspec.msgpack.Encoder().encode(batch)
    return {"bytes": data.hex(), "stamp": 1.5, "dp_rank": rank, "events": expected}


def batches(module) -> dict:
    def make(struct, **fields):
        known = {key: value for key, value in fields.items() if key in struct.__struct_fields__}
        return struct(**known)

    def stored(**fields):
        fields = {
            "block_hashes": [11, 12], "parent_block_hash": None, "token_ids": [1, 200, 70000, 4],
            "block_size": 2, "lora_id": None, "medium": "GPU", "lora_name": None,
        } | fields
        return make(module.BlockStored, **fields)

    def expected(**fields):
        return {
            "stored": [11, 12], "parent": None, "tokens": [1, 200, 70000, 4], "block_size": 2,
            "medium": "gpu", "lora": None, "group": None, "spec": None, "extra_keys": [],
        } | fields

    # As block_pool.py fills them in, after to_event_extra_keys.
    extra_keys = [("adapter", ("image", -3), "salt"), None]
    cases = {
        "stored": ([stored()], [expected()], None),
        "stored, with all that it can have": (
            [stored(parent_block_hash=2**64 - 1, lora_id=1, lora_name="adapter",
                    extra_keys=extra_keys, group_idx=1, kv_cache_spec_kind="full_attention",
                    session_id="s", ownership="o", locality="LOCAL")],
            [expected(parent=2**64 - 1, lora="adapter", group=1, spec="full",
                      extra_keys=[["adapter", ["image", -3], "salt"], []])],
            3,
        ),
        "stored in a group that needs some blocks only": (
            [stored(group_idx=1, kv_cache_spec_kind="sliding_window", kv_cache_spec_sliding_window=8)],
            [expected(group=1, spec="partial")],
            0,
        ),
        "embeddings in place of tokens": (
            [stored(extra_keys=[(DIGEST,), (DIGEST,)])],
            [expected(extra_keys=[[list(DIGEST)], [list(DIGEST)]])],
            None,
        ),
        "hashes as bytes": (
            [stored(block_hashes=[DIGEST], parent_block_hash=DIGEST, token_ids=[1, 2]),
             make(module.BlockRemoved, block_hashes=[DIGEST], medium="GPU")],
            [expected(stored=[HASH], parent=HASH, tokens=[1, 2]),
             {"removed": [HASH], "medium": "gpu", "group": None}],
            None,
        ),
        "stored below the GPU, unknown tokens": (
            [stored(token_ids=[], block_size=0, medium="CPU", group_idx=0)],
            [expected(tokens=[], block_size=0, medium="cpu", group=0)],
            None,
        ),
        "removed, cleared, and stored again": (
            [make(module.BlockRemoved, block_hashes=[12, 11], medium="GPU", group_idx=0),
             make(module.BlockRemoved, block_hashes=[13], medium="STORAGE", ownership="o"),
             module.AllBlocksCleared(), stored()],
            [{"removed": [12, 11], "medium": "gpu", "group": 0},
             {"removed": [13], "medium": "storage", "group": None}, "cleared", expected()],
            0,
        ),
        "nothing": ([], [], None),
    }
    return cases


if __name__ == "__main__":
    main()
