"""The memory that a plan states: what it depends on, and what real runs take."""

import subprocess
import sys
from dataclasses import replace

import pytest
from test_plan import CFG, plan_of
from test_train import REPO, cfg  # noqa: F401

import train
from plaingpt.training.devices import Device
from plaingpt.training.memory import MARGIN, check_fits, memory_gib, what_fits
from plaingpt.training.plan import Plan
from plaingpt.training.sentences import sentences

XL = replace(CFG, n_layer=48, n_head=25, n_embd=1600, block_size=1024, batch_size=64)


def on_gpus(settings: train.TrainConfig, processes: int, gib: float | None = None) -> Plan:
    return replace(plan_of(settings, processes), device=Device("H100", "cuda", gib))


@pytest.mark.parametrize(
    "gib, processes, optimizer, said",
    [
        (35, 8, "muon", "--micro_batch_size=2 takes 32.8 GiB"),
        (28.5, 8, "muon", "--micro_batch_size=8 --activation_checkpointing takes 28.0 GiB"),
        (25, 8, "muon", "--micro_batch_size=4 --fsdp takes 19.0 GiB"),
        (9.5, 8, "adamw", "--micro_batch_size=2 --fsdp --activation_checkpointing takes 8.7 GiB"),
        (7, 8, "muon", "the smallest micro-batches do not fit either: use a smaller model"),
        (20, 1, "muon", "the smallest micro-batches do not fit either: use a smaller model"),
    ],
)
def test_the_first_change_that_fits_is_named(gib, processes, optimizer, said):
    """1.56 billion parameters: weights, gradients and moments take 18 GiB with Muon."""
    assert what_fits(on_gpus(replace(XL, optimizer=optimizer), processes), gib).startswith(said)


def test_a_plan_that_does_not_fit_says_so():
    for gib in (40.0, 50.0):
        lines = "\n".join(sentences(on_gpus(XL, 8, gib)))
        assert "= 65,536 tokens, in 8 processes × 1 micro-step of 8 sequences." in lines
        assert f"Memory: about 46.3 GiB of the {gib:.0f} GiB of H100." in lines
        assert ("This will not fit: --micro_batch_size=4 takes " in lines) == (gib == 40)
    assert "--fsdp has no effect with one process." in sentences(plan_of(replace(XL, fsdp=True)))


def test_memory_shrinks_with_what_is_meant_to_shrink_it():
    full = memory_gib(plan_of(replace(XL, micro_batch_size=4), 4))
    adamw = replace(XL, optimizer="adamw", micro_batch_size=4)
    for changes in ({"fsdp": True}, {"activation_checkpointing": True}, {"optimizer": "muon"}):
        assert memory_gib(plan_of(replace(adamw, **changes), 4)) < memory_gib(plan_of(adamw, 4))
    assert memory_gib(plan_of(replace(XL, micro_batch_size=2), 4)) < full


def test_what_cannot_fit_is_refused_before_it_takes_memory(cfg, tmp_path):  # noqa: F811
    for changes in ({"n_embd": 100_000}, {"batch_size": 100_000_000}):
        with pytest.raises(ValueError, match="this run needs about .* GiB, but cpu has "):
            train.train(replace(cfg, out_dir=str(tmp_path / "out"), **changes))
    assert not (tmp_path / "out").exists()


def test_an_estimate_that_may_be_wrong_refuses_nothing():
    plan = plan_of(XL)
    for share, fits in ((0.99 / MARGIN, False), (1.01 / MARGIN, True)):
        smaller = replace(plan, device=Device("cpu", "cpu", share * memory_gib(plan)))
        assert "This will not fit" in "\n".join(sentences(smaller))
        if fits:
            check_fits(smaller)
        else:
            with pytest.raises(ValueError, match="--micro_batch_size=|smaller model"):
                check_fits(smaller)
    check_fits(replace(plan, device=Device("mps", "mps")))


MEASURE = """
import sys, train
from pathlib import Path
assert train.main(sys.argv[1:]) == 0
status = Path("/proc/self/status").read_text()
print("peak", int(status.partition("VmHWM:")[2].split()[0]) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status")
@pytest.mark.parametrize(
    "changes",
    [
        {"n_layer": 2, "n_embd": 32, "dtype": "float32"},
        {"n_embd": 128, "block_size": 128, "batch_size": 16, "vocab_multiple": 8192},
    ],
)
def test_a_run_takes_the_memory_that_is_planned(cfg, shard_folder, tmp_path, changes):  # noqa: F811
    data = shard_folder(train=[list(range(250)) * 20], val=[list(range(250)) * 2])
    run = replace(cfg, max_steps=2, data_dir=str(data), out_dir=str(tmp_path / "out"), **changes)
    arguments = [f"--{name}={value}" for name, value in vars(run).items()]
    command = [sys.executable, "-c", MEASURE, *arguments]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    planned = float(done.stdout.partition("Memory: about ")[2].split()[0])
    measured = float(done.stdout.rpartition("peak ")[2])
    assert 0.8 * measured <= planned <= 1.5 * measured
