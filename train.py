"""
Train a GPT-2 on the shards that prepare.py made.

    python train.py                                            # laptop: the defaults
    python train.py config/shakespeare_cpu.py --max_steps=100  # a config file, then overrides
    python train.py config/gpt2_124m.py --plan                 # say what would happen, and stop
    python train.py --init_from=resume                         # continue from the newest checkpoint
    python train.py config/finetune_instruct.py --lora_rank=16  # train adapters, not the weights
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py

Ctrl-C and SIGTERM finish the step, save and exit with status 0. The number of processes changes
the losses by rounding only.
"""

import contextlib
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import configurator
from configurator import (
    DType,
    Folder,
    Fraction,
    FractionBelow1,
    NonNegativeFloat,
    NonNegativeInt,
    PathName,
    PositiveFloat,
    PositiveInt,
    UserError,
)
from plaingpt import threads
from plaingpt.training.schedule import ScheduleName


@dataclass(frozen=True)
class TrainConfig:
    # data and folders
    data_dir: Folder = "data/stdlib"  # what prepare.py wrote
    out_dir: Folder = "out/stdlib"  # checkpoints, metrics.jsonl and loss.png go here
    overwrite: bool = False  # start over in an out_dir that already has checkpoints
    init_from: PathName = (
        "scratch"  # scratch, resume, gpt2…gpt2-xl, hf:OWNER/NAME, a checkpoint folder
    )
    # the model; init_from=FOLDER takes its shape from there
    n_layer: PositiveInt = 3  # blocks
    n_head: PositiveInt = 2  # attention heads per block
    n_embd: PositiveInt = 128  # width, a multiple of n_head
    block_size: PositiveInt | None = None  # context length in tokens; None: the folder's, or 256
    dropout: FractionBelow1 = 0.0  # share of activations zeroed in training
    bias: bool = True  # biases in linear layers and LayerNorms
    tie_weights: bool = True  # one matrix for token embedding and head
    vocab_multiple: PositiveInt = 1  # round the vocabulary up to a multiple; 64 is faster on GPUs
    # LoRA: freeze the weights of a checkpoint and train adapters beside them
    lora_rank: NonNegativeInt = 0  # rank of the adapters; 0: no adapters, all weights train
    lora_alpha: PositiveFloat = 16.0  # adapters are scaled by lora_alpha / lora_rank
    lora_dropout: FractionBelow1 = 0.0  # dropout on the adapters' inputs
    lora_targets: tuple[str, ...] = ("c_attn", "c_proj", "c_fc")  # suffixes of the layers to adapt
    # the steps and the optimizer
    batch_size: PositiveInt = 8  # sequences per step, over all processes
    micro_batch_size: PositiveInt | None = None  # sequences a device takes at once; None: its share
    max_steps: PositiveInt | None = None  # optimizer steps; None: 1500, or what epochs asks for
    epochs: PositiveFloat | None = None  # passes over the data, if max_steps is not reached before
    optimizer: Literal["muon", "adamw"] = "muon"  # muon (with AdamW on embeddings) or adamw
    learning_rate: PositiveFloat = 0.01  # at its peak
    min_lr: NonNegativeFloat = 0.0  # at the last step
    warmup_steps: NonNegativeInt = 0  # steps of linear warm-up
    schedule: ScheduleName = "wsd"  # cosine, or wsd: constant, then down to min_lr
    decay_fraction: Fraction = 0.5  # share of the steps over which wsd decays
    weight_decay: NonNegativeFloat = 0.0  # for matrices and embeddings
    embedding_lr_scale: PositiveFloat = 1.5  # with muon: AdamW's multiple of learning_rate
    momentum: FractionBelow1 = 0.9  # Muon's momentum
    beta1: FractionBelow1 = 0.9  # AdamW's beta1
    beta2: FractionBelow1 = 0.95  # AdamW's beta2
    grad_clip: NonNegativeFloat = 1.0  # largest norm of the gradient; 0: no limit
    stride: PositiveInt | None = None  # tokens between the starts of windows; None: block_size
    # watching
    eval_interval: PositiveInt = 500  # steps between evaluations
    eval_tokens: PositiveInt | None = None  # validation tokens per evaluation; None: all
    sample_interval: NonNegativeInt | None = None  # steps; None: at evaluations, 0: never
    log_interval: PositiveInt = 25  # steps between console lines
    save_interval: PositiveInt | None = None  # steps between checkpoints; None: at evaluations
    keep_checkpoints: PositiveInt = 3  # how many of the newest to keep, besides the best
    tracker: Literal["wandb", "trackio"] | None = None  # where else to send the metrics
    plan: bool = False  # print what would be done, and stop
    # the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: DType = "auto"  # of matrix products; auto: bfloat16 where the hardware has it
    compile: bool | Literal["auto"] = "auto"  # torch.compile; auto: on GPUs, if it works
    fsdp: bool = False  # shard weights and optimizer, for models too large for one GPU
    activation_checkpointing: bool = False  # less memory: recompute blocks in the backward pass
    seed: NonNegativeInt = 1337  # for initial weights, data order and dropout


