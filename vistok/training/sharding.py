"""``trainer.strategy: fsdp``: weights, gradients, averages and optimizer states shared out over the processes.

Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (arXiv 2304.11277), in its second form:
every parameter is a ``DTensor`` of which a process holds a slice; the weights of one transformer block at a time are
gathered to compute with. What is computed is what DDP computes, in the same precision, and ``last.ckpt`` and exports
are the same files: a run can be resumed with the other strategy, or on another number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from vistok.interfaces import Generator
from vistok.nn.attention import CrossAttention
from vistok.nn.transformer import Block


def shard(net: Generator, mesh: DeviceMesh) -> None:
    """Share out the parameters of ``net`` in place, one unit for each transformer block and one for the rest."""
    for module in reversed(list(net.modules())):  # from the inside out
        if isinstance(module, Block | CrossAttention):
            fully_shard(module, mesh=mesh)
        if isinstance(module, CrossAttention):
            register_fsdp_forward_method(module, "context")  # blocks are asked for it before they run
    fully_shard(net, mesh=mesh, reshard_after_forward=True)  # also after a pass that has no backward pass
    register_fsdp_forward_method(net, "generate")


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """These tensors with the slices of all processes put together, on the CPU of the first process.

    Every process has to call it; on the others, slices stay what they are.
    """
    return {name: _whole(tensor) for name, tensor in tensors.items()}


def _whole(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    gathered = full(tensor)  # all processes take part in it
    return gathered.cpu() if dist.get_rank() == 0 else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole ``tensor`` on the device of ``other``, or the slice of it that this process holds of ``other``."""
    if isinstance(other, DTensor) and tensor.shape == other.shape:
        return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)
    return tensor.to(other.device)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for modules that shard themselves, with the checkpoints of all other strategies."""

    lightning_restore_optimizer = True

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    @property
    def mesh(self) -> DeviceMesh:
        """All processes in one row."""
        return init_device_mesh(self.root_device.type, (self.world_size,))

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return whole(self.lightning_module.state_dict())

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return tree_map_only(Tensor, _whole, optimizer.state_dict())

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        now = self.lightning_module.state_dict()
        state = {name: placed_like(tensor, now[name]) for name, tensor in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"]):
            parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                index: {name: placed_like(value, parameters[index]) for name, value in values.items()}
                for index, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})
