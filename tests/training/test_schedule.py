"""The learning rate of each step, and when something is due."""

import itertools

import pytest

from plaingpt.training.schedule import Every, LearningRate


def rates(schedule="cosine", max_steps=100, warmup_steps=10, min_lr=0.1, decay_fraction=0.2):
    rate = LearningRate(max_steps, 1.0, min_lr, warmup_steps, schedule, decay_fraction)
    return [rate.at(step) for step in range(max_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_rate_warms_up_peaks_and_ends_at_min_lr(schedule):
    values = rates(schedule)
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(values) == values[9] == 1.0
    assert values[-1] == pytest.approx(0.1)
    assert all(after <= before for before, after in itertools.pairwise(values[9:]))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_rate_falls_at_every_step_of_the_decay(schedule):
    decay = rates(schedule)[10 if schedule == "cosine" else 80 :]
    assert decay[0] < 1.0
    assert all(after < before for before, after in itertools.pairwise(decay))


def test_cosine_is_half_way_down_at_half_time():
    assert rates()[10 + 44] == pytest.approx(0.55)
    assert rates()[10 + 29] == pytest.approx(0.1 + 0.9 * 0.75)  # a third: cos 60° = 1/2


def test_wsd_stays_at_the_peak_and_then_falls_in_a_line():
    values = rates("wsd")
    assert set(values[9:80]) == {1.0}
    assert values[80:] == pytest.approx([1 - 0.9 * (step + 1) / 20 for step in range(20)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_rate_without_warm_up(schedule):
    values = rates(schedule, warmup_steps=0)
    assert values[0] == (1.0 if schedule == "wsd" else pytest.approx(1.0, abs=1e-3))
    assert values[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_run_can_be_all_warm_up(schedule):
    values = rates(schedule, max_steps=10, warmup_steps=20)
    assert values == pytest.approx([(step + 1) / 20 for step in range(10)])


def test_wsd_without_decay_stays_at_the_peak():
    assert set(rates("wsd", decay_fraction=0.0)[10:]) == {1.0}


def test_something_is_due_every_so_many_steps_and_after_the_last():
    every = Every(3, last=7)
    assert [step for step in range(1, 8) if every.due(step)] == [3, 6, 7]
    assert [step for step in range(1, 8) if Every(3).due(step)] == [3, 6]
    assert not any(Every(0).due(step) for step in range(1, 8))


@pytest.mark.parametrize("steps, last", [(0, None), (0, 9), (3, None), (3, 9), (3, 10), (50, 10)])
def test_what_is_due_is_counted_without_asking_for_each_step(steps, last):
    every = Every(steps, last)
    for after in range(14):
        for until in range(14):
            due = [step for step in range(after + 1, until + 1) if every.due(step)]
            assert every.count(after, until) == len(due)
    assert Every(1).count(0, 10**18) == 10**18
