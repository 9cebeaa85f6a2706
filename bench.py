"""
Measure this machine: speed beside the limit of the same work, in one run.

    python bench.py prepare                                # a made-up corpus of 1 GB, a trained BPE
    python bench.py prepare --tokenizer=gpt2 --corpus_mb=200 --repeats=5
"""

import json
import math
import os
import platform
import random
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

import configurator
import runtime
import sources
from documents import DEFAULT_THREADS
from tokenizer import Tokenizer

HERE = Path(__file__).parent


@dataclass(frozen=True)
class PrepareBench:
    corpus_mb: int = 1000  # size of the made-up corpus in 10**6 bytes
    documents: Literal["jsonl", "tiny", "txt"] = "jsonl"  # of 3 kB, of 20 bytes, or all one
    tokenizer: Literal["bpe", "bytes", "gpt2"] = "bpe"  # as of prepare.py
    workers: int = 0  # threads of both; 0: prepare.py's default
    repeats: int = 3  # of each, in turn
    folder: str | None = None  # for the corpus and the shards; None: a temporary one
    output: str = "out/bench_prepare.json"  # where the figures go


def bench_prepare(cfg: PrepareBench) -> dict[str, Any]:
    """prepare.py from start to end, beside tiktoken's encode_ordinary_batch on the same text: with
    the same threads, and with one per core, where that is faster."""
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
    code = "import sys, torch, prepare, runtime; status = prepare.main(); "
    code += "print(runtime.peak_memory_gib(torch.device('cpu'))); sys.exit(status)"
    command = [sys.executable, "-c", code, f"--sources={source}", f"--data_dir={data_dir}"]
    command += [f"--tokenizer={tokenizer}", f"--workers={threads}"]
    began = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, cwd=HERE)
    seconds = time.perf_counter() - began
    if run.returncode:
        raise ValueError(f"prepare.py failed: {run.stderr.strip().splitlines()[-1]}")
    peak = run.stdout.split()[-1]
    return seconds, math.nan if peak == "None" else float(peak)


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] != ["prepare"]:
        print("error: say what to measure: python bench.py prepare", file=sys.stderr)
        return 2
    return configurator.command(PrepareBench, bench_prepare, arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
