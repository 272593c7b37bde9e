"""Conditional disaggregation under load: one prefill and one decode worker, with `--conditional-disagg` off, fixed and auto.

The engines stay, only the processor starts again for each mode. Prompts are token ids of mixed lengths, all new, so
nothing is cached; each stream sends the next request when its last one has ended. The table shows, by mode
and load, the time to the first token of short and of long prompts, the time between tokens, and the share of prompts
that was handed off.

    python3 scripts/bench_conditional.py --model DIR [--bin target/dist]

Needs what `bench_gpu_pd.py` needs; `--cpu` runs it with engines on the CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from pathlib import Path

from bench_gpu_pd import OUTPUT_TOKENS, Topology, body, get, new_prompt, quantiles, stream_all

# Shares of a load by length, as parts of the longest prompt: mostly short, as conversations are, some long.
MIXES = {
    "mixed": [(0.60, 0.02, 0.15), (0.25, 0.15, 0.5), (0.15, 0.9, 1.0)],
    "long": [(1.0, 0.9, 1.0)],
}
# Prompts below this part of the longest count as short.
SHORT = 0.15


def main():
    args = parse_args()
    out = Path(args.out or tempfile.mkdtemp(prefix="stator-bench-"))
    out.mkdir(parents=True, exist_ok=True)
    vocab = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    modes = {
        "off": ["--conditional-disagg", "off"],
        "fixed": ["--conditional-disagg", "fixed", "--disagg-min-prefill-tokens", str(int(args.prompt_tokens * SHORT))],
        "auto": ["--conditional-disagg", "auto"],
    }
    rows = []
    with Topology("pd", args, out, modes["off"]) as topology:
        topology.wait()
        fill(topology, vocab, args)
        for mix in MIXES:
            for mode, processor_args in modes.items():
                topology.start_processor(processor_args)
                topology.wait()
                # What is measured is learned here, and is not counted.
                asyncio.run(load(topology.url, vocab, args, mix, 8, 32, seed=100))
                for streams in args.streams:
                    handed = handed_off(topology.url)
                    row = asyncio.run(load(topology.url, vocab, args, mix, streams, args.rounds * streams, seed=streams))
                    row.update(mode=mode, mix=mix, streams=streams, handed=handed_off(topology.url) - handed)
                    print(json.dumps(row), flush=True)
                    rows.append(row)
    table = render(rows)
    print(table, flush=True)
    (out / "conditional.md").write_text(table)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--bin", default="target/dist", help="folder with Stator's binaries")
    parser.add_argument("--streams", default="8,32,128", type=lambda s: [int(x) for x in s.split(",")])
    parser.add_argument("--rounds", type=int, default=4, help="requests per stream")
    parser.add_argument("--prompt-tokens", type=int, default=3000, help="length of the longest prompts")
    parser.add_argument("--cpu", action="store_true", help="engines on the CPU")
    parser.add_argument("--out", help="folder for logs and the table")
    parser.add_argument("engine_args", nargs="*", help="further vLLM flags, after --")
    return parser.parse_args()


def handed_off(url):
    """Hand-offs that reached their first token."""
    lines = get(f"{url}/metrics").splitlines()
    found = (line for line in lines if line.startswith("stator_processor_handoffs_total") and 'outcome="done"' in line)
    return int(sum(float(line.rpartition(" ")[2]) for line in found))


def fill(topology, vocab, args):
    """Uses every KV block of both engines once. In a new engine blocks of a prompt lie side by side, and move faster
    than they ever will again."""
    models = json.loads(get(f"{topology.url}/workers"))["models"]
    tokens = max(target["kv_blocks"] * target["block_size"] for model in models for target in model["targets"])
    requests = tokens // args.prompt_tokens + 1
    asyncio.run(load(topology.url, vocab, args, "long", 32, requests, seed=0, output_tokens=4))
    print(f"{requests} prompts have filled the caches", flush=True)


def lengths(rng, mix, count, longest):
    """Prompt lengths: the same number of each class in every run of a mix, in random order."""
    result = []
    for share, low, high in MIXES[mix]:
        result += [rng.randint(max(1, int(low * longest)), int(high * longest)) for _ in range(round(share * count))]
    rng.shuffle(result)
    return result


async def load(url, vocab, args, mix, streams, requests, seed, output_tokens=OUTPUT_TOKENS):
    rng = random.Random(time.time_ns())  # new prompts in every run
    sizes = lengths(random.Random(seed), mix, requests, args.prompt_tokens)
    bodies = [body(new_prompt(rng, vocab, size), max_tokens=output_tokens, stream=True) for size in sizes]
    told = await stream_all(url, bodies, streams)
    first = {"short": [], "long": []}
    for size, seconds in told["first"]:
        first["short" if size < SHORT * args.prompt_tokens else "long"].append(seconds)
    times = {f"ttft_{kind}": quantiles(values) if values else None for kind, values in first.items()}
    between = told["between"]
    return dict(requests=len(sizes), rate=told["rate"], itl=quantiles(between) if between else None, **times)


def render(rows):
    lines = [
        "| prompts | streams | mode | TTFT p50 / p99, ms: short | long | ITL p50 / p99, ms | events/s | handed off |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    pair = lambda values, digits: f"{values[0]:.{digits}f} / {values[1]:.{digits}f}" if values else "-"
    for row in sorted(rows, key=lambda row: (list(MIXES).index(row["mix"]), row["streams"])):
        lines.append(f"| {row['mix']} | {row['streams']} | {row['mode']} | {pair(row['ttft_short'], 0)} | {pair(row['ttft_long'], 0)} "
                     f"| {pair(row['itl'], 2)} | {row['rate']:,.0f} | {100 * row['handed'] / row['requests']:.0f} % |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
