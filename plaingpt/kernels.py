"""
A block of GPT-2 on a CPU, compiled by Numba.

Generating a token takes about as long as reading all the weights once, provided little else is
done. A row is computed by the same operations in the same order whatever the other rows are, so
that a text has the same bits in every batch. docs/benchmarks.md has the measurements.

Shapes: R rows (tokens), K inputs and N outputs of a matrix; otherwise as in model.py.
"""

import contextlib
import math
import shutil
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import njit, prange, types
from numba.core import event
from numba.core.cgutils import alloca_once_value, create_struct_proxy, for_range
from numba.extending import intrinsic

from model import EPSILON

LANES, VECTORS = 16, 2  # float32s per vector, and vectors per tile
TILE = LANES * VECTORS  # outputs that are computed together
ADD, GELU = 1, 2  # applied to each product

ROOM = 20_000_000  # bytes; compiled code takes less

f32 = np.float32
NORMAL = {"error_model": "numpy"}
# Sums may be reordered, but not assumed to be finite.
SUMS = {"error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
NUMBERS = {"error_model": "numpy", "fastmath": {"contract"}}
PARALLEL = {"error_model": "numpy", "parallel": True}


class Matrix(NamedTuple):
    """Weights and bias of a linear layer, stored in the order in which they are read."""

    tiles: np.ndarray  # (tiles, K, TILE): float16 as uint16, int8, or float32; zeros beyond N
    scales: np.ndarray  # (N,), what the products are multiplied by
    bias: np.ndarray  # (N,)
    after: int = 0  # ADD: add what the output holds; GELU: apply it


class BlockWeights(NamedTuple):
    ln_1: tuple[np.ndarray, np.ndarray]  # gain and bias, each (C,)
    c_attn: Matrix
    attn_c_proj: Matrix
    ln_2: tuple[np.ndarray, np.ndarray]
    c_fc: Matrix
    mlp_c_proj: Matrix


def jit(options: dict[str, Any]) -> Callable[[Callable[..., Any]], Any]:
    """Numba's njit, with compiled code cached beside this file or in the user's cache directory, if
    there is room."""

    def decorate(function: Callable[..., Any]) -> Any:
        with contextlib.suppress(RuntimeError, OSError):  # neither directory is writable
            found = njit(cache=True, **options)(function)
            if shutil.disk_usage(found.stats.cache_path).free > ROOM:
                return found
        return njit(**options)(function)

    return decorate


def use_threads() -> None:
    """Use as many threads as PyTorch. Numba has a count of its own for each calling thread, and the
    first call that starts its threads changes PyTorch's count if both use the same OpenMP."""
    count, most = torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS  # type: ignore
    numba.set_num_threads(min(count, most))
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


class Announcement(event.Listener):
    """Says once that code is being compiled."""

    announced = False

    def on_start(self, _: Any) -> None:
        if not self.announced:
            print("compiling for this CPU, which takes some seconds", file=sys.stderr)
        self.announced = True

    def on_end(self, _: Any) -> None:
        """Nothing to say."""


event.register("numba:compile", Announcement())


# --- products


FLOAT, INT32, INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR, INDICES = ir.VectorType(FLOAT, LANES), ir.VectorType(INT32, LANES)
ELEMENTS = {types.uint16: ir.HalfType(), types.int8: ir.IntType(8), types.float32: FLOAT}
HAS_AVX512 = binding.get_host_cpu_features().get("avx512f", False)  # 32 registers of 16
PART = VECTORS if HAS_AVX512 else 1  # vectors multiplied by several rows at once


def multiplier(vectors: int, rows: int) -> Any:
    """A function that multiplies vectors of a tile with some rows. All sums stay in registers,
    which LLVM does not achieve on its own."""

    def write(
        b: ir.IRBuilder, w: ir.Value, first: ir.Value, x: Any, row: ir.Value, out: Any
    ) -> None:
        R, K = b.extract_value(x.shape, 0), b.extract_value(x.shape, 1)
        last = b.sub(R, INT64(1))
        inputs, sums = [], []
        for r in range(rows):
            index = b.add(row, INT64(r))
            index = b.select(b.icmp_signed("<", index, last), index, last)
            inputs.append(b.gep(x.data, [b.mul(index, K)]))
            zero = VECTOR([0.0] * LANES)
            sums.append([alloca_once_value(b, zero) for _ in range(vectors)])
        w = b.gep(w, [first])
        with for_range(b, K) as loop:
            columns = []
            for v in range(vectors):
                index = b.add(b.mul(loop.index, INT64(VECTORS)), INT64(v))
                columns.append(as_floats(b, b.load(b.gep(w, [index]), align=1)))
            for r in range(rows):
                number = b.load(b.gep(inputs[r], [loop.index]))
                single = b.insert_element(VECTOR(ir.Undefined), number, INT32(0))
                spread = b.shuffle_vector(single, single, INDICES([0] * LANES))
                for v in range(vectors):
                    product = b.fmul(columns[v], spread, flags=["contract"])
                    b.store(b.fadd(b.load(sums[r][v]), product, flags=["contract"]), sums[r][v])
        for r in range(rows):
            for v in range(vectors):
                place = b.gep(out.data, [INT64((r * vectors + v) * LANES)])
                b.store(b.load(sums[r][v]), b.bitcast(place, VECTOR.as_pointer()), align=4)

    @intrinsic
    def multiply(context, w, first, x, row, out):  # type: ignore[no-untyped-def]
        """Write to `out` the products (rows, vectors · LANES) of a tile w (K, TILE), starting at
        vector `first`, with rows of x (R, K), starting at `row`; the last row is repeated."""

        def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
            w, x, out = (
                create_struct_proxy(signature.args[n])(context, builder, value=args[n])
                for n in (0, 2, 4)
            )
            kind = ir.VectorType(ELEMENTS[signature.args[0].dtype], LANES).as_pointer()
            write(builder, builder.bitcast(w.data, kind), args[1], x, args[3], out)
            return context.get_dummy_value()

        return types.void(w, first, x, row, out), code

    return multiply


def as_floats(b: ir.IRBuilder, numbers: ir.Value) -> ir.Value:
    element = numbers.type.element
    if element == FLOAT:
        return numbers
    return (b.sitofp if isinstance(element, ir.IntType) else b.fpext)(numbers, VECTOR)


one_row, four_rows, eight_rows = multiplier(VECTORS, 1), multiplier(PART, 4), multiplier(PART, 8)


@jit(PARALLEL)
def product(matrix, x, y):
    """Put the products of `matrix` and x (R, K) into y (R, N)."""
    R = len(x)
    for t in prange(len(matrix.tiles)):
        tile, out = matrix.tiles[t], np.empty((8, TILE), f32)
        row = 0
        while row < R:
            if row == R - 1:
                one_row(tile, 0, x, row, out)
                finish(matrix, t * TILE, TILE, out, y[row:])
                row += 1
                continue
            few = row >= R - 4 or not HAS_AVX512
            for first in range(0, VECTORS, PART):
                if few:
                    four_rows(tile, first, x, row, out)
                else:
                    eight_rows(tile, first, x, row, out)
                rows = y[row : row + (4 if few else 8)]
                finish(matrix, t * TILE + first * LANES, PART * LANES, out, rows)
            row += 4 if few else 8


@jit(NUMBERS)
def finish(matrix, start, count, products, y):
    """Scale the products of `count` outputs from `start` on, add the bias, and put them into y
    (rows, N)."""
    end = min(start + count, y.shape[1])
    for r in range(len(y)):
        here = products.reshape(-1)[r * count :]
        for n in range(start, end):
            total = here[n - start] * matrix.scales[n] + matrix.bias[n]
            if matrix.after == ADD:
                total += y[r, n]
            elif matrix.after == GELU:
                total = gelu(total)
            y[r, n] = total


@jit(NORMAL)
def linear(matrix, x):
    y = np.empty((len(x), len(matrix.bias)), f32)
    product(matrix, x, y)
    return y


# --- the rest of a block


@intrinsic
def float_of_bits(context, bits):  # type: ignore[no-untyped-def]
    return types.float32(types.int32), lambda _, b, signature, args: b.bitcast(args[0], FLOAT)


LOG2_E = f32(1 / math.log(2))
C1, C2, C3, C4, C5, C6, C7 = (f32(math.log(2) ** n / math.factorial(n)) for n in range(1, 8))


@jit(NUMBERS)
def exp(x):
    """e^x = 2^(n + f) by eight terms of the series of 2^f: unlike math.exp, LLVM can do that for
    several numbers at a time."""
    x = max(min(x, f32(88)), f32(-87)) * LOG2_E
    n = np.floor(x + f32(0.5))
    f = x - n
    series = f32(1) + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * (C6 + f * C7))))))
    power = (np.int32(n) + np.int32(127)) << np.int32(23)  # the bits of 2^n
    return series * float_of_bits(power)  # type: ignore[call-arg]


