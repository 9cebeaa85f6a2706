"""The loss of a model on held-out text."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from model import GPT
from plaingpt.runtime import Runtime
from plaingpt.text.shards import Split
from plaingpt.training.batches import on_device, validation_batches


def validation_loss(
    model: GPT,
    split: Split,
    max_tokens: int | None,
    batch_size: int,
    rt: Runtime,
    stoppable: bool = False,
) -> tuple[float, int]:
    """The mean loss in nats per token over the fixed windows of a split, and the number of tokens
    that counted. The processes share the work. If it is `stoppable`, a signal ends it: (nan, 0)."""
    windows = validation_batches(
        split, batch_size, model.config.block_size, max_tokens, rt.rank, rt.world_size
    )
    return mean_loss(model, windows, rt, stoppable)


@torch.no_grad()
def mean_loss(
    model: GPT, batches: Iterable[tuple[Tensor, Tensor, Tensor]], rt: Runtime, stoppable: bool
) -> tuple[float, int]:
    """`validation_loss` over this process's own batches of (inputs, targets, mask). If it is
    `stoppable`, all processes must have the same number of batches."""
    was_training = model.training
    model.eval()
    sums = [torch.zeros(2, device=rt.device)]  # a process may have no batches
    for batch in batches:
        if stoppable and rt.stopping():
            model.train(was_training)
            return math.nan, 0
        x, y, mask = (on_device(part, rt) for part in batch)
        with rt.autocast():
            loss = model(x, y, mask)
        sums.append(torch.stack((loss * mask.sum(), mask.sum())))
    model.train(was_training)
    total, counted = rt.sum(torch.stack(sums).cpu().double().sum(0))  # the host waits only here
    return (total / counted).item(), int(counted)


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats per token in a unit that does not depend on the tokenizer."""
    return loss / math.log(2) / bytes_per_token
