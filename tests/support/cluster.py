"""Topologies under test: which programs run, with which arguments, and how they are found ready.

The only place that spells command lines.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import httpx

from .api import Api
from .process import Process, descendants, free_port, is_alive, kill, wait_until

ROOT = Path(__file__).resolve().parent.parent.parent

MODEL_NAME = "tiny"

# Engine flags of both servers. In float32 the two most likely tokens are practically
# never equally likely, so that a greedy answer does not depend on what ran beside it.
# Without white space between JSON tokens, constrained answers come to their end.
ENGINE_FLAGS = [
    "--served-model-name", MODEL_NAME,
    "--dtype", "float32",
    "--enforce-eager",
    "--max-model-len", "2048",
    "--max-num-seqs", "8",
    "--block-size", "32",
    "--kv-cache-memory-bytes", str(128 << 20),
    "--max-logprobs", "20",
    "--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}',
    "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
]

# For engines on a small machine without a network.
ENGINE_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Settings:
    """Where programs, model and working files are."""

    # Folder of our binaries.
    binaries: Path
    # A Python that has vLLM.
    python: Path
    model: Path
    # Logs, discovery and state; one folder per test run.
    folder: Path

    @staticmethod
    def from_environment(folder: Path) -> Settings:
        return Settings(
            binaries=Path(os.environ.get("STATOR_BIN_DIR") or ROOT / "target" / "debug"),
            python=Path(os.environ.get("STATOR_PYTHON") or ROOT / ".venv" / "bin" / "python"),
            model=Path(os.environ.get("STATOR_TEST_MODEL") or ROOT / ".models" / "tiny"),
            folder=folder,
        )


class Reference:
    """vLLM's own OpenAI server, with its own engine."""

    numbers = itertools.count()

    def __init__(self, settings: Settings, *flags: str):
        port = free_port()
        self.api = Api(f"http://127.0.0.1:{port}")
        self.process = Process(
            "vllm serve",
            [settings.python, "-m", "vllm.entrypoints.cli.main", "serve", settings.model, *ENGINE_FLAGS,
             "--enable-prompt-tokens-details", "--host", "127.0.0.1", "--port", str(port), *flags],
            settings.folder / f"reference-{next(self.numbers)}.log",
            ENGINE_ENVIRONMENT,
        )

    def __enter__(self) -> Reference:
        try:
            self.process.wait_until("vLLM's server is ready", self.api.is_healthy)
        except BaseException:
            self.process.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.process.stop()


class Worker:
    """One aggregated worker, on a real or a simulated engine.

    It can be killed and started again: the folder with its state stays the same.
    """

    def __init__(self, settings: Settings, name: str, folder: Path, engine: str = "vllm", flags: tuple[str, ...] = ()):
        self.name = name
        self.folder = folder / name
        self.log = folder / f"{name}.log"
        self.settings = settings
        self.system = Api(f"http://127.0.0.1:{free_port()}")
        self.command = [
            settings.binaries / "stator-agg",
            "--model", settings.model,
            "--engine", engine,
            "--run-dir", self.folder,
            "--discovery-backend", "file",
            "--system-port", self.system.url.rpartition(":")[2],
            *ENGINE_FLAGS, *flags,
        ]
        self.environment = ENGINE_ENVIRONMENT | {
            "STATOR_FILE_KV": str(folder / "discovery"),
            "STATOR_PYTHON": str(settings.python),
        }
        self.process: Process | None = None

    def start(self) -> Worker:
        self.process = Process(self.name, self.command, self.log, self.environment)
        return self

    def status(self) -> dict:
        """What it says of itself; empty while it does not answer."""
        try:
            return self.system.get("/status", timeout=2).json or {}
        except httpx.HTTPError:
            return {}

    def wait_ready(self) -> Worker:
        self.process.wait_until(f"{self.name} is ready", lambda: self.status().get("state") == "ready")
        return self

    def engine_pid(self) -> int | None:
        """The leader of the engine's process group; None where there is no engine of its own."""
        for record in self.folder.rglob("engine.json"):
            process = json.loads(record.read_text()).get("process")
            if process and is_alive(process["pid"]):
                return process["pid"]
        return None

    def stop(self) -> int | None:
        """Ends it, and an engine that it left behind."""
        status = self.process.stop() if self.process else None
        engine = self.engine_pid()
        if engine:
            for pid in (engine, *descendants(engine)):
                kill(pid)
        return status


class Processor:
    """One processor. It finds the workers through the folder it shares with them."""

    def __init__(self, settings: Settings, name: str, folder: Path, flags: tuple[str, ...] = (), key: str | None = None):
        self.name = name
        port = free_port()
        self.api = Api(f"http://127.0.0.1:{port}", key)
        self.process = Process(
            name,
            [settings.binaries / "stator-processor", "--http-host", "127.0.0.1", "--http-port", str(port),
             "--discovery-backend", "file", "--drain-grace", "10s", *flags],
            folder / f"{name}.log",
            {"STATOR_FILE_KV": str(folder / "discovery")} | ({"STATOR_API_KEY": key} if key else {}),
        )

    def wait_ready(self) -> Processor:
        self.process.wait_until(f"{self.name} is ready", self.api.is_healthy)
        return self

    def targets(self) -> list[dict]:
        """The workers as its router sees them."""
        return [target for model in self.api.get("/workers").json["models"] for target in model["targets"]]

    def stop(self) -> int | None:
        return self.process.stop()


class Topology:
    """A processor and its workers in a folder of their own; ends all that it started."""

    numbers = itertools.count()

    def __init__(self, settings: Settings, workers: int = 1, engine: str = "vllm",
                 worker_flags: tuple[str, ...] = (), processor_flags: tuple[str, ...] = ()):
        self.settings = settings
        self.folder = settings.folder / f"topology-{next(self.numbers)}"
        # Discovery refuses a folder that others may write to.
        self.folder.mkdir(mode=0o700)
        self.workers = [
            Worker(settings, f"agg-{index}", self.folder, engine, worker_flags) for index in range(workers)
        ]
        self.processors: list[Processor] = []
        self.processor_flags = processor_flags

    def __enter__(self) -> Topology:
        try:
            for worker in self.workers:
                worker.start()
            self.add_processor(*self.processor_flags)
            for worker in self.workers:
                worker.wait_ready()
            self.processor.wait_ready()
            self.wait_connected(len(self.workers))
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    @property
    def processor(self) -> Processor:
        return self.processors[0]

    @property
    def api(self) -> Api:
        return self.processor.api

    def add_processor(self, *flags: str, key: str | None = None) -> Processor:
        """Starts one more processor over the same workers."""
        name = f"processor-{len(self.processors)}"
        self.processors.append(Processor(self.settings, name, self.folder, flags, key))
        return self.processors[-1]

    def wait_connected(self, count: int) -> None:
        """Waits until the first processor can send to `count` workers."""
        def are_open() -> bool:
            return sum(target["availability"] == "open" for target in self.processor.targets()) == count

        wait_until(f"{count} workers are open", are_open)

    def stop(self) -> None:
        for part in (*self.processors, *self.workers):
            part.stop()
