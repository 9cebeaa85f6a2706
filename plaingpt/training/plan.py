"""What a run will do: every setting resolved."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from configurator import UserError
from model import GPT, GPTConfig
from plaingpt.lora import LoRAConfig
from plaingpt.runtime import Runtime
from plaingpt.training.data import Data
from plaingpt.training.devices import Device
from plaingpt.training.optim import OptimizerConfig, default_learning_rate
from plaingpt.training.schedule import Every, LearningRate
from plaingpt.training.start import Settings, Start


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
    device: Device
    dtype: torch.dtype  # of matrix products
    world_size: int
    fsdp: bool  # shard weights, gradients and optimizer over the processes
    activation_checkpointing: bool
    compile: bool | Literal["auto"]
    # a step
    batch_size: int  # sequences, over all processes
    micro_batch_size: int  # sequences that a process takes at once
    masked: bool  # whether some tokens may not count in the loss
    optimizer: OptimizerConfig
    grad_clip: float  # inf: no limit
    # the run
    done: int  # steps done already, if resumed
    waited: int  # evaluations since the best one, if resumed
    max_steps: int
    fresh: bool  # whether it starts from random weights
    split_tokens: int  # in the training split; 0: no data yet
    epochs: float  # passes over the data; 0: no data yet
    eval_tokens: int  # per evaluation; 0: no data yet
    learning_rate: LearningRate
    rate_source: str  # where its peak comes from; "": it was given
    evaluation: Every
    patience: float  # evaluations without a better loss that end the run; inf: no limit
    tasks: tuple[str, ...]  # each with its size; none without data
    task_tokens: int  # that the model reads each time
    measuring: Every  # of the tasks
    sampling: Every
    saving: Every
    logging: Every

    @property
    def sharded(self) -> bool:
        return self.fsdp and self.world_size > 1

    @property
    def micro_steps(self) -> int:
        return self.batch_size // self.micro_batch_size // self.world_size

    @property
    def steps_left(self) -> int:
        return max(0, self.max_steps - self.done)

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.config.block_size

    @property
    def flops_per_step(self) -> int:
        """Floating-point operations of all processes."""
        return self.tokens_per_step * self.config.flops_per_token(frozen=self.lora is not None)

    def finished(self, step: int, waited: int) -> bool:
        """Whether a run ends after `step` steps, the last `waited` evaluations not the best."""
        return step >= self.max_steps or waited >= self.patience


def sizes_of(model: GPT) -> Sizes:
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".h." in name]
    return Sizes(
        total=model.num_params(),
        trained=model.num_params(trained=True),
        matrices=sum(p.numel() for p in matrices),
        trained_matrices=sum(p.numel() for p in matrices if p.requires_grad),
    )


def make_plan(
    settings: Settings, start: Start, data: Data | None, micro: int, rt: Runtime, device: Device
) -> Plan:
    """The run that the settings ask for, with every None resolved. Without data, epochs are
    ignored."""
    config = start.model.config
    steps = [settings["max_steps"]] if settings["max_steps"] else []
    windows = data.batches.windows if data else 0
    if settings["epochs"] is not None and data:
        steps.append(max(1, math.ceil(settings["epochs"] * windows / settings["batch_size"])))
    max_steps = min(steps, default=1750)
    fresh = settings["init_from"] == "scratch"
    peak, source = settings["learning_rate"], ""
    if peak is None:
        gentle = not fresh and start.adapter is None
        peak, source = default_learning_rate(settings["optimizer"], config.n_embd, gentle)
    if settings["min_lr"] > peak:
        raise UserError(f"min_lr={settings['min_lr']} is above learning_rate={peak}")
    held_out = len(data.held_out) if data else 0
    evaluation = Every(settings["eval_interval"], last=max_steps)
    tasks = data.tasks if data else []
    task_interval = settings["task_interval"] or settings["eval_interval"]
    sample_interval = settings["sample_interval"]
    return Plan(
        config=config,
        sizes=sizes_of(start.model),
        lora=start.adapter.config if start.adapter else None,
        device=device,
        dtype=rt.dtype,
        world_size=rt.world_size,
        fsdp=settings["fsdp"],
        activation_checkpointing=settings["activation_checkpointing"],
        compile=settings["compile"],
        batch_size=settings["batch_size"],
        micro_batch_size=micro,
        masked=bool(data and data.batches.split.has_mask),
        optimizer=OptimizerConfig(
            settings["optimizer"],
            weight_decay=settings["weight_decay"],
            betas=(settings["beta1"], settings["beta2"]),
            momentum=settings["momentum"],
            embedding_lr_scale=settings["embedding_lr_scale"],
        ),
        grad_clip=settings["grad_clip"] or math.inf,
        done=start.step,
        waited=start.progress.waited,
        max_steps=max_steps,
        fresh=fresh,
        split_tokens=len(data.batches.split) if data else 0,
        epochs=max_steps * settings["batch_size"] / windows if data else 0.0,
        eval_tokens=min(settings["eval_tokens"] or held_out, held_out),
        learning_rate=LearningRate(
            max_steps,
            peak=peak,
            min_lr=settings["min_lr"],
            warmup_steps=settings["warmup_steps"],
            schedule=settings["schedule"],
            decay_fraction=settings["decay_fraction"],
        ),
        rate_source=source,
        evaluation=evaluation,
        patience=settings["patience"] or math.inf,
        tasks=tuple(map(str, tasks)),
        task_tokens=sum(task.tokens for task in tasks),
        measuring=Every(task_interval, last=max_steps) if tasks else Every(0),
        sampling=evaluation if sample_interval is None else Every(sample_interval),
        saving=Every(settings["save_interval"] or settings["eval_interval"], last=max_steps),
        logging=Every(settings["log_interval"]),
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
    two = sorted(divisors(whole), key=lambda n: abs(n - wanted))[:2]
    return " and ".join(map(str, sorted(two)))


def divisors(whole: int) -> list[int]:
    """The divisors of `whole`, largest first; beyond 10**12, only those that are at most 10**6 and
    their cofactors."""
    small = [n for n in range(1, min(math.isqrt(whole), 10**6) + 1) if whole % n == 0]
    return sorted({*small, *(whole // n for n in small)}, reverse=True)
