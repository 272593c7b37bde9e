"""Measures what the serving layer costs, on the simulated engine: builds the binaries as they are
published, and runs stator-bench beside them. Takes minutes to build and about a minute to run.

usage: bench.py [STATOR-BENCH ARGUMENTS]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import host

PACKAGES = ["stator-bench", "stator-sim", "stator-agg", "stator-processor"]


def run() -> int:
    host.need_programs("gcc", "cargo")
    env = host.environment()
    command = ["cargo", "build", "--profile", "dist"]
    for package in PACKAGES:
        command += ["--package", package]
    with host.step("building"):
        subprocess.run(command, cwd=host.ROOT, env=env, check=True)
    target = Path(env.get("CARGO_TARGET_DIR", host.ROOT / "target"))
    return subprocess.run([target / "dist" / "stator-bench", *sys.argv[1:]], env=env).returncode


if __name__ == "__main__":
    host.main(run)
