"""Prefill on one GPU and decode on another, beside two aggregated workers on the same two GPUs.

First the link between the GPUs is measured, then two topologies run one after the other with the same engine
flags: `agg`, two aggregated workers, and `pd`, a prefill and a decode worker with NIXL. Each answers the same prompts
(token ids, greedy, `ignore_eos`) one by one, which must give the same tokens, and is then loaded with streaming
completions. The table shows the time to the first token and between tokens, and the KV that was moved.

    python3 scripts/bench_gpu_pd.py --model DIR [--bin target/dist]

Needs two GPUs, torch, nixl, vLLM and aiohttp. Weights are random (`--load-format dummy`). On a machine without GPUs,
`--cpu` runs it with engines on the CPU, to try the script itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

SERVED_NAME = "m"
READY_SECONDS = 200
OUTPUT_TOKENS = 128


def main():
    args = parse_args()
    out = Path(args.out or tempfile.mkdtemp(prefix="stator-bench-"))
    out.mkdir(parents=True, exist_ok=True)
    vocab = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    link = None if args.cpu else measure_link()
    answers, rows, moved = {}, {}, None
    for name in ("agg", "pd"):
        with Topology(name, args, out) as topology:
            started = time.time()
            topology.wait()
            print(f"{name}: ready after {time.time() - started:.1f} s", flush=True)
            answers[name] = [answer(topology.url, prompt) for prompt in equality_prompts(vocab, args.prompt_tokens)]
            before = topology.moved()
            for streams in args.streams:
                rows[name, streams] = asyncio.run(load(topology.url, vocab, args.prompt_tokens, streams, 4 * streams))
                print(f"{name}: {streams} streams: {rows[name, streams]}", flush=True)
            if name == "pd":
                after = topology.moved()
                moved = {key: after[key] - before[key] for key in after}
                print(topology.handoffs(), flush=True)
    equal = sum(a == b for a, b in zip(answers["agg"], answers["pd"]))
    table = render(rows, args, equal, len(answers["agg"]), moved, link)
    print(table, flush=True)
    (out / "table.md").write_text(table)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--bin", default="target/dist", help="folder with Stator's binaries")
    parser.add_argument("--streams", default="1,16,64", type=lambda s: [int(x) for x in s.split(",")])
    parser.add_argument("--prompt-tokens", type=int, default=3000)
    parser.add_argument("--cpu", action="store_true", help="engines on the CPU")
    parser.add_argument("--out", help="folder for logs and the table")
    parser.add_argument("engine_args", nargs="*", help="further vLLM flags, after --")
    return parser.parse_args()


def measure_link():
    """GB/s of copies from one GPU to the other, in a process of its own so that nothing stays on the GPUs."""
    script = """
import time, torch
size = 1 << 30
a, b = torch.empty(size, dtype=torch.uint8, device='cuda:0'), torch.empty(size, dtype=torch.uint8, device='cuda:1')
b.copy_(a); torch.cuda.synchronize(0); torch.cuda.synchronize(1)
start = time.perf_counter()
for _ in range(20): b.copy_(a)
torch.cuda.synchronize(0); torch.cuda.synchronize(1)
print(20 * size / (time.perf_counter() - start) / 1e9)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if result.returncode:
        print(f"the link was not measured: {result.stderr[-300:]}", flush=True)
        return None
    return float(result.stdout)


class Topology:
    """A processor and two workers, one per GPU; ends them on exit."""

    def __init__(self, name, args, out, processor_args=()):
        self.name, self.args, self.out, self.children = name, args, out, []
        engine = ["--load-format", "dummy", "--max-num-seqs", "256", *args.engine_args]
        engine += ["--max-model-len", str(args.prompt_tokens + OUTPUT_TOKENS + 968)]
        if not args.cpu:
            engine += ["--gpu-memory-utilization", "0.85"]
        run_dir = tempfile.mkdtemp(prefix="stator-")
        environment = dict(os.environ, VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1", STATOR_PYTHON=os.environ.get("STATOR_PYTHON", sys.executable),
                           STATOR_FILE_KV=f"{run_dir}/discovery")
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        if args.cpu:
            # vLLM binds the threads of all engines to the same cores.
            environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        self.environment = environment
        self.url, self.system = "http://127.0.0.1:8000", {}
        for gpu, role in enumerate(("agg", "agg") if name == "agg" else ("prefill", "decode")):
            part = f"{role}-{gpu}"
            self.system[part] = f"http://127.0.0.1:{9100 + gpu}"
            self.start(part, environment | {"CUDA_VISIBLE_DEVICES": str(gpu)}, [
                f"{args.bin}/stator-{role}", "--model", args.model, "--served-model-name", SERVED_NAME,
                "--discovery-backend", "file", "--run-dir", f"{run_dir}/{part}", "--system-port", str(9100 + gpu),
                *(() if role == "agg" else ("--connector", "nixl")), *engine,
            ])
        self.start_processor(processor_args)

    def start_processor(self, processor_args):
        """Starts the processor, in place of the one before."""
        for part, child in [each for each in self.children if each[0] == "processor"]:
            child.terminate()
            child.wait(30)
            self.children.remove((part, child))
        self.start("processor", self.environment, [
            f"{self.args.bin}/stator-processor", "--http-port", "8000", "--discovery-backend", "file",
            "--router-mode", "least-loaded", *processor_args,
        ])

    def start(self, part, environment, command):
        log = open(self.out / f"{self.name}-{part}.log", "a")
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.children.append((part, child))

    def wait(self):
        """Waits until both workers take requests."""
        deadline = time.time() + READY_SECONDS
        while time.time() < deadline:
            for part, child in self.children:
                if child.poll() is not None:
                    log = (self.out / f"{self.name}-{part}.log").read_text()
                    raise RuntimeError(f"{part} ended with {child.returncode}:\n{log[-3000:]}")
            try:
                models = json.loads(get(f"{self.url}/workers"))["models"]
                targets = [target for model in models for target in model["targets"]]
                if sum(target["availability"] == "open" for target in targets) == 2:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"{self.name}: not ready after {READY_SECONDS} s")

    def moved(self):
        """What the decode engine has fetched so far; zeros without one."""
        totals = dict(transfers=0.0, bytes=0.0, microseconds=0.0)
        names = {"stator_kv_transfers_total": "transfers", "stator_kv_transfer_bytes_total": "bytes",
                 "stator_kv_transfer_microseconds_total": "microseconds"}
        for part, url in self.system.items():
            for line in get(f"{url}/metrics").splitlines() if part.startswith("decode") else ():
                name, _, value = line.partition("{")
                if name in names:
                    totals[names[name]] += float(value.rpartition(" ")[2])
        return totals

    def handoffs(self):
        lines = get(f"{self.url}/metrics").splitlines()
        return "\n".join(line for line in lines if line.startswith("stator_processor_handoffs_total"))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for signum, patience in ((signal.SIGTERM, 30), (signal.SIGKILL, 5)):
            for _, child in reversed(self.children):
                try:
                    os.killpg(child.pid, signum)
                except ProcessLookupError:
                    pass
            deadline = time.time() + patience
            while time.time() < deadline and any(child.poll() is None for _, child in self.children):
                time.sleep(0.1)
        time.sleep(2)  # the driver returns the memory a moment after the process is gone