if __name__ == "__main__":
    configurator.answer_help(TrainConfig)  # before torch is imported, which takes a second
    threads.wait_briefly()

import torch

from plaingpt import runtime
from plaingpt.checkpoint import adapters, folders
from plaingpt.runtime import Runtime
from plaingpt.text.dataset import open_dataset
from plaingpt.training import optim, parallel
from plaingpt.training.batches import Batch, Batches, Data, open_data
from plaingpt.training.evaluation import bits_per_byte, print_sample, validation_loss
from plaingpt.training.log import Clock, Record, console_line, finite, throughput
from plaingpt.training.optim import OptimizerConfig
from plaingpt.training.plan import Plan, micro_batch_size, sentences, sizes_of
from plaingpt.training.run_folder import RunLog, begin_run, claimed, describe_start
from plaingpt.training.schedule import Every, LearningRate
from plaingpt.training.start import (
    SHAPE,
    Start,
    open_start,
    planned_start,
    saved_settings,
    shape_of,
)
from plaingpt.training.state import TrainState, make_state, write_checkpoint

MAX_BAD_STEPS = 20  # consecutive non-finite steps before the run gives up


def train(cfg: TrainConfig) -> Record:
    """Run a training, or only --plan it; return the last metrics record, {} after --plan.

    Raises UserError, before the first step, for settings, data or checkpoints that do not fit and
    for an out_dir that another training uses, and later if the gradient stays non-finite; OSError
    if a checkpoint cannot be written.
    """
    check_settings(cfg)
    rt = runtime.start(cfg.device, cfg.dtype)
    if cfg.fsdp and rt.dtype == torch.float16:
        raise UserError("--fsdp does not combine with float16: use --dtype=bfloat16 or float32")
    micro = micro_batch_size(cfg.batch_size, cfg.micro_batch_size, rt.world_size)
    if cfg.plan and cfg.init_from == "scratch" and not Path(cfg.data_dir).is_dir():
        print(f"{cfg.data_dir} does not exist yet; assuming GPT-2's vocabulary of 50,257 ids.")
        start = planned_start(asdict(cfg), vocab_size=50257)
        print("\n".join(sentences(make_plan(cfg, start, None, micro, rt))))
        return {}

    with contextlib.nullcontext() if cfg.plan else claimed(Path(cfg.out_dir), rt):
        return begin(cfg, micro, rt)


def begin(cfg: TrainConfig, micro: int, rt: Runtime) -> Record:
    """Open what the run starts from, say what it will do, and do it."""
    # what the run starts from: fresh weights, a checkpoint, or its own newest one
    out_dir = Path(cfg.out_dir)
    given = asdict(cfg)
    history = folders.read_starts(out_dir)
    same_run = runtime.restartable() and bool(history) and history[-1].settings == given
    if same_run and folders.step_folders(out_dir):
        print(f"{out_dir} already holds this run: resuming it")
        cfg = replace(cfg, init_from="resume")
        saved = settings_so_far(cfg)  # a run that began with a checkpoint was never given its shape
        cfg = replace(cfg, **{name: saved[name] for name in (*SHAPE, "vocab_multiple")})
    dataset = open_dataset(cfg.data_dir)
    start = open_start(asdict(cfg), asdict(TrainConfig()), dataset)
    cfg = replace(cfg, **shape_of(start, asdict(cfg), dataset.tokenizer.vocab_size))

    # what it will do
    block_size = start.model.config.block_size
    data = open_data(dataset, cfg.batch_size, block_size, cfg.seed, cfg.stride or block_size)
    plan = make_plan(cfg, start, data.batches, micro, rt)
    print("\n".join(sentences(plan)))
    if cfg.plan:
        return {}
    if start.step >= plan.max_steps:
        done = f"{out_dir} has finished: step {start.step:,} of max_steps={plan.max_steps:,}"
        if not same_run:
            larger = "--max_steps" if cfg.epochs is None else "--epochs (and --max_steps, if given)"
            raise UserError(f"{done}; a larger {larger} continues it")
        print(done)
        return {}
    if not rt.all_equal(start.step):
        raise UserError(f"the processes do not see the same checkpoints in {out_dir}")

    # do it
    state = make_state(start, dataset.tokenizer, plan, rt)
    log = RunLog(out_dir)  # writes nothing; the main process replaces it
    if rt.is_main:
        if start.adapter and start.source and start.step == 0 and not folders.on_hub(cfg.init_from):
            adapters.keep_base(start.source, out_dir)
        now = describe_start(given, rt, start.step, dataset.fingerprint)
        history = (*history, now) if start.step else (now,)
        log = begin_run(out_dir, history, cfg.tracker, dataset.statistics)
    return run(cfg, state, plan, data, log, rt)


