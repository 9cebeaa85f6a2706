"""
Measure the speed of a command, and beside it the limit of this machine for the same work.

    python -m tools.bench prepare                           # made-up corpus of 1 GB, trained BPE
    python -m tools.bench prepare --tokenizer=gpt2 --corpus_mb=200 --repeats=5
    python -m tools.bench train                             # steps of GPT-2 124M
    python -m tools.bench train --settings="config/gpt2_350m.py --batch_size=8" --nanogpt=../nanoGPT
    python -m tools.bench sample                            # tokens written by GPT-2 124M
    python -m tools.bench train --help                      # the settings; likewise for the others
"""

import inspect
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # for python tools/bench.py

import configurator
from configurator import (
    Folder,
    NonNegativeInt,
    PathName,
    PositiveFloat,
    PositiveInt,
    Range,
    UserError,
)
from plaingpt import environment
from tools import bench_sample
from tools.bench_sample import SampleBench

WARMUP_STEPS = 3  # of each training, which do not count
Steps = Annotated[int, Range("at least 4", lambda value: value > WARMUP_STEPS)]


@dataclass(frozen=True)
class PrepareBench:
    corpus_mb: PositiveFloat = 1000.0  # size of the made-up corpus in 10**6 bytes
    documents: Literal["jsonl", "tiny", "txt"] = "jsonl"  # of 3 kB, of 20 bytes, or a single one
    tokenizer: Literal["bpe", "bytes", "gpt2"] = "bpe"  # as in prepare.py
    workers: NonNegativeInt = 0  # threads of prepare.py and of tiktoken; 0: prepare.py's default
    repeats: PositiveInt = 3  # measurements of each, in turn
    folder: Folder | None = None  # for the corpus and the shards; None: a temporary one
    output: PathName = "out/bench_prepare.json"  # where the figures go


@dataclass(frozen=True)
class TrainBench:
    settings: str = "config/gpt2_124m.py --batch_size=2 --micro_batch_size=2"  # for train.py
    steps: Steps = 8  # per run; the first three do not count
    repeats: PositiveInt = 3  # runs
    nanogpt: Folder | None = None  # nanoGPT's folder, to run in turn on the same shape and data
    folder: Folder | None = None  # for the data and the runs; None: a temporary one
    output: PathName = "out/bench_train.json"  # where the figures go


SETTINGS: dict[str, type] = {"prepare": PrepareBench, "train": TrainBench, "sample": SampleBench}


def answer_help(arguments: list[str]) -> None:
    """Print the help of the benchmark that is named, or of this command, and exit if asked to."""
    name = arguments[0] if arguments else ""
    if name in SETTINGS:
        configurator.answer_help(SETTINGS[name], arguments[1:])
    elif "-h" in arguments or "--help" in arguments:
        print(inspect.cleandoc(__doc__ or ""))
        raise SystemExit(0)


if __name__ == "__main__":
    configurator.begin()
    answer_help(sys.argv[1:])  # before torch is imported, which takes a second
    environment.wait_briefly()

import json
import math
import os
import platform
import random
import re
import shlex
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from model import GPTConfig
from plaingpt import runtime
from plaingpt.checkpoint import folders, hugging_face
from plaingpt.checkpoint.folders import RunStart
from plaingpt.text import sources
from plaingpt.text.documents import PART, Reading, hash_records, open_streams, read_items
from plaingpt.text.encoding import default_threads
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.text.validation import Validation
from plaingpt.training import devices, log, run_folder, timing
from plaingpt.wording import byte_size, quantity
from tools.processes import output_of

REPO = Path(__file__).parents[1]
Table = dict[str, list[float]]  # figures by label
# Not runtime.peak_memory_gib: it imports torch, which prepare.py does without.
PREPARE = """
import sys, prepare
from pathlib import Path
status = prepare.main()
memory = Path("/proc/self/status")  # on Linux
print(memory.read_text() if memory.exists() else "")
sys.exit(status)
"""


# --- prepare


def bench_prepare(cfg: PrepareBench) -> Table:
    """Measure prepare.py from start to end, and tiktoken's encode_ordinary_batch on the same text
    with as many threads or with one per core, whichever is faster.

    Raises UserError for settings out of range, and if prepare.py fails.
    """
    configurator.validate(cfg)
    workers, cores = cfg.workers or default_threads(), os.cpu_count() or 1
    with tempfile.TemporaryDirectory(dir=cfg.folder) as name:
        folder = Path(name)
        source, size = write_corpus(folder, cfg)
        print(f"{source.name}: {byte_size(size)} of text, {quantity(workers, 'thread')}")
        # The first run warms up and leaves the tokenizer.
        measure_prepare(source, folder / "data", cfg.tokenizer, workers)
        tokenizer = Tokenizer.load(folder / "data")
        runs, alone, reading = [], [], []
        for _ in range(cfg.repeats):
            reading.append(reading_rates(source, size))
            seconds = min(tiktoken_seconds(source, tokenizer, n) for n in {workers, cores})
            alone.append(size / 1e6 / seconds)
            runs.append(measure_prepare(source, folder / "data", cfg.tokenizer, workers))
    ours = [size / 1e6 / seconds for seconds, _ in runs]
    return {
        "tiktoken alone, MB/s": alone,
        "prepare.py, MB/s": ours,
        "ratio": [mine / other for mine, other in zip(ours, alone)],
        "reading alone, MB/s": [rate for rate, _ in reading],
        "reading alone, thousand documents/s": [rate for _, rate in reading],
        "peak memory of prepare.py, GiB": [peak for _, peak in runs],
    }


