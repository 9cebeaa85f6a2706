"""What a run will do and need: every setting resolved, and described in sentences."""

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from configurator import UserError
from model import GPT, GPTConfig
from plaingpt import runtime
from plaingpt.lora import LoRAConfig
from plaingpt.training.optim import OptimizerConfig
from plaingpt.training.schedule import Every, LearningRate
from plaingpt.wording import quantity


class Sizes(NamedTuple):
    """Parameter counts: all, the trained ones, and how many of each are in the blocks' matrices."""

    total: int
    trained: int
    matrices: int
    trained_matrices: int


@dataclass(frozen=True)
class Plan:
    # the model and where it trains
    config: GPTConfig
    sizes: Sizes
    lora: LoRAConfig | None  # None: all weights train
    device: torch.device
    dtype: torch.dtype  # of matrix products
    world_size: int
    fsdp: bool  # shard weights, gradients and optimizer over the processes
    activation_checkpointing: bool
    compile: bool | Literal["auto"]
    # a step
    batch_size: int  # sequences, over all processes
    micro_batch_size: int  # sequences that a process takes at once
    optimizer: OptimizerConfig
    grad_clip: float  # inf: no limit
    # the run
    max_steps: int
    epochs: float  # 0: not known, for want of data
    learning_rate: LearningRate
    evaluation: Every
    sampling: Every
    saving: Every
    logging: Every

    @property
    def sharded(self) -> bool:
        return self.fsdp and self.world_size > 1

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.config.block_size

    @property
    def flops_per_step(self) -> int:
        """Floating-point operations of all processes."""
        return self.tokens_per_step * self.config.flops_per_token(frozen=self.lora is not None)


def sizes_of(model: GPT) -> Sizes:
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name]
    return Sizes(
        total=model.num_params(),
        trained=model.num_params(trained=True),
        matrices=sum(p.numel() for p in matrices),
        trained_matrices=sum(p.numel() for p in matrices if p.requires_grad),
    )


def micro_batch_size(batch_size: int, wanted: int | None, world_size: int) -> int:
    """The sequences that a process takes at once: `wanted`, or its whole share of the batch.

    Raises UserError if the processes, or the micro-batches, do not divide the batch.
    """
    if batch_size % world_size:
        raise UserError(
            f"batch_size={batch_size} cannot be divided among {world_size} processes; the nearest "
            f"numbers of processes that divide it are {nearest(batch_size, world_size)}"
        )
    share = batch_size // world_size
    micro = wanted or share
    if share % micro:
        of_each = f", {share} in each of {world_size} processes," if world_size > 1 else ""
        raise UserError(
            f"batch_size={batch_size}{of_each} is not a multiple of micro_batch_size={micro}; "
            f"the nearest that divide it are {nearest(share, micro)}"
        )
    return micro


def nearest(whole: int, wanted: int) -> str:
    """The two divisors of `whole` that are nearest to `wanted`."""
    divisors = (size for size in range(1, whole + 1) if whole % size == 0)
    return " and ".join(map(str, sorted(sorted(divisors, key=lambda n: abs(n - wanted))[:2])))


# --- in sentences