def run(
    cfg: TrainConfig, state: TrainState, plan: Plan, data: Data, log: RunLog, rt: Runtime
) -> Record:
    """The training loop: from state.step to plan.max_steps, or until a signal."""
    record: Record = {}
    if state.step == 0 and cfg.init_from != "scratch":  # the baseline for fine-tuning
        log.add({"step": 0, **evaluate(cfg, state, plan, data, rt)})
    clock = Clock(plan.max_steps - state.step)
    with runtime.stop_signals() as stop:
        coming = data.batches.ahead(range(state.step, plan.max_steps), rt)
        while state.step < plan.max_steps:
            # the step
            clock.start()
            rt.seed_step(cfg.seed, state.step)
            lr = plan.learning_rate.at(state.step)
            loss, norm = optimizer_step(state, next(coming), lr, plan, rt)
            clock.stop()
            state.count(math.isfinite(loss + norm))
            step = state.step
            stopping = rt.any(bool(stop))  # read once per step: a signal may arrive at any time
            if state.skipped_in_a_row:
                report_skipped(state, loss, norm)

            # the metrics
            evaluating = plan.evaluation.due(step)
            if evaluating or plan.logging.due(step):
                record = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm}
                record |= throughput(state, plan, clock.read(), rt)
                print(console_line(record, plan.max_steps))
                if evaluating:
                    record |= evaluate(cfg, state, plan, data, rt)
                log.add(record)

            # periodic work: a sample, unless the model is broken, and a checkpoint
            sound = not state.skipped_in_a_row
            if evaluating:
                sound = sound and math.isfinite(record["val_loss"])
            if sound and plan.sampling.due(step):
                print_sample(state.model, state.tokenizer, cfg.seed, rt)
            if stopping or plan.saving.due(step):
                losses = {"loss": loss, "val_loss": record["val_loss"] if evaluating else None}
                save(cfg, state, losses, data, rt)
            if stopping:
                again = f"python train.py --init_from=resume --out_dir={cfg.out_dir}"
                name = stop[0] if stop else "a signal"
                print(f"stopped by {name}; {again} continues from step {step}")
                break
    log.finish()
    return record


# --- before the first step


def check_settings(cfg: TrainConfig) -> None:
    problems = []
    if cfg.min_lr > cfg.learning_rate:
        problems.append(f"min_lr={cfg.min_lr} is above learning_rate={cfg.learning_rate}")
    if cfg.lora_rank and not cfg.lora_targets:
        problems.append("lora_targets is empty")
    if cfg.lora_rank and cfg.init_from == "scratch":
        problems.append("lora_rank needs init_from: adapters are added to an existing model")
    if cfg.overwrite and runtime.restartable():
        problems.append(f"--overwrite does not combine with --max-restarts: remove {cfg.out_dir}")
    configurator.validate(cfg, problems)


def settings_so_far(cfg: TrainConfig) -> dict[str, Any]:
    """With --init_from=resume, the settings of that run, as defaults for this one."""
    if cfg.init_from != "resume":
        return {}
    state = folders.read_state(folders.find(cfg.out_dir))
    settings = saved_settings(state, asdict(TrainConfig()))
    own = {"init_from", "out_dir", "overwrite", "plan"}
    return {name: value for name, value in settings.items() if name not in own}


def make_plan(
    cfg: TrainConfig, start: Start, batches: Batches | None, micro: int, rt: Runtime
) -> Plan:
    """The run that the settings ask for, with every None resolved."""
    config = start.model.config
    steps = [cfg.max_steps] if cfg.max_steps else []
    if cfg.epochs is not None and batches:
        steps.append(max(1, math.ceil(cfg.epochs * batches.windows / cfg.batch_size)))
    max_steps = min(steps, default=1500)
    tokens = max_steps * cfg.batch_size * config.block_size
    evaluation = Every(cfg.eval_interval, last=max_steps)
    return Plan(
        config=config,
        sizes=sizes_of(start.model),
        lora=start.adapter.config if start.adapter else None,
        device=rt.device,
        dtype=rt.dtype,
        world_size=rt.world_size,
        fsdp=cfg.fsdp,
        activation_checkpointing=cfg.activation_checkpointing,
        compile=cfg.compile,
        batch_size=cfg.batch_size,
        micro_batch_size=micro,
        optimizer=OptimizerConfig(
            cfg.optimizer,
            weight_decay=cfg.weight_decay,
            betas=(cfg.beta1, cfg.beta2),
            momentum=cfg.momentum,
            embedding_lr_scale=cfg.embedding_lr_scale,
        ),
        grad_clip=cfg.grad_clip or math.inf,
        max_steps=max_steps,
        epochs=tokens / (batches.windows * batches.stride) if batches else 0.0,
        learning_rate=LearningRate(
            max_steps,
            peak=cfg.learning_rate,
            min_lr=cfg.min_lr,
            warmup_steps=cfg.warmup_steps,
            schedule=cfg.schedule,
            decay_fraction=cfg.decay_fraction,
        ),
        evaluation=evaluation,
        sampling=evaluation if cfg.sample_interval is None else Every(cfg.sample_interval),
        saving=Every(cfg.save_interval or cfg.eval_interval, last=max_steps),
        logging=Every(cfg.log_interval),
    )


