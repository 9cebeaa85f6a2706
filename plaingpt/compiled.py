"""The matrices and blocks of a model, computed on a CPU by plaingpt/kernels.py."""

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from model import Block, KVCache, Linear
from plaingpt import kernels
from plaingpt.kernels import TILE, BlockWeights, Matrix, use_threads

LEVELS = 127  # of an int8 on either side of 0


class CompiledLinear(nn.Module):
    def __init__(self, layer: Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = packed(layer, dtype)

    def forward(self, x: Tensor) -> Tensor:
        use_threads()
        y = kernels.linear(self.matrix, x.reshape(-1, x.size(-1)).contiguous().numpy())
        return torch.from_numpy(y).view(*x.shape[:-1], -1)


def packed(layer: Linear, dtype: torch.dtype) -> Matrix:
    """Float32 weights as `dtype`: float32, float16 or int8. An int8 has a scale for each output."""
    weight, N, K = layer.weight.detach(), layer.out_features, layer.in_features
    scales = torch.ones(N)
    if dtype == torch.int8:
        scales = weight.abs().amax(dim=1).clamp(min=1e-30) / LEVELS
        weight = (weight / scales[:, None]).round()
    whole, rest = divmod(N, TILE)
    tiles = torch.zeros(whole + bool(rest), K, TILE, dtype=dtype)
    tiles[:whole] = weight[: whole * TILE].view(whole, TILE, K).mT
    if rest:
        tiles[whole, :, :rest] = weight[-rest:].T
    bits = tiles.view(torch.uint16) if dtype == torch.float16 else tiles
    bias = torch.zeros(N) if layer.bias is None else layer.bias.detach()
    return Matrix(bits.numpy(), scales.numpy(), bias.numpy())


class CompiledBlock(Block):
    """A block without gradients and dropout."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.ln_1, self.attn, self.ln_2, self.mlp = block.ln_1, block.attn, block.ln_2, block.mlp

        def matrix(part: nn.Module, name: str, after: int = 0) -> Matrix:
            layer = CompiledLinear(getattr(part, name), dtype)
            setattr(part, name, layer)
            return layer.matrix._replace(after=after)

        self.weights = BlockWeights(
            ln_1=gain_and_bias(self.ln_1),
            c_attn=matrix(self.attn, "c_attn"),
            attn_c_proj=matrix(self.attn, "c_proj", after=kernels.ADD),
            ln_2=gain_and_bias(self.ln_2),
            c_fc=matrix(self.mlp, "c_fc", after=kernels.GELU),
            mlp_c_proj=matrix(self.mlp, "c_proj", after=kernels.ADD),
        )

    def forward(self, x: Tensor, layer: int, cache: KVCache | None) -> Tensor:
        B, T, C = x.shape
        if cache is None:
            positions = torch.arange(T).repeat(B, 1)
            entries = torch.empty(B, 2, self.attn.n_head, T, C // self.attn.n_head)
        else:
            positions, entries = cache.positions, cache.entries[layer, :B]
        use_threads()
        rows = x.reshape(B * T, C).contiguous().numpy()
        y = kernels.block(self.weights, rows, positions.numpy(), entries.numpy())
        return torch.from_numpy(y).view(B, T, C)


def gain_and_bias(norm: nn.LayerNorm) -> tuple[np.ndarray, np.ndarray]:
    gain = norm.weight.detach()
    bias = torch.zeros_like(gain) if norm.bias is None else norm.bias.detach()
    return gain.numpy(), bias.numpy()
