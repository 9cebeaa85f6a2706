"""Checkpoints that are written while training goes on, as on a GPU."""

import copy
import threading
import time
from dataclasses import replace

import pytest
import torch
from test_train import assert_same_end, cfg  # noqa: F401

import train
from plaingpt.checkpoint import folders, store
from plaingpt.runtime import Runtime
from plaingpt.training import saving


class InBackground(saving.Saver):
    """A Saver that does not wait, and so needs copies of what the next step changes."""

    def __init__(self, log, keep, rt):
        super().__init__(log, keep, rt)
        self.in_background = True

    def save(self, snapshot, prune):
        tensors = {"weights": snapshot.weights, "optimizer": snapshot.optimizer}
        super().save(replace(snapshot, **copy.deepcopy(tensors)), prune)


def test_only_a_cpu_is_waited_for():
    for device, background in (("cpu", False), ("cuda", True), ("mps", True)):
        rt = Runtime(torch.device(device), torch.float32)
        assert saving.Saver(None, 3, rt).in_background == background


def test_a_run_that_fails_waits_for_its_checkpoint(cfg, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(train, "Saver", InBackground)
    really_step, really_save = train.optimizer_step, store.save
    failing = threading.Event()

    def step(state, *args):
        if state.step == 9:
            failing.set()
            raise ArithmeticError
        return really_step(state, *args)

    def save(out_dir, snapshot):
        assert failing.wait(30)
        time.sleep(0.2)
        return really_save(out_dir, snapshot)

    monkeypatch.setattr(train, "optimizer_step", step)
    monkeypatch.setattr(store, "save", save)
    with pytest.raises(ArithmeticError):
        train.train(replace(cfg, out_dir=str(tmp_path / "failing")))
    assert folders.find(tmp_path / "failing").name == "step_000007"


def test_training_goes_on_while_a_checkpoint_is_written(cfg, tmp_path, monkeypatch):  # noqa: F811
    at_once = replace(cfg, out_dir=str(tmp_path / "at_once"), keep_checkpoints=1)
    train.train(at_once)
    meanwhile = replace(at_once, out_dir=str(tmp_path / "meanwhile"))
    monkeypatch.setattr(train, "Saver", InBackground)
    steps, slow = [], threading.Event()
    really_step, really_save = train.optimizer_step, store.save

    def step(*args):
        steps.append(len(folders.step_folders(meanwhile.out_dir)))
        if len(steps) == 12:
            slow.set()
        return really_step(*args)

    def save(out_dir, snapshot):
        assert slow.wait(30)
        return really_save(out_dir, snapshot)

    monkeypatch.setattr(train, "optimizer_step", step)
    monkeypatch.setattr(store, "save", save)
    train.train(meanwhile)
    assert steps[:12] == [0] * 12  # the checkpoint of step 7 waits for the twelfth
    assert_same_end(tmp_path / "at_once", tmp_path / "meanwhile")
    found = [folder.name for folder in folders.step_folders(meanwhile.out_dir)]
    assert found == [folder.name for folder in folders.step_folders(at_once.out_dir)]


@pytest.mark.parametrize("number, last", [(1, 13), (3, 19)])
def test_a_disk_that_refuses_a_checkpoint_ends_the_run(
    cfg,  # noqa: F811
    tmp_path,
    monkeypatch,
    number,
    last,
):
    monkeypatch.setattr(train, "Saver", InBackground)
    saved, steps, really_step, really_save = [], [], train.optimizer_step, store.save

    def save(out_dir, snapshot):
        saved.append(snapshot.state.step)
        if len(saved) == number:
            raise OSError(28, "No space left on device")
        return really_save(out_dir, snapshot)

    def step(state, *args):
        steps.append(state.step)
        return really_step(state, *args)

    monkeypatch.setattr(store, "save", save)
    monkeypatch.setattr(train, "optimizer_step", step)
    with pytest.raises(OSError, match="No space left"):
        train.train(replace(cfg, out_dir=str(tmp_path / "full")))
    assert saved == [7, 14, 20][:number] and steps[-1] == last
