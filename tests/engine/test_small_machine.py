"""The plug-in for engines with NIXL on a small machine is found, and does what it says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import support

pytestmark = pytest.mark.engine

SCRIPT = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from nixl._api import nixl_agent, nixl_agent_config
from nixl_cu13 import _bindings
config = _bindings.nixlAgentConfig()
config.pthrDelay = 0
print("pause", config.pthrDelay)
agent = nixl_agent("test", nixl_agent_config(backends=["UCX"]))
print("agent", agent.name)
"""


def test_nixl_pauses_between_polls(settings):
    folder = Path(support.__file__).parent / "vllm_plugin"
    done = subprocess.run(
        [settings.python, "-c", SCRIPT], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(folder), "UCX_TLS": "tcp,sm,self"},
    )
    assert "pause 2000" in done.stdout, done.stdout + done.stderr
    assert "agent test" in done.stdout, done.stdout + done.stderr
