"""A vLLM plug-in for engines that move KV with NIXL on a machine with few cores and no GPU.

NIXL's Python API (1.5.1) has each agent's progress thread poll without a pause, which
takes a core for itself, and vLLM (0.32) moves every such engine onto the last core.
With two engines on two cores nothing is left for the tokens: the first one takes 19 s.

The set-up puts it into the environment of the CPU build only. vLLM calls `register` in
each of its processes.
"""

from __future__ import annotations

import importlib
import os

# Microseconds between two polls: short beside a transfer, long beside a poll.
POLL_MICROSECONDS = 2000


def register() -> None:
    """Has NIXL made patient where vLLM loads it, which most engines never do."""
    from vllm.distributed import nixl_utils
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    load = nixl_utils._load_nixl_attr

    def load_patiently(name: str):
        spare_the_cores()
        return load(name)

    nixl_utils._load_nixl_attr = load_patiently


def spare_the_cores() -> None:
    """Leaves this process on all its cores, and gives NIXL's progress thread a pause."""
    os.sched_setaffinity = lambda pid, mask: None
    for build in ("nixl_cu13", "nixl_cu12"):
        try:
            bindings = importlib.import_module(f"{build}._bindings")
        except ImportError:
            continue
        if not issubclass(bindings.nixlAgentConfig, Patient):
            bindings.nixlAgentConfig = with_pauses(bindings.nixlAgentConfig)


class Patient:
    """Marks a class that has been given pauses."""


def with_pauses(config: type) -> type:
    """The class of an agent's configuration, with a floor under the pause between polls."""
    pause = config.pthrDelay

    class PatientAgentConfig(config, Patient):
        @property
        def pthrDelay(self):
            return pause.fget(self)

        @pthrDelay.setter
        def pthrDelay(self, microseconds):
            pause.fset(self, max(microseconds, POLL_MICROSECONDS))

    return PatientAgentConfig
