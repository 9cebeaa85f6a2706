"""From text to shards: what is written, kept, refused, resumed and left behind."""

import errno
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tokenize
from pathlib import Path

import msgspec
import numpy as np
import pytest

import prepare
from plaingpt.text import builder, cutting, dataset, encoding, progress, shards, sources, splits
from plaingpt.text.records import Rows
from plaingpt.text.tokenizer import Tokenizer
from prepare import PrepareConfig

EOT = 256  # of the bytes tokenizer
FIRST = "First line.\nSecond — line.\r\nThird line 😀\n"
SECOND = "naïve\n\n\ttext <|endoftext|> without a last newline"


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in (("a.txt", FIRST), ("b.txt", SECOND)):
        (folder / name).write_bytes(text.encode())
    return folder


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "prepared"


@pytest.fixture
def run(texts, target):
    """`run(sources=…, …)` prepares, by default with the bytes tokenizer."""

    def prepare_with(**settings):
        defaults = {
            "sources": (str(texts),),
            "data_dir": str(target),
            "tokenizer": "bytes",
            "workers": 1,
        }
        return prepare.prepare(PrepareConfig(**{**defaults, **settings}))

    return prepare_with


def command(texts, target, *arguments) -> int:
    wanted = [f"--sources={texts}", f"--data_dir={target}", "--tokenizer=bytes", "--workers=1"]
    return prepare.main([*wanted, *arguments])


def tokens_of(folder, name) -> np.ndarray:
    split = dataset.open_dataset(folder).split(name)
    return split[0 : len(split)]


def documents_of(folder, name) -> list[bytes]:
    """The documents of a split that the bytes tokenizer encoded."""
    tokens = tokens_of(folder, name)
    assert tokens[-1] == EOT
    pieces = np.split(tokens, np.flatnonzero(tokens == EOT) + 1)[:-1]
    return [piece[:-1].astype(np.uint8).tobytes() for piece in pieces]


def snapshot(folder) -> dict:
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mtime_ns,
            path.is_file() and path.read_bytes(),
        )
        for path in folder.rglob("*")
    }


# --- what is written


def test_the_tokens_are_the_bytes_and_an_end_behind_each_document(run, target):
    run(val_fraction=0.0)
    wanted = [*FIRST.encode(), EOT, *SECOND.encode(), EOT]
    assert tokens_of(target, "train").tolist() == wanted
    names = ["dataset.json", "tokenizer.json", "tokenizer_config.json", "train_000000.bin"]
    assert sorted(path.name for path in target.iterdir()) == ["SHA256SUMS", *names]
    sums = [line.split("  ") for line in (target / "SHA256SUMS").read_text().splitlines()]
    assert sorted(name for _, name in sums) == names
    for digest, name in sums:
        assert hashlib.sha256((target / name).read_bytes()).hexdigest() == digest


def test_the_manifest_counts_what_is_there(run, texts, target):
    (texts / "c.txt").write_text("val é\n", encoding="utf-8")
    made = run(sources=(f"{texts}/[ab].txt",), val_sources=(f"{texts}/c.txt",), shard_tokens=64)
    manifest = json.loads((target / "dataset.json").read_text(encoding="utf-8"))
    assert json.loads(msgspec.json.encode(made)) == manifest
    assert manifest["vocab_size"] == 257
    assert manifest["tokenizer"] == Tokenizer.bytes().fingerprint
    assert Tokenizer.load(target).fingerprint == manifest["tokenizer"]
    size = len(FIRST.encode()) + len(SECOND.encode())
    train, val = manifest["splits"]["train"], manifest["splits"]["val"]
    assert (train["documents"], train["bytes"], train["tokens"]) == (2, size, size + 2)
    assert (val["documents"], val["bytes"], val["tokens"]) == (1, 7, 8)
    assert [shard["tokens"] for shard in train["shards"]] == [64, size + 2 - 64]
    for shard in train["shards"] + val["shards"]:
        content = (target / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        assert len(content) == 1024 + 2 * shard["tokens"]
    data = dataset.open_dataset(target)
    assert data.bytes_per_token(data.split("val")) == 7 / 8


def test_val_sources_are_the_validation(run, texts, target):
    run(sources=(f"{texts}/a.txt",), val_sources=(f"{texts}/b.txt",))
    assert documents_of(target, "train") == [FIRST.encode()]
    assert documents_of(target, "val") == [SECOND.encode()]


def test_a_single_file_is_cut_at_a_line_end(run, tmp_path, target):
    lines = "".join(f"line {number}\n" for number in range(100))
    (tmp_path / "one.txt").write_text(lines)
    run(sources=(f"{tmp_path}/one.txt",), val_fraction=0.1)
    (train,), (val,) = documents_of(target, "train"), documents_of(target, "val")
    assert train + val == lines.encode()
    assert train.endswith(b"\n") and val.startswith(b"line ")
    assert 0.08 < len(val) / len(lines) < 0.12


def test_a_single_line_is_cut_anyway(run, tmp_path, target):
    (tmp_path / "one.txt").write_text("é" * 100)
    run(sources=(f"{tmp_path}/one.txt",), val_fraction=0.2)
    assert documents_of(target, "train") == ["é".encode() * 80]
    assert documents_of(target, "val") == ["é".encode() * 20]


@pytest.fixture
def many(tmp_path) -> Path:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02d}.txt").write_text(f"document {number}\n" * 10)
    return folder


def test_documents_are_drawn_for_validation_whole_and_by_the_seed(run, many, tmp_path):
    drawn = []
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        folder = tmp_path / name
        run(sources=(str(many),), data_dir=str(folder), val_fraction=0.2, seed=seed)
        train, val = documents_of(folder, "train"), documents_of(folder, "val")
        assert sorted(train + val) == sorted(path.read_bytes() for path in many.iterdir())
        assert not set(train) & set(val)
        assert len(val) == pytest.approx(12, abs=1)
        drawn.append(val)
    assert drawn[0] == drawn[1] != drawn[2]


