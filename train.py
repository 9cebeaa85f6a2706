"""
Train a GPT-2 on the shards that prepare.py made.

    python train.py                                            # laptop: the defaults
    python train.py config/shakespeare_cpu.py --max_steps=100  # a config file, then overrides
    python train.py config/gpt2_124m.py --plan                 # print the plan, and stop
    python train.py config/gpt2_124m.py --plan_for=8xH100      # the same for other devices
    python train.py --init_from=resume                         # continue from the newest checkpoint
    python train.py config/finetune_instruct.py --lora_rank=16 --learning_rate=5e-4  # adapters
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py

Ctrl-C and SIGTERM finish the step, save and exit with status 0. The number of processes changes
the losses by rounding only, unless there is dropout, which each process draws for itself.
"""

import contextlib
import math
import os
import shlex
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
    NonEmpty,
    NonNegativeFloat,
    NonNegativeInt,
    PathName,
    PositiveFloat,
    PositiveInt,
    UserError,
)
from plaingpt import environment
from plaingpt.training.schedule import ScheduleName


@dataclass(frozen=True)
class TrainConfig:
    # data and folders
    data_dir: Folder = "data/stdlib"  # what prepare.py wrote
    out_dir: Folder = "out/stdlib"  # checkpoints, metrics.jsonl and loss.png go here
    overwrite: bool = False  # start over in an out_dir that already has checkpoints
    init_from: PathName = "scratch"  # scratch, resume, gpt2…gpt2-xl, hf:OWNER/NAME, a folder
    resume: bool = False  # with init_from=FOLDER: continue its run exactly, from its step
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
    max_steps: PositiveInt | None = None  # optimizer steps; None: 1750, or what epochs asks for
    epochs: PositiveFloat | None = None  # passes over the data, if max_steps is not reached before
    optimizer: Literal["muon", "adamw"] = "muon"  # muon (with AdamW on embeddings) or adamw
    learning_rate: PositiveFloat | None = None  # peak; None: follows from optimizer and n_embd
    min_lr: NonNegativeFloat = 0.0  # at the last step
    warmup_steps: NonNegativeInt = 0  # steps of linear warm-up
    schedule: ScheduleName = "wsd"  # cosine, or wsd: constant, then down to min_lr
    decay_fraction: Fraction = 0.5  # share of the steps over which wsd decays
    weight_decay: NonNegativeFloat = 0.0  # for matrices and embeddings
    embedding_lr_scale: PositiveFloat = 1.5  # with muon: AdamW's multiple of learning_rate
    momentum: FractionBelow1 = 0.9  # Muon's momentum
    beta1: FractionBelow1 = 0.9  # AdamW's beta1
    beta2: FractionBelow1 = 0.99  # AdamW's beta2; 0.95 is common for batches of many tokens
    grad_clip: NonNegativeFloat = 1.0  # largest norm of the gradient; 0: no limit
    stride: PositiveInt | None = None  # tokens between the starts of windows; None: block_size
    # watching
    eval_interval: PositiveInt = 500  # steps between evaluations
    eval_tokens: PositiveInt | None = None  # validation tokens per evaluation; None: all
    patience: PositiveInt | None = None  # evaluations without a better loss that end the run
    tasks: tuple[PathName, ...] = ()  # of tools.eval, to measure too: hellaswag, mine.jsonl, …
    task_dir: Folder | None = None  # with the items of hellaswag, …; None: the hub
    task_limit: PositiveInt | None = 200  # items of each task; None: all
    task_interval: PositiveInt | None = None  # steps between measurements; None: at evaluations
    sample_interval: NonNegativeInt | None = None  # steps; None: at evaluations, 0: never
    sample_prompts: PathName | None = None  # a file of prompts; None: held-out questions, if any
    log_interval: PositiveInt = 25  # steps between console lines
    save_interval: PositiveInt | None = None  # steps between checkpoints; None: at evaluations
    keep_checkpoints: PositiveInt = 3  # how many of the newest to keep, besides the best
    tracker: Literal["wandb", "trackio"] | None = None  # where else to send the metrics
    plan: bool = False  # print the plan and how long it takes here, and stop
    plan_for: NonEmpty | None = None  # the same for known GPUs, such as 8xH100
    # the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: DType = "auto"  # of matrix products; auto: bfloat16 where the hardware has it
    compile: bool | Literal["auto"] = "auto"  # torch.compile; auto: on GPUs, if it works
    fsdp: bool = False  # shard weights and optimizer, for models too large for one GPU
    activation_checkpointing: bool = False  # less memory: recompute blocks in the backward pass
    seed: NonNegativeInt = 1337  # for initial weights, data order and dropout


