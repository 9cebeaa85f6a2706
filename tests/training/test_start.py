"""Going on from any checkpoint of a run, exactly."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_train import assert_same_end, cfg  # noqa: F401

import train
from plaingpt.checkpoint import folders


@pytest.fixture
def whole(cfg, tmp_path):  # noqa: F811
    """The folder of a finished run, with the checkpoints of steps 7, 14 and 20."""
    train.train(replace(cfg, out_dir=str(tmp_path / "whole")))
    return tmp_path / "whole"


def names(out_dir: Path) -> list[str]:
    return [folder.name for folder in folders.step_folders(out_dir)]


def starts(out_dir: Path) -> list[int]:
    return [start["step"] for start in json.loads((out_dir / "run.json").read_text())["starts"]]


@pytest.mark.parametrize("step", [7, 14])
def test_a_run_goes_on_from_one_of_its_checkpoints_elsewhere(whole, tmp_path, step):
    first = f"--init_from={whole}/step_{step:06d}"
    before = sorted(whole.rglob("*")), (whole / "metrics.jsonl").read_bytes()
    other = tmp_path / "other"
    assert train.main([first, "--resume", f"--out_dir={other}"]) == 0
    assert_same_end(whole, other)
    assert starts(other) == [0, step] and names(other)[-1] == "step_000020"
    assert before == (sorted(whole.rglob("*")), (whole / "metrics.jsonl").read_bytes())
    assert train.main(["--init_from=resume", f"--out_dir={other}", "--max_steps=21"]) == 0


def test_a_run_goes_on_in_its_own_folder_if_nothing_is_newer(whole, tmp_path, capsys):
    resume = [f"--init_from={whole}/step_000007", "--resume"]
    shutil.copytree(whole, tmp_path / "copy")
    assert train.main(resume) == 2
    err = capsys.readouterr().err
    assert (
        f"{whole} has checkpoints up to step_000020, which are never overwritten: --out_dir=OTHER"
        in err
    )
    assert names(whole) == ["step_000007", "step_000014", "step_000020"]
    assert train.main([*resume, f"--out_dir={tmp_path / 'copy'}"]) == 2  # another run is there
    assert "copy has checkpoints up to step_000020" in capsys.readouterr().err
    for name in ("step_000014", "step_000020"):
        shutil.rmtree(whole / name)
    assert train.main(resume) == 0
    assert_same_end(whole, tmp_path / "copy")
    assert starts(whole) == [0, 7]


def test_what_is_left_is_planned(whole, capsys):
    assert train.main([f"--init_from={whole}/step_000007", "--resume", "--plan"]) == 0
    out = capsys.readouterr().out
    assert "Run: 20 steps, 1,280 tokens" in out and "Left: 13 steps, 832 tokens." in out


def test_a_checkpoint_alone_goes_on_but_not_with_other_settings(whole, tmp_path, capsys):
    alone = tmp_path / "alone"
    shutil.copytree(whole / "step_000014", alone)
    resume = [f"--init_from={alone}", "--resume", f"--out_dir={tmp_path / 'new'}"]
    assert train.main([*resume, "--seed=3"]) == 2
    assert "with other settings: seed is 1337, not 3" in capsys.readouterr().err
    assert train.main(resume) == 0
    assert names(tmp_path / "new") == ["step_000020"]
    for name in ("optimizer.pt", "state.json"):
        (alone / name).unlink()
        assert train.main([*resume[:2], f"--out_dir={tmp_path / 'newer'}"]) == 2
        said = f"alone has no {name}: a run can start from it, but not resume it"
        assert said in capsys.readouterr().err
