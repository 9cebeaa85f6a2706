"""Exact resuming, the plan, what a run leaves behind, and what it refuses."""

import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import masked_copy, write_shard, write_words
from torch.utils._python_dispatch import TorchDispatchMode

import train
from model import GPT
from plaingpt import cpu, runtime
from plaingpt.checkpoint import folders, hugging_face, store
from plaingpt.text import dataset
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training import held_out, optim, run_folder, state
from plaingpt.training.devices import Device
from plaingpt.training.plan import make_plan
from plaingpt.training.start import Start, model_config, open_start
from plaingpt.training.state import make_state, maybe_compiled

REPO = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> train.TrainConfig:
    """A run of a few milliseconds a step on bytes whose next one can be learned."""
    folder = tmp_path_factory.mktemp("data")
    write_words(folder, 900, 60)
    return train.TrainConfig(
        data_dir=str(folder),
        n_layer=2,
        n_head=2,
        n_embd=32,
        block_size=16,
        batch_size=4,
        max_steps=20,
        warmup_steps=2,
        eval_interval=10,
        save_interval=7,
        log_interval=1,
        sample_interval=0,
        dropout=0.1,
        device="cpu",
    )


def fresh_model(cfg: train.TrainConfig) -> GPT:
    return GPT(model_config(vars(cfg), 257))


def records(out_dir) -> list[dict]:
    """metrics.jsonl without the clock's part."""
    timing = {"tokens_per_s", "dt_ms", "mfu", "peak_mem_gib"}
    found = run_folder.read_records(Path(out_dir) / "metrics.jsonl")
    return [{key: r[key] for key in r if key not in timing} for r in found]


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_end(one: Path, other: Path) -> None:
    one_step, other_step = folders.find(one), folders.find(other)
    assert one_step.name == other_step.name
    assert same(hugging_face.read_weights(one_step), hugging_face.read_weights(other_step))
    assert same(store.read_optimizer(one_step), store.read_optimizer(other_step))
    assert records(one) == records(other)


# --- exactness


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "adamw", "micro_batch_size": 2}, {"vocab_multiple": cpu.LARGE}],
    ids=["muon", "adamw", "compiled_loss"],
)
def test_7_steps_and_13_more_are_20_steps(cfg, tmp_path, monkeypatch, changes):
    cfg = replace(cfg, **changes)
    train.train(replace(cfg, out_dir=str(tmp_path / "whole")))
    parts = replace(cfg, out_dir=str(tmp_path / "parts"))

    real, calls = train.optimizer_step, 0

    def dies_in_the_10th_step(*args):
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "optimizer_step", dies_in_the_10th_step)
    with pytest.raises(KeyboardInterrupt):
        train.train(parts)
    assert folders.find(tmp_path / "parts").name == "step_000007"
    assert len(records(tmp_path / "parts")) == 9
    monkeypatch.undo()
    train.train(replace(parts, init_from="resume"))
    assert_same_end(tmp_path / "whole", tmp_path / "parts")
    assert [r["step"] for r in records(tmp_path / "parts")] == list(range(1, 21))


def test_a_line_has_the_mean_loss_since_the_line_before(cfg, tmp_path, monkeypatch):
    """Without the steps that were not finite, and though a kill falls between two lines."""
    real = train.optimizer_step

    def never_finite_in_step_9(state, *rest):
        loss, *others = real(state, *rest)
        return math.nan if state.step == 8 else loss, *others

    monkeypatch.setattr(train, "optimizer_step", never_finite_in_step_9)
    each, mean = replace(cfg, out_dir=str(tmp_path / "each")), tmp_path / "mean"
    train.train(each)
    losses = [r["loss"] for r in records(each.out_dir)]
    five = replace(cfg, out_dir=str(mean), log_interval=5, eval_interval=12)
    train.train(five)
    before = records(mean)
    assert [r["step"] for r in before] == [5, 10, 12, 15, 20] and losses[8] is None
    wanted = [losses[:5], losses[5:8] + losses[9:10], losses[10:12], losses[12:15], losses[15:]]
    assert [r["loss"] for r in before] == pytest.approx([np.mean(few) for few in wanted])
    for step in (14, 20):
        shutil.rmtree(mean / f"step_{step:06d}")
    train.train(replace(five, init_from="resume"))
    assert records(mean) == before


def test_evaluating_sampling_and_saving_more_often_change_no_loss(cfg, tmp_path):
    rare = replace(cfg, out_dir=str(tmp_path / "rare"), eval_interval=100, save_interval=100)
    often = replace(
        cfg, out_dir=str(tmp_path / "often"), eval_interval=1, save_interval=1, sample_interval=3
    )
    train.train(rare)
    train.train(often)
    losses = [[r["loss"] for r in records(tmp_path / name)] for name in ("rare", "often")]
    assert losses[0] == losses[1]


class SGD(optim.Optimizer):
    @torch.no_grad()
    def step(self, usable):
        for parameter in self.parameters():
            parameter -= usable * parameter.grad