def test_some_document_always_stays_to_train_on(run, target):
    run(val_fraction=0.99)
    assert len(documents_of(target, "train")) == len(documents_of(target, "val")) == 1


def test_small_shards_join_to_the_tokens_of_one(run, many, tmp_path, monkeypatch):
    folders = [tmp_path / "one", tmp_path / "several"]
    run(sources=(str(many),), data_dir=str(folders[0]))
    monkeypatch.setattr(encoding, "CHUNK", 300)
    run(sources=(str(many),), data_dir=str(folders[1]), shard_tokens=100, workers=2)
    for name in ("train", "val"):
        one, several = (tokens_of(folder, name) for folder in folders)
        assert np.array_equal(one, several)
        assert len(shards.shard_paths(folders[1], name)) == -(-len(one) // 100) > 1


def test_a_last_shard_that_is_full_is_the_last(run, target):
    tokens = len(FIRST.encode()) + len(SECOND.encode()) + 2
    run(val_fraction=0.0, shard_tokens=tokens)
    assert [path.name for path in shards.shard_paths(target, "train")] == ["train_000000.bin"]


def test_a_bpe_is_trained_on_the_training_text_only(run, tmp_path, target):
    (tmp_path / "train.txt").write_text("abc " * 100)
    (tmp_path / "val.txt").write_text("xyz " * 100)
    sources = {"sources": (f"{tmp_path}/train.txt",), "val_sources": (f"{tmp_path}/val.txt",)}
    run(**sources, tokenizer="bpe", vocab_size=300)
    tokenizer = Tokenizer.load(target)
    assert b" abc" in tokenizer.ranks
    assert not any(len(token) > 1 and b"x" in token for token in tokenizer.ranks)
    assert tokenizer.decode(tokens_of(target, "train")) == "abc " * 100 + "<|endoftext|>"
    assert tokenizer.decode(tokens_of(target, "val")) == "xyz " * 100 + "<|endoftext|>"


def test_two_runs_write_the_same_bytes(run, tiny_text, tmp_path):
    (tmp_path / "text.txt").write_text(tiny_text, encoding="utf-8")
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder, workers in zip(folders, (1, 2)):
        source = (f"{tmp_path}/text.txt",)
        run(sources=source, data_dir=str(folder), tokenizer="bpe", vocab_size=400, workers=workers)
    for path in folders[0].iterdir():
        assert path.read_bytes() == (folders[1] / path.name).read_bytes()


# --- sources


def test_folders_and_patterns_are_searched_for_text(texts, run, target):
    deep = texts / "deep" / "er"
    deep.mkdir(parents=True)
    (deep / "c.txt").write_text("third")
    (texts / "notes.md").write_text("not text")
    (texts / "empty.txt").touch()
    every = [FIRST.encode(), SECOND.encode(), b"third"]
    for source, wanted in (
        (f"{texts}", every),
        (f"{texts}/", every),
        (f"{texts}/**/*.txt", every),
        (f"{texts}/*", every[:2]),
        (f"{texts}/?.txt", every[:2]),
        (f"{deep}", every[2:]),
        (f"{texts}/b.txt", every[1:2]),
    ):
        run(sources=(source,), val_fraction=0.0, overwrite=True)
        assert documents_of(target, "train") == wanted, source


def test_a_file_named_like_a_pattern_is_itself(texts, run, target):
    (texts / "[a].txt").write_text("brackets")
    run(sources=(f"{texts}/[a].txt",), val_fraction=0.0)
    assert documents_of(target, "train") == [b"brackets"]


def test_sources_are_read_in_their_order_and_files_once(texts, run, target):
    run(sources=(f"{texts}/b.txt", f"{texts}", f"{texts}/*.txt"), val_fraction=0.0)
    assert documents_of(target, "train") == [SECOND.encode(), FIRST.encode()]


def test_a_file_named_in_two_ways_is_read_once(texts, run, target, monkeypatch):
    monkeypatch.chdir(texts.parent)
    ways = (f"{texts}", "texts/a.txt", "./texts/b.txt", f"{texts}/../texts/a.txt")
    run(sources=ways, val_fraction=0.0)
    assert len(documents_of(target, "train")) == 2


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    """A made-up standard library."""
    root = tmp_path / "library"
    for name, content in {
        "os.py": "import sys\r\n",
        "json/decoder.py": "# é 😀\nx = 1\n",
        "json/__init__.py": "",
        "old.py": "# coding: latin-1\ny = 'é'\n".encode("latin-1"),
        "test/test_os.py": "left out",
        "json/tests/test_json.py": "left out",
        "idlelib/idle_test/x.py": "left out",
        "site-packages/numpy/core.py": "left out",
        "__pycache__/os.py": "left out",
        "LICENSE.txt": "left out",
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(root))
    return root


def test_the_standard_library_is_its_sources_as_python_reads_them(library, run, target):
    run(sources=("stdlib",), val_fraction=0.0)
    assert documents_of(target, "train") == [
        "# é 😀\nx = 1\n".encode(),
        "# coding: latin-1\ny = 'é'\n".encode(),
        b"import sys\n",
    ]


def test_an_unknown_encoding_is_refused(library, run, target):
    (library / "odd.py").write_text("# coding: nonsense\n")
    with pytest.raises(ValueError, match=r"odd\.py.*unknown encoding.*nonsense"):
        run(sources=("stdlib",))
    assert not target.exists()


def test_the_default_source_is_the_library_of_this_python(run, target, monkeypatch):
    every = sources.stdlib_paths()
    assert {json.__file__, os.__file__, tokenize.__file__} <= set(every)
    monkeypatch.setattr(sources, "stdlib_paths", lambda: every[::10])
    run(sources=PrepareConfig().sources)
    train, val = documents_of(target, "train"), documents_of(target, "val")
    files = []
    for path in every[::10]:
        with tokenize.open(path) as file:
            files.append(file.read().encode())
    assert sorted(train + val) == sorted(content for content in files if content)
    assert sum(map(len, val)) >= 0.05 * sum(map(len, files)) > 0


# --- running again


def test_the_same_settings_again_touch_nothing(texts, target, capsys):
    assert command(texts, target) == 0
    before = snapshot(target)
    capsys.readouterr()
    assert command(texts, target, "--workers=2") == 0
    assert f"{target} is already prepared with these settings" in capsys.readouterr().out
    assert snapshot(target) == before


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--seed=7", "seed was 1337, is now 7"),
        ("--tokenizer=bpe", "tokenizer was 'bytes', is now 'bpe'"),
        ("--val_fraction=0.5", "val_fraction was 0.05, is now 0.5"),
    ],
)
def test_other_settings_are_refused_by_name(texts, target, capsys, argument, said):
    assert command(texts, target) == 0
    before = snapshot(target)
    assert command(texts, target, argument) == 2
    err = capsys.readouterr().err
    assert f"error: {target} was prepared with other settings: {said}. Use --overwrite" in err
    assert snapshot(target) == before


