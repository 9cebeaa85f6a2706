"""The console line and the clock."""

import pytest

from plaingpt.training import log

RECORD = {
    "step": 120,
    "loss": 4.12344,
    "lr": 6e-4,
    "grad_norm": 0.814,
    "tokens": 62_914_560,
    "tokens_per_s": 2_269_000.0,
    "dt_ms": 231.4,
    "mfu": 0.4123,
}


def test_a_step_is_one_line_of_fixed_fields():
    assert log.console_line(RECORD, max_steps=19073) == (
        "step 00120/19073 | loss 4.1234 | lr 6.00e-04 | norm 0.81 | 231 ms | 2.27M tok/s | "
        "mfu 41.2% | eta 1h13m"
    )


def test_an_unknown_share_of_the_peak_is_said():
    line = log.console_line({**RECORD, "mfu": None, "step": 500}, max_steps=500)
    assert line.startswith("step 500/500 | ")
    assert line.endswith(" | mfu n/a | eta 0s")


def test_a_loss_that_is_not_a_number_still_makes_a_line():
    nan = float("nan")
    line = log.console_line({**RECORD, "loss": nan, "grad_norm": nan}, 500)
    assert "loss nan | " in line and "norm nan | " in line


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (690, "690"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (1e3, "1.00k"),
        (9_994, "9.99k"),
        (9_996, "10.0k"),
        (84_123, "84.1k"),
        (99_960, "100k"),
        (100_000, "100k"),
        (999_400, "999k"),
        (999_600, "1.00M"),
        (2_269_000, "2.27M"),
        (12_345_678, "12.3M"),
        (1e9, "1.00B"),
        (1.5e11, "150B"),
    ],
)
def test_numbers_have_three_digits_and_a_unit(number, text):
    assert log.compact(number) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (8.4, "8s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (3599.4, "59m59s"),
        (3599.7, "1h00m"),
        (4321, "1h12m"),
        (100 * 3600 + 59 * 60 + 59, "100h59m"),
    ],
)
def test_durations_are_rounded_once(seconds, text):
    assert log.duration(seconds) == text
