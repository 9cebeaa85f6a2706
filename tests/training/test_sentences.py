"""What a run is said to do."""

from dataclasses import replace

import pytest
from test_plan import CFG, plan_of

from plaingpt.training.schedule import Every
from plaingpt.training.sentences import sentences, time_sentence

PLAN = plan_of(replace(CFG, max_steps=100, eval_interval=40))  # 24 × 256 = 6,144 tokens per step
DATA = {"split_tokens": 30_720, "epochs": 20.0, "eval_tokens": 30_720}


def test_a_warm_up_that_outlasts_the_run_is_said():
    lines = "\n".join(sentences(plan_of(replace(CFG, warmup_steps=1750))))
    assert "warmup_steps=1,750 >= max_steps: the peak learning rate is never reached." in lines


def test_text_that_is_read_again_and_again_is_said():
    words = "This run reads its text 20 times: repetition teaches less and less beyond 4 epochs"
    plan = replace(PLAN, **DATA)
    lines = "\n".join(sentences(plan))
    assert "parameter, 20.00 epochs of 30,720 tokens." in lines and words in lines
    for changes in ({"epochs": 4.0}, {"fresh": False}, {"epochs": 0.0}):
        assert words not in "\n".join(sentences(replace(plan, **changes)))


def test_a_resumed_run_says_what_is_left():
    assert "Left:" not in "\n".join(sentences(PLAN))
    assert "Left: 40 steps, 245,760 tokens." in sentences(replace(PLAN, done=60))
    assert "Left: 0 steps, 0 tokens." in sentences(replace(PLAN, done=101))


def test_an_early_end_is_said():
    assert "Ends early" not in "\n".join(sentences(PLAN))
    patient = replace(PLAN, patience=3, done=60)
    said = "Ends early after 3 evaluations without a better validation loss"
    assert f"{said}." in sentences(patient)
    assert f"{said} (2 so far)." in sentences(replace(patient, waited=2))


def test_tasks_are_said_with_how_often_and_how_much_they_read():
    plan = replace(PLAN, tasks=("piqa (200 items)", "words (80 tokens)"), measuring=Every(20))
    plan = replace(plan, task_tokens=9_000, done=60)
    said = "Tasks: piqa (200 items), words (80 tokens); measured 2 times, 9,000 tokens each."
    assert said in sentences(plan)
    tuned = replace(plan, done=0, fresh=False)  # measured before its first step, too
    often = plan.measuring.count(0, plan.max_steps)
    assert f"measured {often + 1} times" in "\n".join(sentences(tuned))
    assert f"measured {often} times" in "\n".join(sentences(replace(tuned, fresh=True)))


@pytest.mark.parametrize(
    "changes, seconds, said",
    [
        ({}, 0.5, "Time: about 50s, 500 ms per step, as measured here."),
        ({}, 30.0, "Time: about 50m00s, 30 s per step, as measured here."),
        ({"done": 90}, 0.5, "Time: about 5s, "),
        ({"done": 200}, 0.5, "Time: about 0s, "),
        # 3 evaluations of as many tokens as 5 steps have, each at a third of their cost
        (DATA, 1.0, "Time: about 1m45s, "),
        (DATA | {"done": 50, "evaluation": Every(60)}, 1.2, "Time: about 1m02s, "),
        # 5 measurements of tasks, each with as many tokens as 3 steps
        ({"measuring": Every(20), "task_tokens": 18_432}, 1.0, "Time: about 1m45s, "),
    ],
)
def test_the_time_is_that_of_the_steps_and_measurements_to_come(changes, seconds, said):
    assert time_sentence(replace(PLAN, **changes), seconds, "as measured here").startswith(said)
