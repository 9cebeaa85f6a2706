"""A disk that fills up, or becomes read-only, at one call after another: one line, and no loss."""

import builtins
import errno
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from test_train import assert_same_end, cfg, command  # noqa: F401

import prepare
import train
from plaingpt import locks
from plaingpt.checkpoint import folders, store
from plaingpt.text import builder
from tools import export

EVERY = int(os.environ.get("PLAINGPT_TEST_EVERY_CALL", 0))  # 1: not a sample, but all of them


class Disk:
    """Counts the calls that change files below a folder. From number `last` on they fail: those
    that need room on a full disk, all on one that is `read_only`."""

    def __init__(self, monkeypatch, folder) -> None:
        self.folder, self.calls, self.last, self.read_only = str(folder), 0, 0, False
        patch = monkeypatch.setattr
        for name in ("mkdir", "fsync", "link"):
            patch(os, name, self.needing(True, getattr(os, name)))
        for name in ("rename", "replace", "unlink", "rmdir"):
            patch(os, name, self.needing(False, getattr(os, name)))
        for owner in (builtins, io):
            patch(owner, "open", self.opening(io.open))
        patch(os, "open", self.creating(os.open))
        patch(os, "write", self.needing(True, os.write))
        patch(os, "ftruncate", self.needing(False, os.ftruncate))
        save = self.needing(True, torch.save, RuntimeError)
        patch(torch, "save", save)
        save = self.needing(True, safetensors.torch.save_file, safetensors.SafetensorError)
        patch(safetensors.torch, "save_file", save)

    def call(self, room: bool, kind: type[Exception] = OSError) -> None:
        self.calls += 1
        if self.last and self.calls >= self.last and (room or self.read_only):
            number = errno.EROFS if self.read_only else errno.ENOSPC
            raise kind(*[number] * (kind is OSError), os.strerror(number))

    def needing(self, room, function, kind=OSError):
        def call(*words, **named):
            self.call(room, kind)
            return function(*words, **named)

        return call

    def creating(self, function):
        def open(path, flags, *words, **named):
            if flags & os.O_CREAT and str(path).startswith(self.folder):
                self.call(True)
            return function(path, flags, *words, **named)

        return open

    def opening(self, function):
        def open(file, mode="r", *words, **named):
            if mode in ("r", "rb", "rt") or not str(file).startswith(self.folder):
                return function(file, mode, *words, **named)
            self.call("r" not in mode)
            return File(function(file, mode, *words, **named), self)

        return open


class File:
    """An open file on a `Disk`."""

    def __init__(self, file, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        self.disk.call(True)
        return self.file.write(content)


@pytest.fixture
def disk(monkeypatch, tmp_path):
    return Disk(monkeypatch, tmp_path)


def check(disk: Disk, out: Path, cases: int, run, assert_sound, capsys) -> None:
    """`run` a command that writes `out`, on a disk that fails at one call after another, and then
    again, on one that has recovered."""
    shutil.rmtree(out, ignore_errors=True)
    disk.calls = 0
    assert run() == 0
    whole = disk.calls
    assert whole > 10
    sample = range(1, whole + 1) if EVERY else np.linspace(1, whole, cases).astype(int).tolist()
    for read_only in (False, True):
        for last in sample:
            where = f"call {last} of {whole}, read_only={read_only}"
            shutil.rmtree(out, ignore_errors=True)
            capsys.readouterr()
            disk.calls, disk.last, disk.read_only = 0, last, read_only
            status = run()
            disk.last = 0
            if status == 0:  # only calls that need no room were left
                continue
            err = capsys.readouterr().err
            told = [line for line in err.splitlines() if line.startswith("error: ")]
            assert status == 2 and "Traceback" not in err, f"{where}: {err}"
            assert len(told) == 1 and ("No space left" in err or "Read-only" in err), where
            assert_sound(where)
            assert run() == 0, f"{where}: {capsys.readouterr().err}"
            assert_sound(where, ended=True)


def test_preparing(disk, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(builder, "SAVE_SECONDS", 0)
    talks = [f'{{"instruction": "What is {n}?", "output": "{"one " * n}"}}\n' for n in range(1, 9)]
    (tmp_path / "talks.jsonl").write_text("".join(talks))
    words = [f"--sources={tmp_path}/talks.jsonl", "--template=alpaca", "--tokenizer=bytes"]
    words += ["--val_fraction=0.3", "--shard_tokens=200", "--workers=1"]
    assert prepare.main([*words, f"--data_dir={tmp_path}/whole"]) == 0
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    target = tmp_path / "data"

    def run():
        return prepare.main([*words, f"--data_dir={target}"])

    def assert_sound(where, ended=False):
        if ended:
            found = [path for path in target.iterdir() if path.is_file()]
            left = {path.name: path.read_bytes() for path in found}
            left.pop(locks.NAME, None)  # from a disk that was read-only by then; nobody holds it
            assert left == wanted, where

    check(disk, target, 8, run, assert_sound, capsys)


def test_training(disk, cfg, tmp_path, capsys):  # noqa: F811
    changes = {"max_steps": 3, "save_interval": 1, "eval_interval": 2, "keep_checkpoints": 1}
    assert train.main(command(cfg, tmp_path / "whole", **changes)[2:]) == 0
    out_dir = tmp_path / "out"
    words = command(cfg, out_dir, **changes)[2:]

    def run():
        found = folders.step_folders(out_dir)
        if found and found[-1].name == "step_000003":
            return 0
        return train.main([*words, f"--init_from={'resume' if found else 'scratch'}"])

    def assert_sound(where, ended=False):
        for folder in folders.step_folders(out_dir):
            store.load_model(folder)
            store.read_optimizer(folder)
        if ended:
            assert_same_end(tmp_path / "whole", out_dir)

    check(disk, out_dir, 4, run, assert_sound, capsys)


def test_exporting(disk, cfg, tmp_path, capsys):  # noqa: F811
    run_dir, out_dir = tmp_path / "run", tmp_path / "gift"
    assert train.main(command(cfg, run_dir, max_steps=1)[2:]) == 0
    words = [f"--checkpoint={run_dir}", f"--out_dir={out_dir}"]
    assert export.main(words) == 0
    wanted = {path.name: path.read_bytes() for path in out_dir.iterdir()}

    def run():
        return 0 if out_dir.exists() else export.main(words)

    def assert_sound(where, ended=False):
        if ended or out_dir.exists():
            assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == wanted, where

    check(disk, out_dir, 5, run, assert_sound, capsys)