def test_advice_never_replaces_what_nobody_named(tmp_path, monkeypatch, capsys):
    """With the data_dir that is not typed, only the same sources may be overwritten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "stdlib_paths", lambda: [json.__file__])
    (tmp_path / "my novel.txt").write_text(FIRST * 9)
    (tmp_path / "novel.docx").write_bytes(b"PK")
    bytes_only = "--tokenizer=bytes"
    assert PrepareConfig().data_dir == str(progress.DEFAULT)
    assert prepare.main([bytes_only]) == 0
    before = snapshot(tmp_path)
    for arguments, said in (
        (["--seed=7"], "Use --overwrite to replace it, or another --data_dir"),
        (["--sources=my novel.txt"], "Use a folder of its own: --data_dir=data/my_novel"),
        (
            ["--sources=my novel.txt", "--data_dir=./data/stdlib/../stdlib"],
            "Use --overwrite to replace it, or another --data_dir",
        ),
        (["--sources=novel.docx"], "'novel.docx' is of an unsupported kind: only .csv"),
        (["--sources=nothing.txt"], "'nothing.txt' matches no file"),
    ):
        assert prepare.main([bytes_only, *arguments]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert said in line and ("--overwrite" in line) == ("--overwrite" in said)
        assert snapshot(tmp_path) == before


def test_overwrite_replaces_all_shards(run, target):
    run(shard_tokens=20)
    (target / "notes.md").write_text("mine")
    assert len(shards.shard_paths(target, "train")) > 1
    run(val_fraction=0.0, overwrite=True)
    assert [path.name for path in shards.shard_paths(target, "train")] == ["train_000000.bin"]
    assert shards.shard_paths(target, "val") == []
    assert (target / "notes.md").read_text() == "mine"
    assert len(documents_of(target, "train")) == 2


def test_overwrite_and_restarts_do_not_combine(run, target, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(ValueError, match="--overwrite does not combine with --max-restarts"):
        run(overwrite=True)
    run()


def test_leftovers_of_a_killed_run_are_removed(run, target):
    (target / dataset.PARTIAL).mkdir(parents=True)
    (target / dataset.PARTIAL / "train_000000.bin").write_bytes(b"half")
    run(val_fraction=0.0)
    assert len(documents_of(target, "train")) == 2
    assert not (target / dataset.PARTIAL).exists()


def test_a_run_that_was_killed_while_moving_its_files_can_be_repeated(run, target):
    run()
    partial = target / dataset.PARTIAL
    partial.mkdir()
    for name in ("dataset.json", "val_000000.bin"):
        (target / name).rename(partial / name)
    with pytest.raises(ValueError, match=r"half prepared: run its prepare\.py command again"):
        dataset.open_dataset(target)
    run()
    assert len(documents_of(target, "train")) == 2 and len(documents_of(target, "val")) == 1


def test_old_shards_that_a_killed_run_did_not_remove_are_not_mixed_in(run, target):
    run(shard_tokens=20)
    (target / "dataset.json").unlink()
    (target / dataset.PARTIAL).mkdir()
    run(val_fraction=0.0)
    assert documents_of(target, "train") == [FIRST.encode(), SECOND.encode()]
    assert shards.shard_paths(target, "val") == []


def test_a_failure_while_moving_the_files_can_be_repaired(run, target, monkeypatch):
    run()
    really_replace = Path.replace

    def replace(self, other):
        if self.name == "dataset.json":
            raise OSError(errno.EACCES, "in use")
        return really_replace(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.raises(OSError, match="in use"):
            run(seed=7, overwrite=True)
    run(seed=7, overwrite=True)
    assert len(documents_of(target, "train")) == 2 and len(documents_of(target, "val")) == 1


# --- what others made


@pytest.mark.parametrize("name", ["train.bin", "train_000000.bin", "pytorch_model.bin"])
def test_shards_of_others_are_not_touched(run, target, name):
    target.mkdir()
    (target / name).write_bytes(b"theirs")
    before = snapshot(target)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=f"{name}, which prepare.py did not make"):
            run(overwrite=overwrite)
        assert snapshot(target) == before


def test_the_tokenizer_may_be_that_of_a_run(run, target, tmp_path):
    tokenizer = Tokenizer.train(["some text"], 260)
    for step in ("step_000001", "step_000002"):
        (tmp_path / "out" / step).mkdir(parents=True)
        (tmp_path / "out" / step / "state.json").touch()
        tokenizer.save(tmp_path / "out" / step)
    run(tokenizer=str(tmp_path / "out"))
    assert Tokenizer.load(target).fingerprint == tokenizer.fingerprint


def test_the_tokenizer_of_others_is_not_touched(run, target):
    target.mkdir()
    (target / "tokenizer.json").write_text("theirs")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        run()
    assert (target / "tokenizer.json").read_text() == "theirs"


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "theirs"}', "{}"])
def test_the_manifest_of_others_is_not_touched(texts, target, content):
    target.mkdir()
    (target / "dataset.json").write_text(content)
    before = snapshot(target)
    assert command(texts, target) == 2
    assert snapshot(target) == before


def test_an_existing_folder_without_data_is_used(run, target):
    target.mkdir()
    (target / "notes.md").write_text("mine")
    run()
    assert (target / "notes.md").read_text() == "mine"
    assert (target / "dataset.json").exists()


# --- what is refused, and leaves nothing


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


MISTAKES = {
    "empty": (lambda folder: write(folder / "x.txt", b""), "there is no text in "),
    "not utf-8": (
        lambda folder: write(folder / "x.txt", b"ab\xe9 caf\xe9"),
        "x.txt is not UTF-8: byte 0xe9 at 2; convert it, for example with "
        "iconv -f windows-1252 -t utf-8",
    ),
    "missing": (
        lambda folder: str(folder / "x.txt"),
        "matches no file of these kinds: .csv",
    ),
    "no match": (lambda folder: f"{folder}/*.txt", "matches no file of these kinds: .csv"),
    "folder without text": (str, "matches no file of these kinds: .csv"),
    "extension": (
        lambda folder: write(folder / "x.pdf", b"%PDF"),
        ".txt files are read, compressed or not",
    ),
}


@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_source_that_cannot_be_read_leaves_nothing(tmp_path, target, capsys, mistake, existed):
    make, said = MISTAKES[mistake]
    folder = tmp_path / "sources"
    folder.mkdir()
    if existed:
        target.mkdir()
        (target / "notes.md").write_text("mine")
    before = snapshot(target)
    assert command(make(folder), target) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: ") and said in err
    assert "Traceback" not in err
    assert target.exists() == existed and snapshot(target) == before


def test_a_bad_file_among_good_ones_leaves_nothing(texts, target, capsys):
    (texts / "c.txt").write_bytes(b"\xff\xfe")
    assert command(texts, target) == 2
    assert "c.txt is not UTF-8, but UTF-16: convert it" in capsys.readouterr().err
    assert not target.exists()


def test_a_data_dir_that_is_a_file_is_refused(texts, target, capsys):
    target.write_text("mine")
    assert command(texts, target) == 2
    assert f"error: data_dir must be a folder, not '{target}'" in capsys.readouterr().err
    assert command(texts, target / "below") == 2
    assert target.read_text() == "mine"


def test_all_settings_out_of_range_are_reported_at_once(target, capsys):
    wrong = {
        "sources": "",
        "vocab_size": 70000,
        "val_fraction": 1.0,
        "shard_tokens": 0,
        "workers": -1,
        "seed": -1,
    }
    arguments = [f"--{name}={value}" for name, value in wrong.items()]
    assert prepare.main([f"--data_dir={target}", *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and all(name in last for name in wrong)
    assert not target.exists()


def test_gpt2_without_its_files_leaves_nothing(texts, target, capsys, no_gpt2_files):
    assert command(texts, target, "--tokenizer=gpt2") == 2
    assert "TIKTOKEN_CACHE_DIR" in capsys.readouterr().err
    assert not target.exists()


@pytest.fixture
def breaks(monkeypatch):
    """`breaks(error)` makes the second shard of a run raise."""

    def after_one_shard(error):
        really_finish, calls = shards.ShardWriter._finish, []

        def finish(writer):
            calls.append(writer)
            if len(calls) == 2:
                raise error
            really_finish(writer)

        monkeypatch.setattr(shards.ShardWriter, "_finish", finish)

    return after_one_shard


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_nothing(texts, target, capsys, breaks):
    breaks(FULL)
    assert command(texts, target, "--shard_tokens=10") == 2
    assert capsys.readouterr().err.endswith("error: [Errno 28] No space left on device\n")
    assert not target.exists()


def test_a_full_disk_leaves_what_was_there(texts, target, breaks):
    assert command(texts, target) == 0
    before = snapshot(target)
    breaks(FULL)
    assert command(texts, target, "--shard_tokens=10", "--overwrite") == 2
    assert snapshot(target) == before


def test_a_full_disk_while_repairing_can_be_repaired_too(run, target, breaks):
    run()
    (target / "dataset.json").unlink()
    (target / dataset.PARTIAL).mkdir()  # as left by a kill while the files were moved
    breaks(FULL)
    with pytest.raises(OSError, match="No space"):
        run(shard_tokens=10)
    run()
    assert len(documents_of(target, "train")) == 2 and len(documents_of(target, "val")) == 1


def test_an_interrupt_leaves_nothing(texts, target, breaks):
    breaks(KeyboardInterrupt())
    assert command(texts, target, "--shard_tokens=10") == 130
    assert not target.exists()


def test_a_data_dir_within_a_source_is_refused(texts, capsys, monkeypatch):
    """Its files would be read as text when the command is repeated or resumes."""
    monkeypatch.chdir(texts)
    before = snapshot(texts)
    for source in (".", "../texts/", str(texts)):
        assert command(source, "data") == 2
        assert f"data lies in the source {source!r}" in capsys.readouterr().err
        assert snapshot(texts) == before
    assert command("*.txt", "data") == command("*.txt", "data") == 0


def test_the_size_of_the_shards_is_announced_where_it_can_be_told(texts, target, capsys):
    assert command(texts, target) == 0
    assert "of shards to write" in capsys.readouterr().err
    (texts / "c.txt.gz").write_bytes(gzip.compress(b"text " * 9999))
    assert command(texts, target, "--overwrite") == 0
    assert "of shards to write" not in capsys.readouterr().err


def test_the_command_reports_what_it_made(texts, target, capsys):
    assert command(texts, target, "--val_fraction=0") == 0
    size = len(FIRST.encode()) + len(SECOND.encode())
    assert capsys.readouterr().out.splitlines() == [
        f"{texts}: 2 documents, {size + 2} tokens",
        f"train: 2 documents, {size} bytes, {size + 2} tokens ({size / (size + 2):.2f} bytes per "
        "token)",
        "val: empty, but train.py needs some: try --val_fraction, or more documents",
        f"wrote {target}, with a vocabulary of 257 ids",
    ]


def test_a_document_is_not_both_trained_on_and_validated_on(texts, target, run):
    with pytest.raises(ValueError, match=r"a\.txt is in sources and in val_sources"):
        run(sources=(str(texts),), val_sources=(f"{texts}/a.txt",))
    assert not target.exists()


# --- records


def jsonl(path: Path, records) -> str:
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def talk(number):
    question = {"role": "user", "content": f"What is {number} + 1?"}
    return {"messages": [question, {"role": "assistant", "content": f"It is {number + 1}."}]}


def test_only_answers_count_in_the_loss(run, tmp_path, target):
    source = jsonl(tmp_path / "talks.jsonl", [talk(number) for number in range(40)])
    run(sources=(source,), template="chat", shard_tokens=333)
    for name in ("train", "val"):
        split = dataset.open_dataset(target).split(name)
        tokens, mask = split[0 : len(split)], split.mask(0, len(split))
        answers = [text.split(b"### Assistant:\n")[1] for text in documents_of(target, name)]
        wanted = [token for answer in answers for token in [*answer, EOT]]
        assert tokens[mask == 1].tolist() == wanted != []


def test_empty_files_are_counted_and_reported(tmp_path, capsys):
    for name, text in (("a.txt", "some text\n"), ("b.txt", ""), ("c.txt", "more\n"), ("d.txt", "")):
        (tmp_path / name).write_text(text)
    data_dir = tmp_path / "data"
    arguments = [f"--sources={tmp_path}/*.txt", f"--data_dir={data_dir}", "--tokenizer=bytes"]
    assert prepare.main(arguments) == 0
    where = str((tmp_path / "b.txt").resolve())
    assert f"skipped 2: an empty file (the first: {where})" in capsys.readouterr().out
    (source,) = dataset.open_dataset(data_dir).manifest.sources
    assert (
        source.dropped == {"an empty file": (2, where)} and source.documents == 3
    )  # the smallest is cut


def test_bad_records_are_refused_with_their_place_or_skipped_and_counted(
    texts, target, tmp_path, capsys
):
    records = [{"text": f"text {number}"} for number in range(9)]
    records[3:3] = ["{oops", {"text": ""}, {"body": "x"}, {"text": "long " * 50}]
    source = jsonl(tmp_path / "a.jsonl", records)
    wanted = [f"--sources={source}", "--max_record_tokens=100"]
    assert command(texts, target, *wanted) == 2
    assert "a.jsonl, line 4: not JSON (--bad_records=skip" in capsys.readouterr().err
    assert not target.exists()
    assert command(texts, target, *wanted, "--bad_records=skip") == 0
    out, err = capsys.readouterr()
    [known] = dataset.open_dataset(target).manifest.sources
    assert known.documents == 9
    assert {reason: count for reason, (count, _) in known.dropped.items()} == {
        "not JSON": 1,
        "empty": 1,
        "no field 'text'": 1,
        "more than 100 tokens": 1,
    }
    assert "a.jsonl, line 7: more than 100 tokens" in err and "skipped 1: empty" in out
    assert prepare.main([f"--inspect={target}"]) == 0
    assert "skipped 1: empty" in capsys.readouterr().out


def test_halves_of_surrogate_pairs_become_replacement_characters(run, tmp_path, target):
    source = jsonl(tmp_path / "a.jsonl", ['{"text": "a\\ud800b"}', '{"text": "\\ud83d\\ude00"}'])
    run(sources=(source,), val_fraction=0.0)
    assert documents_of(target, "train") == ["a\ufffdb".encode(), "😀".encode()]


def test_even_a_small_source_has_validation_and_equal_records_stay_together(run, tmp_path, target):
    source = jsonl(tmp_path / "a.jsonl", [{"text": f"no {number}"} for number in range(3)])
    run(sources=(source,))
    assert documents_of(target, "val") == [b"no 1"]
    source = jsonl(tmp_path / "b.jsonl", [{"text": f"text {number % 50}"} for number in range(500)])
    run(sources=(source,), val_fraction=0.2, data_dir=str(target / "b"))
    train, val = (set(documents_of(target / "b", name)) for name in ("train", "val"))
    assert not train & val and len(train | val) == 50 and 4 <= len(val) <= 20


@pytest.mark.parametrize("shard_tokens", [7, 1000])
@pytest.mark.parametrize("template", ["text", "chat"])
def test_what_is_trained_on_is_kept_out_of_validation(
    run, tmp_path, target, template, shard_tokens
):
    def record(number):
        return talk(number) if template == "chat" else {"text": f"text {number}"}

    train = jsonl(tmp_path / "train.jsonl", map(record, range(10)))
    val = jsonl(tmp_path / "val.jsonl", map(record, (3, 20, 9, 21)))
    run(sources=(train,), val_sources=(val,), template=template, shard_tokens=shard_tokens)
    kept = documents_of(target, "val")
    assert len(kept) == 2 and b"20" in kept[0] and b"21" in kept[1]
    entry = dataset.open_dataset(target).manifest.splits.val
    assert entry.documents == 2 and entry.trained_on == 2
    tokens = tokens_of(target, "val")
    assert entry.tokens == len(tokens)
    assert prepare.inspect(target)
    if template == "chat":
        mask = dataset.open_dataset(target).split("val").mask(0, len(tokens))
        assert bytes((tokens[mask == 1] % 256).tolist()) == b"It is 21.\0It is 22.\0"


# --- a BPE


def test_a_vocabulary_that_the_text_does_not_fill_is_said(tmp_path, target, capsys):
    (tmp_path / "a.txt").write_text("abc abd " * 500)
    arguments = [f"--sources={tmp_path}/a.txt", f"--data_dir={target}", "--vocab_size=50257"]
    assert prepare.main(arguments) == 0
    size = dataset.open_dataset(target).manifest.vocab_size
    err = capsys.readouterr().err
    assert f"BPE: {size} ids, not 50,257: the text is too short or too uniform" in err
    assert prepare.main([*arguments, "--vocab_size=260", "--overwrite"]) == 0
    assert " ids, not " not in capsys.readouterr().err


def test_long_runs_take_seconds_in_files_and_in_records(tmp_path, target):
    """As one word each, they would take from minutes to hours."""
    signs = (" ", "\n", "\0", "a", "\u0301", "👩\u200d", "7")
    runs = ["x" + sign * 300_000 + "y" for sign in signs]
    for number, run in enumerate(runs):
        (tmp_path / f"{number}.txt").write_bytes(run.encode())
    records = jsonl(tmp_path / "a.jsonl", [{"text": text} for text in runs])
    began = time.monotonic()
    arguments = [f"--sources={tmp_path}/*.txt,{records}", f"--data_dir={target}"]
    assert prepare.main([*arguments, "--vocab_size=400", "--val_fraction=0"]) == 0
    assert time.monotonic() - began < 20
    tokens, tokenizer = tokens_of(target, "train"), Tokenizer.load(target)
    documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot_id) + 1)[:-1]
    assert [tokenizer.decode(ids[:-1]) == text for ids, text in zip(documents, runs * 2)] == [
        True
    ] * 14
    assert all(np.array_equal(*pair) for pair in zip(documents[:7], documents[7:]))


# --- how much


def test_mixing_follows_the_weights_in_tokens(run, tmp_path, target):
    one = jsonl(tmp_path / "one.jsonl", [{"text": "1" * 99} for _ in range(300)])
    two = jsonl(tmp_path / "two.jsonl", [{"text": "2" * 9} for _ in range(1000)])
    run(sources=(f"{one}=3", f"{two}=1"), val_fraction=0.0)
    tokens = tokens_of(target, "train")
    for part in (tokens[:4000], tokens):
        share = (part == ord("1")).sum() / ((part == ord("1")).sum() + (part == ord("2")).sum())
        assert share == pytest.approx(0.75 * 1.1 / (0.75 * 1.1 + 0.25), abs=0.03)
    assert (tokens == ord("1")).sum() == 99 * 300 or (tokens == ord("2")).sum() == 9 * 1000
    ended = [known.ended for known in dataset.open_dataset(target).manifest.sources]
    assert sorted(ended) == [False, True]


def test_weights_on_some_sources_are_refused(texts, target):
    assert command(texts, target, f"--sources={texts}=2,stdlib") == 2
    assert not target.exists()


def test_limits(run, tmp_path, target, many):
    run(sources=(str(many),), max_tokens=1000, val_fraction=0.1)
    assert len(tokens_of(target, "train")) + len(tokens_of(target, "val")) == 1000
    size = (target / "val_000000.bin").stat().st_size
    assert 1024 + 2 * 100 <= size < 1024 + 2 * 250
    run(sources=(str(many),), max_documents=7, val_fraction=0.0, overwrite=True)
    assert len(documents_of(target, "train")) == 7
    source = jsonl(tmp_path / "a.jsonl", [{"text": f"text {number:03}"} for number in range(400)])
    run(sources=(source,), val_fraction=0.5, val_tokens=100, overwrite=True)
    assert 100 <= len(tokens_of(target, "val")) < 110
    assert len(documents_of(target, "train")) + len(documents_of(target, "val")) == 400
    (tmp_path / "a.txt").write_text("0123456789" * 100)
    for limits, train, val in (({"max_tokens": 600}, 300, 300), ({"val_tokens": 70}, 932, 70)):
        run(sources=(f"{tmp_path}/a.txt",), val_fraction=0.5, overwrite=True, **limits)
        assert (len(tokens_of(target, "train")), len(tokens_of(target, "val"))) == (train, val)


def test_sources_in_order_without_weights(run, tmp_path, target):
    one = jsonl(tmp_path / "one.jsonl", [{"text": "a"}, {"text": "b"}])
    (tmp_path / "two.txt").write_text("c")
    run(sources=(one, str(tmp_path / "two.txt")), val_fraction=0.0)
    assert documents_of(target, "train") == [b"a", b"b", b"c"]


# --- killed


def corpus(folder: Path) -> dict:
    """Settings with every way of reading: a cut text, text files, records, weights, masks, val."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(50)]
    prose = " ".join(rng.choice(words, 30_000))
    (folder / "long.txt").write_text(prose)
    (folder / "texts").mkdir()
    for number in range(5):
        (folder / "texts" / f"{number}.txt").write_text(prose[number * 999 : number * 2000])
    records = [{"text": prose[at : at + 50]} for at in rng.integers(0, len(prose), 3000)]
    records[5] = records[7] = "oops"
    one = jsonl(folder / "a.jsonl", records)
    others = [{"text": f"other {prose[at : at + 40]}"} for at in range(0, 50_000, 50)]
    two = jsonl(folder / "b.jsonl", [*others, *records[100:150]])
    return {
        "sources": (str(folder / "long.txt"), str(folder / "texts"), one, two),
        "bad_records": "skip",
        "shard_tokens": 20_011,
        "tokenizer": "bpe",
        "vocab_size": 300,
        "workers": 2,
        "val_tokens": 30_000,
        "seed": 3,
    }