def test_micro_steps_give_the_gradient_of_the_whole_batch(cfg):
    rt = runtime.start("cpu", "float32")
    mask = (torch.arange(64).view(4, 16) % 5 < 2).float()
    mask[1] = 0  # a micro-batch that is all masked
    x, y = torch.randint(257, (4, 16)), torch.randint(257, (4, 16))
    weights = []
    for micro in (1, 2, 4):
        plain = replace(cfg, dropout=0.0, grad_clip=0.0)
        model = fresh_model(plain).init_weights(0)
        plan = make_plan(vars(plain), Start(model), None, micro, rt, Device("cpu", "cpu"))
        state = make_state(Start(model), Tokenizer.bytes(), plan, rt)
        state.optimizers = [SGD(model.parameters())]
        loss, *_ = train.optimizer_step(state, (x, y, mask), 1.0, plan, rt)
        weights.append((torch.tensor(loss), *model.parameters()))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], atol=1e-6, rtol=1e-5)


WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Waits(TorchDispatchMode):
    """Counts the operations whose result the host needs before it can go on."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in WAITS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_host_waits_for_the_device_once_per_step(cfg, optimizer, masked, monkeypatch):
    plain = replace(cfg, optimizer=optimizer)
    rt = runtime.start("cpu", "float32")
    model = fresh_model(plain).init_weights(0)
    plan = make_plan(vars(plain), Start(model), None, 2, rt, Device("cpu", "cpu"))
    state = make_state(Start(model), Tokenizer.bytes(), plan, rt)
    ids = torch.randint(257, (4, 16))
    batch = (ids, ids.clone(), torch.ones(4, 16) if masked else None)
    readings, real = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda each: readings.append(1) or real(each))
    with Waits() as waits:
        train.optimizer_step(state, batch, 1.0, plan, rt)
    assert waits.count == 0 and len(readings) == 1
    assert len(state.optimizers) == (2 if optimizer == "muon" else 1)


def test_the_loss_goes_down(cfg, tmp_path):
    last = train.train(replace(cfg, out_dir=str(tmp_path), max_steps=60, dropout=0.0))
    assert last["val_loss"] < 2.5 < math.log(257)


def test_a_validation_loss_is_the_mean_over_all_targets(cfg, tmp_path):
    last = train.train(replace(cfg, out_dir=str(tmp_path), dtype="float32"))
    model = store.load_model(tmp_path).eval()
    split = dataset.open_dataset(cfg.data_dir).split("val")
    losses = []
    for end in range(1, len(split)):  # each target once, in windows that begin every 16 tokens
        start = min((end - 1) // 16 * 16, len(split) - 17)
        logits = model(torch.from_numpy(split[start:end])[None])[0, -1]
        losses.append(-logits.log_softmax(-1)[split[end : end + 1][0]].item())
    assert last["val_loss"] == pytest.approx(np.mean(losses), abs=1e-4)


def test_patience_ends_a_run_at_the_same_step_though_it_was_killed(
    cfg, tmp_path, monkeypatch, capsys
):
    impatient = replace(cfg, out_dir=str(tmp_path), eval_interval=2, save_interval=3, patience=3)
    losses = [5.0, 4.0, 4.5, 4.0, math.nan, 4.5, 3.0]  # of steps 2, 4, …
    evaluations = iter(losses)
    monkeypatch.setattr(held_out, "validation_loss", lambda *_: (next(evaluations), 1))
    said = "after 3 evaluations without a better validation loss"
    assert train.train(impatient)["step"] == 10
    assert f"step 10: ending early {said}\n" in capsys.readouterr().out
    whole = records(tmp_path)
    for lost, start in (([10], 9), ([9, 10], 6)):
        for step in lost:
            shutil.rmtree(tmp_path / f"step_{step:06d}")
        evaluations = iter(losses[start // 2 :])
        assert train.train(replace(impatient, init_from="resume"))["step"] == 10
        assert records(tmp_path) == whole and folders.read_state(folders.find(tmp_path)).step == 10
    with pytest.raises(ValueError, match=f"step 10 of max_steps=20, {said}; a larger --patience"):
        train.train(replace(impatient, init_from="resume"))
    evaluations = iter(losses[5:])
    longer = replace(impatient, init_from="resume", patience=5, max_steps=14)
    assert train.train(longer)["step"] == 14


def test_the_best_checkpoint_is_named(cfg, tmp_path, monkeypatch, capsys):
    run = replace(cfg, out_dir=str(tmp_path / "run"), eval_interval=2, save_interval=2, max_steps=8)
    run = replace(run, keep_checkpoints=1)

    def trained(losses, **changes) -> str:
        evaluations = iter(losses)
        monkeypatch.setattr(held_out, "validation_loss", lambda *_: (next(evaluations), 1))
        train.train(replace(run, **changes))
        out_dir = Path(changes.get("out_dir", run.out_dir))
        best = json.loads((out_dir / "run.json").read_text())["best"]
        assert (out_dir / best["checkpoint"]).is_dir()
        assert folders.find(out_dir / "best") == out_dir / best["checkpoint"]
        store.load(out_dir / "best")
        return best["checkpoint"]

    assert trained([5.0, 3.0, 4.0, 3.5]) == "step_000004"
    out = capsys.readouterr().out
    where = f"{tmp_path / 'run'}{os.sep}step_000004, validation loss 3.0000\n"
    assert f"the best checkpoint so far: {where}" in out and "so far: " not in out[-200:]
    assert out.endswith(f"the best checkpoint: {where}")
    link = tmp_path / "run" / "best"
    assert os.name == "nt" or os.readlink(link) == "step_000004"
    shutil.copytree(tmp_path / "run", tmp_path / "copy")  # of the link, it makes a folder
    more = {"init_from": "resume", "max_steps": 12}
    assert trained([2.5, 2.6], out_dir=str(tmp_path / "copy"), **more) == "step_000010"
    out = capsys.readouterr().out
    assert out.count("no link to the best checkpoint") == 1 and "is not a link" in out
    assert trained([3.1, 2.9], **more) == "step_000012"
    assert trained([1.0, 2.0], init_from=str(link), out_dir=f"{tmp_path}/new", max_steps=2)
    assert trained([6.0, 6.0, 7.0, 6.0], overwrite=True) == "step_000002"
    assert os.name == "nt" or os.readlink(link) == "step_000002"


def test_samples_continue_the_same_prompts_and_are_kept_once(cfg, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("alpha be\n\ngam\n")
    often = {"sample_interval": 5, "eval_interval": 5, "sample_prompts": str(prompts)}
    whole = replace(cfg, out_dir=str(tmp_path / "whole"), **often)
    train.train(whole)
    out = capsys.readouterr().out
    assert len(re.findall(r"\n  > alpha be\n  \| (?:.*\n  \| )*.*\n  > gam\n  \| ", out)) == 4
    samples = run_folder.read_records(tmp_path / "whole" / "samples.jsonl", run_folder.Sample)
    steps = [5, 5, 10, 10, 15, 15, 20, 20]
    assert [sample["step"] for sample in samples] == steps
    assert [sample["prompt"] for sample in samples[:2]] == ["alpha be", "gam"]
    assert all(sample["text"] for sample in samples)
    (tmp_path / "whole" / "best").unlink(missing_ok=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in (14, 20):
        shutil.rmtree(tmp_path / "parts" / f"step_{step:06d}")
    train.train(replace(whole, init_from="resume", out_dir=str(tmp_path / "parts")))
    for name in ("whole", "parts"):
        path = tmp_path / name / "samples.jsonl"
        assert run_folder.read_records(path, run_folder.Sample) == samples
    train.train(replace(whole, overwrite=True, sample_interval=0))
    assert not (tmp_path / "whole" / "samples.jsonl").exists()
    with pytest.raises(ValueError, match="there are no prompts in"):
        prompts.write_text("\n")
        train.train(replace(whole, out_dir=str(tmp_path / "new")))
    assert not (tmp_path / "new").exists()


# --- steps that are not finite


def test_a_step_that_is_not_finite_is_skipped_and_counted(cfg, tmp_path, monkeypatch, capsys):
    real = GPT.forward
    seen = []

    def sometimes_nan(self, idx, targets=None, *rest):
        loss = real(self, idx, targets, *rest)
        if self.training and targets is not None:
            seen.append({name: p.detach().clone() for name, p in self.named_parameters()})
            return loss * (math.nan if len(seen) in (3, 4) else 1.0)
        return loss

    monkeypatch.setattr(GPT, "forward", sometimes_nan)
    train.train(replace(cfg, out_dir=str(tmp_path), max_steps=6))
    assert same(seen[2], seen[3]) and same(seen[3], seen[4]) and not same(seen[4], seen[5])
    assert capsys.readouterr().out.count("skipped") == 2
    assert records(tmp_path)[-1]["skipped"] == 2


def test_a_loss_that_stays_not_finite_ends_the_run_with_a_hint(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "optimizer_step", lambda *args: (math.nan, 1.0, False))
    words = r"20 steps in a row .* lower --learning_rate.*"
    with pytest.raises(ValueError, match=words + "nothing has been saved$"):
        train.train(replace(cfg, out_dir=str(tmp_path / "unsaved"), save_interval=30))
    with pytest.raises(ValueError, match=words + "init_from=resume .* continues from step 14$"):
        train.train(replace(cfg, out_dir=str(tmp_path / "saved")))


def test_no_good_checkpoint_is_pruned_while_steps_are_skipped(cfg, tmp_path, monkeypatch):
    real, calls = train.optimizer_step, []

    def finite_three_times(*args):
        calls.append(args)
        return real(*args) if len(calls) <= 3 else (math.nan, 1.0, False)

    monkeypatch.setattr(train, "optimizer_step", finite_three_times)
    run = replace(cfg, out_dir=str(tmp_path), save_interval=1, keep_checkpoints=1, max_steps=10)
    train.train(replace(run, eval_interval=100))
    names = [folder.name for folder in folders.step_folders(tmp_path)]
    assert names == [f"step_{step:06d}" for step in range(3, 11)]


def test_fp16_scales_the_loss_and_resumes_exactly(cfg, tmp_path):
    cfg = replace(cfg, dtype="float16", max_steps=8, save_interval=4, eval_interval=8)
    train.train(replace(cfg, out_dir=str(tmp_path / "whole")))
    train.train(replace(cfg, out_dir=str(tmp_path / "parts")))
    shutil.rmtree(tmp_path / "parts" / "step_000008")
    train.train(replace(cfg, out_dir=str(tmp_path / "parts"), init_from="resume"))
    assert store.read_optimizer(folders.find(tmp_path / "whole"))["scaler"]["scale"] > 1
    assert_same_end(tmp_path / "whole", tmp_path / "parts")


# --- starting


def test_nanogpts_folder_trains_as_it_is(cfg, tmp_path, monkeypatch, capsys):
    for name in ("train", "val"):
        np.arange(500, dtype="<u2").tofile(tmp_path / f"{name}.bin")
    monkeypatch.setattr(Tokenizer, "gpt2", Tokenizer.bytes)
    folders = {"data_dir": str(tmp_path), "out_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"id (\d+) at token \1 is beyond the vocabulary of 257"):
        train.train(replace(cfg, **folders))
    for name in ("train", "val"):
        (np.arange(500, dtype="<u2") % 250).tofile(tmp_path / f"{name}.bin")
    assert train.train(replace(cfg, **folders, max_steps=2))["step"] == 2
    assert "assuming GPT-2's ids" in capsys.readouterr().out
    (tmp_path / "meta.pkl").write_bytes(b"a pickle")
    with pytest.raises(ValueError, match="whose table is a pickle: not read"):
        train.train(replace(cfg, **folders, overwrite=True))


def test_a_run_starts_from_a_checkpoint_with_its_shape(cfg, tmp_path, capsys):
    train.train(replace(cfg, out_dir=str(tmp_path / "first"), dropout=0.0))
    warm = replace(
        cfg, out_dir=str(tmp_path / "second"), init_from=str(tmp_path / "first"), n_layer=9
    )
    with pytest.raises(
        ValueError, match="takes the shape of its checkpoint: n_layer=9, where .* has 2"
    ):
        train.train(warm)
    warm = replace(warm, n_layer=train.TrainConfig().n_layer)  # as if it were not given
    first = train.train(replace(warm, learning_rate=1e-9, max_steps=1, dropout=0.0))
    assert store.load_model(tmp_path / "second").config.n_layer == 2
    assert first["val_loss"] == pytest.approx(records(tmp_path / "first")[-1]["val_loss"], abs=1e-3)


def test_a_run_from_another_checkpoint_resumes(cfg, tmp_path, monkeypatch):
    """Though its shape was never given, and the vocabulary is padded; and after a restart."""
    first = replace(cfg, out_dir=str(tmp_path / "first"), max_steps=1, bias=False)
    first = replace(first, vocab_multiple=64)
    train.train(first)
    warm = train.TrainConfig(
        data_dir=cfg.data_dir,
        init_from=first.out_dir,
        out_dir=str(tmp_path / "warm"),
        max_steps=3,
        device="cpu",
        batch_size=4,
        log_interval=1,
    )
    assert train.train(warm)["step"] == 3
    resume = [f"--out_dir={warm.out_dir}", "--init_from=resume", "--max_steps=4"]
    assert train.main(resume) == 0
    assert [r["step"] for r in records(warm.out_dir)] == [0, 1, 2, 3, 4]
    train.train(replace(warm, overwrite=True))
    assert [r["step"] for r in records(warm.out_dir)] == [0, 1, 2, 3]
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    shutil.rmtree(Path(warm.out_dir))
    train.train(warm)
    assert train.train(warm) == {}


def test_a_finished_run_is_not_buried(cfg, tmp_path):
    done = replace(cfg, out_dir=str(tmp_path), max_steps=3)
    train.train(done)
    with pytest.raises(ValueError, match="--init_from=resume continues it, --overwrite"):
        train.train(done)
    with pytest.raises(ValueError, match="has finished: step 3 of max_steps=3"):
        train.train(replace(done, init_from="resume"))
    train.train(replace(done, overwrite=True, max_steps=2))
    assert [p.name for p in folders.step_folders(tmp_path)] == ["step_000002"]
    assert [r["step"] for r in records(tmp_path)] == [1, 2]


@pytest.mark.parametrize("name", ["train", "val"])
def test_overwrite_removes_nothing_for_data_that_cannot_be_read(cfg, tmp_path, name):
    done = replace(cfg, out_dir=str(tmp_path / "run"), max_steps=3)
    train.train(done)
    before = sorted((tmp_path / "run").rglob("*"))
    shutil.copytree(cfg.data_dir, tmp_path / "data")
    write_shard(tmp_path / "data" / f"{name}_000000.bin", np.full(900, 9999))
    with pytest.raises(ValueError, match="id 9999 at token .* beyond the vocabulary of 257"):
        train.train(replace(done, data_dir=str(tmp_path / "data"), overwrite=True))
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_under_max_restarts_the_same_run_goes_on_and_ends_once(cfg, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    run = replace(cfg, out_dir=str(tmp_path), max_steps=9)
    really = train.save
    monkeypatch.setattr(train, "save", lambda *args: really(*args) or 1 / 0)  # dies after step 7
    with pytest.raises(ZeroDivisionError):
        train.train(run)
    monkeypatch.setattr(train, "save", really)
    assert train.train(run)["step"] == 9
    assert "already holds this run: resuming it" in capsys.readouterr().out
    assert train.train(run) == {}
    assert "has finished: step 9 of max_steps=9" in capsys.readouterr().out
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 7]
    with pytest.raises(ValueError, match="--init_from=resume continues it"):
        train.train(replace(run, learning_rate=0.1))
    with pytest.raises(ValueError, match="--overwrite does not combine with --max-restarts"):
        train.train(replace(run, overwrite=True))


def test_a_restart_keeps_what_a_resumed_run_was_told(cfg, tmp_path, monkeypatch):
    run = replace(cfg, out_dir=str(tmp_path), max_steps=4, save_interval=2)
    train.train(run)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    longer = replace(run, init_from="resume", max_steps=9, learning_rate=0.002, save_interval=9)
    real, calls = train.optimizer_step, []

    def dies_in_the_2nd_step(*args):
        calls.append(args)
        return real(*args) if len(calls) < 2 else 1 / 0

    monkeypatch.setattr(train, "optimizer_step", dies_in_the_2nd_step)
    with pytest.raises(ZeroDivisionError):
        train.train(longer)
    monkeypatch.setattr(train, "optimizer_step", real)
    assert train.train(longer)["step"] == 9
    assert max(record["lr"] for record in records(tmp_path)[4:]) <= 0.002


@pytest.mark.parametrize("restarts", [0, 3])
def test_a_run_goes_on_with_the_learning_rate_that_it_chose(cfg, tmp_path, monkeypatch, restarts):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(restarts))
    constant = replace(cfg, learning_rate=None, warmup_steps=0, decay_fraction=0.0)
    run = replace(constant, out_dir=str(tmp_path), max_steps=6, save_interval=3)
    really = train.save
    monkeypatch.setattr(train, "save", lambda *args: really(*args) or 1 / 0)  # dies after step 3
    with pytest.raises(ZeroDivisionError):
        train.train(run)
    monkeypatch.setattr(train, "save", really)
    if restarts:
        train.train(run)
    else:
        assert train.main(["--init_from=resume", f"--out_dir={tmp_path}"]) == 0
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 7))
    rates = {record["lr"] for record in records(tmp_path)}
    assert rates == {optim.default_learning_rate("muon", cfg.n_embd, gentle=False)[0]}


def test_the_context_is_the_checkpoints_unless_said_otherwise(cfg, tmp_path):
    first = replace(cfg, out_dir=str(tmp_path / "first"), max_steps=2, block_size=24)
    train.train(first)
    train.train(replace(first, init_from="resume", block_size=None, max_steps=3))
    warm = replace(first, init_from=first.out_dir, block_size=None, out_dir=str(tmp_path / "warm"))
    for folder in (first.out_dir, train.train(warm) and warm.out_dir):
        model = store.load_model(folders.find(folder))
        assert model.config.block_size == 24


def test_a_resumed_run_keeps_the_settings_that_are_not_given(cfg, tmp_path, capsys):
    first = replace(cfg, out_dir=str(tmp_path), learning_rate=0.003, max_steps=4, dropout=0.2)
    train.train(first)
    assert train.main([f"--out_dir={tmp_path}", "--init_from=resume"]) == 2
    assert "has finished: step 4 of max_steps=4" in capsys.readouterr().err
    resume = [f"--out_dir={tmp_path}", "--init_from=resume", "--max_steps=6", "--dropout=0"]
    assert train.main(resume) == 0
    err = capsys.readouterr().err
    assert "learning_rate = 0.003 (default None, the resumed run)" in err
    first_start, resumed = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert (first_start["step"], resumed["step"]) == (0, 4)
    settings = resumed["settings"]
    given = {"max_steps": 6, "dropout": 0.0, "init_from": "resume"}
    assert settings == json.loads(json.dumps(vars(first) | given))


def test_overwriting_what_a_run_starts_from_is_refused(cfg, tmp_path):
    run = replace(cfg, out_dir=str(tmp_path), max_steps=2)
    train.train(run)
    for name in (tmp_path, os.path.relpath(tmp_path), tmp_path / "step_000002"):
        with pytest.raises(ValueError, match="which init_from starts from"):
            train.train(replace(run, init_from=str(name), overwrite=True))
    assert folders.step_folders(tmp_path)


def test_a_plan_of_any_size_takes_no_memory(cfg, tmp_path, capsys):
    train.train(replace(cfg, out_dir=str(tmp_path), plan=True, n_embd=2**14, n_layer=100))
    assert "GiB" in capsys.readouterr().out


def test_a_place_where_a_run_cannot_save_is_refused_at_the_start(cfg, tmp_path):
    (tmp_path / "step_000014").mkdir()
    with pytest.raises(ValueError, match="step_000014 is in the way of a checkpoint"):
        train.train(replace(cfg, out_dir=str(tmp_path)))
    assert not (tmp_path / "run.json").exists()


def test_a_run_goes_on_in_another_dtype(cfg, tmp_path):
    for dtype in ("float32", "float16", "bfloat16"):
        steps = len(folders.step_folders(tmp_path)) + 1
        init_from = "scratch" if steps == 1 else "resume"
        last = train.train(
            replace(cfg, out_dir=str(tmp_path), dtype=dtype, init_from=init_from, max_steps=steps)
        )
        assert last["step"] == steps


def test_a_run_without_a_finite_step_is_saved_and_goes_on(cfg, tmp_path, monkeypatch):
    """state.json holds no NaN, no such loss is the best, and no optimizer state is no error."""
    run = replace(cfg, out_dir=str(tmp_path), eval_interval=1)
    really = train.optimizer_step
    monkeypatch.setattr(train, "optimizer_step", lambda *a: (math.nan, *really(*a)[1:]))
    monkeypatch.setattr(held_out, "validation_loss", lambda *_: (math.nan, 0))
    monkeypatch.setattr(train.optim, "optimizer_state", lambda *_: {})
    train.train(replace(run, max_steps=1))
    state = json.loads(
        (tmp_path / "step_000001" / "state.json").read_text(), parse_constant=lambda word: 1 / 0
    )
    assert state["loss"] is state["val_loss"] is None
    monkeypatch.undo()
    assert math.isfinite(train.train(replace(run, init_from="resume", max_steps=5))["loss"])


def test_resuming_as_something_else_is_refused(cfg, tmp_path):
    out_dir, other = str(tmp_path / "out"), tmp_path / "other"
    train.train(replace(cfg, out_dir=out_dir, max_steps=2))
    resume = replace(cfg, out_dir=out_dir, init_from="resume")
    with pytest.raises(
        ValueError, match="with other settings: n_layer is 2, not 3; n_embd is 32, not 64"
    ):
        train.train(replace(resume, n_layer=3, n_embd=64))
    for name, value in {"seed": 5, "batch_size": 2, "stride": 7, "block_size": 8}.items():
        with pytest.raises(ValueError, match=f"with other settings: {name} is "):
            train.train(replace(resume, **{name: value}))
    with pytest.raises(ValueError, match="keep the optimizer setting"):
        train.train(replace(resume, optimizer="adamw"))
    shutil.copytree(cfg.data_dir, other)
    write_shard(other / "train_000001.bin", np.zeros(50, "u2"))
    with pytest.raises(ValueError, match="other data"):
        train.train(replace(resume, data_dir=str(other)))
    Tokenizer.train(["abc abc abc"], 258).save(other)
    with pytest.raises(ValueError, match="another tokenizer .* --tokenizer=.*/step_.* makes"):
        train.train(replace(resume, data_dir=str(other)))
    with pytest.raises(ValueError, match="another tokenizer"):
        warm = replace(cfg, init_from=out_dir, out_dir=str(tmp_path / "warm"))
        train.train(replace(warm, data_dir=str(other)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 12, "micro_batch_size": 5}, "nearest that divide it are 4 and 6"),
        ({"max_steps": 0, "seed": -1}, "max_steps must be at least 1, not 0; seed must be"),
        ({"learning_rate": math.nan}, "learning_rate must be a number above 0"),
        ({"grad_clip": math.nan}, "grad_clip must be a finite number, 0 or greater, not nan"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number, 0 or greater, not inf"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"seed": 2**63}, "seed must be below"),
        ({"min_lr": 1.0}, "min_lr=1.0 is above learning_rate"),
        ({"data_dir": ""}, "data_dir must be a path, not ''"),
        ({"data_dir": __file__}, "data_dir must be a folder, not '.*test_train.py'"),
        ({"n_head": 3}, "is not divisible by n_head=3"),
        ({"block_size": 8000}, "one window takes block_size"),
        ({"block_size": 1000}, "the val split has"),
        ({"data_dir": "nowhere"}, "there is no data in nowhere"),
        ({"init_from": "nowhere"}, "nowhere does not exist"),
        ({"init_from": "Resume"}, "init_from='Resume': did you mean 'resume'"),
        ({"init_from": "GPT2-XL"}, "init_from='GPT2-XL': did you mean 'gpt2-xl'"),
        ({"init_from": "resume"}, "holds no checkpoint"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"dropout": 2.0}, "dropout"),
        ({"init_from": __file__}, "init_from=.*test_train.py is a file, not a folder"),
        ({"resume": True}, "resume needs the checkpoint to continue from"),
        ({"resume": True, "overwrite": True, "init_from": "x"}, "does not combine with overwrite"),
        ({"overwrite": True, "init_from": "resume"}, "does not combine with overwrite"),
        ({"plan_for": "8xH1000"}, "is not a known device"),
        ({"n_layer": 1025}, "n_layer is at most 1,024"),
        ({"vocab_multiple": 65537}, "vocab_multiple is at most 65,536"),
        ({"n_embd": 2**40}, "n_embd and block_size 1,048,575"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(cfg, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.train(replace(cfg, out_dir=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


def test_an_out_dir_that_is_something_else_is_refused(cfg, tmp_path):
    train.train(replace(cfg, max_steps=1, out_dir=str(tmp_path / "run")))
    step, bare = str(tmp_path / "run" / "step_000001"), str(tmp_path / "bare")
    shutil.copytree(step, bare, ignore=shutil.ignore_patterns("state.json"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").touch()
    for out_dir, changes, message in [
        (str(tmp_path / "data"), {}, "is a data folder: choose another"),
        (step, {}, f"is a checkpoint; --init_from={step} --resume --out_dir=OTHER continues"),
        (f"{step}/more", {}, "is inside a checkpoint: choose another"),
        (bare, {}, f"is a checkpoint; --init_from={bare} --out_dir=OTHER starts a new run"),
        (str(tmp_path / "\udcff"), {}, "is not UTF-8"),
        (str(tmp_path / "run"), {"data_dir": "data/x"}, "out_dir=out/x"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            if changes:  # a new run on other data, which would have to exist
                open_start(vars(replace(cfg, out_dir=out_dir, **changes)), {}, None)
            train.train(replace(cfg, out_dir=out_dir))


def test_a_file_in_place_of_out_dir_is_refused_before_anything_else(cfg):
    with pytest.raises(ValueError, match="^out_dir must be a folder, not '.*test_train.py'$"):
        train.train(replace(cfg, out_dir=__file__, data_dir="nowhere", device="nothing"))


def test_broken_shards_are_refused_and_foreign_ids_end_the_run(cfg, tmp_path):
    shutil.copytree(cfg.data_dir, tmp_path / "data")
    shard = tmp_path / "data" / "train_000000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    broken = replace(cfg, data_dir=str(tmp_path / "data"), out_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"train_000000.bin .* it was cut off"):
        train.train(broken)
    assert not (tmp_path / "out").exists()
    half = len(whole) // 4 * 2  # of the windows half, so that an early batch reads one
    shard.write_bytes(whole[:half] + b"\xff\xff" * ((len(whole) - half) // 2))
    with pytest.raises(ValueError, match="id 65535 at token .* beyond the vocabulary of 257"):
        train.train(broken)
    assert not folders.step_folders(tmp_path / "out")


# --- what a run leaves


@pytest.mark.plots
def test_the_run_folder(cfg, tmp_path, capsys):
    train.train(replace(cfg, out_dir=str(tmp_path), keep_checkpoints=1, sample_interval=None))
    out = capsys.readouterr().out
    assert "step 20/20 | loss " in out and "validation loss" in out and "\n  | " in out
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (start,) = json.loads((tmp_path / "run.json").read_text())["starts"]
    fingerprint = dataset.open_dataset(cfg.data_dir).fingerprint
    assert start["settings"]["n_embd"] == 32 and start["data"] == fingerprint
    assert {"command", "versions", "revision", "world_size", "device"} <= set(start)
    best = min(r.get("val_loss", math.inf) for r in records(tmp_path))
    states = [folders.read_state(folder) for folder in folders.step_folders(tmp_path)]
    assert states[-1].step == 20
    assert best in [state.val_loss for state in states]
    assert set(records(tmp_path)[0]) == {"step", "loss", "lr", "grad_norm", "tokens", "skipped"}


def test_bits_per_byte_follow_from_nats_per_token(cfg, shard_folder, tmp_path):
    folder = shard_folder(train=[list(b"alpha beta ") * 50], val=[list(b"gamma ") * 20])
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["splits"]["val"]["bytes"] *= 4  # as a tokenizer of 4 bytes per token leaves it
    (folder / "dataset.json").write_text(json.dumps(manifest))
    last = train.train(replace(cfg, data_dir=str(folder), out_dir=str(tmp_path)))
    assert last["val_bpb"] == pytest.approx(last["val_loss"] / math.log(2) / 4)


def test_epochs_set_the_steps(cfg, tmp_path, capsys):
    windows = (len(dataset.open_dataset(cfg.data_dir).split("train")) - 17) // 16 + 1
    quarter = math.ceil(0.25 * windows / 4)
    epochs = replace(cfg, out_dir=str(tmp_path), epochs=0.25, max_steps=None)
    assert train.train(replace(epochs, max_steps=3))["step"] == 3  # of both, what ends first
    resume = [f"--out_dir={tmp_path}", "--init_from=resume"]
    assert train.main([*resume, "--max_steps=None"]) == 0
    assert run_folder.read_records(tmp_path / "metrics.jsonl")[-1]["step"] == quarter
    assert train.main([*resume, "--max_steps=None"]) == 2
    assert "a larger --epochs (and --max_steps, if given) continues it" in capsys.readouterr().err


def test_an_epoch_is_a_pass_over_the_windows_whatever_the_stride(cfg, tmp_path, capsys):
    for stride in (16, 8, 5):
        epochs = replace(cfg, epochs=2, max_steps=None, stride=stride, plan=True)
        train.train(replace(epochs, out_dir=str(tmp_path)))
        assert re.search(r", 2\.0\d epochs of \d,\d{3} tokens\.", capsys.readouterr().out)


def test_the_plan_needs_no_data_and_writes_nothing(cfg, tmp_path, capsys):
    plan = replace(cfg, data_dir=str(tmp_path / "none"), out_dir=str(tmp_path / "out"), plan=True)
    assert train.train(plan) == {}
    out = capsys.readouterr().out
    assert "50,257" in out and "20 steps" in out and "GiB" in out
    assert "none does not exist yet; python prepare.py --sources=FILES --data_dir=" in out
    assert "Time: about " in out and "as measured here" in out
    assert train.train(replace(plan, plan=False, plan_for="8xH100", batch_size=64)) == {}
    out = capsys.readouterr().out
    assert "in 8 processes × 1 micro-step" in out and "GiB of the 74 GiB of H100." in out
    assert "40% of the 989 TFLOP/s of each H100" in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name, size", [("gpt2", "124,439,808"), ("gpt2-xl", "1,557,611,200"), ("folder", "34,208")]
)
def test_fine_tuning_is_planned_without_data_or_network(cfg, tmp_path, capsys, name, size):
    """OpenAI's sizes are those of their published checkpoints."""
    train.train(replace(cfg, out_dir=str(tmp_path / "first"), max_steps=1))
    where = str(tmp_path / "first") if name == "folder" else name
    plan = train.TrainConfig(init_from=where, data_dir=str(tmp_path / "none"), epochs=3, plan=True)
    capsys.readouterr()
    assert train.train(replace(plan, device="cpu", out_dir=str(tmp_path / "out"))) == {}
    out = capsys.readouterr().out
    assert f"Model: {size} parameters" in out and "1,750 are assumed" in out
    assert train.train(replace(plan, lora_rank=4, device="cpu")) == {}
    assert "LoRA: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "device, dtype, wanted",
    [
        ("cuda", torch.bfloat16, torch.bfloat16),
        ("cuda", torch.float16, None),
        ("cuda", torch.float32, None),
        ("cpu", torch.bfloat16, None),
    ],
)
def test_only_gpus_that_train_in_bf16_keep_the_residual_stream_in_it(device, dtype, wanted):
    assert state.stream_dtype(runtime.Runtime(torch.device(device), dtype)) == wanted


