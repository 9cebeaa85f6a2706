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
from typing import Annotated, Any, Literal, NamedTuple

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
)
from plaingpt import environment
from tools import bench_sample
from tools.bench_sample import SampleBench

Steps = Annotated[int, Range("at least 4", lambda value: value >= 4)]


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
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

from plaingpt import runtime
from plaingpt.text import sources
from plaingpt.text.encoding import default_threads
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.wording import byte_size, quantity
from tools import bench_train
from tools.processes import output_of

REPO = Path(__file__).parents[1]
Table = dict[str, list[float]]  # figures by label
# Not runtime.peak_memory_gib: it imports torch, which prepare.py does without.
PREPARE = """
import sys, time, prepare
from pathlib import Path
from plaingpt.text.builder import SplitBuilder
def run(builder, encode, run=SplitBuilder.run):
    main, process = time.thread_time(), time.process_time()
    run(builder, encode)
    main, process = time.thread_time() - main, time.process_time() - process
    print(f"processor time: {main} s in one thread, {process - main} s in others")
SplitBuilder.run = run
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
        runs, alone = [], []
        for _ in range(cfg.repeats):
            seconds = min(tiktoken_seconds(source, tokenizer, n) for n in {workers, cores})
            alone.append(size / 1e6 / seconds)
            runs.append(measure_prepare(source, folder / "data", cfg.tokenizer, workers))
    ours = [size / 1e6 / run.seconds for run in runs]
    return {
        "tiktoken alone, MB/s": alone,
        "prepare.py, MB/s": ours,
        "ratio": [mine / other for mine, other in zip(ours, alone)],
        "reading and writing in one thread, MB/s": [size / 1e6 / run.one for run in runs],
        "threads that it can feed": [run.others / run.one for run in runs],
        "peak memory of prepare.py, GiB": [run.peak for run in runs],
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


class PrepareRun(NamedTuple):
    """What a process that prepares a source takes."""

    seconds: float
    one: float  # processor time of the thread that reads and writes, in seconds
    others: float  # and of those that encode, together
    peak: float  # memory in GiB, NaN if unknown


def measure_prepare(source: Path, data_dir: Path, tokenizer: str, threads: int) -> PrepareRun:
    shutil.rmtree(data_dir, ignore_errors=True)
    arguments = [f"--sources={source}", f"--data_dir={data_dir}", f"--tokenizer={tokenizer}"]
    command = [sys.executable, "-c", PREPARE, *arguments, f"--workers={threads}"]
    began = time.perf_counter()
    printed = output_of("prepare.py", command, REPO)
    seconds = time.perf_counter() - began
    one, others = map(float, re.findall(r"([\d.e-]+) s in", printed))
    peak = re.search(r"^VmHWM:\s+(\d+) kB$", printed, re.M)
    return PrepareRun(seconds, one, others, int(peak[1]) / 2**20 if peak else math.nan)


# --- train


def measure_training(cfg: TrainBench) -> Table:
    """Measure train.py on made-up ids, its parts, and nanoGPT if cfg names it.

    Raises UserError for settings out of range, and if a training fails.
    """
    configurator.validate(cfg)
    return bench_train.measure(cfg.settings, cfg.steps, cfg.repeats, cfg.nanogpt, cfg.folder)


# --- all


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
    measures = {"prepare": bench_prepare, "train": measure_training, "sample": bench_sample.measure}
    return configurator.command(
        SETTINGS[name], lambda cfg: report(name, cfg, measures[name](cfg)), arguments[1:]
    )


if __name__ == "__main__":
    sys.exit(main())
