"""
Measure how fast a GPT-2 with random weights writes, and beside it the speed of this machine's
memory: every token reads all weights once.

    python -m tools.bench sample
    python -m tools.bench sample --size=350m --precisions=auto,int8 --batch_size=8
    python -m tools.bench sample --against=transformers,ctranslate2,llama.cpp --llama_cpp=llama.cpp

The first token has a time of its own; tokens/s are those of the others, always the likeliest.
"Drawn" means sample.py's default settings, limited to the 1,024 likeliest tokens: with random
weights all are about as likely, and top_p alone would have to sort them all.
"""

import importlib.util
import json
import runpy
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Annotated, Any, Literal

import configurator
from configurator import Folder, PathName, PositiveInt, Range
from plaingpt.wording import quantity
from tools.processes import output_of

REPO = Path(__file__).parents[1]
CONFIGS = REPO / "config"
Peer = Literal["transformers", "ctranslate2", "llama.cpp"]
Precision = Literal["float32", "auto", "int8"]
PACKAGES = {"transformers": ["transformers"], "ctranslate2": ["ctranslate2", "transformers"]}
PEERS = {  # what each calls our precisions
    "transformers": {"float32": "float32", "auto": "bfloat16"},
    "ctranslate2": {"float32": "float32", "int8": "int8"},
    "llama.cpp": {"float32": "f32", "auto": "f16", "int8": "q8_0"},
}
BENCH = Path("build", "bin", "llama-bench")
BUILD = "cmake -B build && cmake --build build --target llama-bench"
WRITER = "import sys; from tools import bench_peers; bench_peers.main(sys.argv[1])"
# As sample.py does, before torch is imported; the others wait for their threads in their own way.
OURS = (
    "from plaingpt import environment; environment.wait_briefly(); environment.use_huge_pages(); "
)


@dataclass(frozen=True)
class SampleBench:
    size: Literal["124m", "350m", "774m", "1558m"] = "124m"  # of config/gpt2_*.py
    prompt_tokens: PositiveInt = 32  # random ones, to be continued
    new_tokens: Annotated[int, Range("at least 2", lambda value: value >= 2)] = 200  # to write
    batch_size: PositiveInt = 1  # texts that are written side by side
    precisions: tuple[Precision, ...] | None = None  # auto: 16 bits; None: all that sample.py has
    against: tuple[Peer, ...] = ()  # other programs, each in turn with ours
    llama_cpp: Folder | None = None  # a copy of llama.cpp in which llama-bench has been built
    repeats: PositiveInt = 3  # measurements of each
    folder: Folder | None = None  # for the weights; None: a temporary one
    output: PathName = "out/bench_sample.json"  # where the figures go


@dataclass(frozen=True)
class Task:
    """What a process is to do. It gets it as JSON."""

    act: str  # what writes: sample.py, or a peer; "weights" makes the model
    folder: str  # of the model; what a peer makes of it lies beside it
    shape: dict[str, int]
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    precision: str = "float32"
    device: str = "auto"
    threads: int = 1


def measure(cfg: SampleBench) -> dict[str, list[float]]:
    """The figures of each precision and of the peers that cfg names, by label: one per repeat, and
    ours one per repeat and peer.

    Raises UserError for settings out of range, peers that are not installed, and if one fails.
    """
    shape = shape_of(cfg.size)
    configurator.validate(cfg, problems_of(cfg, shape))
    table: dict[str, list[float]] = defaultdict(list)
    if cfg.folder:
        Path(cfg.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cfg.folder) as name:
        folder = str(Path(name).resolve() / "model")
        task = Task("weights", folder, shape, cfg.prompt_tokens, cfg.new_tokens, cfg.batch_size)
        found = run_writer(task)
        task = replace(task, device=found["device"], threads=found["threads"])
        print(f"GPT-2 {cfg.size} on {task.device}, {quantity(task.threads, 'thread')}")
        precisions = cfg.precisions or found["precisions"]
        if "llama.cpp" in cfg.against:
            for precision in precisions:
                convert(str(cfg.llama_cpp), folder, PEERS["llama.cpp"][precision])
        for precision, peer in turns(cfg, precisions):
            ours = run_writer(replace(task, act="sample.py", precision=precision))
            for label, value in ours.items():
                table[f"{precision}{label}"].append(value)
            if peer:
                named = PEERS[peer][precision]
                speed = measure_peer(replace(task, act=peer, precision=named), cfg.llama_cpp)
                table[f"{peer} {named}, tokens/s"].append(speed)
                ratio = ours[", tokens/s"] / speed
                table[f"ratio to {peer} {named}"].append(ratio)
    return dict(table)


def shape_of(size: str) -> dict[str, int]:
    """The shape of a GPT-2 that the config of its size has."""
    values = runpy.run_path(str(CONFIGS / f"gpt2_{size}.py"))
    return {name: values[name] for name in ("n_layer", "n_head", "n_embd", "block_size")}


def problems_of(cfg: SampleBench, shape: dict[str, int]) -> Iterator[str]:
    """Sentences on what these settings cannot measure, or not on this machine."""
    if cfg.prompt_tokens + cfg.new_tokens > shape["block_size"]:
        yield (
            f"prompt_tokens={cfg.prompt_tokens} and new_tokens={cfg.new_tokens} exceed the context "
            f"of {quantity(shape['block_size'], 'token')}"
        )
    for peer, packages in PACKAGES.items():
        missing = [name for name in packages if not importlib.util.find_spec(name)]
        if peer in cfg.against and missing:
            yield f"against={peer} needs: pip install {' '.join(missing)}"
    if "llama.cpp" in cfg.against and not (cfg.llama_cpp and Path(cfg.llama_cpp, BENCH).is_file()):
        yield f"against=llama.cpp needs --llama_cpp=FOLDER, a copy of it where you ran {BUILD}"
    if "llama.cpp" in cfg.against and cfg.batch_size > 1:
        yield f"llama-bench writes one text at a time: batch_size must be 1, not {cfg.batch_size}"


def turns(cfg: SampleBench, precisions: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    """The precisions to measure ours in, each with the peer that comes next, if any."""
    for _ in range(cfg.repeats):
        for precision in precisions:
            peers = [peer for peer in cfg.against if precision in PEERS[peer]]
            yield from zip(repeat(precision), peers or (None,))


# --- processes


def run_writer(task: Task) -> dict[str, Any]:
    """What tools/bench_peers.py finds for a task."""
    code = (OURS if task.act == "sample.py" else "") + WRITER
    printed = output_of(task.act, [sys.executable, "-c", code, json.dumps(asdict(task))], REPO)
    return json.loads(printed.splitlines()[-1])


def measure_peer(task: Task, llama_cpp: str | None) -> float:
    """The tokens/s of another program."""
    if task.act != "llama.cpp":
        return run_writer(task)[", tokens/s"]
    command = [str(Path(str(llama_cpp), BENCH).resolve()), "-m", f"{task.folder}.{task.precision}"]
    command += ["-p", "0", "-n", str(task.new_tokens), "-d", str(task.prompt_tokens), "-r", "1"]
    command += ["-t", str(task.threads), "-ngl", "0" if task.device == "cpu" else "99"]
    return json.loads(output_of("llama-bench", [*command, "-o", "json"], REPO))[0]["avg_ts"]


def convert(llama_cpp: str, folder: str, kind: str) -> None:
    """Write `folder`.`kind`, a GGUF file."""
    command = [sys.executable, "examples/to_gguf.py", str(Path(llama_cpp).resolve())]
    output_of("to_gguf.py", [*command, folder, f"{folder}.{kind}", "--outtype", kind], REPO)