def test_compile_falls_back_to_eager_and_says_so(cfg, tmp_path, monkeypatch, capsys):
    def broken(model, **settings):
        def call(*args):
            raise RuntimeError("no compiler\nat all")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    rt = runtime.start("cpu")
    model = fresh_model(cfg)
    monkeypatch.setattr(state, "worth_compiling", lambda rt: True)
    plan = SimpleNamespace(compile="auto", micro_batch_size=4, masked=False)
    assert maybe_compiled(model, plan, rt) is model
    assert "(RuntimeError: no compiler)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--compile=true does not work here"):
        maybe_compiled(model, SimpleNamespace(**vars(plan) | {"compile": True}), rt)


@pytest.mark.parametrize("masked", [False, True])
def test_a_run_compiles_once_for_steps_and_once_for_evaluations(cfg, tmp_path, monkeypatch, masked):
    from torch._dynamo.testing import CompileCounter  # takes a second

    counter, really = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **settings: really(model, backend=counter, **settings)
    )
    data_dir = masked_copy(cfg.data_dir, tmp_path / "masked") if masked else cfg.data_dir
    run = replace(cfg, data_dir=data_dir, out_dir=str(tmp_path / "out"), compile=True, max_steps=4)
    train.train(replace(run, micro_batch_size=2, eval_interval=2))
    assert counter.frame_count == 2


