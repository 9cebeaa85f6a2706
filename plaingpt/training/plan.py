"""What a training is going to do and to need, in sentences."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from configurator import UserError
from model import GPT, GPTConfig
from plaingpt import runtime
from plaingpt.runtime import Runtime
from plaingpt.training import batches

if TYPE_CHECKING:
    from train import TrainConfig


def sentences(
    cfg: "TrainConfig", rt: Runtime, model: GPT, batches: batches.Batches | None, max_steps: int
) -> list[str]:
    """What the run is going to do, in sentences."""
    config = model.config
    params = model.num_params()
    micro = micro_batch_size(cfg, rt)
    micro_steps = cfg.batch_size // micro // rt.world_size
    tokens_per_step = cfg.batch_size * config.block_size
    tokens = max_steps * tokens_per_step
    flops = tokens * config.flops_per_token(frozen=cfg.lora_rank > 0)
    many = f"{rt.world_size} processes × " if rt.world_size > 1 else ""
    needed, there = memory_gib(model, micro, cfg, rt), runtime.device_memory_gib(rt.device)
    lines = [
        f"Model: {params:,} parameters; {config.n_layer} layers, {config.n_head} heads, "
        f"{config.n_embd} wide, context {config.block_size:,}, vocabulary {config.vocab_size:,}.",
        *lora_sentence(cfg, model),
        f"Step: {cfg.batch_size:,} sequences × {config.block_size:,} = {tokens_per_step:,} tokens, "
        f"in {many}{micro_steps:,} micro-step(s) of {micro:,} sequences.",
        f"Run: {max_steps:,} steps, {tokens:,} tokens, {tokens / params:.1f} per parameter"
        + (f", {tokens / (batches.windows * batches.stride):.2f} epochs." if batches else "."),
        f"Compute: {flops:.3g} floating-point operations, "
        f"on {rt.device} in {str(rt.dtype).removeprefix('torch.')}, {cfg.optimizer}.",
        f"Memory: about {needed:.1f} GiB"
        + (f" of the {there:.0f} GiB of {rt.device}." if there else "."),
    ]
    if cfg.warmup_steps >= max_steps:
        lines.append(f"{cfg.warmup_steps:,} steps of warm-up do not end: lower --warmup_steps.")
    if cfg.fsdp and rt.world_size == 1:
        lines.append("One process has nobody to share with: --fsdp does nothing here.")
    if there and needed > there:
        lines.append("It will not fit. " + what_fits(cfg, rt, model, there))
    return lines


def lora_sentence(cfg: "TrainConfig", model: GPT) -> list[str]:
    if not cfg.lora_rank:
        return []
    trained, where = model.num_params(trained=True), ", ".join(cfg.lora_targets)
    share = trained / model.num_params()
    return [f"LoRA: {trained:,} of them train ({share:.1%}), of rank {cfg.lora_rank} on {where}."]


def what_fits(cfg: "TrainConfig", rt: Runtime, model: GPT, there: float) -> str:
    """The first change of settings with which a step fits into `there` GiB."""
    micro = micro_batch_size(cfg, rt)
    options: list[dict[str, Any]] = [{}, {"activation_checkpointing": True}]
    if rt.world_size > 1:
        options += [{"fsdp": True}, {"fsdp": True, "activation_checkpointing": True}]
    for changes in options:
        for size in (size for size in range(micro, 0, -1) if micro % size == 0):
            needed = memory_gib(model, size, replace(cfg, **changes), rt)
            if needed <= there:
                words = [f"--{name}" for name in changes]
                return f"{' '.join([f'--micro_batch_size={size}', *words])} takes {needed:.1f} GiB."
    return "Nor would it with the smallest micro-batches; --fsdp shares it among processes."


def memory_gib(model: GPT, micro_batch_size: int, cfg: "TrainConfig", rt: Runtime) -> float:
    """An estimate of a training step's memory in a process: weights, gradients, optimizer,
    activations."""
    config, half = model.config, rt.dtype != torch.float32
    params, trained = model.num_params(), model.num_params(trained=True)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name]
    hidden = sum(p.numel() for p in matrices)
    state = 4 * (params + 3 * trained)
    if cfg.optimizer == "muon":
        state -= 4 * sum(p.numel() for p in matrices if p.requires_grad)
    if cfg.fsdp and rt.world_size > 1:  # and what is put together meanwhile: embeddings, two blocks
        state = state // rt.world_size + 8 * (params - hidden + 2 * hidden // config.n_layer)
        if cfg.optimizer == "muon":  # all matrices of a shape, their updates
            state += 8 * hidden // 3
    elif rt.world_size > 1 and micro_batch_size * rt.world_size < cfg.batch_size:
        state += 4 * trained  # gradients outside of DDP's buckets, until the last micro-step
    if half:
        state += 2 * params  # bf16 copies, kept for the backward pass
    per_token = activation_bytes_per_token(config, half, cfg.activation_checkpointing)
    return (state + micro_batch_size * config.block_size * per_token) / 2**30


def activation_bytes_per_token(config: GPTConfig, half: bool, recompute: bool) -> int:
    """Roughly what a step keeps of each token for the backward pass, in bf16 (`half`) or fp32.

    In units of n_embd, a block keeps two LayerNorms (in and out), qkv, attention, and the MLP
    around its GELU. With `recompute` it keeps its input only, and one block at a time the rest. Of
    the logits there are three copies.
    """
    block = config.n_embd * (36 if half else 64)
    blocks = config.n_layer * block
    if recompute:
        blocks = config.n_layer * 4 * config.n_embd + block
    return blocks + config.vocab_size * (10 if half else 12)


def micro_batch_size(cfg: "TrainConfig", rt: Runtime) -> int:
    """Sequences that this process takes at once. Raises UserError where they, or the processes,
    do not divide the batch, and for what does not combine with several of them."""
    if cfg.fsdp and rt.dtype == torch.float16:
        raise UserError("--fsdp does not combine with float16: take --dtype=bfloat16 or float32")
    sizes = [size for size in range(1, cfg.batch_size + 1) if cfg.batch_size % size == 0]

    def nearest(size: int) -> str:
        near = sorted(sizes, key=lambda other: abs(other - size))[:2]
        return " and ".join(map(str, sorted(near)))

    if cfg.batch_size % rt.world_size:
        raise UserError(
            f"batch_size={cfg.batch_size} does not divide over {rt.world_size} processes; the "
            f"nearest numbers of processes that it divides over are {nearest(rt.world_size)}"
        )
    share = cfg.batch_size // rt.world_size
    micro = cfg.micro_batch_size or share
    if share % micro:
        sizes = [size for size in sizes if share % size == 0]
        of_each = f", {share} in each of {rt.world_size} processes," if rt.world_size > 1 else ""
        raise UserError(
            f"batch_size={cfg.batch_size}{of_each} is no multiple of micro_batch_size={micro}; "
            f"the nearest that divide it are {nearest(micro)}"
        )
    return micro
