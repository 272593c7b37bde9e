"""Runs every test: Rust, then the tests of whole topologies in `tests/`.

Installs what is missing. All parts run, also after one failed; the status is that of
the worst.

usage: test.py [PYTEST ARGUMENTS]
"""

from __future__ import annotations

import subprocess
import sys

import host
import model
import setup_tests
import setup_vllm


def run() -> int:
    host.need_programs("gcc", "cargo", "etcd", "nats-server", "openssl")
    vllm = setup_vllm.python()
    tests = setup_tests.python()
    env = host.environment() | {
        # Where the tests of both languages find a real engine and its model.
        "STATOR_PYTHON": str(vllm),
        "STATOR_TEST_MODEL": str(model.tiny(tests)),
    }
    parts = {
        # First: the launcher's tests start them, and so do those of whole topologies.
        "building the binaries": ["cargo", "build", "--workspace", "--bins"],
        "Rust tests": ["cargo", "test", "--workspace", "--no-fail-fast"],
        "tests of whole topologies": [tests, "-m", "pytest", host.ROOT / "tests", *sys.argv[1:]],
    }
    failed = [name for name, command in parts.items() if not passes(name, command, env)]
    if failed:
        host.say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def passes(name: str, command: list, env: dict[str, str]) -> bool:
    with host.step(name):
        return subprocess.run(command, cwd=host.ROOT, env=env).returncode == 0


if __name__ == "__main__":
    host.main(run)
