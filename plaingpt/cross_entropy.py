"""
The cross-entropy of logits and its gradient on a CPU, compiled by Numba.

PyTorch copies the logits to float32 and makes six passes over them in main memory. Here a row stays
in the cache, and its gradient takes the place of its logits. docs/benchmarks.md has the
measurements.

Shapes: N rows, V logits in each.
"""

import math
from typing import Any

import numpy as np
import torch
from numba import prange, types
from numba.extending import intrinsic
from torch import Tensor

from plaingpt.kernels import (
    INT32,
    LANES,
    NUMBERS,
    PARALLEL,
    exp,
    f32,
    float_of_bits,
    jit,
    use_threads,
)

PARTS = 64  # that the rows are divided into; a free thread takes the next
WIDTH = 4 * LANES  # sums side by side
SIGN, OTHERS = np.int32(31), np.int32(0x7FFFFFFF)


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The sum of weights (N,) · -log softmax(logits (N, V))[targets (N,)], nan if it is not finite.
    Overwrites the logits, which are bfloat16 or float32. Raises IndexError for targets outside
    range(V)."""
    if len(targets) and not 0 <= targets.min() <= targets.max() < logits.size(1):
        raise IndexError(f"a target is outside range({logits.size(1)})")
    return FusedLoss.apply(logits, targets, weights)


class FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        use_threads()
        gradient, losses = logits.detach().contiguous(), torch.empty(len(targets))
        if logits.dtype == torch.bfloat16:
            run, array = in_bfloat16, gradient.view(torch.uint16).numpy()
        else:
            run, array = in_float32, gradient.numpy()
        run(array, targets.numpy(), weights.numpy(), losses.numpy())
        ctx.save_for_backward(gradient)
        return losses.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient if grad == 1 else gradient * grad, None, None


@jit(PARALLEL)
def in_bfloat16(logits, targets, weights, losses):
    """Put the weighted loss of each row into `losses`, and its gradient into the row."""
    N, V = logits.shape
    for part in prange(PARTS):
        x = np.empty(V, f32)
        for n in range(part * N // PARTS, (part + 1) * N // PARTS):
            widen(logits[n], x)
            losses[n] = differentiate(x, targets[n], weights[n])
            narrow(x, logits[n])


@jit(PARALLEL)
def in_float32(logits, targets, weights, losses):
    N = len(logits)
    for part in prange(PARTS):
        for n in range(part * N // PARTS, (part + 1) * N // PARTS):
            losses[n] = differentiate(logits[n], targets[n], weights[n])


@jit(NUMBERS)
def differentiate(x, target, weight):
    """The loss of a row of logits x (V,), which then holds the gradient."""
    largest = maximum(x)
    wanted = x[target] - largest
    for v in range(len(x)):
        x[v] = exp(x[v] - largest)  # nan if a logit is nan or inf
    total = sum_of(x)
    x[target] -= total
    factor = weight / total
    for v in range(len(x)):
        x[v] *= factor
    return weight * (math.log(total) - wanted)


@jit(NUMBERS)
def sum_of(x):
    """The sum of x (V,), always in the same order. If LLVM may choose one, code that has just been
    compiled rounds differently from the same code in Numba's cache, and no run can be repeated."""
    sums = np.zeros(WIDTH, f32)
    whole = len(x) // WIDTH * WIDTH
    for start in range(0, whole, WIDTH):
        for lane in range(WIDTH):
            sums[lane] += x[start + lane]
    total = f32(0)
    for lane in range(WIDTH):
        total += sums[lane]
    for v in range(whole, len(x)):
        total += x[v]
    return total


@jit(NUMBERS)
def maximum(x):
    """The largest of x (V,), as an integer: LLVM then takes several at a time."""
    bits, largest = x.view(np.int32), np.int32(-OTHERS - 1)
    for v in range(len(x)):
        largest = max(largest, np.int32(bits[v] ^ ((bits[v] >> SIGN) & OTHERS)))
    return float_of_bits(np.int32(largest ^ ((largest >> SIGN) & OTHERS)))  # type: ignore[call-arg]


@jit(NUMBERS)
def widen(row, x):
    """Put the bfloat16s of a row into x."""
    for v in range(len(x)):
        x[v] = float_of_bits(np.int32(row[v]) << np.int32(16))  # type: ignore[call-arg]


@jit(NUMBERS)
def narrow(x, row):
    """Round x to the bfloat16s of a row, ties to even."""
    for v in range(len(x)):
        bits: Any = bits_of_float(x[v])  # type: ignore[call-arg]
        odd = (bits >> np.int32(16)) & np.int32(1)
        row[v] = np.uint16((bits + np.int32(0x7FFF) + odd) >> np.int32(16))


@intrinsic
def bits_of_float(context, number):  # type: ignore[no-untyped-def]
    return types.int32(types.float32), lambda _, b, signature, args: b.bitcast(args[0], INT32)