if __name__ == "__main__":
    configurator.answer_help(TrainConfig)  # before torch is imported, which takes a second
    environment.wait_briefly()

import torch

from plaingpt import runtime
from plaingpt.checkpoint import adapters, folders
from plaingpt.runtime import Runtime
from plaingpt.text.dataset import open_dataset
from plaingpt.text.recipe import command_for
from plaingpt.training import optim, parallel, tasks
from plaingpt.training.batches import Batch
from plaingpt.training.data import Data, open_data
from plaingpt.training.devices import Device, device_of, planned_devices
from plaingpt.training.held_out import evaluate
from plaingpt.training.log import Clock, Record, console_line, finite, throughput
from plaingpt.training.memory import check_fits
from plaingpt.training.plan import Plan, make_plan, micro_batch_size
from plaingpt.training.run_folder import begin_run, check_out_dir, claimed, describe_start
from plaingpt.training.samples import print_samples
from plaingpt.training.saving import Saver
from plaingpt.training.sentences import sentences, time_sentence, without_better
from plaingpt.training.start import (
    SHAPE,
    load_weights,
    open_start,
    resumed_folder,
    resumes,
    saved_settings,
    shape_of,
)
from plaingpt.training.state import TrainState, make_state, snapshot_of
from plaingpt.training.timing import nominal_seconds, step_seconds

MAX_BAD_STEPS = 20  # consecutive non-finite steps before the run gives up


def train(cfg: TrainConfig) -> Record:
    """Run a training, or only --plan it; return the last metrics record, {} after --plan.

    Raises UserError, before the first step, for settings, data or checkpoints that do not fit and
    for an out_dir that another training uses, and later if the gradient stays non-finite; OSError
    if a checkpoint cannot be written.
    """
    check_settings(cfg)
    with runtime.stop_signals() as stop:
        if cfg.plan_for:
            rt, device = planned_devices(cfg.plan_for, cfg.dtype)
            return begin(replace(cfg, plan=True), rt, device)
        rt = runtime.start(cfg.device, cfg.dtype, stop)
        with contextlib.nullcontext() if cfg.plan else claimed(Path(cfg.out_dir), rt):
            return begin(cfg, rt, device_of(rt.device))


def begin(cfg: TrainConfig, rt: Runtime, device: Device) -> Record:
    """Everything before the first step, then `run`; with --plan, only the plan."""
    if cfg.fsdp and rt.dtype == torch.float16:
        raise UserError("--fsdp does not combine with float16: use --dtype=bfloat16 or float32")
    micro = micro_batch_size(cfg.batch_size, cfg.micro_batch_size, rt.world_size)
    given = asdict(cfg)
    cfg, same_run = restarted(cfg, given)
    if resumes(asdict(cfg)) and cfg.learning_rate is None:  # it keeps the one that it chose
        cfg = replace(cfg, learning_rate=settings_so_far(cfg)["learning_rate"])

    # what the run starts from: fresh weights, a checkpoint, or its own newest one
    out_dir, dataset = Path(cfg.out_dir), None
    if cfg.plan and not Path(cfg.data_dir).exists():
        print(f"{cfg.data_dir} does not exist yet; {command_for(Path(cfg.data_dir))} makes it.")
        if cfg.epochs and not cfg.max_steps:
            print("Until then --epochs cannot be converted into steps; 1,750 are assumed.")
    else:
        dataset = open_dataset(cfg.data_dir)
    start = open_start(asdict(cfg), asdict(TrainConfig()), dataset)
    check_out_dir(out_dir, start.step)

    # what it will do
    length = start.model.config.block_size
    data = open_data(dataset, asdict(cfg), length) if dataset else None
    plan = make_plan(asdict(cfg), start, data, micro, rt, device)
    print("\n".join(sentences(plan)))
    if not dataset or not data or cfg.plan:
        here = None if cfg.plan_for else step_seconds(start, plan, rt, optimizer_step)
        print(time_sentence(plan, *(here or nominal_seconds(plan))))
        return {}
    if plan.finished(start.step, plan.waited):
        done = f"has finished: step {start.step:,} of max_steps={plan.max_steps:,}"
        larger = "--max_steps" if not cfg.epochs else "--epochs (and --max_steps, if given)"
        if start.step < plan.max_steps:
            done, larger = f"{done}, after {without_better(plan.waited)}", "--patience"
        if not same_run:
            raise UserError(f"{start.source} {done}; a larger {larger} continues it")
        print(out_dir, done)
        return {}
    if not rt.all_equal(start.step):
        raise UserError(f"the processes do not see the same checkpoints in {out_dir}")
    check_fits(plan)

    # do it
    data.try_reading(start.step)
    start = load_weights(start, asdict(cfg))
    shape = shape_of(start, asdict(cfg), dataset.tokenizer.vocab_size)
    cfg = replace(cfg, learning_rate=plan.learning_rate.peak, **shape)
    state = make_state(start, dataset.tokenizer, plan, rt)
    log, stopping = None, rt.stopping()
    if rt.is_main and not stopping:  # once it begins, --overwrite removes the old checkpoints
        if start.base:
            adapters.keep_base(start.base, out_dir)
        now = describe_start(given, rt, start.step, dataset.fingerprint)
        log = begin_run(out_dir, now, start.source, cfg.tracker, dataset.statistics)
    with Saver(log, cfg.keep_checkpoints, rt) as saver:
        return run(cfg, state, plan, data, saver, rt)


