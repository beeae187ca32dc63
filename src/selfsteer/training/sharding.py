"""Weights that ranks hold in parts: FSDP2 through accelerate, on a CPU as on GPUs.

accelerate falls back to DDP where there is no GPU, without a word. `accelerator_of` tells it
otherwise; all that follows, `fully_shard` on every layer, checkpoints in parts, clipping, is
accelerate's own code path of the GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from selfsteer.errors import EngineError
from selfsteer.run import ranks


def accelerator_of(device: torch.device) -> Any:
    """What accelerate makes of the ranks' environment; on a CPU it is made to shard there.

    The Trainer's arguments undo the latter, so it has to be called again after them.
    """
    from accelerate import Accelerator, DistributedType
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    if device.type != "cpu":
        return Accelerator()
    made = Accelerator(cpu=True)
    state = AcceleratorState()
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin()  # from FSDP_*, as on a GPU
    return made


def reshard(model: Any) -> None:
    """Drops weights of other ranks, which a forward without backward leaves behind."""
    for unit in model.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def check_sharded(model: Any) -> None:
    """Makes sure that weights are in parts where they were asked to be.

    Raises:
        EngineError: accelerate fell back to something else.
    """
    if ranks.sharding() == "fsdp" and not isinstance(model, FSDPModule):
        raise EngineError(
            f"FSDP was asked for, but accelerate made a {type(model).__name__} of the model, which "
            "holds all weights on every rank. Use the shipped profile fsdp2, or fsdp_version: 2 in "
            "your own."
        )


def own_part(value: Tensor) -> Tensor:
    """A tensor itself, or the part of it that this rank holds."""
    return value.to_local() if isinstance(value, DTensor) else value


def parted(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as another one is held: on its device, and in parts if that is."""
    value = value.to(like.device, like.dtype)
    if not isinstance(like, DTensor):
        return value
    # each rank has all of it, and takes its part without asking the others
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """While this lasts every rank holds all weights, and a forward asks no other rank.

    All ranks must enter together. Without shards it does nothing.
    """
    if ranks.sharding() == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            yield
        return
    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()
