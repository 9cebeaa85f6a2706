"""Signals: whenever they come, a run ends soon, with status 0 and nothing half-written."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from test_train import REPO, cfg, command  # noqa: F401

import train
from model import GPT
from plaingpt import runtime
from plaingpt.checkpoint import folders

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX signals")


def send(number: int, stop: list[str] | None = None) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.1)  # a thread takes it


def test_signals_are_noted_and_then_have_their_usual_effect():
    with runtime.stop_signals() as stop:
        assert stop == []
        send(signal.SIGTERM)
        send(signal.SIGTERM)  # the same once more, from torchrun
        assert stop == ["SIGTERM"]
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runtime.stop_signals() as stop:
            send(signal.SIGHUP)
            assert stop == []
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with runtime.stop_signals() as stop:
            send(signal.SIGHUP)
            assert stop == ["SIGHUP"]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes_without_a_signal_ends_a_run_as_a_reader_does():
    ours, theirs = os.openpty()
    with (
        open(theirs, "w", buffering=1) as terminal,
        contextlib.redirect_stdout(terminal),
        runtime.stop_signals() as stop,
    ):
        print("step 1")
        os.close(ours)
        print("step 2")
        print("step 3")
        assert stop == ["the end of its output"]


SECOND = """
import hashlib, os, signal, time
from plaingpt import runtime

runtime.ECHO_S = 0.2
with runtime.stop_signals() as stop:
    for pause in (0.1, 0.3):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(pause)
    print(stop, flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # one long call, as a large product is
"""


def test_a_second_one_ends_even_a_long_native_call_at_once():
    run = subprocess.Popen([sys.executable, "-c", SECOND], cwd=REPO, stdout=subprocess.PIPE)
    assert run.stdout.readline() == b"['SIGTERM']\n"
    time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=10) == 128 + signal.SIGINT


def test_a_signal_during_the_baseline_ends_it(cfg, tmp_path, monkeypatch, capsys):  # noqa: F811
    train.train(replace(cfg, out_dir=str(tmp_path / "first"), max_steps=1))
    warm = replace(cfg, init_from=str(tmp_path / "first"), out_dir=str(tmp_path / "warm"))
    real, calls = GPT.forward, []

    def stopped(self, *args):
        calls.append(args)
        send(signal.SIGTERM)
        return real(self, *args)

    monkeypatch.setattr(GPT, "forward", stopped)
    assert train.main(command(warm, tmp_path / "warm")[2:]) == 0
    assert len(calls) == 1
    assert capsys.readouterr().out.endswith("stopped by SIGTERM; nothing has been saved\n")
    assert folders.step_folders(tmp_path / "warm") == []
    monkeypatch.undo()
    assert train.train(warm)["step"] == 20


def test_a_signal_during_set_up_ends_the_run_before_its_first_step(
    cfg,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    really = train.load_weights
    monkeypatch.setattr(train, "load_weights", lambda *a: send(signal.SIGINT) or really(*a))
    monkeypatch.setattr(train, "optimizer_step", lambda *args: 1 / 0)
    run = replace(cfg, out_dir=str(tmp_path))
    assert train.train(run) == {}
    assert capsys.readouterr().out.endswith("stopped by SIGINT; nothing has been saved\n")
    monkeypatch.undo()
    train.train(replace(run, max_steps=3))
    monkeypatch.setattr(train, "load_weights", lambda *a: send(signal.SIGINT) or really(*a))
    for start in ({"init_from": "resume", "max_steps": 6}, {"overwrite": True}):
        assert train.train(replace(run, **start)) == {}
        assert f"--out_dir={tmp_path} continues from step 3\n" in capsys.readouterr().out
    assert [start.step for start in folders.read_starts(tmp_path)] == [0]
