"""
Train a GPT-2 on the shards that prepare.py made.

    python train.py                                            # laptop: the defaults
    python train.py config/shakespeare_cpu.py --max_steps=100  # a config file, then overrides
    python train.py config/gpt2_124m.py --plan                 # say what would happen, and stop
    python train.py --init_from=resume                         # go on from the newest checkpoint
    python train.py config/finetune_instruct.py --lora_rank=16  # train adapters, not the weights
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py

Ctrl-C and SIGTERM finish the step, save and end with exit status 0. The number of processes changes
the losses by rounding only.
"""

import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import configurator
from configurator import DType, UserError
from model import GPT, GPTConfig
from plaingpt import files, lora, runtime
from plaingpt.checkpoint import adapters, folders, store
from plaingpt.text import dataset
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training import evaluation, optim, parallel, plan
from plaingpt.training import log as metrics
from plaingpt.training import schedule as schedules
from plaingpt.training.batches import Batch, Batches, check_length

SAMPLE_TOKENS = 100  # of the sample at an evaluation
SHAPE = ("n_layer", "n_head", "n_embd", "bias", "tie_weights")  # what init_from=FOLDER decides
MAX_BAD_STEPS = 20  # steps in a row without a finite gradient that end a run


@dataclass(frozen=True)
class TrainConfig:
    # data and folders
    data_dir: str = "data/stdlib"  # what prepare.py wrote
    out_dir: str = "out/stdlib"  # checkpoints, metrics.jsonl and loss.png go here
    overwrite: bool = False  # start over in an out_dir that already has checkpoints
    init_from: str = "scratch"  # scratch, resume, gpt2…gpt2-xl, hf:OWNER/NAME, a checkpoint folder
    # the model; init_from=FOLDER takes its shape from there
    n_layer: int = 3  # blocks
    n_head: int = 2  # attention heads in a block
    n_embd: int = 128  # width, a multiple of n_head
    block_size: int | None = None  # context length in tokens; None: the folder's, or 256
    dropout: float = 0.0  # share of activations zeroed in training
    bias: bool = True  # biases in linear layers and LayerNorms
    tie_weights: bool = True  # one matrix for token embedding and head
    vocab_multiple: int = 1  # round the vocabulary up to a multiple; 64 is faster on GPUs
    # LoRA: a checkpoint's weights stay as they are, an adapter beside them trains
    lora_rank: int = 0  # of the adapters; 0: none, all weights train
    lora_alpha: float = 16.0  # they count lora_alpha / lora_rank times
    lora_dropout: float = 0.0  # share of their inputs zeroed in training
    lora_targets: tuple[str, ...] = ("c_attn", "c_proj", "c_fc")  # ends of linear layers' names
    # the optimizer
    batch_size: int = 8  # sequences in a step, over all processes
    micro_batch_size: int | None = None  # sequences a device takes at once; None: its whole share
    max_steps: int | None = None  # optimizer steps; None: 1500, or as many as epochs takes
    epochs: float | None = None  # passes over the data; of both, what ends first
    optimizer: optim.OptimizerName = "muon"  # muon (with AdamW on embeddings) or adamw
    learning_rate: float = 0.01  # peak
    min_lr: float = 0.0  # at the last step
    warmup_steps: int = 0  # steps up to the peak
    schedule: schedules.Schedule = "wsd"  # cosine, or wsd: constant, then down to min_lr
    decay_fraction: float = 0.5  # share of the steps that wsd spends going down
    weight_decay: float = 0.0  # of matrices and embeddings
    embedding_lr_scale: float = 1.5  # with muon: of learning_rate, for what AdamW trains
    momentum: float = 0.9  # Muon's
    beta1: float = 0.9  # AdamW's
    beta2: float = 0.95  # AdamW's
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no limit
    stride: int | None = None  # tokens between the starts of windows; None: block_size
    # watching
    eval_interval: int = 500  # steps between evaluations
    eval_tokens: int | None = None  # validation tokens in an evaluation; None: all
    sample_interval: int | None = None  # steps between samples; None: at evaluations, 0: never
    log_interval: int = 25  # steps between lines
    save_interval: int | None = None  # steps between checkpoints; None: at evaluations
    keep_checkpoints: int = 3  # newest to keep, and the best
    tracker: Literal["wandb", "trackio"] | None = None  # where else the metrics go
    plan: bool = False  # print what would be done, and stop
    # the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: DType = "auto"  # of matrix products; auto: bfloat16 where the hardware has it
    compile: bool | Literal["auto"] = "auto"  # torch.compile; auto: on GPUs, where it works
    fsdp: bool = False  # shard weights and optimizer over the processes, for what outgrows a GPU
    activation_checkpointing: bool = False  # less memory: blocks are computed again in backward
    seed: int = 1337  # of the weights, the order of the data and the dropout