def run(
    cfg: TrainConfig, state: TrainState, plan: Plan, data: Data, saver: Saver, rt: Runtime
) -> Record:
    """The training loop: from state.step to the end of the plan, or until a signal."""
    record: Record = {}
    log = saver.log  # None in all but the main process
    if state.step == 0 and cfg.init_from != "scratch":  # the baseline for fine-tuning
        record = {"step": 0, **evaluate(state, plan, data, rt)}
        if log and "val_loss" in record:
            log.add(record)
    clock = Clock(plan.max_steps - state.step)
    coming = data.batches.ahead(range(state.step, plan.max_steps), rt)
    stopping, finished = rt.stopping(), False
    while not (finished or stopping):
        # the step
        clock.start()
        rt.seed_step(cfg.seed, state.step)
        lr = plan.learning_rate.at(state.step)
        loss, norm, stopping = optimizer_step(state, next(coming), lr, plan, rt)
        clock.stop()
        state.count(loss, math.isfinite(loss + norm))
        step = state.step
        if state.skipped_in_a_row:
            report_skipped(cfg, state, loss, norm)

        # the metrics
        evaluating = plan.evaluation.due(step)
        if evaluating or plan.measuring.due(step) or plan.logging.due(step):
            record = {"step": step, "loss": state.read_loss(), "lr": lr, "grad_norm": norm}
            record |= throughput(state, plan, clock.read(), rt)
            print(console_line(record, plan.max_steps))
            record |= evaluate(state, plan, data, rt)
            if log:
                log.add(record)

        # periodic work: samples, unless the model is broken, and a checkpoint
        sound = not state.skipped_in_a_row
        if evaluating:
            sound = sound and math.isfinite(record["val_loss"])
        if sound and plan.sampling.due(step):
            samples = print_samples(state.model, state.tokenizer, data.prompts, cfg.seed, step, rt)
            if log:
                log.add_samples(samples)
        finished = plan.finished(step, state.progress.waited)
        if finished or stopping or plan.saving.due(step):
            losses = {"loss": loss, "val_loss": record["val_loss"] if evaluating else None}
            save(cfg, state, losses, data, saver, rt)
    saver.wait()
    if finished and state.step < plan.max_steps:
        print(f"step {state.step}: ending early after {without_better(state.progress.waited)}")
    elif stopping:
        name = rt.stop[0] if rt.stop else "a signal"
        print(f"stopped by {name}; {how_to_resume(cfg.out_dir)}")
    if log:
        log.finish()
    return record


# --- before the first step


def check_settings(cfg: TrainConfig) -> None:
    problems = [*tasks.problems_of(cfg.tasks)]
    if cfg.lora_rank and not cfg.lora_targets:
        problems.append("lora_targets is empty")
    if cfg.lora_rank and cfg.init_from == "scratch":
        problems.append("lora_rank needs init_from: adapters are added to an existing model")
    if cfg.resume and cfg.init_from == "scratch":
        problems.append(
            "resume needs the checkpoint to continue from, as init_from=out/run/step_000500; "
            "--init_from=resume continues the newest in out_dir"
        )
    if resumes(asdict(cfg)) and cfg.overwrite:
        problems.append("resuming deletes nothing, so it does not combine with overwrite")
    if Path(cfg.init_from).is_file():
        problems.append(f"init_from={cfg.init_from} is a file, not a folder")
    if cfg.overwrite and environment.restartable():
        problems.append(f"--overwrite does not combine with --max-restarts: remove {cfg.out_dir}")
    configurator.validate(cfg, problems)


