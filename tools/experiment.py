"""
Run an experiment: a file of settings and seeds → trainings → a table and a figure.

    python -m tools.experiment experiments/optimizer.py               # train what is missing
    python -m tools.experiment experiments/optimizer.py --jobs=2      # two at a time
    python -m tools.experiment experiments/optimizer.py --only=adamw  # only this variant
    python -m tools.experiment experiments/optimizer.py --table       # train nothing

Each variant is trained with each seed by train.py, in a process of its own, into
out/experiments/optimizer/VARIANT_SEED. Interrupted or killed, the same command resumes. A finished
run is a line of experiments/results/optimizer.jsonl, from which the table and the figure,
optimizer.png, are made; remove that file and the run folders to train everything again.

If the file defines summary(results), its text follows the table of a complete experiment
(tools/experiment_results.py has the fields of a result).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # for python tools/experiment.py

import configurator
from configurator import NonNegativeInt, PositiveInt, UserError


@dataclass(frozen=True)
class ExperimentConfig:
    # the experiment
    setup: tuple[str, ...] = ()  # commands that make the data: python prepare.py …
    base: dict = field(default_factory=dict)  # settings of train.py for all runs
    variants: dict = field(default_factory=dict)  # further settings, by the name of the variant
    seeds: tuple[NonNegativeInt, ...] = ()  # of the runs of each variant
    # what to do
    only: tuple[str, ...] = ()  # the variants to train; empty: all
    jobs: PositiveInt = 1  # runs at a time, which share the cores
    table: bool = False  # make the table and the figure of what is recorded, and train nothing


if __name__ == "__main__":
    configurator.answer_help(ExperimentConfig)  # before torch is imported, which takes a second

import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator

import torch

from plaingpt.checkpoint import folders
from plaingpt.files import Settings, as_record
from plaingpt.locks import locked
from plaingpt.wording import duration, quantity, shorten, shown
from tools import experiment_results
from tools.experiment_results import Result, Run
from tools.processes import output_of

REPO = Path(__file__).parents[1]
SHARED: Settings = {"sample_interval": 0, "keep_checkpoints": 1}  # unless the file says otherwise
OWN = ("seed", "out_dir", "overwrite", "resume", "plan", "plan_for", "epochs", "patience")
NAME = re.compile(r"[\w.,+=-]+")
# From torchrun, which restarts processes; train.py then continues the run of the same settings.
RESTARTABLE = {"TORCHELASTIC_MAX_RESTARTS": "1"}
CHECK = """
import json, sys
import configurator, train
for name, arguments in json.loads(sys.argv[1]).items():
    try:
        train.check_settings(configurator.resolve(train.TrainConfig, arguments)[0])
    except configurator.UserError as problem:
        print(f"variant {name}: {problem}".replace("command line: ", ""))
"""


def experiment(cfg: ExperimentConfig, file: Path) -> str:
    """Train the runs that are missing, draw the figure, and print and return the table.

    Raises UserError for settings that do not fit, for runs that were trained with other settings
    than they have now and, after the other runs, for those that failed.
    """
    folder = Path("out/experiments") / file.stem
    records = file.parent / "results" / f"{file.stem}.jsonl"
    runs = runs_of(cfg, folder)
    if not cfg.table:
        with locked(folder):
            done = {f"{r.variant}_{r.seed}" for r in experiment_results.read(runs, records)}
            missing = [run for run in runs if run.name not in done]
            if chosen := [run for run in missing if run.variant in (cfg.only or cfg.variants)]:
                set_up(cfg, chosen)
                train_all(chosen, cfg.jobs, records)
    results = experiment_results.read(runs, records)
    if not results:
        raise UserError(f"{records} has no run of {file} yet; without --table they are trained")
    if untrained := len(runs) - len(results):
        print(f"{untrained} of {quantity(len(runs), 'run')} not trained yet", file=sys.stderr)
    text = experiment_results.table(results, len(set(cfg.seeds)))
    summary = runpy.run_path(str(file)).get("summary")
    if summary and len(results) == len(runs):
        text += f"\n\n{summary(results)}"
    print(text)
    experiment_results.draw(results, records.with_suffix(".png"))
    return text


# --- the runs


def runs_of(cfg: ExperimentConfig, folder: Path) -> list[Run]:
    """The runs of all variants with the first seed, then with the second, and so on. Raises
    UserError for settings that are not the experiment's to have."""
    configurator.validate(cfg, problems_of(cfg))
    settings = {
        name: as_record(cfg.base | changes, Settings, f"variant {name}")
        for name, changes in cfg.variants.items()
    }
    return [
        Run(name, seed, settings[name], folder / f"{name}_{seed}")
        for seed in dict.fromkeys(cfg.seeds)
        for name in settings
    ]