def train(cfg: TrainConfig) -> metrics.Record:
    """Run (or only --plan) a training; return the last metrics record, {} after --plan.

    Raises UserError for settings, data or checkpoints that do not fit, before the first step,
    and when the gradient stays non-finite; OSError where a checkpoint could not be written.
    """
    check_settings(cfg)
    rt = runtime.start(cfg.device, cfg.dtype)
    micro = plan.micro_batch_size(cfg, rt)
    if cfg.plan and cfg.init_from == "scratch" and not Path(cfg.data_dir).is_dir():
        print(f"{cfg.data_dir} is not there yet; taking GPT-2's vocabulary of 50,257 ids.")
        with torch.device("meta"):
            model = GPT(model_config(cfg, 50257))
        max_steps = steps_to_do(cfg, None)
        print("\n".join(plan.sentences(cfg, rt, model, None, max_steps)))
        return {}

    # data, model, optimizer
    out_dir, given = Path(cfg.out_dir), json.loads(json.dumps(asdict(cfg)))
    earlier = folders.read_starts(out_dir)
    restarted = rt.restartable and earlier != [] and earlier[-1]["settings"] == given
    if rt.restartable and cfg.overwrite:
        raise UserError(f"--overwrite does not combine with --max-restarts: remove {out_dir} first")
    if restarted and folders.steps(out_dir):
        print(f"{out_dir} is this run, begun before: going on with it")
        cfg = replace(cfg, init_from="resume")
        cfg = replace(cfg, **settings_so_far(cfg))
    data = dataset.open_dataset(cfg.data_dir)
    fingerprint, tokenizer = data.fingerprint, data.tokenizer
    model, folder, adapter, state, saved = build_model(cfg, tokenizer, fingerprint)
    cfg = with_shape(cfg, model.config, tokenizer)
    start, skipped = state.get("step", 0), state.get("skipped", 0)
    block_size = model.config.block_size
    split = data.split("train")
    batches = Batches(split, cfg.batch_size, block_size, cfg.seed, cfg.stride or block_size)
    val_split = data.split("val")
    check_length(val_split, block_size)
    max_steps = steps_to_do(cfg, batches)
    print("\n".join(plan.sentences(cfg, rt, model, batches, max_steps)))
    if cfg.plan:
        return {}
    if start >= max_steps:
        it_is_done = f"{out_dir} is at step {start:,}, max_steps={max_steps:,}: it is done"
        if not restarted:
            larger = "--max_steps" if cfg.epochs is None else "--epochs (and --max_steps, if given)"
            raise UserError(f"{it_is_done}; a larger {larger} goes on")
        print(it_is_done)
        return {}
    if rt.any(rt.sum(torch.tensor(float(start))).item() != start * rt.world_size):
        raise UserError(f"the processes do not see the same checkpoints in {out_dir}")
    model.transformer.recompute = cfg.activation_checkpointing
    if cfg.fsdp and rt.world_size > 1:
        parallel.shard(model, rt)
    else:
        model.to(rt.device)
    optimizers = optim.build_optimizers(
        model,
        cfg.optimizer,
        weight_decay=cfg.weight_decay,
        betas=(cfg.beta1, cfg.beta2),
        momentum=cfg.momentum,
        embedding_lr_scale=cfg.embedding_lr_scale,
    )
    scaler = torch.amp.GradScaler(rt.device.type, enabled=rt.dtype == torch.float16)
    if saved:
        optim.load_optimizer_state(model, optimizers, saved["parameters"])
        if saved["scaler"]:  # {} of a run in another dtype
            scaler.load_state_dict(saved["scaler"])
        saved = {}  # as large as the model, twice
    step_model = maybe_compiled(model, cfg, micro, rt)
    if rt.world_size > 1 and not cfg.fsdp:
        step_model = parallel.average_gradients(step_model, rt)

    log, tracker = None, None
    if rt.is_main:
        this_start = describe_start(given, rt, start, fingerprint)
        if adapter and start == 0 and not folders.on_hub(cfg.init_from):
            adapters.keep_base(folder, out_dir)
        log, tracker = begin_run(cfg, [*earlier, this_start] if start else [this_start])
    bytes_per_token = data.bytes_per_token(val_split)
    tokens_per_step = cfg.batch_size * block_size
    peak_flops = metrics.peak_flops(rt.device)
    flops_per_token = model.config.flops_per_token(frozen=adapter is not None)
    record: metrics.Record = {}
    bad_steps = timed_steps = 0
    seconds = 0.0

    def validation(step: int) -> metrics.Record:
        loss, _ = evaluation.validation_loss(model, val_split, cfg.eval_tokens, micro, rt)
        found = {"val_loss": loss}
        text = f"step {step}: validation loss {loss:.4f} nats per token"
        if bytes_per_token:
            found["val_bpb"] = evaluation.bits_per_byte(loss, bytes_per_token)
            text += f", {found['val_bpb']:.4f} bits per byte"
        print(text)
        return found

    if start == 0 and cfg.init_from != "scratch":  # what there is to improve
        before = {"step": 0, **validation(0)}
        if log:
            log.add(before)

    with runtime.stop_signals() as stop:
        coming = batches.ahead(range(start, max_steps), rt)
        for step in range(start, max_steps):
            began = time.perf_counter()
            rt.seed_step(cfg.seed, step)
            lr = learning_rate(step, max_steps, cfg)
            batch = next(coming)
            loss, norm = optimizer_step(
                model, step_model, batch, optimizers, scaler, lr, micro, cfg.grad_clip, rt
            )
            seconds += time.perf_counter() - began
            timed_steps += 1

            done = step + 1
            stopping = rt.any(bool(stop))  # asked once: a signal may come at any line
            last = stopping or done == max_steps
            bad_steps = 0 if math.isfinite(loss + norm) else bad_steps + 1
            skipped += bad_steps > 0
            if bad_steps:
                print(
                    f"step {done}: skipped, as its loss ({loss}) or gradient ({norm}) is not finite"
                )
            if bad_steps == MAX_BAD_STEPS:
                raise UserError(
                    f"{bad_steps} steps in a row were not finite: lower --learning_rate, raise "
                    "--warmup_steps or try --dtype=float32, and go on with --init_from=resume"
                )
            if done == start + 1:
                warm = time.perf_counter()
            if done == start + 6:
                left = (time.perf_counter() - warm) / 5 * (max_steps - done)
                print(f"Time: about {metrics.duration(left)} for the steps that are left.")
            evaluating = done == max_steps or done % cfg.eval_interval == 0
            if evaluating or done % cfg.log_interval == 0:
                dt = seconds / timed_steps
                record = {
                    "step": done,
                    "loss": loss,
                    "lr": lr,
                    "grad_norm": norm,
                    "skipped": skipped,
                    "tokens": done * tokens_per_step,
                    "tokens_per_s": tokens_per_step / dt,
                    "dt_ms": 1000 * dt,
                    "mfu": None,
                    "peak_mem_gib": runtime.peak_memory_gib(rt.device),
                }
                if peak_flops:
                    flops = flops_per_token * tokens_per_step
                    record["mfu"] = flops / dt / (peak_flops * rt.world_size)
                print(metrics.console_line(record, max_steps, (max_steps - done) * dt))
                seconds, timed_steps = 0.0, 0
            if evaluating:
                record |= validation(done)
            if log and record.get("step") == done:
                log.add(record)
                if evaluating:
                    metrics.plot(log.records, out_dir / "loss.png")
            if tracker and record.get("step") == done:
                tracker.log(record)
            sound = not (bad_steps or (evaluating and not math.isfinite(record["val_loss"])))
            if sound and due(done, cfg.sample_interval, evaluating):
                print_sample(model, tokenizer, cfg.seed, rt)
            if last or due(done, cfg.save_interval, evaluating):
                state = {
                    "step": done,
                    "world_size": rt.world_size,
                    "loss": metrics.finite(loss),
                    "val_loss": metrics.finite(record.get("val_loss")) if evaluating else None,
                    "skipped": skipped,
                    "data": fingerprint,
                    "versions": runtime.versions(),
                    "settings": asdict(cfg),
                }
                save(cfg, model, adapter, optimizers, scaler, tokenizer, state, rt)
            if stopping:
                name = stop[0] if stop else "a signal"
                again = f"python train.py --init_from=resume --out_dir={cfg.out_dir}"
                print(f"stopped by {name}; {again} goes on from step {done}")
                break
    if tracker:
        tracker.finish(folders.find(out_dir))
    return record


