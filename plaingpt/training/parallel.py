"""One model on many processes: gradients averaged (DDP), or all of it sharded (FSDP2).

Shapes: n matrices of one shape, W processes.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model import GPT
from plaingpt import cpu
from plaingpt.runtime import Runtime

# The parts of torch.distributed that shard are imported where they are used: they take 0.6 s.


def shard(model: GPT, rt: Runtime) -> None:
    """Leave each process its part of every weight, and so of every gradient and moment (FSDP2).

    A block's weights are gathered while it computes, in `gathered_dtype`. Everything else stays
    float32 and is cast by autocast, as in a single process, so that the losses agree to rounding.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if rt.device.type == "cpu":
        cpu.speed_up(model)
    mesh = init_device_mesh(rt.device.type, (rt.world_size,))
    policy = MixedPrecisionPolicy(gathered_dtype(rt), torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)  # the embeddings and the last LayerNorm


def gathered_dtype(rt: Runtime) -> torch.dtype:
    """The dtype in which a block's weights are gathered and used: half the bytes where autocast
    would cast them anyway. On a CPU, a LayerNorm does not take bf16 weights with float32 input."""
    return rt.dtype if rt.device.type == "cuda" else torch.float32


def average_gradients(step_model: Any, together: bool, rt: Runtime) -> DistributedDataParallel:
    """The model as a module whose backward pass averages gradients over the processes (DDP);
    `together`: in one all-reduce, for a compiled model, whose gradients are ready only at the end.
    """
    devices = [rt.device] if rt.device.type == "cuda" else None
    mib = sum(p.nbytes for p in step_model.parameters()) // 2**20 + 1 if together else None
    return DistributedDataParallel(
        step_model, device_ids=devices, gradient_as_bucket_view=True, bucket_cap_mb=mib
    )


def share_gradients(step_model: Callable[..., Tensor], share: bool) -> None:
    """Set whether the next backward pass averages gradients. With DDP only the last micro-step has
    to; FSDP always does, because waiting would keep a whole gradient in every process."""
    if isinstance(step_model, DistributedDataParallel):
        step_model.require_backward_grad_sync = share


def is_sharded(model: Any) -> bool:
    return hasattr(model, "unshard")  # FSDP gave it one


@contextlib.contextmanager
def unsharded(model: Any, rt: Runtime) -> Iterator[None]:
    """Gather all of a sharded model, so that it can be called in ways other than training's: under
    autocast if its weights are bf16, and without compiling anew for other shapes.

    All processes must enter and leave it, after a first step or evaluation. In between they do not
    wait for one another.
    """
    if not is_sharded(model):
        yield
        return
    blocks: list[Any] = list(model.transformer.h)
    for block in blocks:
        block.set_reshard_after_forward(False)
        block.unshard()
    model.unshard()
    try:
        rounded = gathered_dtype(rt) != torch.float32
        autocast = rt.autocast() if rounded else contextlib.nullcontext()
        with autocast, torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True)
        # Shards everything again, and forgets these calls: the next backward pass would prefetch
        # what was called last, which may differ between the processes.
        model.reset_iter_state()


def full_tensor(tensor: Any) -> Tensor:
    """A sharded tensor (DTensor) gathered from all processes; any other tensor unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_shard(tensor: Any) -> Tensor:
    """This process's shard of a tensor, sharing its memory; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sharded_as(like: Any, tensor: Tensor) -> Tensor:
    """This process's shard of a tensor that every process holds, if `like` is sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    same = DTensor.from_local(tensor, like.device_mesh, [Replicate()], run_check=False)
    return same.redistribute(placements=like.placements)


def divided(function: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """function(stack) of a stack (n, rows, columns) that all processes hold, if the function treats
    each matrix alone: each process computes 1/W of them, and all get all results."""
    if not dist.is_initialized():
        return function(stack)
    processes, rank = dist.get_world_size(), dist.get_rank()
    results = torch.zeros_like(stack)
    if rank < len(stack):
        results[rank::processes] = function(stack[rank::processes])
    dist.all_reduce(results)  # all_gather pads to equal parts: W results, even if W is far above n
    return results


def at_owners(function: Callable[[Tensor], Tensor], shards: Tensor, rows: int) -> Tensor:
    """Like `divided`, for n matrices of `rows` rows that are sharded along them: `shards` and the
    result are (n, rows here, columns). Each matrix is put together in one process only."""
    processes, rank = dist.get_world_size(), dist.get_rank()
    heights = [len(part) for part in torch.arange(rows).chunk(processes)]
    heights += [0] * (processes - len(heights))
    share, n, columns = -(-len(shards) // processes), len(shards), shards.size(2)
    counts = [max(0, min(share, n - owner * share)) for owner in range(processes)]
    whole = [counts[rank] * height * columns for height in heights]  # of my matrices, in others
    parts = [count * heights[rank] * columns for count in counts]  # of others' matrices, here

    received = shards.new_empty(sum(whole))
    dist.all_to_all_single(received, shards.flatten(), whole, parts)
    pieces = zip(received.split(whole), heights)
    stack = torch.cat(
        [piece.view(counts[rank], height, columns) for piece, height in pieces], dim=1
    )
    results = function(stack) if len(stack) else stack
    sent = torch.cat([part.flatten() for part in results.split(heights, dim=1)])
    returned = torch.empty_like(shards)
    dist.all_to_all_single(returned.view(-1), sent, parts, whole)
    return returned


def gather_to_main(tensors: dict[str, Tensor], rt: Runtime) -> dict[str, Tensor]:
    """Sharded tensors gathered one by one on the CPU of the main process; {} in the others."""
    found = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor.detach())
        if rt.is_main:
            found[name] = full.cpu()
    return found
