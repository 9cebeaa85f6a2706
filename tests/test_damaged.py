"""Every file that the commands read, damaged in hundreds of ways: they open it, or name it in one
line."""

import contextlib
import copy
import json
import os
import random
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import prepare
import sample
import train
from plaingpt.checksums import SUMS
from plaingpt.text import builder
from plaingpt.training import run_folder
from tools import compare, export
from tools import eval as evaluation

CASES = 10  # for each file and command; a hunt for more takes thousands
SECONDS = 10  # for one command
NEW = [
    "--tokenizer=bytes",
    "--template=alpaca",
    "--sources=WORLD/tasks.jsonl",
    "--val_fraction=0.3",
]
SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=8", "--block_size=8", "--batch_size=2"]
SMALL += ["--device=cpu", "--dtype=float32", "--sample_interval=0", "--max_steps=2"]
COMMANDS: dict[str, tuple[Callable[[list[str]], int], list[str]]] = {
    "inspect": (prepare.main, ["--inspect=data"]),
    "prepare": (prepare.main, [*NEW, "--data_dir=half"]),
    "plan": (train.main, ["--init_from=resume", "--out_dir=run", "--max_steps=3", "--plan"]),
    "resume": (train.main, ["--init_from=resume", "--out_dir=run", "--max_steps=3"]),
    "tune": (train.main, ["--init_from=run", "--data_dir=data", "--out_dir=new", *SMALL[4:]]),
    "resume lora": (train.main, ["--init_from=resume", "--out_dir=lora", "--max_steps=3"]),
    "sample": (sample.main, ["--checkpoint=run", "--max_new_tokens=2", "--device=cpu"]),
    "sample lora": (sample.main, ["--checkpoint=lora", "--max_new_tokens=2", "--device=cpu"]),
    "export": (export.main, ["--checkpoint=run", "--out_dir=exported"]),
    "export lora": (export.main, ["--checkpoint=lora", "--out_dir=exported"]),
    "eval": (evaluation.main, ["--checkpoint=run", "--data_dir=data", "--device=cpu"]),
    "compare": (compare.main, ["--runs=run"]),
}
STEP, TUNED = "run/step_000002", "lora/step_000002"
READERS = {
    "data/dataset.json": ["inspect", "resume", "eval", "export"],
    f"data/{SUMS}": ["inspect", "plan"],
    f"{STEP}/{SUMS}": ["sample", "resume"],
    "data/tokenizer.json": ["inspect", "plan"],
    "data/tokenizer_config.json": ["inspect", "plan"],
    "data/train_000000.bin": ["inspect", "plan"],
    "data/train_000000.mask.bin": ["inspect", "plan"],
    "half/.partial/progress.json": ["prepare"],
    f"{STEP}/config.json": ["sample", "plan", "tune", "sample lora"],
    f"{STEP}/model.safetensors": ["sample", "plan", "export"],
    f"{STEP}/tokenizer.json": ["sample", "export"],
    f"{STEP}/tokenizer_config.json": ["sample", "export"],
    f"{STEP}/state.json": ["resume", "export"],
    f"{STEP}/optimizer.pt": ["resume"],
    "run/run.json": ["resume", "export"],
    "run/metrics.jsonl": ["resume", "export", "compare"],
    "run/samples.jsonl": ["resume"],
    f"{TUNED}/adapter_config.json": ["sample lora", "export lora"],
    f"{TUNED}/adapter_model.safetensors": ["sample lora", "resume lora"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with data, half-prepared data, a run and a LoRA run."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tasks = [{"instruction": f"say {n}", "output": "yes " * (n + 1)} for n in range(20)]
        Path("tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
        new = [word.replace("WORLD", str(folder)) for word in NEW]
        assert prepare.main([*new, "--data_dir=data"]) == 0
        assert train.main(["--data_dir=data", "--out_dir=run", *SMALL]) == 0
        sample = {"step": 2, "prompt": "say 1", "text": "yes {"}
        run_folder.append_lines(Path("run/samples.jsonl"), [sample, sample])
        tuned = ["--lora_rank=2", "--init_from=run", "--data_dir=data", "--out_dir=lora"]
        assert train.main([*tuned, *SMALL[4:]]) == 0

        def killed(self):
            raise KeyboardInterrupt

        patch.setattr(builder.SplitBuilder, "finish", killed)
        assert prepare.main([*new, "--data_dir=half"]) == 130
        assert Path("half/.partial/progress.json").exists()
    return folder


# --- damage

VALUES = [None, True, -1, 0, 1, 1.5, 1e308, 2**40, 10**30, "", "x", "\udcff", "9" * 1000, [], {}]
VALUES += [[[1]], {"a": 1}, [1, 2], ["x", "y", "z"]]


def damage_value(value, rng: random.Random):
    """JSON with one of its values replaced, removed, repeated or renamed."""
    places = list(walk(value))
    parent, key = rng.choice(places)
    kind = rng.choice(["replace", "replace", "replace", "remove", "repeat", "rename"])
    if parent is None:
        return rng.choice(VALUES)
    if kind == "remove":
        del parent[key]
    elif kind == "repeat" and isinstance(parent, list):
        parent.insert(key, parent[key])
    elif kind == "rename" and isinstance(parent, dict):
        parent[rng.choice(["x", "\udcff", *parent])] = parent.pop(key)
    else:
        others = [other[place] for other, place in places if other is not None]
        parent[key] = copy.deepcopy(rng.choice([*VALUES, rng.choice(others)]))
    return value


def walk(value, parent=None, key=None) -> Iterator[tuple]:
    yield parent, key
    if isinstance(value, (dict, list)):
        for name in value if isinstance(value, dict) else range(len(value)):
            yield from walk(value[name], value, name)


def damage_json(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.25:
        return damage_bytes(content, rng)
    lines = content.splitlines() if content.startswith(b'{"step"') else [content]  # metrics.jsonl
    at = rng.randrange(len(lines))
    value = json.loads(lines[at])
    if isinstance(value, dict) and rng.random() < 0.9:
        value.pop("crc32", None)  # so that the damage gets past the checksum
    lines[at] = json.dumps(damage_value(value, rng)).encode()
    return b"\n".join([*lines, b""])


def damage_safetensors(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damage_bytes(content, rng)
    size = struct.unpack("<Q", content[:8])[0]
    if rng.random() < 0.3:  # a weight that is huge, infinite or not a number
        at = 8 + size + 4 * rng.randrange((len(content) - 8 - size) // 4)
        number = struct.pack("<f", rng.choice([1e38, -3e38, float("inf"), float("nan")]))
        return content[:at] + number + content[at + 4 :]
    header = json.loads(content[8 : 8 + size])
    if rng.random() < 0.5:  # a tensor of another type or shape, in as many bytes
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        entry["dtype"] = rng.choice(["F16", "BF16", "F64", "I32", "F8_E4M3", "F4", "C64", "BOOL"])
        bits = {"F64": 64, "C64": 64, "I32": 32, "F8_E4M3": 8, "BOOL": 8, "F4": 4}
        start, end = entry["data_offsets"]
        count = 8 * (end - start) // bits.get(entry["dtype"], 16)
        entry["shape"] = rng.choice([[count], [1, count], [1, 1, count], [count // 2, 2]])
    else:
        header = damage_value(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    flipped = bytearray(content)
    for place in rng.sample(range(len(content)), min(3, len(content))):
        flipped[place] ^= rng.randrange(1, 256)
    kinds = [b"", b"\xff" * 20, b"[" * 100_000, b"null", bytes(len(content)), content[:at]]
    kinds += [content + content, content[:at] + b"\x00" + content[at:], *[bytes(flipped)] * 3]
    return rng.choice(kinds)


def damage_optimizer(path: Path, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damage_bytes(path.read_bytes(), rng)
    saved = torch.load(path)
    states = saved["parameters"]
    name = rng.choice(list(states))
    key = rng.choice(list(states[name]))
    tensor = states[name][key]
    kinds = [
        torch.full_like(tensor, float("nan")),
        -1 - tensor.abs(),
        tensor.double(),
        tensor[None],
    ]
    kinds += [tensor.to(torch.complex64), tensor > 0, tensor.to("meta"), torch.ones(3), 1.0, None]
    kinds += [tensor.reshape(-1).to_sparse(), torch.zeros(1).expand(10**12), "x", [], {}]
    change = rng.randrange(6)
    if change < 3:
        states[name][key] = rng.choice(kinds)
    elif change == 3:
        (states if rng.random() < 0.5 else states[name]).popitem()
    elif change == 4:
        states[rng.choice(["x", "transformer.h.0"])] = states[name]
    else:
        saved |= rng.choice([{"parameters": {}}, {"parameters": []}, {"scaler": 1}, {"scaler": []}])
    torch.save(saved, path)
    return path.read_bytes()


def damage(path: Path, rng: random.Random) -> str:
    """Damage a file; return how. Mostly it gets past the checksums."""
    if rng.random() < 0.9 and path.name != SUMS:
        for sums in Path().rglob(SUMS):
            sums.unlink()
    if rng.random() < 0.1 and os.name != "nt":
        path.unlink()
        return make_odd(path, rng.choice(["pipe", "folder", "zeros", "loop", "missing"]))
    if path.suffix == ".pt":
        new = damage_optimizer(path, rng)
    else:
        kinds = {"": damage_bytes, ".bin": damage_bytes, ".safetensors": damage_safetensors}
        new = kinds.get(path.suffix, damage_json)(path.read_bytes(), rng)
    path.write_bytes(new)
    return repr(new[:2000])


def make_odd(path: Path, kind: str) -> str:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.symlink_to("/dev/zero" if kind == "zeros" else path.name)
    return kind


# --- the test


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def late(number, frame):
        raise AssertionError(f"not done after {seconds} s")

    if os.name == "nt":
        yield
        return
    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def check_command(command: str, path: Path, world: Path, capfd) -> None:
    """Run a command on the damaged file at `path`."""
    main, arguments = COMMANDS[command]
    capfd.readouterr()
    with time_limit(SECONDS):
        status = main([word.replace("WORLD", str(world)) for word in arguments])
    err = capfd.readouterr().err
    assert status in (0, 2), status
    if status == 2:
        line = err.partition("error: ")[2].rstrip("\n")
        assert line and "\n" not in line and len(line) < (300 if path.name in line else 2000), err
        others = ["logits are not finite"]  # which has no file to name
        others += [
            "the resumed run",
            "other settings",
            "must be",
            "device ",
        ]  # a setting of another value
        others += ["has changed", "on other data", "there is no data", "is not an adapter for"]
        others += ["checksums differ"]  # in dataset.json, from those of the shard
        assert any(words in line for words in [path.name, *others]), line


def names() -> list[tuple[str, str]]:
    return [(file, command) for file, commands in READERS.items() for command in commands]


@pytest.mark.parametrize(("file", "command"), names())
def test_a_damaged_file_is_one_line(world, tmp_path, monkeypatch, capfd, file, command):
    for seed in range(CASES):
        rng = random.Random(f"{file} {command} {seed}")
        shutil.copytree(world, tmp_path / str(seed))
        monkeypatch.chdir(tmp_path / str(seed))
        how = damage(Path(file), rng)
        try:
            check_command(command, Path(file), world, capfd)
        except BaseException:
            print(f"seed {seed}: {how}")
            raise