# --- before the first step


def settings_so_far(cfg: TrainConfig) -> dict[str, Any]:
    """The settings of the run that --init_from=resume goes on with, which hold unless others are
    given."""
    if cfg.init_from != "resume":
        return {}
    settings = saved_settings(folders.find(cfg.out_dir))
    own = {"init_from", "out_dir", "overwrite", "plan"}
    return {name: value for name, value in settings.items() if name not in own}


def saved_settings(folder: Path) -> dict[str, Any]:
    """What a checkpoint was trained with; the default of a setting that is newer than it."""
    defaults, saved = asdict(TrainConfig()), folders.read_state(folder)["settings"]
    known = defaults | {name: saved[name] for name in defaults.keys() & saved.keys()}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in known.items()}


def describe_start(
    settings: dict[str, Any], rt: runtime.Runtime, step: int, fingerprint: str
) -> dict[str, Any]:
    """What it takes to repeat a run, for run.json and the tracker."""
    return {
        "time": time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime()),
        "step": step,
        "command": shlex.join(sys.argv),
        "settings": settings,
        "data": fingerprint,
        "device": str(rt.device),
        "dtype": str(rt.dtype),
        "world_size": rt.world_size,
        "versions": runtime.versions(),
        "revision": runtime.revision(),
    }


