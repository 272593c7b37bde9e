"""A vLLM plug-in for engines on CPUs with matrix instructions (AMX).

The kernel lets a process use them only after it has asked. vLLM (0.32) does not ask; what
computes prompts happens to, on its first call. So an engine whose first step continues a
prompt that another engine computed dies of an illegal instruction.

The set-up puts it into the environment of the CPU build only. vLLM calls `register` in
each of its processes.
"""

from __future__ import annotations


def register() -> None:
    """Asks for the instructions where the CPU has them."""
    import torch
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
