"""Topologies under test: which programs run, with which arguments, and how they are found ready.

The only place that spells command lines.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

from .api import Api
from .process import Process, descendants, free_port, kill, wait_until

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
        venv = Path(os.environ.get("VLLM_VENV") or ROOT / ".venv")
        return Settings(
            binaries=Path(os.environ.get("STATOR_BIN_DIR") or ROOT / "target" / "debug"),
            python=venv / "bin" / "python",
            model=Path(os.environ.get("STATOR_TEST_MODEL") or ROOT / ".models" / "tiny"),
            folder=folder,
        )


class Reference:
    """vLLM's own OpenAI server, with its own engine."""

    def __init__(self, settings: Settings, *flags: str):
        port = free_port()
        self.api = Api(f"http://127.0.0.1:{port}")
        self.process = Process(
            "vllm serve",
            [settings.python, "-m", "vllm.entrypoints.cli.main", "serve", settings.model, *ENGINE_FLAGS,
             "--enable-prompt-tokens-details", "--host", "127.0.0.1", "--port", str(port), *flags],
            settings.folder / "reference.log",
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
