"""The table and the picture of several runs."""

import json

import pytest
from conftest import save_checkpoint

from model import GPT, GPTConfig
from tools import compare

SHAPE = GPTConfig(257, block_size=16, n_layer=1, n_head=1, n_embd=8)
LINES = [
    {"step": 0, "val_loss": 9.0},
    {"step": 10, "loss": 5.0, "tokens": 640, "dt_ms": 100.0},
    {"step": 20, "loss": None, "tokens": 1280, "dt_ms": 50.0, "val_loss": 3.0, "val_bpb": 1.25},
    {"step": 25, "loss": 4.0, "tokens": 1600, "dt_ms": 20.0, "val_loss": 3.5, "val_bpb": 1.5},
]


def write_run(folder, lines=LINES, checkpoint=True):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if checkpoint:
        state = {"step": 25, "data": "", "settings": {"block_size": None}}
        save_checkpoint(folder, GPT(SHAPE).init_weights(0), state=state)
    return folder


def settings(tmp_path, *runs):
    names = ",".join(map(str, runs))
    return [f"--runs={names}", f"--out={tmp_path}/all.png"]


def test_the_figures_of_runs_side_by_side(tmp_path, capsys):
    one = write_run(tmp_path / "one")
    lines = [{"step": 5, "loss": 6.0, "tokens": 2_000_000, "dt_ms": 2e6}]
    other = write_run(tmp_path / "other", lines, checkpoint=False)
    (other / "run.json").touch()
    assert compare.main(settings(tmp_path, one, other)) == 0
    note, head, *rows, wrote = capsys.readouterr().out.splitlines()
    assert note == (
        f"the size of the model of {other} is unknown: {other} holds a run that has not saved a "
        "checkpoint yet"
    )
    names = ["run", "parameters", "steps", "tokens", "val loss", "best", "at step"]
    names += ["bits/byte", "best b/b", "FLOPs", "time", "tokens/s"]
    assert head.split() == " ".join(names).split()
    flops = SHAPE.flops_per_token() * 1600  # in 10 × 100 + 10 × 50 + 5 × 20 ms
    figures = f"3.07k 25 1.60k 3.5000 3.0000 20 1.5000 1.2500 {flops:.3g} 2s 1.00k"
    assert rows[0].split() == [str(one), *figures.split()]
    others = "– 5 2.00M – – – – – – 2h46m 200"
    assert rows[1].split() == [str(other), *others.split()]
    assert len({len(row) for row in (head, *rows)}) == 1
    assert wrote == f"wrote {tmp_path}/all.png"
    assert (tmp_path / "all.png").read_bytes().startswith(b"\x89PNG")


def test_the_points_of_the_picture(tmp_path):
    run = compare.read_run(write_run(tmp_path / "one"))
    assert [record["tokens"] for record in run.records] == [0, 640, 1280, 1600]
    assert [record["seconds"] for record in run.records] == pytest.approx([0, 1, 1.5, 1.6])
    each = SHAPE.flops_per_token()
    assert [record["flops"] for record in run.records] == [0, 640 * each, 1280 * each, 1600 * each]


@pytest.mark.parametrize(
    "lines, said",
    [
        ([], "metrics.jsonl is empty: its run has not logged a step yet"),
        (LINES[:1], "metrics.jsonl is empty: its run has not logged a step yet"),
        ([{"step": 5, "dt_ms": 1.0}], "metrics.jsonl: the record of step 5 has no tokens or no dt"),
        ([{"step": 5, "tokens": "x"}], "metrics.jsonl:1: tokens: expected a whole number"),
        ([*LINES, {"stop": 5}], "metrics.jsonl:5: missing field"),
    ],
)
def test_a_run_without_figures_is_one_line(tmp_path, capsys, lines, said):
    runs = write_run(tmp_path / "one"), write_run(tmp_path / "two", lines)
    assert compare.main(settings(tmp_path, *runs)) == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1 and f"error: {runs[1]}" in errors[0] and said in errors[0]
    assert not (tmp_path / "all.png").exists()


def test_what_is_not_a_run_is_refused(tmp_path, capsys):
    (step,) = write_run(tmp_path / "one").glob("step_*")
    for name, said in [
        (tmp_path / "on", "does not exist; did you mean"),
        (step, f"is within a run: name its folder, {tmp_path}/one"),
        (tmp_path / "one" / "best", f"is within a run: name its folder, {tmp_path}/one"),
        (tmp_path, "has no metrics.jsonl: name the folders of runs, such as out/stdlib"),
    ]:
        assert compare.main(settings(tmp_path, name)) == 2
        assert f"error: {name} {said}" in capsys.readouterr().err
    assert compare.main(["--runs=", f"--out={tmp_path}/a.jpg"]) == 2
    err = capsys.readouterr().err
    assert "runs is empty" in err and "a.jpg' does not end with .png" in err