def write_corpus(folder: Path, cfg: PrepareBench) -> tuple[Path, int]:
    """Write random lines of the standard library; return the file, and the bytes of its text."""
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
                parts = (text[at : at + 20] for at in range(0, len(text), 20))
                texts = [part for part in parts if part.strip()]  # prepare.py refuses blank records
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


def reading_rates(path: Path, size: int) -> tuple[float, float]:
    """MB and thousands of documents that one thread reads, checks and hashes in a second."""
    validation = Validation(0.05, 1337, math.inf, math.inf)
    reading = Reading("text", "text", "refuse", validation)
    began, documents = time.perf_counter(), 0
    [stream] = open_streams((str(path),), (), reading)
    for items in read_items(stream, reading):
        hash_records(items, validation.seed)
        documents += int(np.count_nonzero(items.table["kind"] != PART))
    seconds = time.perf_counter() - began
    return size / 1e6 / seconds, documents / 1e3 / seconds


def tiktoken_seconds(path: Path, tokenizer: Tokenizer, threads: int) -> float:
    """Seconds in encode_ordinary_batch, in batches of about 4 MB; reading does not count."""
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
    """Seconds and peak memory in GiB (NaN if unknown) of a process that prepares `source`."""
    shutil.rmtree(data_dir, ignore_errors=True)
    arguments = [f"--sources={source}", f"--data_dir={data_dir}", f"--tokenizer={tokenizer}"]
    command = [sys.executable, "-c", PREPARE, *arguments, f"--workers={threads}"]
    began = time.perf_counter()
    printed = output_of("prepare.py", command, REPO)
    seconds = time.perf_counter() - began
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", printed, re.M)
    return seconds, int(peak[1]) / 2**20 if peak else math.nan


# --- train


def bench_train(cfg: TrainBench) -> Table:
    """Measure train.py on made-up ids, a matrix product alone, and nanoGPT if cfg names it.

    Raises UserError for settings out of range, and if a training fails.
    """
    configurator.validate(cfg)
    ours, theirs, products, peaks = [], [], [], []
    with tempfile.TemporaryDirectory(dir=cfg.folder) as name:
        data_dir, out_dir = Path(name) / "data", Path(name) / "out"
        write_ids(data_dir)
        for _ in range(cfg.repeats):
            records = measure_train(cfg, data_dir, out_dir)
            speeds = [record["tokens_per_s"] for record in records if "tokens_per_s" in record]
            ours.append(typical("train.py", speeds))
            peaks.append(records[-1]["peak_mem_gib"])
            start = folders.read_starts(out_dir)[-1]
            config = hugging_face.read_config(folders.find(out_dir))
            device, dtype = torch.device(start.device), getattr(torch, start.dtype[6:])
            products.append(timing.product_flops(device, dtype) / 1e12)
            if cfg.nanogpt:
                theirs.append(measure_nanogpt(cfg.nanogpt, data_dir, config, start))
    tflops = [config.flops_per_token() * tokens / 1e12 for tokens in ours]
    promised = devices.device_of(device).peak_flops
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
    return {label: values for label, values in table.items() if values}


def write_ids(data_dir: Path) -> None:
    """Write shards of random bytes, under the names that nanoGPT looks for."""
    data_dir.mkdir()
    Tokenizer.bytes().save(data_dir)
    for name, tokens in (("train", 2**22), ("val", 2**14)):
        ids = np.random.default_rng(0).integers(256, size=tokens)
        ids.astype("<u2").tofile(data_dir / f"{name}.bin")


def measure_train(cfg: TrainBench, data_dir: Path, out_dir: Path) -> list[log.Record]:
    """The metrics of a training in a process of its own, with a vocabulary of GPT-2's size."""
    try:
        arguments = shlex.split(cfg.settings)
    except ValueError as error:
        raise UserError(f"settings={cfg.settings!r}: {error}") from None
    arguments += [f"--data_dir={data_dir}", f"--out_dir={out_dir}", "--overwrite"]
    arguments += ["--vocab_multiple=50304", f"--max_steps={cfg.steps}", "--log_interval=1"]
    arguments += [f"--eval_interval={cfg.steps}", "--eval_tokens=1", "--sample_interval=0"]
    output_of("train.py", [sys.executable, "train.py", *arguments], REPO)
    return run_folder.read_records(out_dir / "metrics.jsonl")


def measure_nanogpt(folder: str, data_dir: Path, config: GPTConfig, start: RunStart) -> float:
    """Tokens/s of nanoGPT on the same shape and batch, with its own dtype and loop; compiled on
    GPUs."""
    settings: dict[str, Any] = dict(start.settings)
    micro = settings["micro_batch_size"] or settings["batch_size"]
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


# --- all


def typical(name: str, values: list[float]) -> float:
    """The median after the warm-up. Raises UserError if `name` reported too few steps."""
    if len(values) <= WARMUP_STEPS:
        raise UserError(
            f"{name} reported {quantity(len(values), 'step')}; {WARMUP_STEPS} are only warm-up"
        )
    return statistics.median(values[WARMUP_STEPS:])


def report(command: str, cfg: Any, table: Table) -> None:
    """Print medians and spreads as a table; write all figures to cfg.output as JSON."""
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


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    answer_help(arguments)
    name = arguments[0] if arguments else ""
    if name not in SETTINGS:
        names = " or ".join(SETTINGS)
        print(f"error: say what to measure: python -m tools.bench {names}", file=sys.stderr)
        return 2
    measures: dict[str, Callable[[Any], Table]]
    measures = {"prepare": bench_prepare, "train": bench_train, "sample": bench_sample.measure}
    return configurator.command(
        SETTINGS[name], lambda cfg: report(name, cfg, measures[name](cfg)), arguments[1:]
    )


if __name__ == "__main__":
    sys.exit(main())
