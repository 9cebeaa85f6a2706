"""Models that are placed on a device for writing, rather than for training."""

import torch

from configurator import DType, UserError
from model import GPT, Block
from plaingpt.runtime import Runtime

LARGEST = 65504  # of a float16


def place(model: GPT, rt: Runtime, dtype: DType = "auto", quantize: str | None = None) -> GPT:
    """Make a float32 model ready to write on the device of `rt`. On a CPU, its blocks and its head
    are then compiled, with weights in `dtype` (auto: 16 bits) or in int8 and everything else in
    float32.

    Raises UserError for quantize="int8" on another device, and for weights that do not fit in 16
    bits.
    """
    if rt.device.type != "cpu":
        if quantize:
            raise UserError(f"quantize={quantize} is for CPUs, and the device is {rt.device}")
        return rt.place(model, rt.dtype).eval()
    from plaingpt.compiled import CompiledBlock, CompiledLinear  # Numba takes 0.4 s to import

    half = dtype == "auto" or rt.dtype != torch.float32
    held = torch.int8 if quantize else torch.float16 if half else torch.float32
    if held == torch.float16:
        check_range(model)
    model = model.to(rt.device).requires_grad_(False).eval()
    for layer, block in enumerate(model.transformer.h):
        assert isinstance(block, Block)
        model.transformer.h[layer] = CompiledBlock(block, held)
    model.set_submodule("lm_head", CompiledLinear(model.lm_head, held))
    if held == torch.float16:
        model.transformer.wte.half()  # added to positions in float32, which makes their sum so
    model(torch.zeros(1, 1, dtype=torch.long))  # compiles now, rather than within the first text
    return model


def check_range(model: GPT) -> None:
    """Raises UserError for weights that a float16 cannot hold."""
    if any(not weight.abs().max() <= LARGEST for weight in model.parameters()):
        raise UserError(f"weights above {LARGEST:,} do not fit in 16 bits: use --dtype=float32")
