"""
Measure the steps of train.py on made-up ids, and beside them what they consist of: the matrix
products and the attention alone, which no step can be faster than, and the optimizers.

    python -m tools.bench train                             # steps of GPT-2 124M
    python -m tools.bench train --settings="config/gpt2_350m.py --batch_size=8" --nanogpt=../nanoGPT
"""

import itertools
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configurator import UserError
from model import GPT, Attention, CrossEntropy, GPTConfig
from plaingpt import cpu
from plaingpt.checkpoint import folders, hugging_face
from plaingpt.checkpoint.folders import RunStart
from plaingpt.runtime import Runtime
from plaingpt.text.bpe import single_bytes
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training import devices, log, optim, run_folder, timing
from plaingpt.training.state import stream_dtype, worth_compiling
from plaingpt.wording import quantity
from tools.processes import output_of

REPO = Path(__file__).parents[1]
WARMUP_STEPS = 3  # of each training, which do not count
CALLS = 7  # of each part, of which the first two do not count
KINDS = {  # of a GPU's kernels, by words in their names; the first that fits counts
    "generated kernels": ("triton",),
    "attention": ("flash", "fmha", "sdpa", "cudnn"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "splitk"),
    "copies": ("memcpy", "memset"),
}


def measure(
    settings: str, steps: int, repeats: int, nanogpt: str | None, folder: str | None
) -> dict[str, list[float]]:
    """Figures by label, one per repeat: train.py with these settings, its parts, and nanoGPT from
    the folder `nanogpt`. `folder` is for the data and the runs.

    Raises UserError if a training fails.
    """
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=folder) as name:
        data_dir, out_dir = Path(name) / "data", Path(name) / "out"
        write_ids(data_dir)
        for _ in range(repeats):
            records = measure_train(settings, steps, data_dir, out_dir)
            speeds = [record["tokens_per_s"] for record in records if "tokens_per_s" in record]
            row = {"train.py, tokens/s": typical("train.py", speeds)}
            start = folders.read_starts(out_dir)[-1]
            config = hugging_face.read_config(folders.find(out_dir))
            if nanogpt:
                row["nanoGPT, tokens/s"] = measure_nanogpt(nanogpt, data_dir, config, start)
            rt = Runtime(torch.device(start.device), getattr(torch, start.dtype[6:]))
            row |= parts_of_a_step(config, micro_of(start), rt)
            if peak := records[-1]["peak_mem_gib"]:
                row["peak memory of train.py, GiB"] = peak
            rows.append(row | ratios(row, config, devices.device_of(rt.device).peak_flops))
    return {label: [row[label] for row in rows] for label in rows[0]}


def ratios(row: dict[str, float], config: GPTConfig, peak_flops: float | None) -> dict[str, float]:
    """How train.py compares with the other figures of a row."""
    ours = row["train.py, tokens/s"]
    flops = config.flops_per_token() * ours
    found = {"ratio to products and attention": ours / row["products and attention, tokens/s"]}
    found["train.py, TFLOP/s"] = flops / 1e12
    found["ratio to a matrix product"] = flops / 1e12 / row["matrix product alone, TFLOP/s"]
    if "nanoGPT, tokens/s" in row:
        found["ratio to nanoGPT"] = ours / row["nanoGPT, tokens/s"]
    if peak_flops:
        found["MFU by the data sheet, %"] = 100 * flops / peak_flops
    return found