def get(url):
    with urllib.request.urlopen(url, timeout=5) as response:
        return response.read().decode()


def equality_prompts(vocab, longest):
    rng = random.Random(7)
    lengths = [length for length in (20, 64, 200, 500, 900, 1500, 2200, 3000) if length <= longest] * 2
    return [new_prompt(rng, vocab, length) for length in lengths]


def body(prompt, **more):
    return {"model": SERVED_NAME, "prompt": prompt, "ignore_eos": True, "temperature": 0.0, **more}


def answer(url, prompt):
    """The 32 tokens that follow a prompt, as ids."""
    data = json.dumps(body(prompt, max_tokens=32, return_token_ids=True)).encode()
    request = urllib.request.Request(f"{url}/v1/completions", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())["choices"][0]["token_ids"]


def new_prompt(rng, vocab, tokens):
    return [rng.randrange(300, vocab - 600) for _ in range(tokens)]


async def load(url, vocab, prompt_tokens, streams, requests):
    """Runs `requests` over `streams` at a time; returns rates and times."""
    rng = random.Random(streams)
    prompts = [new_prompt(rng, vocab, prompt_tokens) for _ in range(requests)]
    bodies = [body(prompt, max_tokens=OUTPUT_TOKENS, stream=True) for prompt in reversed(prompts)]
    told = await stream_all(url, bodies, streams)
    first_token = [seconds for _, seconds in told["first"]]
    return dict(rate=told["rate"], ttft=quantiles(first_token), itl=quantiles(told["between"]))


async def stream_all(url, bodies, streams):
    """Sends completions, so many at a time. Returns the seconds to the first event with each prompt's length, the
    seconds between events, and events per second."""
    import aiohttp

    waiting = iter(bodies)
    first, between = [], []
    begun = time.perf_counter()

    async def stream(session):
        for request in waiting:
            start, last = time.perf_counter(), None
            async with session.post(f"{url}/v1/completions", json=request) as response:
                if response.status != 200:
                    raise RuntimeError((await response.text())[:400])
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    now = time.perf_counter()
                    if last is None:
                        first.append((len(request["prompt"]), now - start))
                    else:
                        between.append(now - last)
                    last = now

    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        await asyncio.gather(*(stream(session) for _ in range(streams)))
    seconds = time.perf_counter() - begun
    return dict(first=first, between=between, rate=(len(first) + len(between)) / seconds)


def quantiles(values):
    """p50 and p99 in milliseconds."""
    ordered = sorted(values)
    return 1e3 * statistics.median(ordered), 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def render(rows, args, equal, answers, moved, link):
    lines = [
        "| streams | topology | TTFT p50 / p99, ms | ITL p50 / p99, ms | events/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    for streams in args.streams:
        for name in ("agg", "pd"):
            row = rows[name, streams]
            lines.append(f"| {streams} | {name} | {row['ttft'][0]:.1f} / {row['ttft'][1]:.1f} "
                         f"| {row['itl'][0]:.2f} / {row['itl'][1]:.2f} | {row['rate']:,.0f} |")
    lines.append("")
    lines.append(f"Equal greedy answers: {equal} of {answers}.")
    if moved and moved["microseconds"]:
        rate = moved["bytes"] / moved["microseconds"] / 1e3
        each = moved["bytes"] / max(1, moved["transfers"]) / 1e6
        beside = f", {100 * rate / link:.0f} % of the link's {link:.0f} GB/s (1 GiB copies)" if link else ""
        lines.append(f"KV moved: {moved['transfers']:.0f} transfers of {each:.1f} MB, {rate:.1f} GB/s while moving{beside}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
