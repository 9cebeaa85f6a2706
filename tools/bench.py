"""
Measure this machine: speed beside the limit of the same work, in one run.

    python -m tools.bench prepare                                # a made-up corpus of 1 GB, a trained BPE
    python -m tools.bench prepare --tokenizer=gpt2 --corpus_mb=200 --repeats=5
    python -m tools.bench train                                  # steps of GPT-2 124M
    python -m tools.bench train --settings="config/gpt2_350m.py --batch_size=8" --nanogpt=../nanoGPT
"""

import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

import configurator
from configurator import UserError
from model import GPTConfig
from plaingpt import files, runtime
from plaingpt.checkpoint import folders, hugging_face
from plaingpt.text import sources
from plaingpt.text.documents import DEFAULT_THREADS
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training import log, run_folder

REPO = Path(__file__).parents[1]


@dataclass(frozen=True)
class PrepareBench:
    corpus_mb: float = 1000.0  # size of the made-up corpus in 10**6 bytes
    documents: Literal["jsonl", "tiny", "txt"] = "jsonl"  # of 3 kB, of 20 bytes, or all one
    tokenizer: Literal["bpe", "bytes", "gpt2"] = "bpe"  # as of prepare.py
    workers: int = 0  # threads of both; 0: prepare.py's default
    repeats: int = 3  # of each, in turn
    folder: str | None = None  # for the corpus and the shards; None: a temporary one
    output: str = "out/bench_prepare.json"  # where the figures go


def bench_prepare(cfg: PrepareBench) -> dict[str, Any]:
    """prepare.py from start to end, beside tiktoken's encode_ordinary_batch on the same text: with
    the same threads, and with one per core, where that is faster."""
    check_repeats(cfg.repeats)
    threads, cores = cfg.workers or DEFAULT_THREADS, os.cpu_count() or 1
    with tempfile.TemporaryDirectory(dir=cfg.folder) as name:
        folder = Path(name)
        source, size = write_corpus(folder, cfg)
        print(f"{source.name}: {size / 1e6:,.0f} MB of text, {threads} threads")
        # The first run warms up and leaves the tokenizer.
        measure_prepare(source, folder / "data", cfg.tokenizer, threads)
        tokenizer = Tokenizer.load(folder / "data")
        runs, alone = [], []
        for _ in range(cfg.repeats):
            seconds = min(tiktoken_seconds(source, tokenizer, n) for n in {threads, cores})
            alone.append(size / 1e6 / seconds)
            runs.append(measure_prepare(source, folder / "data", cfg.tokenizer, threads))
    whole = [size / 1e6 / seconds for seconds, _ in runs]
    table = {
        "tiktoken alone, MB/s": alone,
        "prepare.py, MB/s": whole,
        "ratio": [ours / theirs for ours, theirs in zip(whole, alone)],
        "peak memory of prepare.py, GiB": [peak for _, peak in runs],
    }
    return report("prepare", cfg, table)


@dataclass(frozen=True)
class TrainBench:
    settings: str = "config/gpt2_124m.py --batch_size=2 --micro_batch_size=2"  # train.py's
    steps: int = 8  # of a run; those before the fourth do not count
    repeats: int = 3  # runs
    nanogpt: str | None = None  # a folder with nanoGPT, to run in turn on the same shape and data
    folder: str | None = None  # for the data and the runs; None: a temporary one
    output: str = "out/bench_train.json"  # where the figures go