@pytest.mark.parametrize("kind", ["one after another", "weighed", "val_sources"])
def test_stopped_anywhere_it_ends_with_the_same_bytes(tmp_path, monkeypatch, kind):
    """Stopped by an exception after random numbers of writes, with progress saved now and then."""
    settings = corpus(tmp_path / "corpus")
    if kind == "weighed":
        weighed = zip(settings["sources"], (5, 0.5, 1, 1))
        settings["sources"] = tuple(f"{source}={weight}" for source, weight in weighed)
    if kind == "val_sources":
        settings |= {"sources": settings["sources"][:3], "val_sources": settings["sources"][3:]}
    monkeypatch.setattr(encoding, "CHUNK", 5000)
    monkeypatch.setattr(cutting, "BLOCK", 3000)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prepare.prepare(PrepareConfig(data_dir=str(whole), **settings))
    wanted = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert "val_000000.bin" in wanted and len(wanted) > 6

    monkeypatch.setattr(builder, "SAVE_SECONDS", 0)
    really_save = builder.SplitBuilder.save
    rng, lives = np.random.default_rng(1), [0]

    def die():
        lives[0] -= 1
        if lives[0] == 0:
            raise KeyboardInterrupt

    def save(builder):
        die()
        if rng.random() < 0.1:  # else whatever was written since has to be cut off
            really_save(builder)

    def dying(really_write):
        def write(split, *arguments):
            really_write(split, *arguments)
            die()

        return write

    monkeypatch.setattr(builder.SplitBuilder, "save", save)
    for name in ("write", "write_documents"):
        monkeypatch.setattr(splits.SplitWriter, name, dying(getattr(splits.SplitWriter, name)))
    deaths = 0
    for _ in range(200):
        lives[0] = int(rng.integers(1, 150))
        try:
            prepare.prepare(PrepareConfig(data_dir=str(parts), **settings))
            break
        except KeyboardInterrupt:
            deaths += 1
    assert deaths >= 3
    assert {path.name: path.read_bytes() for path in parts.iterdir()} == wanted


