"""What a run will do."""

from dataclasses import replace

import pytest
import torch

import train
from plaingpt.runtime import Runtime
from plaingpt.training.data import Data
from plaingpt.training.devices import Device
from plaingpt.training.plan import Plan, divisors, make_plan, micro_batch_size
from plaingpt.training.start import Start, model_config, outline

CPU = torch.device("cpu")
CFG = train.TrainConfig(batch_size=24, device="cpu")


def plan_of(cfg: train.TrainConfig, processes: int = 1, data: Data | None = None) -> Plan:
    rt = Runtime(CPU, torch.bfloat16, world_size=processes)
    start = Start(outline(model_config(vars(cfg), 50257)))
    micro = micro_batch_size(cfg.batch_size, cfg.micro_batch_size, processes)
    return make_plan(vars(cfg), start, data, micro, rt, Device("cpu", "cpu", 23.0))


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
    assert plan.max_steps == 1750 and plan.grad_clip == float("inf")
    assert not plan.sampling.due(1750) and plan.saving.due(50) and plan.saving.due(1750)


def test_the_learning_rate_is_the_one_given_or_that_of_the_width():
    for changes, peak, source in (
        ({}, 0.01, "measured"),
        ({"n_embd": 768}, 0.0041, "derived from the width"),
        ({"n_embd": 768, "learning_rate": 0.5}, 0.5, ""),
        ({"init_from": "out/a"}, 0.001, "a tenth of a new model's, measured"),
    ):
        plan = plan_of(replace(CFG, **changes))
        assert (plan.learning_rate.peak, plan.rate_source) == (peak, source)
    with pytest.raises(ValueError, match="min_lr=0.02 is above learning_rate=0.01"):
        plan_of(replace(CFG, min_lr=0.02))


def test_the_divisors_of_a_huge_number_are_found_at_once():
    assert divisors(24) == [24, 12, 8, 6, 4, 3, 2, 1]
    assert divisors(10**8)[:3] == [10**8, 5 * 10**7, 25 * 10**6]
    assert divisors(2**63 - 1)[0] == 2**63 - 1
