"""How long a step is said to take."""

import time
from dataclasses import replace

import pytest
import torch
from test_plan import CFG, plan_of

import train
from plaingpt.runtime import Runtime
from plaingpt.training import devices, timing
from plaingpt.training.devices import Device
from plaingpt.training.start import Start, model_config, outline
from plaingpt.training.timing import product_flops  # before a fixture replaces it

RT = Runtime(torch.device("cpu"), torch.float32)
TINY = replace(CFG, n_layer=1, n_embd=32, block_size=16, micro_batch_size=6)


def seconds_of(cfg, speed, monkeypatch, **changes):
    """The outcome on a machine of `speed` FLOP/s, and the sequences of each step that was tried,
    which slept a millisecond per sequence."""
    tried = []

    def step(state, batch, lr, plan, rt):
        tried.append(len(batch[0]))
        assert lr == 0 and tried[-1] % plan.micro_batch_size == 0
        time.sleep(0.001 * tried[-1])

    monkeypatch.setattr(timing, "product_flops", lambda device, dtype: speed)
    plan = replace(plan_of(cfg), dtype=torch.float32, **changes)
    start = Start(outline(model_config(vars(cfg), 50257)))
    return timing.step_seconds(start, plan, RT, step), tried


def test_the_speed_of_a_product_is_measured():
    assert 1e8 < product_flops(torch.device("cpu"), torch.float32) < 1e15


def test_a_quick_step_is_measured_whole(monkeypatch):
    (seconds, how), tried = seconds_of(TINY, 1e12, monkeypatch)
    assert how == "as measured here" and tried == [24] * 10
    assert 0.024 <= seconds < 0.1


def test_a_long_step_is_measured_on_some_of_its_sequences(monkeypatch):
    sequence = plan_of(TINY).flops_per_step / 24
    (seconds, how), tried = seconds_of(TINY, 13 * sequence, monkeypatch)  # 13 take a second
    assert how == "as measured here on 12 of its 24 sequences" and tried == [12, 12]
    assert 0.024 <= seconds < 0.1
    (_, how), tried = seconds_of(TINY, 2 * sequence, monkeypatch)
    assert how == "as measured here on 2 of its 24 sequences" and tried == [2, 2]
    (_, how), tried = seconds_of(TINY, sequence / 3, monkeypatch)
    assert how == "as measured here on 1 of its 24 sequences" and tried == [1, 1]


@pytest.mark.parametrize(
    "share, changes", [(0.2, {}), (1000, {"device": Device("cpu", "cpu", 0.01)})]
)
def test_a_step_beyond_this_machine_is_not_tried(monkeypatch, share, changes):
    plan = plan_of(TINY)
    speed = share * plan.flops_per_step / 24
    (seconds, how), tried = seconds_of(TINY, speed, monkeypatch, **changes)
    assert seconds == pytest.approx(24 / share) and tried == []
    assert how == "at the speed of matrix products alone: it will take longer"


def test_real_steps_are_timed(monkeypatch):
    monkeypatch.setattr(timing, "product_flops", lambda device, dtype: 1e10)
    start = Start(outline(model_config(vars(TINY), 300)))
    plan = replace(plan_of(TINY), config=start.model.config)
    seconds, how = timing.step_seconds(start, plan, RT, train.optimizer_step)
    assert how == "as measured here" and 0 < seconds < 5


def test_known_devices_are_planned_by_their_data_sheets():
    _, device = devices.planned_devices("8xA100", "auto")
    plan = replace(plan_of(CFG, 8), device=device)
    seconds, how = timing.nominal_seconds(plan)
    assert seconds == pytest.approx(plan.flops_per_step / (8 * 0.4 * 312e12))
    assert "40% of the 312 TFLOP/s of each A100" in how
