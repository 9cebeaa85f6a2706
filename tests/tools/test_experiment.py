"""Experiments: from a file of settings to runs, records, a table and a figure."""

import contextlib
import io
import json
import runpy
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import workers
from test_end_to_end import REPO, check, commands_of, header_lines

import configurator
import train
from plaingpt.checkpoint import folders
from tools import experiment, experiment_results
from tools.experiment_results import Result

FILES = sorted((REPO / "experiments").glob("*.py"))
RESULTS = (REPO / "docs" / "results.md").read_text(encoding="utf-8")
TINY = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16, "eval_interval": 2}


class Forked:
    """A training as a Popen, forked from a process that has imported torch."""

    def __init__(self, run):
        environment = experiment.RESTARTABLE | {"RANK": "0"}
        arguments = ([experiment.arguments_of(run)], str(experiment.log_of(run)))
        self.process = workers.context.Process(target=workers.work, args=(environment, *arguments))
        self.process.start()
        self.wait, self.terminate = self.process.join, self.process.terminate

    def poll(self):
        return self.process.exitcode

    @property
    def returncode(self):
        return self.process.exitcode


@pytest.fixture
def started(monkeypatch):
    """Have runs forked, and settings checked in this process; returns the names of the runs."""
    names = []

    def start(run, threads):
        names.append(run.name)
        return Forked(run)

    def checked(name, command, folder):
        with contextlib.redirect_stdout(io.StringIO()) as out, monkeypatch.context() as patch:
            patch.setattr(sys, "argv", command[2:])
            exec(experiment.CHECK, {})
        return out.getvalue()

    monkeypatch.setattr(experiment, "start", start)
    monkeypatch.setattr(experiment, "output_of", checked)
    return names


@pytest.fixture
def write(tmp_path, monkeypatch, shard_folder):
    """`write(variants, …)` writes an experiment on made-up data: tiny.py, in the working folder."""
    rng = np.random.default_rng(0)
    data = shard_folder([rng.integers(97, 107, 3000)], [rng.integers(97, 107, 300)])
    monkeypatch.chdir(tmp_path)

    def write(variants, more="", seeds=(1, 2), **base):
        base = TINY | {"data_dir": str(data), "max_steps": 4} | base
        lines = [f"base = {base}", f"variants = {variants}", f"seeds = {seeds}", more]
        (tmp_path / "tiny.py").write_text("\n".join(lines))

    return write


def recorded() -> dict[tuple[str, int], Result]:
    lines = Path("results/tiny.jsonl").read_text().splitlines()
    results = [msgspec.json.decode(line, type=Result) for line in lines]
    return {(result.variant, result.seed): result for result in results}


def errors_of(capsys) -> str:
    return capsys.readouterr().err.partition("error: ")[2]


