"""Writes every golden vector anew, with vLLM's own code. Look at the difference before you commit it.

- crates/engine/tests/golden: the engine's wire, both directions. `--sources DIR` makes those of
  another release from an unpacked wheel of vLLM, over the installed packages.
- crates/text/tests/golden: tokenizers, templates, parsers.
- crates/processor/tests/golden: what requests with tools ask of the engine.

usage: gen.py [--sources DIR]
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import host
import setup_vllm

WIRE = host.ROOT / "crates" / "engine" / "tests" / "golden"
SCRIPTS = host.ROOT / "scripts"


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=Path, metavar="DIR")
    sources = parser.parse_args().sources
    python = setup_vllm.python()
    with host.step("what an engine sends"):
        write_outputs(python, sources)
    with host.step("what an engine makes of our requests"):
        env = host.environment() | {"STATOR_BLESS": "1", "STATOR_PYTHON": str(python)}
        if sources:
            env["STATOR_VLLM_SOURCES"] = str(sources.absolute())
        command = ["cargo", "test", "-q", "-p", "stator-engine", "--test", "golden_live"]
        subprocess.run(command, check=True, cwd=host.ROOT, env=env)
    if not sources:
        with host.step("tokenizers, templates and parsers"):
            host.call(python, SCRIPTS / "golden_text.py")
        with host.step("constraints of tool calls"):
            host.call(python, SCRIPTS / "golden_calls.py")
    return 0


def write_outputs(python: Path, sources: Path | None) -> None:
    options = ["--sources", sources] if sources else []
    made = subprocess.run(
        [python, SCRIPTS / "golden.py", "outputs", *options],
        check=True, stdout=subprocess.PIPE, text=True, env=host.environment(),
    ).stdout
    major, minor = json.loads(made)["vllm_version"].split(".")[:2]
    folder = WIRE / f"v{major}_{minor}"
    folder.mkdir(exist_ok=True)
    (folder / "outputs.json").write_text(made)
    events = subprocess.run(
        [python, SCRIPTS / "golden_events.py", *options],
        check=True, stdout=subprocess.PIPE, text=True, env=host.environment(),
    ).stdout
    (folder / "events.json").write_text(events)


if __name__ == "__main__":
    host.main(run)