# --- trackers, the real libraries writing to this machine


def test_trackio_gets_metrics_settings_statistics_and_the_checkpoint(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    run = replace(cfg, out_dir=str(tmp_path / "out"), tracker="trackio", max_steps=10)
    train.train(run)
    train.train(replace(run, init_from="resume", max_steps=12))
    with sqlite3.connect(tmp_path / "trackio" / "plaingpt.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
        assert [step for _, step, _ in rows] == list(range(1, 13))
        assert len({name for name, *_ in rows}) == 1 and rows[0][0].startswith("out-20")
        logged = json.loads(rows[9][2])
        (config,) = base.execute("select config from configs limit 1").fetchone()
        assert {"settings", "splits", "revision", "data"} <= json.loads(config).keys()
        files = base.execute("select manifest from artifact_versions").fetchall()
        assert "model.safetensors" in str(files)
    record = run_folder.read_records(tmp_path / "out" / "metrics.jsonl")[9]
    assert logged["val_loss"] == record["val_loss"]
    assert logged["perplexity"] == pytest.approx(math.exp(record["loss"]))
    assert {"lr", "grad_norm", "tokens_per_s", "val_perplexity"} <= logged.keys()


def test_wandb_gets_the_same_offline(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    pytest.importorskip("wandb", reason="wandb is not installed")
    train.train(replace(cfg, out_dir=str(tmp_path), tracker="wandb", max_steps=3))
    (written,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30  # a process of wandb's own writes
    while b"safetensors" not in (content := written.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for word in (b"val_perplexity", b"grad_norm", b"tokens_per_s", b"splits", b"safetensors"):
        assert word in content


def test_a_tracker_that_is_not_installed_says_what_to_install(cfg, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="--tracker=wandb needs .*: pip install wandb"):
        train.train(replace(cfg, out_dir=str(tmp_path), tracker="wandb"))
    assert not folders.step_folders(tmp_path)


# --- as a process


def command(cfg: train.TrainConfig, out_dir: Path, **changes) -> list[str]:
    settings = vars(replace(cfg, out_dir=str(out_dir), **changes))
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, str(REPO / "train.py"), *arguments]


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_sigterm_finishes_the_step_saves_and_exits_0(cfg, tmp_path):
    run = subprocess.Popen(
        command(cfg, tmp_path / "parts", max_steps=100_000, save_interval=100_000),
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in run.stdout:
        if line.startswith("step 000005"):
            break
    for _ in range(3):  # a scheduler's, torchrun's, an impatient user's
        run.send_signal(signal.SIGTERM)
    out, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    again = re.escape(f"python train.py --init_from=resume --out_dir={tmp_path / 'parts'}")
    assert re.search(rf"stopped by SIGTERM; {again} continues from step \d+\n", out)
    assert len(folders.step_folders(tmp_path / "parts")) == 1


def test_a_run_goes_on_without_its_streams(cfg, tmp_path, monkeypatch):
    """As in `python train.py >&- 2>&-`, where Python has none."""
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    assert train.main(command(cfg, tmp_path)[2:]) == 0
    assert folders.find(tmp_path).name == "step_000020"


def test_a_reader_that_leaves_ends_a_run_quietly(cfg, tmp_path, monkeypatch, capsys):
    """As in `python train.py | head -1`: nothing has been trained yet."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        monkeypatch.setattr("sys.stdout", gone)
        assert train.main(command(cfg, tmp_path / "run")[2:]) == 0
    assert all(" (default " in line for line in capsys.readouterr().err.splitlines())
    assert not folders.step_folders(tmp_path / "run")


def test_a_run_whose_reader_leaves_saves_and_ends(cfg, tmp_path):
    """As in `python train.py | tee log`, of which Ctrl-C ends tee first."""
    long = replace(cfg, max_steps=100_000, eval_interval=100_000, log_interval=1)
    arguments = command(long, tmp_path / "run")
    with subprocess.Popen(arguments, cwd=REPO, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line.startswith("step 000005"):
                break
        run.stdout.close()
        assert run.wait(timeout=60) == 0
    assert len(folders.step_folders(tmp_path / "run")) == 1


def test_optimizers_cover_the_model(cfg):
    model = fresh_model(cfg)
    settings = {"weight_decay": 0, "betas": (0.9, 0.9), "momentum": 0.9, "embedding_lr_scale": 1}
    optimizers = optim.build_optimizers(model, optim.OptimizerConfig("muon", **settings))
    owned = [p for each in optimizers for group in each.param_groups for p in group["params"]]
    assert len(owned) == len(list(model.parameters()))
