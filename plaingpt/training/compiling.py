"""torch.compile, where it works and pays."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from configurator import UserError
from model import GPT
from plaingpt.runtime import Runtime


def maybe_compiled(
    model: GPT, wanted: bool | Literal["auto"], micro_batch_size: int, rt: Runtime
) -> Callable[..., Tensor]:
    """The model as a training step calls it, tried once; "auto" compiles on GPUs.

    Evaluation and sampling keep the plain module, because their shapes vary. Raises UserError if
    compiling is `wanted` and fails; "auto" says so and trains without it.
    """
    if wanted is False or (wanted == "auto" and not worth_compiling(rt)):
        return model
    compiled = torch.compile(model)
    shape = (micro_batch_size, model.config.block_size)
    tokens = torch.zeros(shape, dtype=torch.long, device=rt.device)
    reason = ""
    try:
        with rt.autocast():
            compiled(tokens, tokens).backward()
    except Exception as error:  # a missing compiler, an unsupported platform, …: many kinds
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    model.zero_grad(set_to_none=True)
    if not rt.any(bool(reason)):
        return compiled
    reason = reason or "in another process"
    if wanted is True:
        raise UserError(f"--compile=true does not work here ({reason})")
    print(f"torch.compile does not work here ({reason}); training without it")
    return model


def worth_compiling(rt: Runtime) -> bool:
    """On a CPU, compiling takes longer than a small run."""
    return rt.device.type == "cuda"
