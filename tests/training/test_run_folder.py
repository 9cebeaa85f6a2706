"""metrics.jsonl, the plot, and what must not be in the way."""

import importlib
import json
import re
import struct
import sys

import matplotlib
import msgspec
import pytest

from plaingpt.checkpoint import folders
from plaingpt.training import run_folder

# --- metrics.jsonl


def write(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def test_records_are_appended_a_line_each(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = run_folder.RunLog(tmp_path, [])
    log.add({"step": 1, "loss": 2.5})
    assert re.fullmatch(r'\{"step": 1, "loss": 2.5, "crc32": "[0-9a-f]{8}"\}\n', path.read_text())
    log.add({"step": 2, "loss": 2.25})
    assert (
        log.records
        == run_folder.read_records(path)
        == [
            {"step": 1, "loss": 2.5},
            {"step": 2, "loss": 2.25},
        ]
    )
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def begin(out_dir, step, source=None):
    start = folders.RunStart(step=step, settings={"init_from": "scratch"})
    return run_folder.begin_run(out_dir, start, source, None, {})


def test_leftovers_of_a_killed_save_vanish(tmp_path):
    (tmp_path / ".partial_step_000007").mkdir()
    (tmp_path / ".partial_old_step_000003").mkdir()
    begin(tmp_path, 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "run.json"]


def test_a_run_without_matplotlib_ends_before_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib\.figure"):
        begin(tmp_path / "run", 0)
    assert not (tmp_path / "run").exists()


@pytest.mark.plots
def test_plots_do_not_depend_on_the_backend_of_a_notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.missing")
    log = begin(tmp_path, 0)
    importlib.reload(matplotlib)  # which reads the variable
    log.add({"step": 1, "val_loss": 2.5})
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_resuming_drops_the_steps_that_will_come_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = begin(tmp_path, 0)
    for step in range(1, 6):
        log.add({"step": step, "run": 1})
    log = begin(tmp_path, 3, tmp_path / "step_000003")
    assert [r["step"] for r in run_folder.read_records(path)] == [1, 2, 3]
    log.add({"step": 4, "run": 2})
    steps = [(r["step"], r["run"]) for r in run_folder.read_records(path)]
    assert steps == [(1, 1), (2, 1), (3, 1), (4, 2)]
    assert [start.step for start in folders.read_starts(tmp_path)] == [0, 3]
    assert begin(tmp_path, 0).records == []
    assert path.read_bytes() == b""


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3, "loss": 1.', "{", "\0\0\0"])
def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    begin(tmp_path, 2, tmp_path / "step_000002").add({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_samples_with_braces_are_torn_as_well(tmp_path):
    path = tmp_path / "samples.jsonl"
    samples = [run_folder.Sample(step, "{", 'a }, "crc32": "1"}') for step in (1, 2, 3)]
    run_folder.append_lines(path, map(msgspec.to_builtins, samples))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(1, len(lines[2]) - 2):
        path.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
        records = run_folder.read_records(path, run_folder.Sample)
        assert [record["step"] for record in records] == [1, 2], lines[2][:cut]
    path.write_bytes(whole[:-5] + b"0" + whole[-4:])
    with pytest.raises(ValueError, match=r"samples\.jsonl:3 is damaged: its checksum differs"):
        run_folder.read_records(path, run_folder.Sample)


def test_a_damaged_line_in_the_middle_is_an_error_and_the_file_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, '{"step": 1}', '{"ste', '{"step": 3}')
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is damaged: "):
        begin(tmp_path, 10, tmp_path / "step_000010")
    assert path.read_bytes() == before


def test_a_missing_file_has_no_records(tmp_path):
    assert run_folder.read_records(tmp_path / "metrics.jsonl") == []


# --- the plot


@pytest.mark.plots
def test_the_plot_is_a_png(tmp_path):
    path = tmp_path / "loss.png"
    records = [{"step": step, "loss": 5 / step} for step in range(1, 50)]
    run_folder.plot(records, path)
    without = path.read_bytes()
    records += [{"step": 48, "val_loss": 4.5}, {"step": 49, "val_loss": 4.4}]
    run_folder.plot(records, path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content != without
    width, height = struct.unpack(">II", content[16:24])
    assert 400 <= width <= 2000 and 200 <= height <= 2000
    assert 5_000 < len(content) < 200_000
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


# --- the place


def test_what_is_in_the_way_of_a_checkpoint_is_noticed_at_the_start(tmp_path):
    (tmp_path / "step_000003").mkdir()
    (tmp_path / "step_3.bak").mkdir()
    run_folder.check_out_dir(tmp_path, 3)
    with pytest.raises(ValueError, match="step_000003 is in the way of a checkpoint"):
        run_folder.check_out_dir(tmp_path, 2)
    (tmp_path / "step_000003" / "state.json").touch()
    run_folder.check_out_dir(tmp_path, 2)
    run_folder.check_out_dir(tmp_path / "none", 0)