def begin_run(
    cfg: TrainConfig, starts: list[dict[str, Any]]
) -> tuple[metrics.MetricsLog, metrics.Tracker | None]:
    """Make the run folder, with run.json; return what takes the records."""
    out_dir, start = Path(cfg.out_dir), starts[-1]
    out_dir.mkdir(parents=True, exist_ok=True)
    tracker = None
    if cfg.tracker:
        name = f"{out_dir.name}-{starts[0]['time']}"
        about = start | {"splits": dataset.open_dataset(cfg.data_dir).statistics}
        tracker = metrics.Tracker(cfg.tracker, name, out_dir, about)
    if start["step"] == 0:
        for folder in folders.steps(out_dir):  # only with --overwrite
            files.remove(folder)
    files.write_json(out_dir / "run.json", {"starts": starts})
    return metrics.MetricsLog(out_dir / "metrics.jsonl", start["step"] or -1), tracker


def check_settings(cfg: TrainConfig) -> None:
    """Raises UserError that lists all settings out of range."""
    problems = []
    counts = "batch_size micro_batch_size max_steps block_size stride vocab_multiple eval_interval"
    counts += " eval_tokens log_interval save_interval keep_checkpoints"
    not_negative = "min_lr warmup_steps weight_decay grad_clip seed sample_interval"
    for name, value in asdict(cfg).items():
        if value is None:
            continue
        if name in counts.split() and value < 1:
            problems.append(f"{name} must be at least 1, not {value}")
        if name in not_negative.split() and not 0 <= value < math.inf:
            problems.append(f"{name} must be a number from 0 on, not {value}")
        if name in ("learning_rate", "embedding_lr_scale", "epochs") and not 0 < value < math.inf:
            problems.append(f"{name} must be a number above 0, not {value}")
        if name in ("momentum", "beta1", "beta2") and not 0 <= value < 1:
            problems.append(f"{name} must be in [0, 1), not {value}")
    for name in ("data_dir", "out_dir"):
        if not getattr(cfg, name):
            problems.append(f"{name} is empty")
    if cfg.lora_rank:
        try:
            lora_config(cfg)
        except ValueError as error:
            problems.append(str(error))
        if cfg.init_from == "scratch":
            problems.append("lora_rank needs init_from: an adapter is for weights that are there")
    if cfg.seed >= 2**63:
        problems.append(f"seed must be below 2**63, not {cfg.seed}")
    if cfg.min_lr > cfg.learning_rate:
        problems.append(f"min_lr={cfg.min_lr} is above learning_rate={cfg.learning_rate}")
    if not 0 <= cfg.decay_fraction <= 1:
        problems.append(f"decay_fraction must be in [0, 1], not {cfg.decay_fraction}")
    if problems:
        raise UserError("; ".join(problems))