def bench_train(cfg: TrainBench) -> dict[str, Any]:
    """Steps of train.py on made-up ids, beside a matrix product alone, and nanoGPT if it is here.

    Raises UserError for too few steps, and where a training fails.
    """
    check_repeats(cfg.repeats)
    if cfg.steps < 4:
        raise UserError(f"steps must be at least 4, not {cfg.steps}")
    ours, theirs, products, peaks = [], [], [], []
    with tempfile.TemporaryDirectory(dir=cfg.folder) as name:
        data_dir, out_dir = Path(name) / "data", Path(name) / "out"
        write_ids(data_dir)
        for _ in range(cfg.repeats):
            records = measure_train(cfg, data_dir, out_dir)
            ours.append(statistics.median(r["tokens_per_s"] for r in records[3:]))
            peaks.append(records[-1]["peak_mem_gib"])
            start = files.read_json(out_dir / "run.json")["starts"][-1]
            config = hugging_face.config_from_hugging_face(folders.find(out_dir), None, 0.0)
            device, dtype = torch.device(start["device"]), getattr(torch, start["dtype"][6:])
            products.append(product_tflops(device, dtype))
            if cfg.nanogpt:
                theirs.append(measure_nanogpt(cfg, data_dir, config, start))
    tflops = [config.flops_per_token() * tokens / 1e12 for tokens in ours]
    promised = log.peak_flops(device)
    table = {
        "train.py, tokens/s": ours,
        "nanoGPT, tokens/s": theirs,
        "ratio": [mine / other for mine, other in zip(ours, theirs)],
        "train.py, TFLOP/s": tflops,
        "matrix product alone, TFLOP/s": products,
        "ratio to it": [step / product for step, product in zip(tflops, products)],
        "MFU by the data sheet, %": [t * 1e14 / promised for t in tflops] if promised else [],
        "peak memory of train.py, GiB": [peak for peak in peaks if peak],
    }
    return report("train", cfg, {label: values for label, values in table.items() if values})


def write_ids(data_dir: Path) -> None:
    """Shards of random bytes, under the names that nanoGPT looks for, too."""
    data_dir.mkdir()
    Tokenizer.bytes().save(data_dir)
    for name, tokens in (("train", 2**22), ("val", 2**14)):
        ids = np.random.default_rng(0).integers(256, size=tokens)
        ids.astype("<u2").tofile(data_dir / f"{name}.bin")


