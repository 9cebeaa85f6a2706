"""What a run is said to do and to need."""

from dataclasses import replace

import pytest
import torch

import train
from model import GPT
from plaingpt.runtime import Runtime
from plaingpt.training import plan

CPU = torch.device("cpu")
CFG = train.TrainConfig(batch_size=24, device="cpu")


def meta(cfg: train.TrainConfig) -> GPT:
    with torch.device("meta"):
        return GPT(train.model_config(cfg, 50257))


def world(size: int = 1, dtype: torch.dtype = torch.bfloat16) -> Runtime:
    return Runtime(CPU, dtype, world_size=size)


def test_a_processs_share_of_the_batch_is_taken_at_once_unless_said_otherwise():
    assert plan.micro_batch_size(CFG, world()) == 24
    assert plan.micro_batch_size(CFG, world(4)) == 6
    assert plan.micro_batch_size(replace(CFG, micro_batch_size=3), world(4)) == 3


@pytest.mark.parametrize(
    "micro, processes, message",
    [
        (None, 5, "does not divide over 5 processes; the nearest .* divides over are 4 and 6"),
        (5, 1, "is no multiple of micro_batch_size=5; the nearest that divide it are 4 and 6"),
        (5, 4, "6 in each of 4 processes, .* the nearest that divide it are 3 and 6"),
    ],
)
def test_what_does_not_divide_names_what_does(micro, processes, message):
    with pytest.raises(ValueError, match=message):
        plan.micro_batch_size(replace(CFG, micro_batch_size=micro), world(processes))


def test_fsdp_and_float16_do_not_combine():
    with pytest.raises(ValueError, match="does not combine with float16"):
        plan.micro_batch_size(replace(CFG, fsdp=True), world(2, torch.float16))


XL = replace(CFG, n_layer=48, n_head=25, n_embd=1600, block_size=1024, batch_size=64)


@pytest.mark.parametrize(
    "gib, processes, said",
    [
        (35, 8, "--micro_batch_size=2 takes 32.7 GiB"),
        (28, 8, "--micro_batch_size=8 --activation_checkpointing takes 27.2 GiB"),
        (25, 8, "--micro_batch_size=4 --fsdp takes 22.3 GiB"),
        (12, 8, "--micro_batch_size=2 --fsdp --activation_checkpointing takes 11.5 GiB"),
        (8, 8, "Nor would it with the smallest micro-batches"),
        (20, 1, "Nor would it with the smallest micro-batches; --fsdp shares it"),
    ],
)
def test_the_first_change_that_fits_is_named(gib, processes, said):
    """1.56 billion parameters: weights, gradients and moments take 18 GiB with Muon."""
    assert plan.what_fits(XL, world(processes), meta(XL), gib).startswith(said)


def test_a_plan_that_does_not_fit_says_so(monkeypatch):
    for gib in (40.0, 50.0):
        monkeypatch.setattr(plan.runtime, "device_memory_gib", lambda device, gib=gib: gib)
        lines = "\n".join(plan.sentences(XL, world(8), meta(XL), None, 100))
        assert "= 65,536 tokens, in 8 processes × 1 micro-step(s) of 8" in lines
        assert f"Memory: about 45.5 GiB of the {gib:.0f} GiB of cpu." in lines
        assert ("It will not fit. --micro_batch_size=4 takes " in lines) == (gib == 40)
    lines = "\n".join(plan.sentences(replace(XL, fsdp=True), world(1), meta(XL), None, 100))
    assert "One process has nobody to share with" in lines


def test_memory_shrinks_with_what_is_meant_to_shrink_it():
    model = meta(XL)
    full = plan.memory_gib(model, 4, XL, world(4))
    for changes in ({"fsdp": True}, {"activation_checkpointing": True}, {"optimizer": "muon"}):
        changed = replace(XL, **{"optimizer": "adamw", **changes})
        assert plan.memory_gib(model, 4, changed, world(4)) < plan.memory_gib(
            model, 4, replace(XL, optimizer="adamw"), world(4)
        )
    assert plan.memory_gib(model, 2, XL, world(4)) < full