@jit(NUMBERS)
def gelu(x):
    """The tanh approximation as x·sigmoid(2u)."""
    u = f32(math.sqrt(2 / math.pi)) * (x + f32(0.044715) * x * x * x)
    return x / (f32(1) + exp(f32(-2) * u))


@jit(SUMS)
def normalize(x, weights, y):
    """Put the LayerNorm of x (R, C) into y."""
    gain, bias = weights
    C = len(gain)
    for r in range(len(x)):
        mean, variance = f32(0), f32(0)
        for c in range(C):
            mean += x[r, c]
        mean /= f32(C)
        for c in range(C):
            variance += (x[r, c] - mean) ** 2
        scale = f32(1) / math.sqrt(variance / f32(C) + f32(EPSILON))
        for c in range(C):
            y[r, c] = (x[r, c] - mean) * scale * gain[c] + bias[c]


@jit(PARALLEL)
def attend(qkv, positions, entries, y):
    """Causal attention with queries, keys and values (B·T, 3·C), into y (B·T, C)."""
    (B, T), (_, _, H, _, D) = positions.shape, entries.shape
    for n in prange(B * H):
        b, h = n % B, n // B
        k, v = entries[b, 0, h], entries[b, 1, h]
        for t in range(T):
            row, s = qkv[b * T + t], positions[b, t]
            for d in range(D):
                k[s, d], v[s, d] = row[(H + h) * D + d], row[(2 * H + h) * D + d]
            mix(row[h * D : (h + 1) * D], k[: s + 1], v[: s + 1], y[b * T + t, h * D : (h + 1) * D])


