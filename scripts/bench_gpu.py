"""Output tokens per second and time to the first token on a GPU: Stator beside vLLM's own servers.

Starts one server after the other on the same GPU with the same engine flags, loads each with streaming
completions of token-id prompts (greedy, `ignore_eos`), and prints one table:

- stator: `stator-processor` and `stator-agg`, two processes before the engine;
- rust: vLLM's own Rust frontend, one process before the engine;
- python: vLLM's API server;
- engine: the engine alone, in process (`LLM.generate`), without HTTP. It has no first-token time.

    python3 scripts/bench_gpu.py --model DIR [--bin target/dist] [--servers stator,rust,python,engine]

Needs aiohttp. Weights are random (`--load-format dummy`), so only config and tokenizer must be in DIR.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 128
SERVED_NAME = "m"
READY_SECONDS = 240


def main():
    args = parse_args()
    out = Path(args.out or tempfile.mkdtemp(prefix="stator-bench-"))
    out.mkdir(parents=True, exist_ok=True)
    vocab = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    rows = {}
    for turn in range(args.turns):
        for name in args.servers.split(","):
            try:
                keep_best(rows.setdefault(name, {}), measure(name, args, out, vocab))
            except Exception as error:  # one server that fails must not cost the others' figures
                print(f"{name}, turn {turn}: {error}", flush=True)
    table = render(rows, args.streams)
    print(table, flush=True)
    (out / "table.md").write_text(table)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--bin", default="target/dist", help="folder with Stator's binaries")
    parser.add_argument("--servers", default="stator,rust,python,engine")
    parser.add_argument("--streams", default="1,64,256", type=lambda s: [int(x) for x in s.split(",")])
    parser.add_argument("--rounds", type=int, default=2, help="measurements of each server at each load; the best counts")
    parser.add_argument("--turns", type=int, default=2, help="times that each server is started, one after the other in turn")
    parser.add_argument("--out", help="folder for logs and the table")
    parser.add_argument("engine_args", nargs="*", help="further vLLM flags, after --")
    return parser.parse_args()


def keep_best(row, cells):
    """Takes the higher rate of each load: what disturbs a measurement only ever slows it down."""
    for streams, cell in cells.items():
        row[streams] = max(row.get(streams, (0.0, None)), cell, key=lambda c: c[0])


def measure(name, args, out, vocab):
    """Starts server `name`, loads it, ends it; returns {streams: (tokens/s, mean TTFT ms or None)}."""
    if name == "engine":
        return measure_engine(args, out, vocab)
    started = time.time()
    with Server(name, args, out) as server:
        server.wait()
        print(f"{name}: ready after {time.time() - started:.1f} s", flush=True)
        load(server.url, vocab, streams=8, requests=16)  # the first requests compile and fill caches
        result = {}
        for streams in args.streams:
            requests = 8 if streams == 1 else 6 * streams
            rounds = [load(server.url, vocab, streams, requests) for _ in range(args.rounds)]
            result[streams] = max(rounds)
            print(f"{name}: {streams} streams: {', '.join(f'{r[0]:.0f} tok/s, {r[1]:.1f} ms' for r in rounds)}", flush=True)
        server.report_cpu()
        return result


class Server:
    """The processes behind one URL; ends them on exit."""

    def __init__(self, name, args, out):
        self.name, self.out, self.children = name, out, []
        engine = [
            "--load-format", "dummy", "--max-model-len", "4096", "--max-num-seqs", "256",
            "--gpu-memory-utilization", "0.85", *args.engine_args,
        ]
        environment = dict(os.environ, VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self.url = "http://127.0.0.1:8000"
        if name == "stator":
            run_dir = tempfile.mkdtemp(prefix="stator-")
            environment["STATOR_FILE_KV"] = f"{run_dir}/discovery"
            environment["STATOR_PYTHON"] = sys.executable
            self.start("agg", environment, [
                f"{args.bin}/stator-agg", "--model", args.model, "--served-model-name", SERVED_NAME,
                "--discovery-backend", "file", "--run-dir", f"{run_dir}/agg", *engine,
            ])
            self.start("processor", environment, [
                f"{args.bin}/stator-processor", "--http-port", "8000", "--discovery-backend", "file",
            ])
        else:
            if name == "rust":
                environment["VLLM_USE_RUST_FRONTEND"] = "1"
            self.start("server", environment, [
                sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", args.model,
                "--served-model-name", SERVED_NAME, "--host", "127.0.0.1", "--port", "8000", *engine,
            ])

    def start(self, part, environment, command):
        log = open(self.out / f"{self.name}-{part}.log", "w")
        child = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.children.append((part, child))

    def wait(self):
        """Waits until the model answers."""
        deadline = time.time() + READY_SECONDS
        while time.time() < deadline:
            for part, child in self.children:
                if child.poll() is not None:
                    log = (self.out / f"{self.name}-{part}.log").read_text()
                    raise RuntimeError(f"{part} ended with {child.returncode}:\n{log[-3000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2) as response:
                    if response.status == 200:
                        return
            except OSError:
                pass
            time.sleep(0.2)
        raise RuntimeError(f"not ready after {READY_SECONDS} s")

    def report_cpu(self):
        """Prints the CPU seconds of every process of this server so far (front ends and engine alike)."""
        tick = os.sysconf("SC_CLK_TCK")
        groups = {child.pid for _, child in self.children}
        rows = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, rest = stat.read_text().split("(", 1)[1].rsplit(") ", 1)
            except (OSError, ValueError):
                continue
            fields = rest.split()
            if int(fields[3]) in groups:
                rows.append(f"{name} {(int(fields[11]) + int(fields[12])) / tick:.1f} s")
        print(f"{self.name}: CPU: {', '.join(sorted(rows))}", flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for signum, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 5)):
            for _, child in reversed(self.children):
                try:
                    os.killpg(child.pid, signum)
                except ProcessLookupError:
                    pass
            deadline = time.time() + patience
            while time.time() < deadline and any(child.poll() is None for _, child in self.children):
                time.sleep(0.1)
        time.sleep(2)  # the driver returns the memory a moment after the process is gone


def load(url, vocab, streams, requests):
    """Runs `requests` over `streams` at a time; returns (output tokens/s, mean TTFT in ms)."""
    processes = max(1, min(8, streams // 16))
    jobs = [
        (url, vocab, streams // processes, requests // processes, seed) for seed in range(processes)
    ]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(import_client, range(processes))
        samples = [s for part in pool.map(client, jobs, chunksize=1) for s in part]
    first, last = min(s[0] for s in samples), max(s[2] for s in samples)
    tokens = sum(s[3] for s in samples)
    return tokens / (last - first), 1e3 * sum(s[1] - s[0] for s in samples) / len(samples)


def import_client(_):
    import aiohttp  # noqa: F401


def client(job):
    """One client process: [(start, first token, end, output tokens)]."""
    import aiohttp

    url, vocab, streams, requests, seed = job
    rng = random.Random(seed)
    bodies = [
        {
            "model": SERVED_NAME,
            "prompt": [rng.randrange(300, vocab - 600) for _ in range(PROMPT_TOKENS)],
            "max_tokens": OUTPUT_TOKENS,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(requests)
    ]
    samples = []

    async def one(session, body):
        start, first, last = time.perf_counter(), None, b""
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise RuntimeError((await response.text())[:400])
            async for line in response.content:
                if line.startswith(b"data: {"):
                    first = first or time.perf_counter()
                    last = line
        usage = json.loads(last[6:])["usage"]
        samples.append((start, first, time.perf_counter(), usage["completion_tokens"]))

    async def run():
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=300)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            async def stream():
                while bodies:
                    await one(session, bodies.pop())
            await asyncio.gather(*(stream() for _ in range(streams)))

    asyncio.run(run())
    return samples


def measure_engine(args, out, vocab):
    """Runs the engine alone in a process of its own."""
    job = json.dumps({"model": args.model, "vocab": vocab, "streams": args.streams, "prompt": PROMPT_TOKENS, "output": OUTPUT_TOKENS})
    environment = dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    answer = out / "engine.json"
    script = Path(__file__).with_name("bench_engine.py")
    with open(out / "engine.log", "w") as log:
        subprocess.run([sys.executable, script, job, answer], env=environment, stdout=log, stderr=log, check=True)
    result = json.loads(answer.read_text())
    print(f"engine: {result}", flush=True)
    return {int(streams): (rate, None) for streams, rate in result.items()}


def render(rows, streams):
    lines = ["| output tokens/s (TTFT mean, ms) at | " + " | ".join(f"{n} streams" for n in streams) + " |"]
    lines.append("| --- |" + " --- |" * len(streams))
    rows = {name: cells for name, cells in rows.items() if cells}
    for name, cells in rows.items():
        text = [f"{rate:,.0f}" + (f" ({ttft:.1f})" if ttft else "") for rate, ttft in (cells[n] for n in streams)]
        lines.append(f"| {name} | " + " | ".join(text) + " |")
    if "stator" in rows and "rust" in rows:
        ratio = [f"{rows['stator'][n][0] / rows['rust'][n][0]:.2f}x" for n in streams]
        lines.append("| stator / rust | " + " | ".join(ratio) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