def test_a_run_begun_with_other_settings_or_texts_is_not_resumed(
    texts, target, capsys, monkeypatch
):
    monkeypatch.setattr(builder, "SAVE_SECONDS", 0)
    monkeypatch.setattr(shards.ShardWriter, "close", lambda writer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(texts, target)
    monkeypatch.undo()
    assert (target / dataset.PARTIAL / "progress.json").exists()
    assert command(texts, target, "--seed=5") == 2
    assert "was started with other settings: seed was 1337, is now 5" in capsys.readouterr().err
    (texts / "a.txt").write_text("changed")
    assert command(texts, target) == 2
    assert "a.txt is new, has changed or is gone since" in capsys.readouterr().err
    (texts / "a.txt").unlink()
    assert command(texts, target) == 2
    assert "a.txt is new, has changed or is gone since" in capsys.readouterr().err
    assert command(texts, target, "--overwrite", "--val_fraction=0") == 0
    assert documents_of(target, "train") == [SECOND.encode()]


@pytest.mark.parametrize("damage", ["cut off", "changed"])
def test_a_run_whose_shards_are_damaged_starts_over_as_the_message_says(
    texts, target, capsys, monkeypatch, damage
):
    monkeypatch.setattr(builder, "SAVE_SECONDS", 0)
    monkeypatch.setattr(shards.ShardWriter, "close", lambda writer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(texts, target)
    monkeypatch.undo()
    path = target / dataset.PARTIAL / "train_000000.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content[:-1] if damage == "cut off" else content)
    assert command(texts, target) == 2
    assert f"remove {path.parent} to start over" in capsys.readouterr().err
    shutil.rmtree(path.parent)
    assert command(texts, target) == 0


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("existed", [False, True])
def test_killed_before_the_first_note_leaves_nothing_in_the_way(texts, run, target, existed):
    if existed:
        run(seed=3)
    before = snapshot(target)
    script = (
        "import os, sys\nimport prepare\n"
        "prepare.SplitBuilder.run = lambda *_: os.kill(os.getpid(), 9)\n"
        "sys.exit(prepare.main())"
    )
    arguments = [f"--sources={texts}", f"--data_dir={target}", "--vocab_size=300", "--overwrite"]
    killed = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=Path(__file__).parents[1]
    )
    assert killed.returncode == -9 and (target / dataset.PARTIAL / "tokenizer.json").exists()
    if existed:
        assert before.items() <= snapshot(target).items()
        run(seed=3)  # as it was
        assert len(documents_of(target, "train")) == 2 and len(documents_of(target, "val")) == 1
    else:
        with pytest.raises(ValueError, match=r"half prepared: run its prepare\.py command again"):
            dataset.open_dataset(target)
    run(val_fraction=0.0, overwrite=existed)  # other settings
    assert documents_of(target, "train") == [FIRST.encode(), SECOND.encode()]
    assert not (target / dataset.PARTIAL).exists()


def test_an_interrupted_move_is_not_mistaken_for_another_run(run, texts, target, monkeypatch):
    monkeypatch.setattr(prepare, "install", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run()
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=r"was started with other settings: val_fraction was 0\.05"
    ):
        run(val_fraction=0.0)
    run(val_fraction=0.0, overwrite=True)
    assert len(documents_of(target, "train")) == 2


def test_validation_beyond_its_limit_is_not_trained_on(run, tmp_path, target):
    (tmp_path / "t.txt").write_text("t" * 1000)
    (tmp_path / "v.txt").write_text("v" * 1000)
    sources = {"sources": (f"{tmp_path}/t.txt",), "val_sources": (f"{tmp_path}/v.txt",)}
    run(**sources, val_tokens=200, max_tokens=500)
    assert set(tokens_of(target, "train")) == {ord("t")} and len(tokens_of(target, "train")) == 500
    assert set(tokens_of(target, "val")) == {ord("v")} and len(tokens_of(target, "val")) == 200


# --- inspecting


def test_inspect_finds_every_kind_of_damage(texts, target, capsys):
    assert command(texts, target, "--template=chat") == 0
    assert prepare.main([f"--inspect={target}"]) == 0
    out = capsys.readouterr().out
    assert "⟦First line." in out or "⟦naïve" in out
    for name in ("train_000000.bin", "train_000000.mask.bin", "val_000000.bin", "tokenizer.json"):
        content = (target / name).read_bytes()
        (target / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        assert prepare.main([f"--inspect={target}"]) == 2
        assert name in capsys.readouterr().err
        (target / name).write_bytes(content)
    assert prepare.main([f"--inspect={target}"]) == 0
    assert prepare.main([f"--inspect={target}/nothing"]) == 2


def test_inspect_finds_an_id_beyond_the_vocabulary(shard_folder, capsys):
    folder = shard_folder(train=[[1, 2], [3, 4, 257, 5]], manifest=False)
    assert prepare.main([f"--inspect={folder}"]) == 2
    wanted = f"error: {folder}/train_000001.bin: id 257 at token 2 is beyond the vocabulary of 257"
    assert wanted in capsys.readouterr().err


def test_a_split_without_tokens_can_be_inspected(shard_folder, capsys):
    folder = shard_folder(train=[[1, 2]], val=[[]], manifest=False)
    assert prepare.main([f"--inspect={folder}"]) == 0
    assert "val: 0 tokens" in capsys.readouterr().out


# --- importing


@pytest.mark.parametrize("code", ["import prepare", "import runpy, sys\n{help}"])
def test_neither_importing_nor_help_loads_torch(code):
    """The help loads nothing that is slow."""
    show_help = (
        "sys.argv = ['prepare.py', '--help']\n"
        "try: runpy.run_path('prepare.py', run_name='__main__')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
    )
    script = code.format(help=show_help) + "\nimport sys\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    loaded = set(done.stderr.split())
    assert done.returncode == 0 and "configurator" in loaded and "torch" not in loaded
    if "runpy" in code:
        assert "--sources" in done.stdout
        assert not loaded & {"numpy", "tiktoken", "tokenizers", "tqdm", "datasets", "pyarrow"}
    else:
        assert done.stdout == ""
        assert not loaded & {"tokenizers", "datasets", "pyarrow", "fsspec"}


# --- running it again, and odd sources


def run_in(folder, *arguments) -> int:
    return prepare.main([f"--data_dir={folder}", "--tokenizer=bytes", *map(str, arguments)])


def test_sources_that_changed_since_are_not_taken_for_prepared(tmp_path, capsys):
    text = tmp_path / "novel.txt"
    text.write_text("It was a night.\n" * 50)
    source, folder = f"--sources={text}", tmp_path / "data"
    assert run_in(folder, source) == run_in(folder, source) == 0
    assert "is already prepared" in capsys.readouterr().out
    text.write_text("It was a day.\n" * 50)
    assert run_in(folder, source) == 2
    assert "trained on it cannot be resumed then" in capsys.readouterr().err
    assert run_in(folder, source, "--overwrite") == 0
    text.unlink()  # a file that has gone cannot be compared
    assert run_in(folder, source) == 0


def test_overwriting_leaves_files_of_others(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    folder = tmp_path / "data"
    assert run_in(folder, f"--sources={tmp_path}/a.txt", "--shard_tokens=200") == 0
    (folder / "pytorch_model.bin").write_bytes(b"mine")
    assert run_in(folder, f"--sources={tmp_path}/a.txt", "--overwrite") == 0
    assert sorted(path.name for path in folder.glob("*.bin")) == [
        "pytorch_model.bin",
        "train_000000.bin",
        "val_000000.bin",
    ]


def test_a_link_is_read_by_its_own_name_and_once(tmp_path):
    blob = tmp_path / "blobs" / "3f2a"
    blob.parent.mkdir()
    blob.write_text('{"text": "hello there"}\n' * 40)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).symlink_to(blob)
    assert run_in(tmp_path / "data", f"--sources={tmp_path}/*.jsonl") == 0
    (source,) = dataset.open_dataset(tmp_path / "data").manifest.sources
    assert source.documents == 40


def test_validation_has_about_the_size_that_was_asked_for(tmp_path):
    long_line = tmp_path / "line.txt"
    long_line.write_text("title\n" + "word " * 300_000)
    folder = tmp_path / "files"
    folder.mkdir()
    for name, size in (("big", 400_000), ("small", 60), ("tiny", 50)):
        (folder / f"{name}.txt").write_text("a line\n" * (size // 7))
    for seed in range(4):
        for number, source in enumerate((long_line, folder)):
            data_dir = tmp_path / f"data{number}{seed}"
            assert run_in(data_dir, f"--sources={source}", f"--seed={seed}") == 0
            splits = dataset.open_dataset(data_dir).statistics
            share = splits["val"]["bytes"] / (splits["val"]["bytes"] + splits["train"]["bytes"])
            assert 0 < share < 0.06


def test_a_weight_on_files_that_another_source_has_is_refused(tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "1.txt").write_text("one\n" * 50)
    sources = f"--sources={tmp_path}/notes/=3,{tmp_path}/notes/1.txt=1"
    assert run_in(tmp_path / "data", sources) == 2
    assert "has a weight, but no text of its own" in capsys.readouterr().err


def test_a_folder_of_nanogpt_can_be_inspected(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Tokenizer, "gpt2", Tokenizer.bytes)
    np.frombuffer(b"To be, or not to be", np.uint8).astype("<u2").tofile(tmp_path / "train.bin")
    assert prepare.main([f"--inspect={tmp_path}"]) == 0
    assert "To be, or not to be" in capsys.readouterr().out


def test_a_dataset_of_the_hub_that_changed_is_not_resumed(tmp_path, monkeypatch, capsys):
    hashes = iter(["first", "first", "second"])
    monkeypatch.setattr(prepare, "hub_hash", lambda source: next(hashes))
    monkeypatch.setattr(encoding, "CHUNK", 1)
    monkeypatch.setattr(builder, "SAVE_SECONDS", 0)

    class Broken:
        size = 0

        def batches(self, fields, state):
            for n in range(1, 100):
                yield Rows([{"text": f"text {n}"}], "row", [n]), None
            raise OSError("the network is away")

    monkeypatch.setattr(sources, "hub_shards", lambda *_: [Broken()])
    for said in ("network is away", "network is away", "hf:own/er is new, has changed"):
        assert run_in(tmp_path / "data", "--sources=hf:own/er") == 2
        assert said in capsys.readouterr().err