def steps_to_do(cfg: TrainConfig, batches: Batches | None) -> int:
    """Steps of the whole run: max_steps or epochs, whichever ends first."""
    steps = [cfg.max_steps] if cfg.max_steps else []
    if cfg.epochs is not None and batches:
        steps.append(max(1, math.ceil(cfg.epochs * batches.windows / cfg.batch_size)))
    return min(steps, default=1500)


def model_config(cfg: TrainConfig, vocab_size: int) -> GPTConfig:
    return GPTConfig(
        vocab_size=math.ceil(vocab_size / cfg.vocab_multiple) * cfg.vocab_multiple,
        block_size=cfg.block_size or 256,
        n_layer=cfg.n_layer,
        n_head=cfg.n_head,
        n_embd=cfg.n_embd,
        dropout=cfg.dropout,
        bias=cfg.bias,
        tie_weights=cfg.tie_weights,
    )


def lora_config(cfg: TrainConfig) -> lora.LoRAConfig:
    return lora.LoRAConfig(cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets)


def build_model(
    cfg: TrainConfig, tokenizer: Tokenizer, data_fingerprint: str
) -> tuple[GPT, Path, lora.Adapter | None, dict[str, Any], dict[str, Any]]:
    """The model on the CPU, the folder that it is from, with LoRA what its adapters are, and
    state.json and the optimizer file of a resumed run ({} otherwise).

    Raises UserError where a checkpoint is of another shape, tokenizer or data, or where a new
    run would bury one.
    """
    if cfg.init_from != "resume":
        buried = folders.steps(cfg.out_dir)
        if buried and not (cfg.overwrite or cfg.plan):
            raise UserError(
                f"{buried[-1]} exists: --init_from=resume goes on from it, --overwrite starts "
                "over, --out_dir=OTHER leaves it alone"
            )
    wanted = model_config(cfg, tokenizer.vocab_size)
    if cfg.init_from == "scratch" and cfg.plan:
        with torch.device("meta"):
            return GPT(wanted), Path(), None, {}, {}
    if cfg.init_from == "scratch":
        return GPT(wanted).init_weights(cfg.seed), Path(), None, {}, {}

    resuming = cfg.init_from == "resume"
    folder = folders.find(cfg.out_dir if resuming else cfg.init_from)
    settings = saved_settings(folder) if resuming else asdict(cfg)
    model, own_tokenizer = store.load(
        folder, block_size=settings["block_size"], dropout=cfg.dropout, merged=not resuming
    )
    if own_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{folder} has another tokenizer than {cfg.data_dir}")
    if not resuming:
        check_shape(cfg, model.config, folder)
        if cfg.overwrite and folder in folders.steps(cfg.out_dir):
            raise UserError(f"--overwrite would remove {folder}, which init_from starts from")
        if not cfg.lora_rank:
            return model, folder, None, {}, {}
        out_dir, config = Path(cfg.out_dir), lora_config(cfg)
        adapter = adapters.adapter_for(folder, cfg.init_from, out_dir, model, config)
        lora.add(model, config, cfg.seed)
        return model, folder, adapter, {}, {}

    state = folders.read_state(folder)
    here, there = asdict(wanted), asdict(model.config)
    if cfg.block_size is None:
        here["block_size"] = there["block_size"]
    # which window a sequence number means, and what an adapter is
    kept = ("seed", "batch_size", "stride", *(name for name in settings if "lora_" in name))
    for name in kept:
        here[name], there[name] = getattr(cfg, name), settings[name]
    other = [
        f"{name} is {there[name]}, not {here[name]}" for name in here if here[name] != there[name]
    ]
    if other:
        raise UserError(f"cannot resume {folder} with other settings: {'; '.join(other)}")
    if state["data"] != data_fingerprint:
        raise UserError(f"cannot resume {folder} on other data than it was trained on")
    resumed = None
    if cfg.lora_rank:
        resumed = replace(adapters.read_adapter(folder)[0], config=lora_config(cfg))
    return model, folder, resumed, state, store.read_optimizer(folder)


