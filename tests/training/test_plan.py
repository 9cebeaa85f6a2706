"""What a run is said to do and to need."""

from dataclasses import replace

import pytest
import torch

import train
from plaingpt import runtime
from plaingpt.runtime import Runtime
from plaingpt.training.plan import Plan, memory_gib, micro_batch_size, sentences, what_fits
from plaingpt.training.start import planned_start

CPU = torch.device("cpu")
CFG = train.TrainConfig(batch_size=24, device="cpu")
XL = replace(CFG, n_layer=48, n_head=25, n_embd=1600, block_size=1024, batch_size=64)


def plan_of(cfg: train.TrainConfig, processes: int = 1) -> Plan:
    rt = Runtime(CPU, torch.bfloat16, world_size=processes)
    start = planned_start(vars(cfg), 50257)
    micro = micro_batch_size(cfg.batch_size, cfg.micro_batch_size, processes)
    return train.make_plan(cfg, start, None, micro, rt)


def test_a_processs_share_of_the_batch_is_taken_at_once_unless_said_otherwise():
    assert micro_batch_size(24, None, 1) == 24
    assert micro_batch_size(24, None, 4) == 6
    assert micro_batch_size(24, 3, 4) == 3


@pytest.mark.parametrize(
    "micro, processes, message",
    [
        (None, 5, "be divided among 5 processes; the nearest .* that divide it are 4 and 6"),
        (5, 1, "is not a multiple of micro_batch_size=5; the nearest that divide it are 4 and 6"),
        (5, 4, "6 in each of 4 processes, .* the nearest that divide it are 3 and 6"),
    ],
)
def test_what_does_not_divide_names_what_does(micro, processes, message):
    with pytest.raises(ValueError, match=message):
        micro_batch_size(24, micro, processes)


def test_fsdp_and_float16_do_not_combine(tmp_path):
    cfg = replace(CFG, fsdp=True, dtype="float16", out_dir=str(tmp_path))
    with pytest.raises(ValueError, match="does not combine with float16"):
        train.train(cfg)


def test_settings_of_none_become_numbers():
    plan = plan_of(replace(CFG, eval_interval=30, max_steps=100))
    assert plan.config.block_size == 256 and plan.max_steps == 100
    for what in (plan.evaluation, plan.sampling, plan.saving):
        assert [step for step in range(1, 101) if what.due(step)] == [30, 60, 90, 100]
    plan = plan_of(replace(CFG, sample_interval=0, save_interval=50, grad_clip=0.0))
    assert plan.max_steps == 1500 and plan.grad_clip == float("inf")
    assert not plan.sampling.due(1500) and plan.saving.due(50) and plan.saving.due(1500)


@pytest.mark.parametrize(
    "gib, processes, said",
    [
        (35, 8, "--micro_batch_size=2 takes 32.7 GiB"),
        (28, 8, "--micro_batch_size=8 --activation_checkpointing takes 27.2 GiB"),
        (25, 8, "--micro_batch_size=4 --fsdp takes 22.3 GiB"),
        (12, 8, "--micro_batch_size=2 --fsdp --activation_checkpointing takes 11.5 GiB"),
        (8, 8, "Neither will the smallest micro-batches"),
        (20, 1, "Neither will the smallest micro-batches; --fsdp would split"),
    ],
)
def test_the_first_change_that_fits_is_named(gib, processes, said):
    """1.56 billion parameters: weights, gradients and moments take 18 GiB with Muon."""
    assert what_fits(plan_of(XL, processes), gib).startswith(said)


def test_a_plan_that_does_not_fit_says_so(monkeypatch):
    for gib in (40.0, 50.0):
        monkeypatch.setattr(runtime, "device_memory_gib", lambda device, gib=gib: gib)
        lines = "\n".join(sentences(plan_of(XL, 8)))
        assert "= 65,536 tokens, in 8 processes × 1 micro-step of 8 sequences." in lines
        assert f"Memory: about 45.5 GiB of the {gib:.0f} GiB of cpu." in lines
        assert ("This will not fit. --micro_batch_size=4 takes " in lines) == (gib == 40)
    assert "--fsdp has no effect with one process." in sentences(plan_of(replace(XL, fsdp=True)))


def test_a_warm_up_that_outlasts_the_run_is_said():
    lines = "\n".join(sentences(plan_of(replace(CFG, warmup_steps=1500))))
    assert "warmup_steps=1,500 >= max_steps: the peak learning rate is never held." in lines


def test_memory_shrinks_with_what_is_meant_to_shrink_it():
    full = memory_gib(plan_of(replace(XL, micro_batch_size=4), 4))
    adamw = replace(XL, optimizer="adamw", micro_batch_size=4)
    for changes in ({"fsdp": True}, {"activation_checkpointing": True}, {"optimizer": "muon"}):
        assert memory_gib(plan_of(replace(adamw, **changes), 4)) < memory_gib(plan_of(adamw, 4))
    assert memory_gib(plan_of(replace(XL, micro_batch_size=2), 4)) < full
