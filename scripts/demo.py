"""Serves a model and asks it something: the way from an empty clone to an answer.

Builds, installs vLLM into `.venv`, makes a tiny model, starts a processor, a prefill worker
and a decode worker, sends one chat request, and leaves them running until Ctrl-C.

- `MODEL=DIR_OR_NAME` serves another model; with a single GPU, by one aggregated worker.
- `PORT=8000` is where the API listens.

usage: demo.py [--once] [-- VLLM FLAGS]      (--once: end after the answer)
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import host
import model
import setup_vllm

QUESTION = "Hello! What can you tell me about rivers?"

# So that the tiny model starts on any machine within seconds.
TINY_FLAGS = ["--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8",
              "--kv-cache-memory-bytes", str(128 << 20)]


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--once", action="store_true", help="end after the answer")
    parser.add_argument("flags", nargs="*", metavar="VLLM FLAGS")
    arguments = parser.parse_args()

    host.need_programs("gcc", "cargo")
    with host.step("building (the first time takes minutes)"):
        host.call("cargo", "build", "--release", "--workspace", "--bins")
    python = setup_vllm.python()
    given = os.environ.get("MODEL")
    serve = given or str(model.tiny(python))
    name = serve if given else "tiny"
    flags = [*([] if given else TINY_FLAGS), *arguments.flags]

    url = f"http://127.0.0.1:{os.environ.get('PORT') or 8000}"
    topology = start(serve, name, url, python, flags)
    try:
        wait_until_ready(topology, url)
        show_answer(url, name, is_random=not given)
        if not arguments.once:
            return topology.wait()
    finally:
        end(topology)
    return 0


def start(serve: str, name: str, url: str, python, flags: list[str]) -> subprocess.Popen:
    workers = ["--prefill-workers", "1", "--decode-workers", "1"]
    if name == "tiny":
        workers += ["--share-gpus"]
    elif setup_vllm.has_gpu() and setup_vllm.gpus() < 2:
        host.say("one GPU: prefill and decode stay together")
        workers = []
    host.say(f"starting a processor and {'prefill and decode workers' if workers else 'a worker'} for {name}")
    env = host.environment() | {"STATOR_PYTHON": str(python)}
    if flags[: len(TINY_FLAGS)] == TINY_FLAGS:
        # One thread is enough, and an engine in one process is ready sooner.
        env |= {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    command = [
        host.ROOT / "target" / "release" / "stator", "up", "--model", serve, "--served-model-name", name,
        "--http-port", url.rpartition(":")[2], "--name", "demo", "--plain", *workers, "--", *flags,
    ]
    # A session of its own: Ctrl-C reaches this script, which then ends the topology in order.
    topology = subprocess.Popen(
        command, env=env, start_new_session=True, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )
    threading.Thread(target=show_states, args=(topology,), daemon=True).start()
    return topology


def show_states(topology: subprocess.Popen) -> None:
    """Shows what the launcher says itself; what its processes log only if it comes to nothing."""
    last = collections.deque(maxlen=40)
    for line in topology.stdout:
        last.append(line)
        if " | " not in line:
            print("   ", line, end="", flush=True)
    if topology.wait() != 0:
        print("".join(last), file=sys.stderr)


def wait_until_ready(topology: subprocess.Popen, url: str) -> None:
    while True:
        if topology.poll() is not None:
            raise host.SetupError(f"the topology ended with status {topology.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)


def show_answer(url: str, name: str, is_random: bool) -> None:
    body = {"model": name, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 40}
    if is_random:
        # Else it may well end after one word.
        body["min_tokens"] = 20
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    note = "\n  (random weights: the words have no meaning)" if is_random else ""
    print(
        f"""
  > {QUESTION}
  {answer["choices"][0]["message"]["content"]}{note}

  The OpenAI API is at {url}/v1. Another request:

    curl {url}/v1/chat/completions -H 'content-type: application/json' \\
      -d '{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'

  A real model:          make demo MODEL=/path/to/model
  Without this script:   target/release/stator up --help
  Ctrl-C ends everything.
""",
        flush=True,
    )


def end(topology: subprocess.Popen) -> None:
    """Has the topology drain; a second Ctrl-C ends it at once."""
    if topology.poll() is not None:
        return
    topology.send_signal(signal.SIGINT)
    try:
        topology.wait()
    except KeyboardInterrupt:
        topology.send_signal(signal.SIGINT)
        topology.wait()


if __name__ == "__main__":
    # A SIGTERM ends the topology as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    host.main(run)
