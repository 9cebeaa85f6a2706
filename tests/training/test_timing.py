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


# --- by data sheets: GPT-2 124M, which has 124,475,904 parameters, 84,934,656 in blocks' matrices

SMALL = replace(CFG, n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_multiple=64)
SMALL = replace(SMALL, batch_size=512, micro_batch_size=1, optimizer="adamw")


def planned(text, **changes):
    """The seconds of a step on known devices, those of its arithmetic, and the phrase."""
    rt, device = devices.planned_devices(text, "auto")
    plan = replace(plan_of(replace(SMALL, **changes), rt.world_size), device=device)
    seconds, how = timing.nominal_seconds(plan)
    return seconds, plan.flops_per_step / (rt.world_size * 0.4 * device.peak_flops), how


def test_one_known_device_has_nothing_to_send():
    seconds, compute, how = planned("A100")
    assert seconds == pytest.approx(compute)
    assert "40% of the 312 TFLOP/s of each A100" in how and "sends" not in how


@pytest.mark.parametrize(
    "text, changes, waiting",
    [
        # 7/4 of the gradients, 4 bytes each, at 80% of 450 GB/s
        ("8xH100", {}, 0.871331328 / 360),
        # without a compiled backward pass, two thirds of the last of 64 micro-steps hide it
        ("8xRTX 4090", {"compile": False}, 0.871331328 / 25.6 - 0.84865 / 64 * 2 / 3),
        ("8xH100", {"compile": False, "micro_batch_size": 64}, 0),
        # 511/256 of the gradients at 80% of 400 GB/s, in one operation
        ("512xH100", {}, 0.993862 / 320 + 0.0005),
        # 2 bytes of each matrix, there and back
        ("8xH100", {"optimizer": "muon"}, (0.871331328 + 3.5 * 0.084934656) / 360),
    ],
)
def test_processes_wait_for_the_averages_of_their_gradients(text, changes, waiting):
    seconds, compute, how = planned(text, **changes)
    assert seconds - compute == pytest.approx(waiting, rel=2e-3, abs=1e-9)
    assert f"and waits {1000 * (seconds - compute):.3g} ms for it: " in how
    assert f"an efficiency of {compute / seconds:.0%}" in how


def test_fsdp_sends_more_but_while_it_computes():
    # 8 micro-steps: 7/8 of 4 bytes of all parameters twice: gathered blocks are half as long, and
    # gathered twice
    seconds, compute, how = planned("8xH100", fsdp=True, micro_batch_size=8)
    assert seconds == pytest.approx(compute) and "sends 6.97 GB and waits 0 ms" in how
    # one micro-step: 511/512 of 4 bytes each, and 38 operations
    seconds, compute, how = planned("512xH100", fsdp=True)
    assert seconds == pytest.approx(0.993706 / 320 + 38 * 0.0005, rel=1e-4) and seconds > compute
    assert "sends 0.994 GB" in how
