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
from .process import Process, descendants, free_port, free_row, is_alive, kill, wait_until

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


def connector(name: str = "NixlConnector", extra: dict | None = None, **fields) -> tuple[str, ...]:
    """Engine flags with which KV is handed from prefill to decode; `fields` are of vLLM's KVTransferConfig."""
    config = {"kv_connector": name, "kv_role": "kv_both", "kv_buffer_device": "cpu"} | fields
    return "--kv-transfer-config", json.dumps(config | {"kv_connector_extra_config": extra or {}})


class Worker:
    """One worker of a role, on a real or a simulated engine.

    It can be killed and started again: the folder with its state stays the same.
    """

    def __init__(self, settings: Settings, name: str, folder: Path, engine: str = "vllm", flags: tuple[str, ...] = (),
                 role: str = "agg"):
        self.name = name
        self.role = role
        self.folder = folder / name
        self.log = folder / f"{name}.log"
        self.settings = settings
        self.system = Api(f"http://127.0.0.1:{free_port()}")
        self.command = [
            settings.binaries / f"stator-{role}",
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
        # What processors know it by, once it is ready.
        self.id: str | None = None

    def start(self) -> Worker:
        assert not self.is_running(), f"{self.name} runs already"
        self.process = Process(self.name, self.command, self.log, self.environment)
        return self

    def is_running(self) -> bool:
        return self.process is not None and self.process.status() is None

    def status(self) -> dict:
        """What it says of itself; empty while it does not answer."""
        try:
            return self.system.get("/status", timeout=2).json or {}
        except httpx.HTTPError:
            return {}

    def wait_ready(self) -> Worker:
        self.process.wait_until(f"{self.name} is ready", lambda: self.status().get("state") == "ready")
        self.id = self.status()["worker"]
        return self

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels, or, with labels in the name, that one; 0 if it never counted."""
        return read_metric(self.system, name)

    def kv_usage(self) -> float:
        """The share of KV blocks that are in use, for a request or for another engine to fetch."""
        return self.status().get("kv_usage", 1.0)

    def kill(self) -> None:
        """SIGKILL to it and its engine, as when a machine is lost."""
        engine = self.engine_pids()
        self.process.kill()
        for pid in engine:
            kill(pid)

    def engine_pids(self) -> list[int]:
        """The processes of its engine, or of those of all its ranks."""
        return [pid for leader in self.engine_leaders() for pid in (leader, *descendants(leader))]

    def engine_pid(self) -> int | None:
        """The leader of the engine's process group; None where there is no engine of its own."""
        return next(iter(self.engine_leaders()), None)

    def engine_leaders(self) -> list[int]:
        """The leader of each rank's process group, in no order; empty where there is no engine of its own."""
        records = (json.loads(record.read_text()) for record in self.folder.rglob("engine.json"))
        processes = (record.get("process") for record in records)
        return [process["pid"] for process in processes if process and is_alive(process["pid"])]

    def stop(self) -> int | None:
        """Ends it, and an engine that it left behind."""
        status = self.process.stop() if self.process else None
        for pid in self.engine_pids():
            kill(pid)
        return status


def read_metric(api: Api, name: str) -> float:
    """The sum of a Prometheus series over all labels that begin as `name` says."""
    text = api.get("/metrics").text
    rows = [line for line in text.splitlines() if line.startswith((f"{name}{{", f"{name} "))] \
        if "{" not in name else [line for line in text.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in rows)


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

    def wait_live(self) -> Processor:
        """Waits until it answers, if only that it has no worker."""
        self.process.wait_until(f"{self.name} is live", lambda: self.api.answers("/live"))
        return self

    def metric(self, name: str) -> float:
        """As that of a worker."""
        return read_metric(self.api, name)

    def wait_ready(self) -> Processor:
        self.process.wait_until(f"{self.name} is ready", self.api.is_healthy)
        return self

    def targets(self) -> list[dict]:
        """The workers as its router sees them."""
        return [target for model in self.api.get("/workers").json["models"] for target in model["targets"]]

    def stop(self) -> int | None:
        return self.process.stop()


class Relay:
    """The relay of a machine, for workers with `worker_flags`. It can be killed and started again."""

    def __init__(self, settings: Settings):
        # Questions come on the next one.
        port = free_row(2)
        self.worker_flags = ("--kv-relay", "node", "--kv-relay-address", f"127.0.0.1:{port}")
        self.settings = settings
        self.system = Api(f"http://127.0.0.1:{free_port()}")
        self.command = [
            settings.binaries / "stator-kv-relay", "--discovery-backend", "file", "--port", str(port),
            "--system-port", self.system.url.rpartition(":")[2],
        ]
        self.process: Process | None = None

    def start(self, topology: Topology) -> Relay:
        """Starts it beside the workers of a topology."""
        self.process = Process(
            "relay", self.command, topology.folder / "relay.log",
            {"STATOR_FILE_KV": str(topology.folder / "discovery")},
        )
        self.process.wait_until("the relay is live", lambda: self.system.answers("/live"))
        return self

    def metric(self, name: str) -> float:
        """As that of a worker."""
        return read_metric(self.system, name)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()

    def stop(self) -> None:
        if self.process:
            self.process.stop()


class Topology:
    """A processor and its workers in a folder of their own; ends all that it started."""

    numbers = itertools.count()

    def __init__(self, settings: Settings, workers: int | dict[str, int] = 1, engine: str = "vllm",
                 worker_flags: tuple[str, ...] = (), processor_flags: tuple[str, ...] = ()):
        """`workers`: how many of each role; a number: aggregated ones."""
        self.settings = settings
        self.engine = engine
        self.folder = settings.folder / f"topology-{next(self.numbers)}"
        # Discovery refuses a folder that others may write to.
        self.folder.mkdir(mode=0o700)
        self.workers: list[Worker] = []
        roles = workers if isinstance(workers, dict) else {"agg": workers}
        for role, count in roles.items():
            for _ in range(count):
                self.add_worker(role, *worker_flags)
        self.processors: list[Processor] = []
        self.processor_flags = processor_flags

    def __enter__(self) -> Topology:
        try:
            for worker in self.workers:
                worker.start()
            self.add_processor(*self.processor_flags)
            for worker in self.workers:
                worker.wait_ready()
            if self.workers:
                self.processor.wait_ready()
            else:
                self.processor.wait_live()
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

    def of_role(self, role: str) -> list[Worker]:
        return [worker for worker in self.workers if worker.role == role]

    def add_worker(self, role: str, *flags: str) -> Worker:
        """One more worker, not started."""
        name = f"{role}-{len(self.of_role(role))}"
        self.workers.append(Worker(self.settings, name, self.folder, self.engine, flags, role))
        return self.workers[-1]

    def add_processor(self, *flags: str, key: str | None = None) -> Processor:
        """Starts one more processor over the same workers."""
        name = f"processor-{len(self.processors)}"
        self.processors.append(Processor(self.settings, name, self.folder, flags, key))
        return self.processors[-1]

    def wait_connected(self, count: int) -> None:
        """Waits until the first processor can send to `count` workers."""
        def are_open() -> bool:
            # A worker of several ranks is a target for each.
            targets = self.processor.targets()
            return len({target["worker"] for target in targets if target["availability"] == "open"}) == count

        wait_until(f"{count} workers are open", are_open)

    def wait_idle(self, seconds: float = 60) -> None:
        """Waits until nothing runs and no KV is kept, neither in the books of the processors nor in an engine."""
        def what_is_left() -> list[str]:
            left = [f"{processor.name} has booked {target['booked']}" for processor in self.processors
                    for target in processor.targets() if target["booked"]["requests"]]
            for worker in self.workers:
                if not worker.is_running():
                    continue
                status = worker.status()
                left += [f"{worker.name} has {what}: {status.get(what)}"
                         for what in ("requests", "running", "waiting", "kv_usage") if status.get(what) != 0]
            return left

        try:
            wait_until("nothing is left", lambda: not what_is_left(), seconds)
        except TimeoutError:
            raise TimeoutError(f"left after {seconds} s: {', '.join(what_is_left())}") from None

    def stop(self) -> None:
        for part in (*self.processors, *self.workers):
            part.stop()
