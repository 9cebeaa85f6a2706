"""
CPU-only speed-ups: blocked attention, bf16 GELU, the loss, memory reuse, bf16 detection.

`speed_up` puts the fast layers in place once a model is built or loaded, as `lora.add` does with
adapters: they have no weights of their own. docs/benchmarks.md has the measurements.
"""

import ctypes
import math
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from model import GPT, Attention, CrossEntropy

BLOCK = 256  # queries in a block of attention
LONGEST = 1024  # tokens up to which blocks are faster than the flash kernel
LARGE = 1024  # ids from which a loss of our own saves more time than importing Numba takes


def speed_up(model: GPT) -> None:
    """Replace the layers that PyTorch runs slowly on a CPU with faster ones of the same result."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Attention):
            model.set_submodule(name, BlockedAttention())
        elif isinstance(layer, nn.GELU):
            model.set_submodule(name, GELU(approximate="tanh"))
        elif isinstance(layer, CrossEntropy) and model.config.vocab_size >= LARGE:
            model.set_submodule(name, CompiledCrossEntropy())


class BlockedAttention(Attention):
    """Attention as plain products, a third faster than the flash kernel: each block of queries
    meets only the keys up to its own end."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, dropout: float
    ) -> Tensor:
        shape, T, D = q.shape[:2], q.size(2), q.size(3)
        if seen is not None or not 1 < T <= LONGEST:
            return super().forward(q, k, v, seen, dropout)
        future = q.new_full((T, T), -torch.inf).triu(1)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B·H, T, D)
        out = []
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            bias, keys = future[start:end, :end], k[:, :end]
            scores = torch.baddbmm(bias, q[:, start:end], keys.mT, alpha=D**-0.5)
            weights = F.dropout(F.softmax(scores, dim=-1), dropout)  # (B·H, block, end)
            out.append(torch.bmm(weights, v[:, :end]))
        return torch.cat(out, dim=1).unflatten(0, shape)


class GELU(nn.GELU):
    """GPT-2's GELU; in bf16 by vectorized operations, twice as fast as PyTorch's kernel.
    torch.compile generates its own; ours would break its graph."""

    def forward(self, x: Tensor) -> Tensor:
        ours = x.dtype == torch.bfloat16 and not torch.compiler.is_compiling()
        return SigmoidGELU.apply(x) if ours else super().forward(x)


class SigmoidGELU(torch.autograd.Function):
    """The tanh approximation as x·sigmoid(u), where u = 2·sqrt(2/pi)·(x + 0.044715·x³)."""

    linear = torch.tensor(2 * math.sqrt(2 / math.pi), dtype=torch.bfloat16)
    cubic = 0.044715 * 2 * math.sqrt(2 / math.pi)

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        linear, cubic = SigmoidGELU.linear, SigmoidGELU.cubic
        gate = torch.addcmul(linear, x, x, value=cubic).mul_(x).sigmoid_()
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        x, gate = ctx.saved_tensors
        linear, cubic = SigmoidGELU.linear, SigmoidGELU.cubic
        slope = torch.addcmul(linear, x, x, value=3 * cubic).mul_(x)  # x·du/dx
        return (1 - gate).mul_(slope).add_(1).mul_(gate).mul_(grad)


class CompiledCrossEntropy(CrossEntropy):
    """The loss and its gradient by Numba, while each row of the logits stays in the cache: several
    times as fast as PyTorch's passes over all of them. It overwrites the logits."""

    def forward(self, logits: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        known = logits.dtype in (torch.bfloat16, torch.float32)
        if not known or torch.compiler.is_compiling():
            return super().forward(logits, targets, mask)
        from plaingpt.cross_entropy import cross_entropy  # imports Numba: half a second

        weights = torch.ones(len(targets)) if mask is None else mask.float()
        return cross_entropy(logits, targets, weights / weights.sum().clamp(min=1))


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory instead of returning it to the system.

    A training step frees and allocates the same tensors again and again; mapping their pages anew
    cost a quarter of a step. Other C libraries are left alone.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(mmap_max, 0)  # allocate everything on the heap
    mallopt(trim_threshold, -1)  # and never shrink it
    mallopt(top_pad, 64 << 20)


def has_bf16() -> bool:
    """AVX512-BF16 or AMX; without them a bf16 product is emulated and slower than fp32."""
    # Private names, the same from torch 2.9 to 2.15; a torch without them trains in fp32.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
