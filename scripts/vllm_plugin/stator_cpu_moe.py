"""A vLLM plug-in that lets mixture-of-experts models run on data-parallel ranks without a GPU.

vLLM's communicator for CPUs (0.32) lacks the two operations that bring the ranks'
tokens to the experts and back, so that the first step ends the engine. Here they are,
by gloo: plain and slow, for tests of topologies.

The set-up puts it into the environment of the CPU build only.
"""

from __future__ import annotations


def register() -> None:
    """Adds what is missing; what vLLM brings itself stays."""
    from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    for operation in (all_gatherv, reduce_scatterv):
        name = operation.__name__
        if getattr(CpuCommunicator, name) is getattr(DeviceCommunicatorBase, name):
            setattr(CpuCommunicator, name, operation)


def all_gatherv(self, input_, dim=0, sizes=None):
    """Every rank's rows, one after the other. `sizes[r]`: rows of rank r; None: as many as here."""
    if isinstance(input_, list):
        return [all_gatherv(self, one, dim, sizes) for one in input_]
    import torch

    if dim != 0:
        raise NotImplementedError("rows only")
    sizes = sizes or [input_.shape[0]] * self.world_size
    # gloo gathers equal shapes only: short ranks send rows that are cut off again.
    mine = input_.new_zeros((max(sizes), *input_.shape[1:]))
    mine[: input_.shape[0]] = input_
    theirs = [torch.empty_like(mine) for _ in sizes]
    torch.distributed.all_gather(theirs, mine, group=self.cpu_group)
    return torch.cat([rows[:size] for rows, size in zip(theirs, sizes)])


def reduce_scatterv(self, input_, dim=-1, sizes=None):
    """This rank's rows of the ranks' sum. `sizes[r]`: rows of rank r; None: equal shares."""
    import torch

    if dim not in (0, -input_.dim()):
        raise NotImplementedError("rows only")
    # In float32: gloo has no sum of every type that weights come in.
    total = input_.float().contiguous()
    torch.distributed.all_reduce(total, group=self.cpu_group)
    sizes = sizes or [total.shape[0] // self.world_size] * self.world_size
    start = sum(sizes[: self.rank_in_group])
    return total[start : start + sizes[self.rank_in_group]].to(input_.dtype)
