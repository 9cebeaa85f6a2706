"""The console line and the clock."""

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