# --- the step, and periodic work


def optimizer_step(
    state: TrainState, batch: Batch, lr: float, plan: Plan, rt: Runtime
) -> tuple[float, float]:
    """Accumulate the gradient of a batch and update once; return the loss and the gradient's norm.

    The loss is the mean over all targets of all processes whose mask is 1. A step whose loss or
    gradient is not finite changes nothing.
    """
    x, y, mask = batch  # this process's
    counted = x.numel() * rt.world_size if mask is None else rt.sum(mask.sum()).clamp(min=1)
    loss = torch.zeros((), device=rt.device)
    for first in range(0, len(x), plan.micro_batch_size):
        part = slice(first, first + plan.micro_batch_size)
        part_mask = None if mask is None else mask[part]
        share = (x[part].numel() if part_mask is None else part_mask.sum()) / counted
        parallel.share_gradients(state.step_model, part.stop == len(x))
        with rt.autocast():
            micro_loss = state.step_model(x[part], y[part], part_mask) * share
        # DDP and FSDP average gradients over the processes; the sum is wanted here.
        state.scaler.scale(micro_loss * rt.world_size).backward()
        loss += micro_loss.detach()
    mean_loss = rt.sum(loss).item()

    for each in state.optimizers:
        state.scaler.unscale_(each)  # type: ignore[arg-type]
    parameters = [parameter for each in state.optimizers for parameter in each.parameters()]
    total_norm = torch.nn.utils.clip_grad_norm_(parameters, plan.grad_clip)
    norm = parallel.full_tensor(total_norm).item()
    usable = math.isfinite(mean_loss + norm)
    optim.set_learning_rate(state.optimizers, lr)
    for each in state.optimizers:
        if usable:
            state.scaler.step(each)  # type: ignore[arg-type]
        each.zero_grad()
    state.scaler.update()
    return mean_loss, norm


def report_skipped(state: TrainState, loss: float, norm: float) -> None:
    """Raises UserError if too many steps in a row were skipped."""
    print(f"step {state.step}: skipped: its loss ({loss}) or gradient ({norm}) is not finite")
    if state.skipped_in_a_row == MAX_BAD_STEPS:
        raise UserError(
            f"{MAX_BAD_STEPS} steps in a row were not finite: lower --learning_rate, raise "
            "--warmup_steps or try --dtype=float32, and continue with --init_from=resume"
        )


def evaluate(cfg: TrainConfig, state: TrainState, plan: Plan, data: Data, rt: Runtime) -> Record:
    """Print and return the validation loss: `val_loss` and, if known, `val_bpb`."""
    micro, split = plan.micro_batch_size, data.held_out
    loss, _ = validation_loss(state.model, split, cfg.eval_tokens, micro, rt)
    measured = {"val_loss": loss}
    text = f"step {state.step}: validation loss {loss:.4f} nats per token"
    if bytes_per_token := data.dataset.bytes_per_token(split):
        measured["val_bpb"] = bits_per_byte(loss, bytes_per_token)
        text += f", {measured['val_bpb']:.4f} bits per byte"
    print(text)
    return measured


def save(cfg: TrainConfig, state: TrainState, losses: Record, data: Data, rt: Runtime) -> None:
    about = {
        **{name: finite(loss) for name, loss in losses.items()},
        "data": data.dataset.fingerprint,
        "versions": runtime.versions(),
        "settings": asdict(cfg),
    }
    write_checkpoint(state, Path(cfg.out_dir), about, rt)
    if rt.is_main:
        folders.prune(Path(cfg.out_dir), cfg.keep_checkpoints)


def main(argv: list[str] | None = None) -> int:
    quiet = (
        os.environ.get("RANK", "0") != "0"
    )  # only the main process prints, but all report errors
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere if quiet else sys.stdout),
    ):
        status = configurator.command(TrainConfig, train, argv, settings_so_far)
    if status == 0:  # after an error the other processes may be gone already
        runtime.leave()
    return status


if __name__ == "__main__":
    sys.exit(main())
