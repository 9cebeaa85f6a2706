"""One model on many processes: gradients averaged (DDP), or all of it sharded (FSDP2)."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model import GPT
from plaingpt.runtime import Runtime

# What torch.distributed has for sharding is not imported at the top: it takes 0.6 s.


def shard(model: GPT, rt: Runtime) -> None:
    """Leave each process its part of every weight, and so of every gradient and moment (FSDP2).

    The weights of a block are put together while it computes. They stay float32, cast by autocast
    as those of one process are, so that the losses are the same to rounding.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(rt.device.type, (rt.world_size,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # the embeddings and the last LayerNorm


def average_gradients(step_model: Any, rt: Runtime) -> DistributedDataParallel:
    """The model as a module whose backward pass averages gradients over the processes (DDP)."""
    devices = [rt.device] if rt.device.type == "cuda" else None
    return DistributedDataParallel(step_model, device_ids=devices, gradient_as_bucket_view=True)


def share_gradients(step_model: Callable[..., Tensor], share: bool) -> None:
    """Whether the next backward pass averages gradients: with DDP only the last micro-step has to.
    Shards share in each: what waits would be a whole gradient in every process."""
    if isinstance(step_model, DistributedDataParallel):
        step_model.require_backward_grad_sync = share


def is_sharded(model: Any) -> bool:
    return hasattr(model, "set_requires_gradient_sync")


@contextlib.contextmanager
def together(model: Any) -> Iterator[None]:
    """While it lasts, what a sharded model does outside of its own forward pass works, too."""
    if is_sharded(model):
        model.unshard()
    yield
    if is_sharded(model):
        model.reshard()


def whole(tensor: Any) -> Tensor:
    """A tensor that is sharded over the processes (DTensor), put together; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own(tensor: Any) -> Tensor:
    """This process's shard of a tensor, sharing its memory; a tensor that is whole as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sharded_as(like: Any, tensor: Tensor) -> Tensor:
    """This process's shard of a tensor that all processes have, if `like` is sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    same = DTensor.from_local(tensor, like.device_mesh, [Replicate()], run_check=False)
    return same.redistribute(placements=like.placements)


def gathered(tensors: dict[str, Tensor], rt: Runtime) -> dict[str, Tensor]:
    """Sharded tensors put together one by one, on the CPU of the main process; {} in others."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if rt.is_main:
            found[name] = full.cpu()
    return found