def sentences(plan: Plan) -> list[str]:
    config, sizes = plan.config, plan.sizes
    micro_steps = plan.batch_size // plan.micro_batch_size // plan.world_size
    tokens = plan.max_steps * plan.tokens_per_step
    processes = f"{plan.world_size} processes × " if plan.world_size > 1 else ""
    needed, available = memory_gib(plan), runtime.device_memory_gib(plan.device)
    lines = [
        f"Model: {sizes.total:,} parameters; {quantity(config.n_layer, 'layer')}, "
        f"{quantity(config.n_head, 'head')}, {config.n_embd} wide, context "
        f"{config.block_size:,}, vocabulary {config.vocab_size:,}.",
        *lora_sentence(plan),
        f"Step: {quantity(plan.batch_size, 'sequence')} × {config.block_size:,} = "
        f"{quantity(plan.tokens_per_step, 'token')}, in {processes}"
        f"{quantity(micro_steps, 'micro-step')} of {quantity(plan.micro_batch_size, 'sequence')}.",
        f"Run: {quantity(plan.max_steps, 'step')}, {quantity(tokens, 'token')}, "
        f"{tokens / sizes.total:.1f} per parameter"
        + (f", {plan.epochs:.2f} epochs." if plan.epochs else "."),
        f"Compute: {plan.max_steps * plan.flops_per_step:.3g} floating-point operations, "
        f"on {plan.device} in {str(plan.dtype).removeprefix('torch.')}, {plan.optimizer.name}.",
        f"Memory: about {needed:.1f} GiB"
        + (f" of the {available:.0f} GiB of {plan.device}." if available else "."),
    ]
    if plan.learning_rate.warmup_steps >= plan.max_steps:
        lines.append(
            f"warmup_steps={plan.learning_rate.warmup_steps:,} >= max_steps: the peak learning "
            "rate is never held."
        )
    if plan.fsdp and plan.world_size == 1:
        lines.append("--fsdp has no effect with one process.")
    if available and needed > available:
        lines.append(f"This will not fit. {what_fits(plan, available)}")
    return lines


def lora_sentence(plan: Plan) -> list[str]:
    if not plan.lora:
        return []
    share = plan.sizes.trained / plan.sizes.total
    return [
        f"LoRA: {plan.sizes.trained:,} of them train ({share:.1%}), "
        f"rank {plan.lora.rank} on {', '.join(plan.lora.targets)}."
    ]


def what_fits(plan: Plan, available: float) -> str:
    """The first change of settings with which a step fits into `available` GiB."""
    options: list[dict[str, Any]] = [{}, {"activation_checkpointing": True}]
    if plan.world_size > 1:
        options += [{"fsdp": True}, {"fsdp": True, "activation_checkpointing": True}]
    micro = plan.micro_batch_size
    for changes in options:
        for size in (size for size in range(micro, 0, -1) if micro % size == 0):
            needed = memory_gib(replace(plan, micro_batch_size=size, **changes))
            if needed <= available:
                words = [f"--micro_batch_size={size}", *(f"--{name}" for name in changes)]
                return f"{' '.join(words)} takes {needed:.1f} GiB."
    return (
        "Neither will the smallest micro-batches; --fsdp would split the state over more processes."
    )


def memory_gib(plan: Plan) -> float:
    """An estimate of a process's memory in a training step: weights, gradients, optimizer and
    activations."""
    sizes, half = plan.sizes, plan.dtype != torch.float32
    state = 4 * (sizes.total + 3 * sizes.trained)
    if plan.optimizer.name == "muon":  # one moment instead of two
        state -= 4 * sizes.trained_matrices
    if plan.sharded:
        others = sizes.total - sizes.matrices
        gathered = 8 * (others + 2 * sizes.matrices // plan.config.n_layer)  # two blocks at a time
        state = state // plan.world_size + gathered
        if plan.optimizer.name == "muon":  # all matrices of one shape, and their updates
            state += 8 * sizes.matrices // 3
    elif plan.world_size > 1 and plan.micro_batch_size * plan.world_size < plan.batch_size:
        state += 4 * sizes.trained  # gradients outside of DDP's buckets, until the last micro-step
    if half:
        state += 2 * sizes.total  # bf16 copies, kept for the backward pass
    tokens = plan.micro_batch_size * plan.config.block_size
    return (state + tokens * activation_bytes_per_token(plan, half)) / 2**30


def activation_bytes_per_token(plan: Plan, half: bool) -> int:
    """Roughly what a step keeps of each token for the backward pass, in bf16 (`half`) or fp32.

    In units of n_embd, a block keeps two LayerNorms (in and out), qkv, attention, and the MLP
    around its GELU; with activation checkpointing only its input, and the rest of one block at a
    time. There are three copies of the logits.
    """
    config = plan.config
    block = config.n_embd * (36 if half else 64)
    blocks = config.n_layer * block
    if plan.activation_checkpointing:
        blocks = config.n_layer * 4 * config.n_embd + block
    return blocks + config.vocab_size * (10 if half else 12)
