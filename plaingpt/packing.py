"""
Blocks for writing text on a CPU, where each token takes the time of reading all weights once: they
hold the weights in fewer bits, or have all threads read them, and do little else per token.

Activations stay in float32. With 16 or 8 bits, a matrix gives a row of a batch the same bits
whatever the other rows are. docs/benchmarks.md has the measurements.
"""

import warnings

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from configurator import DType, UserError
from model import EPSILON, GPT, Block, KVCache, Linear
from plaingpt.runtime import Runtime

LARGEST = 65504  # of a float16
LEVELS = 127  # of an int8 on either side of 0


def place(model: GPT, rt: Runtime, dtype: DType = "auto", quantize: str | None = None) -> GPT:
    """Make a float32 model ready to write on the device of `rt`. On a CPU, the matrices of its
    blocks and its head are then in `dtype` (auto: 16 bits) or in int8.

    Raises UserError for quantize="int8" where PyTorch has no kernels for it, and for weights that
    16 bits do not hold.
    """
    if not can_pack(rt.device):
        if quantize:
            raise UserError(f"quantize={quantize}: PyTorch has no kernels for it on {rt.device}")
        return rt.place(model, rt.dtype).eval()
    torch.backends.quantized.engine = "fbgemm"
    half = dtype == "auto" or rt.dtype != torch.float32
    pack = Int8Linear if quantize else HalfLinear if half else SharedLinear
    rt.place(model).eval()
    if pack is not SharedLinear:
        check_range(model)
    for layer, block in enumerate(model.transformer.h):
        assert isinstance(block, Block)
        model.transformer.h[layer] = PackedBlock(block, pack)
    model.set_submodule("lm_head", pack(model.lm_head))
    if pack is not SharedLinear:
        model.transformer.wte.half()  # added to positions in float32, which makes their sum so
    return model


def check_range(model: GPT) -> None:
    """Raises UserError for weights that a float16 cannot hold."""
    if any(not weight.abs().max() <= LARGEST for weight in model.parameters()):
        raise UserError(f"weights above {LARGEST:,} do not fit 16 bits: use --dtype=float32")


def input_levels() -> int:
    """Levels of an activation on either side of 0. Without VNNI, FBGEMM adds pairs of products in
    16 bits, which only 7 bits never exceed."""
    # A private name, the same from torch 2.9 to 2.15; a torch without it gets 7 bits.
    return 127 if getattr(torch.cpu, "_is_vnni_supported", lambda: False)() else 63


def can_pack(device: torch.device) -> bool:
    """Whether PyTorch has kernels for packed weights there: on CPUs of x86."""
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


class PackedBlock(Block):
    """A block of GPT-2 with packed matrices, as few calls as possible, and no dropout."""

    def __init__(self, block: Block, pack: type["Packed"]) -> None:
        nn.Module.__init__(self)
        self.ln_1, self.attn, self.ln_2, self.mlp = block.ln_1, block.attn, block.ln_2, block.mlp
        for part, name in (
            (self.attn, "c_attn"),
            (self.attn, "c_proj"),
            (self.mlp, "c_fc"),
            (self.mlp, "c_proj"),
        ):
            setattr(part, name, pack(getattr(part, name)))

    def forward(self, x: Tensor, layer: int, cache: KVCache | None) -> Tensor:
        (B, T, C), attn, mlp = x.shape, self.attn, self.mlp
        normal = torch.layer_norm(x, (C,), self.ln_1.weight, self.ln_1.bias, EPSILON)
        qkv = attn.c_attn.forward(normal).view(B, T, 3, attn.n_head, C // attn.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        seen = None
        if cache is not None:
            k, v = cache.extend(layer, qkv[:, :, 1:])
            seen = cache.seen
        y = attn.attend.forward(q, k, v, seen, 0.0)  # (B, H, T, D)
        x = attn.c_proj.forward(y.transpose(1, 2).reshape(B, T, C)).add_(x)
        normal = torch.layer_norm(x, (C,), self.ln_2.weight, self.ln_2.bias, EPSILON)
        hidden = F.gelu(mlp.c_fc.forward(normal), approximate="tanh")
        return mlp.c_proj.forward(hidden).add_(x)


class HalfLinear(nn.Module):
    """Weights in float16, which holds bfloat16 weights exactly from 1e-5 on; float32 products."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class Int8Linear(nn.Module):
    """Weights and activations in int8, with a scale for each output and for each input row."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        weight = layer.weight.detach()
        scales = weight.abs().amax(dim=1).clamp(min=1e-30) / LEVELS
        zeros = torch.zeros(len(scales), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, and without an equal as yet
            rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded, None)
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.levels = input_levels()

    def forward(self, x: Tensor) -> Tensor:
        largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True).clamp_(min=1e-30)
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        y = multiply(x / largest, 1 / self.levels, self.levels + 1, self.packed).mul_(largest)
        return y if self.bias is None else y.add_(self.bias)


class SharedLinear(nn.Module):
    """float32 weights, stored as (in, out). For a single row each thread reads some of the inputs'
    weights, in order: twice as fast as F.linear, which would use one thread."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight.detach().t().contiguous(), layer.bias
        threads = range(1, torch.get_num_threads() + 1)
        self.parts = max(n for n in threads if layer.in_features % n == 0)

    def forward(self, x: Tensor) -> Tensor:
        inputs, outputs = self.weight.shape
        if x.numel() == inputs:
            shared = self.weight.view(self.parts, -1, outputs)
            y = torch.bmm(x.view(self.parts, 1, -1), shared).sum(0).view(*x.shape[:-1], outputs)
        else:
            y = x @ self.weight
        return y if self.bias is None else y.add_(self.bias)


Packed = HalfLinear | Int8Linear | SharedLinear