def settings_so_far(cfg: TrainConfig) -> dict[str, Any]:
    """The settings of the run to resume, as defaults for this one; {} for a new run."""
    if not resumes(asdict(cfg)):
        return {}
    folder = resumed_folder(asdict(cfg))
    settings = saved_settings(folders.read_state(folder), asdict(TrainConfig()))
    own = {"init_from", "resume", "overwrite", "plan", "plan_for"}
    if (folder.parent / "run.json").exists():  # not that of a copy outside its run folder
        settings |= {"out_dir": str(folder.parent)}
    elif cfg.out_dir == TrainConfig.out_dir and cfg.init_from != "resume":
        raise UserError(f"{folder} is not in a run folder: choose an --out_dir")
    return {name: value for name, value in settings.items() if name not in own}


def restarted(cfg: TrainConfig, given: dict[str, Any]) -> tuple[TrainConfig, bool]:
    """Under --max-restarts, whether out_dir holds this very run; the settings then resume it."""
    history = folders.read_starts(Path(cfg.out_dir)) if environment.restartable() else ()
    same_run = bool(history) and history[-1].settings == given
    if same_run and folders.step_folders(cfg.out_dir):
        print(f"{cfg.out_dir} already holds this run: resuming it")
        cfg = replace(cfg, init_from="resume", resume=False)
        saved = settings_so_far(cfg)  # a run that began with a checkpoint was never given its shape
        cfg = replace(cfg, **{name: saved[name] for name in (*SHAPE, "vocab_multiple")})
    return cfg, same_run


# --- the step, and periodic work


def optimizer_step(
    state: TrainState, batch: Batch, lr: float, plan: Plan, rt: Runtime
) -> tuple[float, float, bool]:
    """Accumulate the gradient of a batch and update once; return the loss, the gradient's norm, and
    whether any process has been asked to stop.

    The loss is the mean over all targets of all processes whose mask is 1. A step whose loss or
    gradient is not finite changes nothing. The device decides that, so a GPU never idles while the
    host reads a number: the figures are read together, after everything is queued.
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
    mean_loss, stops = rt.sum(torch.stack((loss, loss.new_full((), len(rt.stop)))))

    for each in state.optimizers:
        state.scaler.unscale_(each)  # type: ignore[arg-type]
    parameters = [parameter for each in state.optimizers for parameter in each.parameters()]
    norm = parallel.full_tensor(torch.nn.utils.clip_grad_norm_(parameters, plan.grad_clip))
    optim.set_learning_rate(state.optimizers, lr)
    usable = (mean_loss + norm).isfinite()
    for each in state.optimizers:
        each.step(usable)
        each.zero_grad()
    state.scaler.update()
    mean_loss, norm, stops = torch.stack((mean_loss, norm, stops)).tolist()
    return mean_loss, norm, stops > 0 or (rt.world_size == 1 and bool(rt.stop))


def report_skipped(cfg: TrainConfig, state: TrainState, loss: float, norm: float) -> None:
    """Print that a step was skipped. Raises UserError after too many in a row."""
    print(f"step {state.step}: skipped: its loss ({loss}) or gradient ({norm}) is not finite")
    if state.skipped_in_a_row == MAX_BAD_STEPS:
        raise UserError(
            f"{MAX_BAD_STEPS} steps in a row were not finite: lower --learning_rate, raise "
            f"--warmup_steps or try --dtype=float32; {how_to_resume(cfg.out_dir)}"
        )


def how_to_resume(out_dir: str) -> str:
    saved = folders.step_folders(out_dir)
    if not saved:
        return "nothing has been saved"
    step = int(saved[-1].name.removeprefix("step_"))
    where = shlex.quote(out_dir)
    return f"python train.py --init_from=resume --out_dir={where} continues from step {step}"


def save(
    cfg: TrainConfig, state: TrainState, losses: Record, data: Data, saver: Saver, rt: Runtime
) -> None:
    about = {
        **{name: finite(loss) for name, loss in losses.items()},
        "data": data.dataset.fingerprint,
        "versions": runtime.versions(),
        "settings": asdict(cfg),
    }
    saver.wait()  # memory may not hold two snapshots
    snapshot = snapshot_of(state, about, rt)
    if snapshot:
        # a checkpoint before the trouble may still be needed
        saver.save(snapshot, prune=not state.skipped_in_a_row)


def main(argv: list[str] | None = None) -> int:
    quiet = os.environ.get("RANK", "0") != "0"  # only the main process prints; all report errors
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