def measure_train(cfg: TrainBench, data_dir: Path, out_dir: Path) -> list[log.Record]:
    """The records of a training in a process of its own, with a vocabulary of GPT-2's size."""
    command = [sys.executable, "train.py", *shlex.split(cfg.settings)]
    command += [f"--data_dir={data_dir}", f"--out_dir={out_dir}", "--overwrite"]
    command += ["--vocab_multiple=50304", f"--max_steps={cfg.steps}", "--log_interval=1"]
    command += [f"--eval_interval={cfg.steps}", "--eval_tokens=1", "--sample_interval=0"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    if run.returncode:
        raise UserError(f"train.py failed: {run.stderr.strip().splitlines()[-1]}")
    return run_folder.read_records(out_dir / "metrics.jsonl")


def measure_nanogpt(
    cfg: TrainBench, data_dir: Path, config: GPTConfig, start: dict[str, Any]
) -> float:
    """Tokens/s of nanoGPT's training, on the same shape and batch, with its own dtype and loop;
    compiled on GPUs."""
    settings = start["settings"]
    micro = settings["micro_batch_size"] or settings["batch_size"]
    cuda = start["device"].startswith("cuda")
    given = {
        "dataset": data_dir,
        "out_dir": data_dir.parent / "nanogpt",
        "device": start["device"],
        "compile": cuda,
        "batch_size": micro,
        "gradient_accumulation_steps": settings["batch_size"] // micro,
        "block_size": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "bias": config.bias,
        "max_iters": cfg.steps,
        "eval_iters": 1,
        "log_interval": 1,
    }
    command = [sys.executable, "train.py", *(f"--{name}={each}" for name, each in given.items())]
    run = subprocess.run(command, capture_output=True, text=True, cwd=cfg.nanogpt)
    if run.returncode:
        raise UserError(f"nanoGPT failed: {run.stderr.strip().splitlines()[-1]}")
    times = [float(ms) / 1000 for ms in re.findall(r"^iter .* time ([\d.]+)ms", run.stdout, re.M)]
    return settings["batch_size"] * config.block_size / statistics.median(times[3:])


def product_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """What a large matrix product alone reaches, the best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) / 1e12


def check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, not {repeats}")


def report(command: str, cfg: Any, table: dict[str, list[float]]) -> dict[str, Any]:
    """Print a table of medians and spreads; write it all, as JSON, where cfg.output says."""
    print(f"{'':32} {'median':>10} {'lowest':>10} {'highest':>10}")
    for label, values in table.items():
        low, high = min(values), max(values)
        print(f"{label:32} {statistics.median(values):10.2f} {low:10.2f} {high:10.2f}")
    result = {
        "command": command,
        "settings": asdict(cfg),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": runtime.versions(),
        "table": table,
    }
    Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)
    Path(cfg.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def write_corpus(folder: Path, cfg: PrepareBench) -> tuple[Path, int]:
    """Lines of the standard library in a random order; returns the file and its bytes of text."""
    path = folder / ("corpus.txt" if cfg.documents == "txt" else "corpus.jsonl")
    rng = random.Random(0)
    lines = [
        line
        for file in sources.stdlib_paths()
        for line in "".join(sources.TextFile(file, 0).pieces()).splitlines(keepends=True)
    ]
    size = 0
    with path.open("w", encoding="utf-8") as file:
        while size < cfg.corpus_mb * 1e6:
            text = "".join(rng.choices(lines, k=80))
            texts = [text]
            if cfg.documents == "tiny":
                texts = [text[at : at + 20] for at in range(0, len(text), 20)]
            for each in texts:
                file.write(each if path.suffix == ".txt" else json.dumps({"text": each}) + "\n")
                size += len(each.encode())
    return path, size


def texts_of(path: Path) -> Iterator[str]:
    for item, _ in sources.find_source(str(path)).items(sources.Position()):
        if isinstance(item, sources.TextFile):
            yield from item.pieces()
        else:
            yield item.value["text"]


def tiktoken_seconds(path: Path, tokenizer: Tokenizer, threads: int) -> float:
    """Seconds inside encode_ordinary_batch, in batches of about 4 MB; reading is not counted."""
    seconds, batch, size = 0.0, [], 0
    for text in texts_of(path):
        batch.append(text)
        size += len(text)
        if size > 4e6:
            seconds += timed_batch(batch, tokenizer, threads)
            batch, size = [], 0
    return seconds + timed_batch(batch, tokenizer, threads)


def timed_batch(batch: list[str], tokenizer: Tokenizer, threads: int) -> float:
    began = time.perf_counter()
    tokenizer.encoding.encode_ordinary_batch(batch, num_threads=threads)
    return time.perf_counter() - began


def measure_prepare(
    source: Path, data_dir: Path, tokenizer: str, threads: int
) -> tuple[float, float]:
    """Seconds and peak memory, in GiB, of a process that prepares `source`."""
    shutil.rmtree(data_dir, ignore_errors=True)
    code = "import sys, torch, prepare; from plaingpt import runtime; status = prepare.main(); "
    code += "print(runtime.peak_memory_gib(torch.device('cpu'))); sys.exit(status)"
    command = [sys.executable, "-c", code, f"--sources={source}", f"--data_dir={data_dir}"]
    command += [f"--tokenizer={tokenizer}", f"--workers={threads}"]
    began = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    seconds = time.perf_counter() - began
    if run.returncode:
        raise UserError(f"prepare.py failed: {run.stderr.strip().splitlines()[-1]}")
    peak = run.stdout.split()[-1]
    return seconds, math.nan if peak == "None" else float(peak)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["prepare"]:
        return configurator.command(PrepareBench, bench_prepare, arguments[1:])
    if arguments[:1] == ["train"]:
        return configurator.command(TrainBench, bench_train, arguments[1:])
    print("error: say what to measure: python -m tools.bench prepare or train", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