def write_ids(data_dir: Path) -> None:
    """Write shards of random ids over a vocabulary of GPT-2's size, under the names that nanoGPT
    looks for."""
    data_dir.mkdir()
    pairs = [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    tokens = {token: number for number, token in enumerate([*single_bytes(), *pairs[:50_000]])}
    tokenizer = Tokenizer(tokens)
    tokenizer.save(data_dir)
    for name, count in (("train", 2**22), ("val", 2**14)):
        ids = np.random.default_rng(0).integers(tokenizer.vocab_size, size=count)
        ids.astype("<u2").tofile(data_dir / f"{name}.bin")


def measure_train(settings: str, steps: int, data_dir: Path, out_dir: Path) -> list[log.Record]:
    """The metrics of a training in a process of its own."""
    try:
        arguments = shlex.split(settings)
    except ValueError as error:
        raise UserError(f"settings={settings!r}: {error}") from None
    arguments += [f"--data_dir={data_dir}", f"--out_dir={out_dir}", "--overwrite"]
    arguments += ["--vocab_multiple=64", f"--max_steps={steps}", "--log_interval=1"]
    arguments += [f"--eval_interval={steps}", "--eval_tokens=1", "--sample_interval=0"]
    output_of("train.py", [sys.executable, "train.py", *arguments], REPO)
    return run_folder.read_records(out_dir / "metrics.jsonl")


def micro_of(start: RunStart) -> int:
    """The sequences that a run takes at once."""
    settings: dict[str, Any] = dict(start.settings)
    return settings["micro_batch_size"] or settings["batch_size"]


def measure_nanogpt(folder: str, data_dir: Path, config: GPTConfig, start: RunStart) -> float:
    """Tokens/s of nanoGPT on the same shape and batch, with its own dtype and loop; compiled on
    GPUs."""
    settings: dict[str, Any] = dict(start.settings)
    micro = micro_of(start)
    cuda = start.device.startswith("cuda")
    given = {
        "dataset": data_dir,
        "out_dir": data_dir.parent / "nanogpt",
        "device": start.device,
        "compile": cuda,
        "batch_size": micro,
        "gradient_accumulation_steps": settings["batch_size"] // micro,
        "block_size": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "bias": config.bias,
        "max_iters": settings["max_steps"],
        "eval_iters": 1,
        "log_interval": 1,
    }
    arguments = [f"--{name}={value}" for name, value in given.items()]
    printed = output_of("nanoGPT", [sys.executable, "train.py", *arguments], folder)
    times = [float(ms) / 1000 for ms in re.findall(r"^iter .* time ([\d.]+)ms", printed, re.M)]
    return settings["batch_size"] * config.block_size / typical("nanoGPT", times)


def typical(name: str, values: list[float]) -> float:
    """The median after the warm-up. Raises UserError if `name` reported too few steps."""
    if len(values) <= WARMUP_STEPS:
        raise UserError(
            f"{name} reported {quantity(len(values), 'step')}; {WARMUP_STEPS} are only warm-up"
        )
    return statistics.median(values[WARMUP_STEPS:])


# --- the parts of a step


def parts_of_a_step(config: GPTConfig, sequences: int, rt: Runtime) -> dict[str, float]:
    """What a micro-step of `sequences` full windows and an update consist of, in this process."""
    if rt.device.type == "cpu":
        cpu.keep_freed_memory()  # as train.py does
    tokens = sequences * config.block_size
    products = products_seconds(config, tokens, rt)
    attention = attention_seconds(config, sequences, rt)
    model = rt.place(GPT(config).init_weights(0))
    model.transformer.stream_dtype = stream_dtype(rt)
    step_model = torch.compile(model, dynamic=False) if worth_compiling(rt) else model
    ids = torch.randint(config.vocab_size, (sequences, config.block_size), device=rt.device)

    def micro_step() -> None:
        model.zero_grad()
        with rt.autocast():
            loss = step_model(ids, ids.clone())
        loss.backward()

    figures = {
        "products and attention, tokens/s": tokens / (products + attention),
        "of these, attention, %": 100 * attention / (products + attention),
        "a micro-step, ms": 1e3 * seconds(rt, micro_step),
    }
    if rt.device.type == "cpu":
        logits = torch.randn(tokens, config.vocab_size, dtype=rt.dtype, requires_grad=True)
        for label, loss in {"plainGPT": model.loss, "PyTorch": CrossEntropy()}.items():
            spent = seconds(rt, differentiate, loss, logits, ids.flatten())
            figures[f"the loss and its gradient by {label}, ms"] = 1e3 * spent
    kinds = kernels_by_kind(micro_step) if rt.device.type == "cuda" else {}
    figures |= {f"of it, {kind}, ms": ms for kind, ms in kinds.items()}
    names: dict[str, optim.OptimizerName] = {"AdamW": "adamw", "Muon": "muon"}
    for label, name in names.items():
        settings = optim.OptimizerConfig(name, 0.0, (0.9, 0.95), 0.9, 1.0)
        optimizers = optim.build_optimizers(model, settings)
        figures[f"an update by {label}, ms"] = 1e3 * seconds(rt, update, optimizers)
    peak = timing.product_flops(rt.device, rt.dtype)
    return figures | {"matrix product alone, TFLOP/s": peak / 1e12}


def differentiate(loss: CrossEntropy, logits: Tensor, targets: Tensor) -> None:
    logits.grad = None
    loss(logits, targets, None).backward()


def update(optimizers: list[optim.Optimizer]) -> None:
    for each in optimizers:
        each.step(torch.ones((), dtype=torch.bool, device=each.parameters()[0].device))


def seconds(rt: Runtime, function: Callable[..., Any], *arguments: Any) -> float:
    """The median time of a call, without the first two."""
    times = []
    for _ in range(CALLS):
        wait(rt)
        began = time.perf_counter()
        function(*arguments)
        wait(rt)
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def wait(rt: Runtime) -> None:
    if rt.device.type != "cpu":
        torch.accelerator.synchronize(rt.device)


def products_seconds(config: GPTConfig, tokens: int, rt: Runtime) -> float:
    """All matrix products of a forward and backward pass over `tokens`, one after the other."""
    C, L = config.n_embd, config.n_layer
    shapes = [(3 * C, C, L), (C, C, L), (4 * C, C, L), (C, 4 * C, L), (config.vocab_size, C, 1)]
    total = 0.0
    for rows, columns, times in shapes:
        x, weight, gradient = (
            torch.randn(shape, device=rt.device, dtype=rt.dtype)
            for shape in ((tokens, columns), (rows, columns), (tokens, rows))
        )
        for pair in ((x, weight.T), (gradient, weight), (gradient.T, x)):
            total += times * seconds(rt, torch.matmul, *pair)
    return total


def attention_seconds(config: GPTConfig, sequences: int, rt: Runtime) -> float:
    """The attention of all layers, forward and backward."""
    shape = (3, sequences, config.n_head, config.block_size, config.n_embd // config.n_head)
    qkv = torch.randn(shape, device=rt.device, dtype=rt.dtype, requires_grad=True)
    attend = cpu.BlockedAttention() if rt.device.type == "cpu" else Attention()

    def both_ways() -> None:
        y = attend(*qkv.unbind(), None, 0.0)
        torch.autograd.grad(y, qkv, y)

    return config.n_layer * seconds(rt, both_ways)


def kernels_by_kind(function: Callable[[], Any]) -> dict[str, float]:
    """The milliseconds that a GPU spends in each kind of kernel during a call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    found = dict.fromkeys([*KINDS, "others"], 0.0)
    for event in profiler.key_averages():
        found[kind_of(event.key)] += event.self_device_time_total / 1e3
    return found


def kind_of(kernel: str) -> str:
    name = kernel.lower()
    kinds = [kind for kind, words in KINDS.items() if any(word in name for word in words)]
    return kinds[0] if kinds else "others"