def test_an_experiment_is_interrupted_resumed_and_extended(
    tmp_path, write, started, monkeypatch, capsys
):
    long = {"max_steps": 60, "log_interval": 1, "eval_interval": 30}
    more = "def summary(results):\n    return f'{len(results)} of {len(seeds)} × 2 runs'"
    write({"short": {}, "long": long}, more)
    folder, records = tmp_path / "out/experiments/tiny", tmp_path / "results/tiny.jsonl"

    def interrupt(seconds):
        time.sleep(seconds / 10)
        metrics = folder / "long_1" / "metrics.jsonl"
        if metrics.exists() and metrics.stat().st_size:  # after its first step
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "time", SimpleNamespace(sleep=interrupt))
        assert experiment.main(["tiny.py"]) == 130
    assert started == ["short_1", "long_1"]
    assert [variant for variant, _ in recorded()] == ["short"]
    assert experiment.main(["tiny.py", "--table"]) == 0
    table = capsys.readouterr().out
    assert "| short (1 of 2 seeds) | " in table and "runs" not in table.splitlines()[-1]

    assert experiment.main(["tiny.py", "--jobs=2"]) == 0
    assert started[2:] == ["long_1", "short_2", "long_2"]
    begun, resumed = folders.read_starts(folder / "long_1")
    assert begun.step == 0 and 0 < resumed.step < 60
    table = capsys.readouterr().out
    assert table.endswith("\n\n4 of 2 × 2 runs\n")
    assert (records.with_suffix(".png")).read_bytes().startswith(b"\x89PNG")

    found = recorded()
    last = json.loads((folder / "long_2" / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["long", 2].loss == pytest.approx(last["val_loss"], abs=1e-5)
    assert found["long", 2].bits_per_byte == pytest.approx(last["val_bpb"], abs=1e-5)
    assert found["long", 2].steps == 60 and found["long", 2].tokens == last["tokens"]
    assert [step for step, _, _ in found["short", 1].curve] == [2, 4]

    for run in folder.glob("*_*/"):
        shutil.rmtree(run)
    assert experiment.main(["tiny.py", "--seeds=1,2,3", "--only=short"]) == 0
    assert started[5:] == ["short_3"]
    assert "| long (2 of 3 seeds) | " in capsys.readouterr().out


def test_a_run_that_fails_leaves_the_others_alone(tmp_path, write, started, capsys):
    write({"lost": {"data_dir": "nowhere"}, "found": {}}, seeds=(1,))
    assert experiment.main(["tiny.py"]) == 2
    said = errors_of(capsys)
    assert said.startswith("lost_1 failed: there is no data in nowhere; ")
    assert "(its output is in out/experiments/tiny/lost_1.log)" in said
    assert recorded().keys() == {("found", 1)}


def test_settings_that_have_changed_are_an_error(tmp_path, write, started, capsys):
    write({"a": {}, "b": {}}, seeds=(1,))
    records = Path("results/tiny.jsonl")
    experiment_results.add(a_result("a", 1, 3.0, settings={"max_steps": 8}), records)
    for arguments in (["tiny.py"], ["tiny.py", "--table"]):
        assert experiment.main(arguments) == 2
        said = errors_of(capsys)
        assert said.startswith("a_1 was trained with other settings: max_steps is 4 and was 8; ")
        assert f"remove its runs from {records} and out/experiments/tiny/a_1 to train " in said
    records.unlink()
    run = tmp_path / "out/experiments/tiny/b_1"
    run.mkdir(parents=True)
    settings = {"init_from": "scratch", "max_steps": 4, **TINY, "n_embd": 16}
    (run / "run.json").write_text(json.dumps({"starts": [{"settings": settings}]}))
    assert experiment.main(["tiny.py", "--only=b"]) == 2
    assert "b_1 was trained with other settings: n_embd is 8 and was 16" in errors_of(capsys)
    assert started == []


@pytest.mark.parametrize(
    ("variants", "more", "said"),
    [
        ({}, "", "variants is empty: expected settings by name, "),
        ({"a": {}}, "seeds = ()", "seeds is empty: expected at least one"),
        ({"a": {}}, "seeds = (1.5,)", "tiny.py: seeds expects int,…, not (1.5,)"),
        ({"a": 3}, "", "variant a expects a dict of settings, not 3"),
        ({"a/b": {}}, "", "variant 'a/b': a name consists of letters, "),
        ({"a": {"seed": 3}}, "", "variant a cannot set seed"),
        ({"a": {"max_steps": None}}, "", "variant a needs max_steps"),
        ({"a": {"learning_rat": 1}}, "", "variant a: unknown setting 'learning_rat'; did you mean"),
        ({"a": {}, "b": {"n_embd": -1}}, "", "variant b: n_embd must be at least 1, not -1"),
        ({"a": {"n_embd": [[1]]}}, "", "variant a: "),
        ({"a": {}}, "variant = 1", "tiny.py: unknown setting 'variant'; did you mean 'variants'?"),
        ({"a": {}}, "only = ('b',)", "only: unknown variant 'b'; the variants are a"),
        ({"a": {}}, "setup = ('ls',)", "setup: expected commands that begin with python, not 'ls'"),
        ({"a": {}}, "setup = ('python \\'',)", 'setup: "python \'": No closing quotation'),
        ({"a": {}}, "table = True", "results/tiny.jsonl has no run of tiny.py yet"),
    ],
)
def test_a_mistake_in_the_file_is_found_before_any_training(
    write, started, capsys, variants, more, said
):
    write(variants, more)
    assert experiment.main(["tiny.py"]) == 2
    assert errors_of(capsys).startswith(said)
    assert started == []


def test_the_result_of_a_run_folder(tmp_path, monkeypatch):
    """The curve is thinned from its end; the time is that of all steps."""
    lines = [{"step": 0, "val_loss": 9.0}]
    for step in range(10, 500, 10):
        loss = {"val_loss": 4.0 if step == 50 else 5.0, "val_bpb": 2.5} if step % 20 == 10 else {}
        lines.append({"step": step, "tokens": 64 * step, "dt_ms": 1000.0, **loss})
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    start = {"settings": {"init_from": "gpt2"}, "device": "cuda", "dtype": "torch.bfloat16"}
    (tmp_path / "run.json").write_text(json.dumps({"starts": [start]}))
    monkeypatch.setattr(experiment_results, "trained_parameters", lambda folder: 123)
    run = experiment_results.Run("a", 1, {}, tmp_path)
    result = experiment_results.measured(run, threads=2)
    assert (result.steps, result.tokens, result.seconds) == (490, 64 * 490, 490.0)
    assert (result.loss, result.lowest, result.bits_per_byte) == (5.0, 4.0, 2.5)
    assert (result.device, result.parameters) == ("cuda, bfloat16", 123)
    assert [step for step, _, _ in result.curve] == [10, *range(50, 491, 40)]
    assert result.curve[0] == (10, 640, 5.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 500, "val_loss": null}\n')
    with pytest.raises(ValueError, match="the validation loss of step 500 is not finite"):
        experiment_results.measured(run, threads=2)


def test_the_command_line_names_one_file(capsys):
    for arguments in ([], ["experiments/size.py", "experiments/tying.py"]):
        assert experiment.main(arguments) == 2
        assert errors_of(capsys).startswith("expected the file of an experiment, as in python -m")
    assert experiment.main(["experiments/sizes.py"]) == 2
    assert "did you mean experiments/size.py?" in errors_of(capsys)


def test_an_experiment_in_processes_of_its_own(tmp_path, write, capfd):
    (tmp_path / "text.txt").write_text("What is written here is short. " * 300)
    setup = "python prepare.py --sources=text.txt --tokenizer=bytes --data_dir=made"
    write({"one": {"max_steps": 2, "data_dir": "made"}}, f"setup = ({setup!r},)", seeds=(5,))
    assert experiment.main(["tiny.py"]) == 0
    out = capfd.readouterr().out
    assert f"+ {setup}\n" in out and "\none_5: loss 4." in out and "; 0 runs left\n" in out
    [result] = recorded().values()
    assert (result.steps, result.tokens) == (2, 256) and result.device.startswith("cpu, ")
    assert "step 2/2 | loss 5." in Path("out/experiments/tiny/one_5.log").read_text()
    write({"one": {}}, "setup = ('python nothing.py',)", seeds=(6,))
    assert experiment.main(["tiny.py"]) == 2
    assert "'python nothing.py' failed with status 2" in capfd.readouterr().err


# --- the table


def a_result(variant: str, seed: int, loss: float, **changes) -> Result:
    about = {"settings": {}, "steps": 10, "tokens": 20_480, "parameters": 1_152_128}
    about |= {"seconds": 2.0, "device": "cpu, bfloat16, 2 threads", "versions": {"torch": "2.13.0"}}
    about |= {"lowest": loss, "bits_per_byte": loss / 2, "curve": ((10, 20_480, loss),)}
    return Result(variant=variant, seed=seed, loss=loss, **about | changes)


def test_the_table_has_the_spread_and_paired_differences():
    losses = {"first": (3.0, 3.1, 3.2), "second": (3.4, 3.3, 3.5)}
    results = [
        a_result(variant, seed, loss)
        for variant, several in losses.items()
        for seed, loss in enumerate(several, 1)
    ]
    # differences of 0.2, 0.1 and 0.15 bits per byte: a deviation of 0.05, over the root of 3
    assert (
        experiment_results.table(results, seeds=3)
        == """\
| variant | parameters | tokens | loss | bits per byte | difference | ms per step | time |
| --- | --- | --- | --- | --- | --- | --- | --- |
| first | 1.15M | 20.5k | 3.1000 ± 0.1000 | 1.5500 ± 0.0500 |  | 200 | 2s |
| second | 1.15M | 20.5k | 3.4000 ± 0.1000 | 1.7000 ± 0.0500 | +0.1500 ± 0.0289 | 200 | 2s |

Validation losses at the last step are in nats per token: mean ± standard deviation over the seeds
1, 2, 3. Differences to the first row are in bits per byte: mean ± standard error over runs of the
same seed. Times are those of the training steps (cpu, bfloat16, 2 threads, PyTorch 2.13.0)."""
    )


def test_the_table_of_what_is_there():
    """One seed, a run that has been better, and a loss without bits per byte."""
    results = [a_result("first", 1, 3.0), a_result("second", 2, 2.5, lowest=2.25)]
    results += [a_result("third", 1, 2.0, bits_per_byte=None)]
    names, _, *rows = experiment_results.table(results, seeds=2).splitlines()[:5]
    cells = [dict(zip(names.split(" | "), row.split(" | "))) for row in rows]
    assert [cell["| variant"][2:] for cell in cells] == [
        f"{name} (1 of 2 seeds)" for name in ("first", "second", "third")
    ]
    assert [cell["lowest"] for cell in cells] == ["", "2.2500", ""]
    assert [cell["difference"] for cell in cells] == ["", "", "-1.0000"]


# --- the experiments of the repository


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_experiment_of_the_repository_can_be_run(file, monkeypatch):
    """Its settings fit, it has three seeds or more, and its commands parse."""
    monkeypatch.chdir(REPO)
    path = file.relative_to(REPO).as_posix()
    cfg, _ = configurator.resolve(experiment.ExperimentConfig, [path])
    assert len(set(cfg.seeds)) >= 3
    for run in experiment.runs_of(cfg, Path("out/experiments") / file.stem):
        train.check_settings(
            configurator.resolve(train.TrainConfig, experiment.arguments_of(run))[0]
        )
    commands = commands_of([command for command in cfg.setup if " -c " not in command])
    for program, arguments in [*commands, *commands_of(header_lines(path))]:
        check(program, arguments)
    assert [program for program, _ in commands_of(header_lines(path))] == ["tools.experiment"]


def test_the_tables_of_the_docs_are_those_of_the_records(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    monkeypatch.setattr(experiment_results, "draw", lambda results, path: None)
    printed = []
    for file in FILES:
        path = file.relative_to(REPO).as_posix()
        assert f"\npython -m tools.experiment {path}\n" in RESULTS
        if (file.parent / "results" / f"{file.stem}.jsonl").exists():
            assert experiment.main([path, "--table"]) == 0
            printed.append(capsys.readouterr().out)
            assert f"\n{printed[-1]}" in RESULTS
    rows = [line for line in RESULTS.splitlines() if line.startswith("|")]
    assert set(rows) <= {line for table in printed for line in table.splitlines()}


def test_a_law_that_holds_is_found():
    """Losses that follow L = 2 + 50 / N^0.3 exactly."""
    summary = runpy.run_path(str(REPO / "experiments" / "size.py"))["summary"]
    results = [
        a_result("x", seed, 2 + 50 / size**0.3, parameters=size)
        for size in (1e5, 3e5, 1e6, 3e6)
        for seed in (1, 2, 3)
    ]
    text = " ".join(summary(results).split())
    assert "E = 2.00 to 2.00, A = 50.0 to 50.0, a = 0.30 to 0.30; no loss is further" in text
    assert f"would reach {2 + 50 / 124e6**0.3:.2f} to " in text and "to 41 times the" in text
