"""The plug-ins for engines on a small machine without a GPU are found, and do what they say."""

from __future__ import annotations

import os
import subprocess

import pytest

pytestmark = pytest.mark.engine

# As vLLM's NIXL connector does it, beside what the plug-ins are asked.
NIXL = """
import os, time
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.distributed.nixl_utils import NixlWrapper, nixl_agent_config
cores = os.sched_getaffinity(0)
os.sched_setaffinity(0, [max(cores)])
print("cores kept", os.sched_getaffinity(0) == cores)
agent = NixlWrapper("test", nixl_agent_config(num_threads=4))
before = time.process_time()
time.sleep(2)
print("idle", time.process_time() - before < 0.5)
"""

MOE = """
from vllm.plugins import load_general_plugins
load_general_plugins()
import sys
import torch, torch.distributed as dist
from types import SimpleNamespace
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator as Communicator

def rank(number, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    self = SimpleNamespace(world_size=2, rank_in_group=number, cpu_group=dist.group.WORLD)
    rows = torch.full((number + 1, 2), number + 1, dtype=torch.bfloat16)
    gathered = Communicator.all_gatherv(self, [rows, rows[:, 0]], dim=0, sizes=[1, 2])
    assert [one.tolist() for one in gathered] == [[[1, 1], [2, 2], [2, 2]], [1, 2, 2]]
    mine = Communicator.reduce_scatterv(self, gathered[0], dim=0, sizes=[1, 2])
    assert mine.dtype == torch.bfloat16 and mine.tolist() == [[2, 2]] if number == 0 else [[4, 4], [4, 4]]

torch.multiprocessing.start_processes(rank, (sys.argv[1],), nprocs=2, start_method="fork")
print("gathered and scattered")
"""


def run(settings, script: str, *arguments: object) -> str:
    done = subprocess.run(
        [settings.python, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, timeout=300, env=os.environ | {"UCX_TLS": "tcp,sm,self"},
    )
    return done.stdout + done.stderr


def test_nixl_leaves_the_cores_to_the_engine(settings):
    output = run(settings, NIXL)
    assert "cores kept True" in output and "idle True" in output, output


def test_experts_are_reached_across_ranks(settings, tmp_path):
    assert "gathered and scattered" in run(settings, MOE, tmp_path / "store")
