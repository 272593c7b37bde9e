"""A vLLM plug-in for engines that move KV with NIXL on a machine with few cores.

NIXL's Python API has each agent's progress thread poll without a pause, which takes a
core for itself, and vLLM moves every such engine onto the last core. With two engines
on two cores nothing is left for the tokens.

vLLM finds it where this folder is on PYTHONPATH: it is laid out like an installed
distribution with an entry point.
"""

from __future__ import annotations

import importlib
import os

# Microseconds between two polls: short beside a transfer, long beside a poll.
POLL_MICROSECONDS = 2000


def register() -> None:
    """Called by vLLM in each of its processes."""
    os.sched_setaffinity = lambda pid, mask: None
    for build in ("nixl_cu13", "nixl_cu12"):
        try:
            bindings = importlib.import_module(f"{build}._bindings")
        except ImportError:
            continue
        bindings.nixlAgentConfig = with_pauses(bindings.nixlAgentConfig)


def with_pauses(config: type) -> type:
    """The class of an agent's configuration, with a floor under the pause between polls."""
    pause = config.pthrDelay

    class PatientAgentConfig(config):
        @property
        def pthrDelay(self):
            return pause.fget(self)

        @pthrDelay.setter
        def pthrDelay(self, microseconds):
            pause.fset(self, max(microseconds, POLL_MICROSECONDS))

    return PatientAgentConfig
