"""An estimate of the memory that a run needs, and the settings with which it fits."""

from dataclasses import replace
from typing import Any

import torch

from configurator import UserError
from plaingpt.cpu import BLOCK, LARGE, LONGEST
from plaingpt.training.plan import Plan, divisors

PROCESS = 0.3 * 2**30  # bytes of Python, PyTorch and Matplotlib
NUMBA = 0.12 * 2**30  # bytes, where it compiles the loss
MARGIN = 1.5  # no measured run took less than two thirds of its estimate (docs/benchmarks.md)


def check_fits(plan: Plan) -> None:
    """Raises UserError if the run needs more memory than the device has, even allowing for a poor
    estimate: allocating it could take the machine down."""
    needed, available = memory_gib(plan), plan.device.memory_gib
    if available and needed > MARGIN * available:
        raise UserError(
            f"this run needs about {needed:,.1f} GiB, but {plan.device.name} has {available:,.1f}; "
            f"{what_fits(plan, available)}"
        )


def what_fits(plan: Plan, available: float) -> str:
    """The first change of settings that makes a step fit into `available` GiB."""
    options: list[dict[str, Any]] = [{}, {"activation_checkpointing": True}]
    if plan.world_size > 1:
        options += [{"fsdp": True}, {"fsdp": True, "activation_checkpointing": True}]
    for changes in options:
        for size in divisors(plan.micro_batch_size):
            needed = memory_gib(replace(plan, micro_batch_size=size, **changes))
            if needed <= available:
                words = [f"--micro_batch_size={size}", *(f"--{name}" for name in changes)]
                return f"{' '.join(words)} takes {needed:.1f} GiB"
    return (
        "the smallest micro-batches do not fit either: use a smaller model, or --fsdp with more "
        "processes"
    )


def memory_gib(plan: Plan) -> float:
    """An estimate of a process's peak memory: the machine's on a CPU, else the device's.
    docs/benchmarks.md compares it with measurements on a CPU."""
    sizes, on_cpu = plan.sizes, plan.device.kind == "cpu"
    half = plan.dtype != torch.float32
    kept = 4 * (sizes.total + 2 * sizes.trained)  # weights and two moments
    gradients = 4 * sizes.trained
    update = 0  # while the optimizer runs
    if plan.optimizer.name == "muon":
        kept -= 4 * sizes.trained_matrices  # one moment
        update = 14 * sizes.trained_matrices // 3  # all matrices of one shape at a time
    if plan.sharded:
        others = sizes.total - sizes.matrices
        gathered = 8 * (others + 2 * sizes.matrices // plan.config.n_layer)  # two blocks at a time
        kept = kept // plan.world_size + gathered
        gradients //= plan.world_size
    elif (plan.world_size > 1 or on_cpu) and plan.micro_steps > 1:
        gradients *= 2  # outside of DDP's buckets, or in gaps of the heap
    tokens = plan.micro_batch_size * plan.config.block_size
    activations = tokens * activation_bytes_per_token(plan, half)
    if half:
        activations += 2 * sizes.total  # copies of the weights, kept for the backward pass
    saving = 8 * sizes.trained if on_cpu else 0  # transposed, and as bytes
    most = max(gradients + max(activations, update), saving)
    process = (PROCESS + NUMBA * (plan.config.vocab_size >= LARGE)) * on_cpu
    return (process + kept + most) / 2**30


def activation_bytes_per_token(plan: Plan, half: bool) -> int:
    """Roughly what a step keeps of each token for the backward pass, in bf16 (`half`) or fp32.

    In units of n_embd, a block keeps two LayerNorms (in and out), qkv, attention, and the MLP
    around its GELU; with activation checkpointing only its input, and the rest of one block at a
    time. There are three copies of the logits; on a CPU only one, and gaps.
    """
    config = plan.config
    block = config.n_embd * (36 if half else 64)
    logits = 12 * config.vocab_size
    if plan.device.kind == "cpu":
        logits = config.vocab_size * (3 if half else 6)
        if config.block_size <= LONGEST:  # plaingpt/cpu.py's attention keeps its weights
            keys = (config.block_size + min(config.block_size, BLOCK)) // 2
            block += config.n_head * keys * (2 if half else 4)
    blocks = config.n_layer * block
    if plan.activation_checkpointing:
        blocks = config.n_layer * 4 * config.n_embd + block
    return blocks + logits