def check_shape(cfg: TrainConfig, shape: GPTConfig, folder: Path) -> None:
    """Raises UserError where the settings ask for another shape than the folder's."""
    defaults = TrainConfig()
    other = [
        f"{name}={getattr(cfg, name)}, where {folder} has {getattr(shape, name)}"
        for name in SHAPE
        if getattr(cfg, name) not in (getattr(defaults, name), getattr(shape, name))
    ]
    if other:
        raise UserError(f"init_from takes the shape from there: {'; '.join(other)}")


def with_shape(cfg: TrainConfig, shape: GPTConfig, tokenizer: Tokenizer) -> TrainConfig:
    """The settings with the shape that a model opened from a folder has, for those who resume."""
    cfg = replace(cfg, **{name: getattr(shape, name) for name in SHAPE})
    if model_config(cfg, tokenizer.vocab_size).vocab_size != shape.vocab_size:
        cfg = replace(cfg, vocab_multiple=shape.vocab_size)
    return cfg


def maybe_compiled(
    model: GPT, cfg: TrainConfig, micro: int, rt: runtime.Runtime
) -> Callable[..., Tensor]:
    """The model as the training step calls it: compiled on GPUs, or where --compile says so.

    Evaluation and sampling keep the plain module, whose shapes may vary. Raises UserError where
    --compile=true does not work; "auto" says so and goes on without.
    """
    if cfg.compile is False or (cfg.compile == "auto" and not worth_compiling(rt)):
        return model
    fast = torch.compile(model)
    shape = (micro, model.config.block_size)
    tokens = torch.zeros(shape, dtype=torch.long, device=rt.device)
    reason = ""
    try:
        with rt.autocast():
            fast(tokens, tokens).backward()
    except Exception as error:  # a missing compiler, an unsupported platform, …: many kinds
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
    model.zero_grad(set_to_none=True)
    if not rt.any(bool(reason)):
        return fast
    reason = reason or "in another process"
    if cfg.compile is True:
        raise UserError(f"--compile=true does not work here ({reason})")
    print(f"torch.compile does not work here ({reason}); going on without it")
    return model


def worth_compiling(rt: runtime.Runtime) -> bool:
    """On a CPU compiling takes longer than a small run lasts."""
    return rt.device.type == "cuda"


# --- the step, and what comes once in a while


def learning_rate(step: int, max_steps: int, cfg: TrainConfig) -> float:
    return schedules.learning_rate(
        step,
        max_steps=max_steps,
        peak=cfg.learning_rate,
        min_lr=cfg.min_lr,
        warmup_steps=cfg.warmup_steps,
        schedule=cfg.schedule,
        decay_fraction=cfg.decay_fraction,
    )