@jit(SUMS)
def mix(q, k, v, y):
    """Put the mean of v (S, D), weighted by the softmax of k·q, into y (D,)."""
    S, D = k.shape
    weights, scale = np.empty(S, f32), f32(1 / math.sqrt(D))
    largest, total = f32(-np.inf), f32(0)
    for s in range(S):
        score = f32(0)
        for d in range(D):
            score += q[d] * k[s, d]
        weights[s] = score * scale
        largest = max(largest, weights[s])
    for s in range(S):
        weights[s] = exp(weights[s] - largest)
        total += weights[s]
    for d in range(D):
        y[d] = 0
    for s in range(S):
        for d in range(D):
            y[d] += weights[s] * v[s, d]
    for d in range(D):
        y[d] /= total


@jit(NORMAL)
def block(weights, x, positions, entries):
    """What model.py's Block makes of x (B·T, C), the tokens at `positions` (B, T). Their keys and
    values are added to `entries` (B, 2, H, S, D)."""
    (R, C), x = x.shape, x.copy()
    normal, qkv = np.empty((R, C), f32), np.empty((R, 3 * C), f32)
    hidden = np.empty((R, 4 * C), f32)
    normalize(x, weights.ln_1, normal)
    product(weights.c_attn, normal, qkv)
    attend(qkv, positions, entries, normal)
    product(weights.attn_c_proj, normal, x)
    normalize(x, weights.ln_2, normal)
    product(weights.c_fc, normal, hidden)
    product(weights.mlp_c_proj, hidden, x)
    return x
