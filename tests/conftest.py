"""No network, and made-up text and shards for the tests that need some."""

import json
import os
import random
import socket
from pathlib import Path

import numpy as np
import pytest
import tiktoken

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported
os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])  # for processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small only lose time to more threads
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as commands do: environment.wait_briefly

from plaingpt.text import shards
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training import run_folder, timing

LOOPBACK = {"127.0.0.1", "::1", "localhost"}


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Sockets reach this machine only; Unix sockets and the loopback (gloo) stay open."""
    really_connect = socket.socket.connect
    really_resolve = socket.getaddrinfo

    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            raise RuntimeError(f"a test tried to reach {address}")
        return really_connect(self, address)

    def getaddrinfo(host, *args, **kwargs):
        if host not in LOOPBACK | {None, "", "0.0.0.0", "::", socket.gethostname()}:
            raise RuntimeError(f"a test tried to find {host}")
        return really_resolve(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        patch.setattr(socket.socket, "connect_ex", connect)
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        for name in ("http_proxy", "https_proxy", "all_proxy"):  # one may be on the loopback
            patch.delenv(name, raising=False)
            patch.delenv(name.upper(), raising=False)
        yield


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    """Runs do not draw loss.png, a sixth of a second each time, but in tests marked `plots`."""
    if not request.node.get_closest_marker("plots"):
        monkeypatch.setattr(run_folder, "plot", lambda records, path: None)


@pytest.fixture(autouse=True)
def a_slow_machine(monkeypatch):
    """Plans do not measure a matrix product, a second each time."""
    monkeypatch.setattr(timing, "product_flops", lambda device, dtype: 1e11)


@pytest.fixture(scope="session")
def tiny_text() -> str:
    """About 40 kB of made-up prose and Python with some of everything that Unicode has."""
    rng = random.Random(0)
    sounds = ["ba", "ko", "lin", "mer", "su", "tra", "ven", "ish", "dor", "pel", "qua"]
    words = ["".join(rng.choices(sounds, k=rng.randint(1, 3))) for _ in range(300)]
    rare = [
        "naïve",
        "Straße",
        "日本語",
        "привет",
        "😀",
        "👩‍👩‍👧",
        "it's",
        "we'll",
        "3.14",
        "x²",
        "—",
    ]

    def sentence() -> str:
        chosen = rng.choices(words, k=rng.randint(4, 12))
        if rng.random() < 0.3:
            chosen.insert(rng.randrange(len(chosen)), rng.choice(rare))
        return " ".join(chosen).capitalize() + rng.choice([".", "!", "?", "…"])

    def function() -> str:
        name, first, second = rng.sample(words, 3)
        return (
            f"def {name}({first}, {second}=None):\n"
            f'    """{sentence()}"""\n'
            f"    for i in range({rng.randint(2, 999)}):\n"
            f"        {first}[i] += {second}  # {rng.choice(words)}\n"
            f"    return {{'{name}': {first}}}\n\n"
        )

    parts = []
    while sum(map(len, parts)) < 40_000:
        if rng.random() < 0.3:
            parts.append(function())
        else:
            parts.append(" ".join(sentence() for _ in range(rng.randint(1, 5))) + "\n\n")
    return "".join(parts)


def write_shard(path: Path, tokens: np.ndarray) -> dict:
    """One shard; returns its entry for the manifest."""
    content = tokens.astype("<u2").tobytes()
    path.write_bytes(shards.encode_header(len(tokens)) + content)
    return {"file": path.name, "tokens": len(tokens), "sha256": shards.sha256_of(path)}


def write_words(folder: Path, train: int, val: int) -> None:
    """A data folder of that many random words in bytes, whose next byte can be learned."""
    rng = np.random.default_rng(0)
    words = [b"alpha ", b"beta ", b"gamma ", b"delta\n"]
    for name, count in (("train", train), ("val", val)):
        text = b"".join(words[i] for i in rng.integers(4, size=count))
        write_shard(folder / f"{name}_000000.bin", np.frombuffer(text, np.uint8).astype("u2"))
    Tokenizer.bytes().save(folder)


def positions(count: int, start: int = 0) -> np.ndarray:
    """Tokens that are their own positions."""
    return np.arange(start, start + count, dtype=np.uint16)


def split_of(folder: Path, name: str = "train", vocab_size: int = 65536) -> shards.Split:
    """A split whose ids may exceed the vocabulary of the folder's tokenizer."""
    return shards.Split(name, shards.shard_paths(folder, name), vocab_size)


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory):
    """`shard_folder(train=[tokens, …], val=[…])` writes a folder as prepare.py does: a shard for
    each array, the bytes tokenizer, and a manifest."""

    def write(train, val=(), manifest=True):
        folder = tmp_path_factory.mktemp("shards")
        tokenizer = Tokenizer.bytes()
        tokenizer.save(folder)
        splits = {}
        for name, arrays in (("train", train), ("val", val)):
            shards = [
                write_shard(folder / f"{name}_{number:06d}.bin", np.array(array, np.uint16))
                for number, array in enumerate(arrays)
            ]
            tokens = sum(shard["tokens"] for shard in shards)
            counts = {"documents": len(shards), "bytes": tokens, "tokens": tokens}
            if shards:
                splits[name] = {**counts, "shards": shards}
        content = {
            "format": 1,
            "settings": {},
            "template": None,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.fingerprint,
            "splits": splits,
        }
        if manifest:
            (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return write


def save_checkpoint(out_dir: Path, model, tokenizer: Tokenizer | None = None, **changes) -> Path:
    """A step folder of a model, with the bytes tokenizer unless another is given; `changes` are
    fields of its Snapshot."""
    from plaingpt.checkpoint import store  # not at the top: tests of text do without torch
    from plaingpt.checkpoint.folders import State

    tokenizer = tokenizer or Tokenizer.bytes()
    state = State(**{"step": 1, "data": "", "settings": {}} | changes.pop("state", {}))
    fields = {"optimizer": {}, "state": state} | changes
    return store.save(out_dir, store.Snapshot(model.config, model.weights(), tokenizer, **fields))


@pytest.fixture
def no_gpt2_files(monkeypatch, tmp_path_factory):
    """tiktoken with an empty cache folder, which this returns, and nothing read before."""
    empty = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(empty))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    return empty


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def masked_copy(data_dir: str, folder: Path) -> str:
    """The same data with masks, in which most windows of a batch count differently."""
    folder.mkdir()
    for path in Path(data_dir).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    rng = np.random.default_rng(1)
    for name in ("train", "val"):
        tokens = np.fromfile(folder / f"{name}_000000.bin", "<u2")[512:]
        mask = (rng.random(len(tokens)) < np.linspace(0, 1, len(tokens))).astype(np.uint8)
        mask[: len(tokens) // 4] = 0
        mask.tofile(folder / f"{name}_000000.mask.bin")
    return str(folder)