def problems_of(cfg: ExperimentConfig) -> Iterator[str]:
    if not cfg.variants:
        yield "variants is empty: expected settings by name, {'small': {'n_layer': 2}, …}"
    if not cfg.seeds:
        yield "seeds is empty: expected at least one, and three for a spread"
    for name, changes in cfg.variants.items():
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            yield f"variant {shown(name)}: a name consists of letters, digits and any of _.,+=-"
        elif not isinstance(changes, dict):
            yield f"variant {name} expects a dict of settings, not {shown(changes)}"
        else:
            given = cfg.base | changes
            yield from (f"variant {name} cannot set {own}" for own in OWN if own in given)
            if type(given.get("max_steps")) is not int:
                yield f"variant {name} needs max_steps, the last step of its runs"
    for name in cfg.only:
        if name not in cfg.variants:
            yield f"only: unknown variant {name!r}; the variants are {', '.join(cfg.variants)}"
    for command in cfg.setup:
        try:
            words = shlex.split(command)
        except ValueError as error:  # unbalanced quotes
            yield f"setup: {command!r}: {error}"
            continue
        if len(words) < 2 or words[0] != "python":
            yield f"setup: expected commands that begin with python, not {command!r}"


def arguments_of(run: Run) -> list[str]:
    own = {"seed": run.seed, "out_dir": str(run.folder)}
    return [f"--{name}={value}" for name, value in (SHARED | run.settings | own).items()]


def set_up(cfg: ExperimentConfig, runs: list[Run]) -> None:
    """Check the settings of the runs, then run the setup. Raises UserError for settings that
    train.py refuses or that have changed since a run began, and if a command fails."""
    arguments = json.dumps({run.variant: arguments_of(run) for run in runs})
    if problems := output_of("train.py", [sys.executable, "-c", CHECK, arguments], REPO):
        raise UserError(problems.strip().replace("\n", "\n       "))
    for run in runs:
        for start in folders.read_starts(run.folder)[-1:]:
            before = {name: start.settings.get(name) for name in run.settings}
            experiment_results.check_unchanged(run, before, str(run.folder))
    for command in cfg.setup:
        print(f"+ {shorten(command, 100)}")
        script, *rest = shlex.split(command)[1:]
        script = str(REPO / script) if script.endswith(".py") else script
        words = [sys.executable, script, *rest]
        status = subprocess.run(words, env=os.environ | RESTARTABLE).returncode
        if status:
            raise UserError(f"{command!r} failed with status {status}")


def train_all(runs: list[Run], jobs: int, records: Path) -> None:
    """Train runs, `jobs` at a time, and record each one that finishes. If this is interrupted, the
    runs in progress save and stop. Raises UserError, at the end, for those that failed."""
    threads = max(1, torch.get_num_threads() // min(jobs, len(runs)))
    waiting, failed = list(runs), []
    running: list[tuple[Run, subprocess.Popen]] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append((waiting[0], start(waiting.pop(0), threads)))
            time.sleep(0.1)
            ended = [each for each in running if each[1].poll() is not None]
            running = [each for each in running if each not in ended]
            for run, process in ended:
                try:
                    result = result_of(run, process.returncode, threads)
                except UserError as problem:
                    failed.append(f"{run.name} failed: {problem}")
                    print(failed[-1], file=sys.stderr)
                    continue
                experiment_results.add(result, records)
                left = quantity(len(waiting) + len(running), "run")
                print(
                    f"{run.name}: loss {result.loss:.4f}, {duration(result.seconds)}; {left} left"
                )
    finally:
        for _, process in running:
            process.terminate()
        for _, process in running:
            process.wait()
    if failed:
        raise UserError("\n       ".join(failed))


def start(run: Run, threads: int) -> subprocess.Popen:
    """A process that trains a run, or the rest of it, and adds what it prints to the run's log."""
    command = [sys.executable, str(REPO / "train.py"), *arguments_of(run)]
    environment = os.environ | RESTARTABLE | {"OMP_NUM_THREADS": str(threads)}
    with log_of(run).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def log_of(run: Run) -> Path:
    return run.folder.with_name(f"{run.name}.log")


def result_of(run: Run, status: int, threads: int) -> Result:
    """The result of a run whose process has ended. Raises UserError if it ended too early."""
    if status or not (run.folder / f"step_{run.settings['max_steps']:06d}").exists():
        lines = log_of(run).read_text("utf-8", "replace").split("\n")
        last = next(filter(str.strip, reversed(lines)), f"status {status}")
        raise UserError(f"{last.removeprefix('error: ')} (its output is in {log_of(run)})")
    return experiment_results.measured(run, threads)


def file_of(arguments: list[str]) -> Path:
    """The experiment's file. Raises UserError unless the command line names exactly one."""
    files, _ = configurator.split_arguments(ExperimentConfig, arguments, [])
    if len(files) != 1:
        example = "python -m tools.experiment experiments/size.py"
        raise UserError(f"expected the file of an experiment, as in {example}")
    return Path(files[0])


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    return configurator.command(
        ExperimentConfig, lambda cfg: experiment(cfg, file_of(arguments)), arguments
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the runs, as Ctrl-C does
    sys.exit(main())