def optimizer_step(
    model: GPT,
    step_model: Callable[..., Tensor],
    batch: Batch,
    optimizers: list[optim.Optimizer],
    scaler: torch.amp.GradScaler,
    lr: float,
    micro: int,
    grad_clip: float,
    rt: runtime.Runtime,
) -> tuple[float, float]:
    """Accumulate the gradient of a batch and update once; return the loss and the gradient's norm.

    The loss is the mean over all targets of all processes whose mask is 1. A step whose loss or
    gradient is not finite changes nothing.
    """
    x, y, mask = batch  # this process's
    counted = x.numel() * rt.world_size if mask is None else rt.sum(mask.sum()).clamp(min=1)
    loss = torch.zeros((), device=rt.device)
    for first in range(0, len(x), micro):
        part = slice(first, first + micro)
        part_mask = None if mask is None else mask[part]
        share = (x[part].numel() if part_mask is None else part_mask.sum()) / counted
        parallel.share_gradients(step_model, first + micro == len(x))
        with rt.autocast():
            micro_loss = step_model(x[part], y[part], part_mask) * share
        scaler.scale(micro_loss * rt.world_size).backward()  # processes average their gradients
        loss += micro_loss.detach()
    loss = rt.sum(loss)

    for each in optimizers:
        scaler.unscale_(each)  # type: ignore[arg-type]
    parameters = [parameter for each in optimizers for parameter in each.parameters()]
    norm = parallel.whole(torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf))
    finite = math.isfinite(loss.item() + norm.item())
    optim.set_learning_rate(optimizers, lr)
    for each in optimizers:
        if finite:
            scaler.step(each)  # type: ignore[arg-type]
        each.zero_grad()
    scaler.update()
    return loss.item(), norm.item()


def save(
    cfg: TrainConfig,
    model: GPT,
    adapter: lora.Adapter | None,
    optimizers: list[optim.Optimizer],
    scaler: torch.amp.GradScaler,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    rt: runtime.Runtime,
) -> None:
    """Write a checkpoint, from all processes: each may have a part of the tensors."""
    tensors = model.state_dict()
    if model.config.tie_weights:
        del tensors["lm_head.weight"]  # the same as the embedding
    weights = parallel.gathered(lora.adapter_tensors(tensors) if adapter else tensors, rt)
    parameters = {
        name: parallel.gathered(moments, rt)
        for name, moments in optim.optimizer_state(model, optimizers).items()
    }
    if not rt.is_main:
        return
    optimizer_file = {"parameters": parameters, "scaler": scaler.state_dict()}
    out_dir, step = Path(cfg.out_dir), state["step"]
    folder = store.save(
        out_dir, step, model.config, weights, tokenizer, optimizer_file, state, adapter
    )
    folders.prune(out_dir, cfg.keep_checkpoints)
    print(f"step {step}: saved {folder}")


def due(done: int, interval: int | None, evaluating: bool) -> bool:
    """Whether something happens after `done` steps; None: at evaluations, 0: never."""
    if interval is None:
        return evaluating
    return interval > 0 and done % interval == 0


def print_sample(model: GPT, tokenizer: Tokenizer, seed: int, rt: runtime.Runtime) -> None:
    """Print what the model makes up after `<|endoftext|>`; the same draws each time."""
    model.eval()
    tokens = model.generate(
        torch.tensor([[tokenizer.eot_id]], device=rt.device),
        SAMPLE_TOKENS,
        temperature=0.8,
        top_p=0.95,
        stop_id=tokenizer.eot_id,
        vocab_size=tokenizer.vocab_size,
        generator=torch.Generator(rt.device).manual_seed(seed),
    )
    with parallel.together(model):  # a sharded model needs all processes
        ids = [int(token) for token in tokens]
    model.train()
    text = tokenizer.decode(ids).removesuffix(tokenizer.eot)
    print("\n".join(f"  | {line}" for line in text.splitlines()))


def main(argv: list[str] | None = None) -> int:
    quiet = os.environ.get("RANK", "0") != "0"  # one process of many speaks; errors all of them do
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere if quiet else sys.stdout),
    ):
        status = configurator.command(TrainConfig, train, argv, settings_so_far)
    if status == 0:  # after an error the others may not be there to part from
        runtime.leave()
    return status


if __name__ == "__main__":
    sys.exit(main())
