"""
Kill prepare, train (in one process and in two) and export with kill -9, start them again, and
compare what they end with to runs that were never killed.

    PYTHONPATH=. python tests/kills.py 1000        # about half an hour on two cores

Kills come at the calls of the file system, in turn, and at random moments, up to three in a row. A
test kills a few times.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import workers
from conftest import free_port

import prepare
import train
from plaingpt import locks
from plaingpt.checkpoint import folders, store
from plaingpt.text import builder, cutting, encoding, shards, splits
from plaingpt.training import run_folder
from tools import export

COMMANDS = {"prepare": prepare, "train": train, "export": export}
EVENTS = {  # of sys.addaudithook; open counts if it is below the folder of the run
    *("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    "fcntl.lockf",
}
CALLS = [  # what Python does not audit
    (os, "fsync"),
    (os, "write"),
    (torch, "save"),
    (safetensors.torch, "save_file"),
    (shards.ShardWriter, "write"),
    (splits.SplitWriter, "write_documents"),
]
STEPS, SAVE_EVERY = 6, 2
workers.context.set_forkserver_preload(
    [*workers.PRELOAD, "prepare", "tools.export", "huggingface_hub.repocard", "matplotlib.figure"]
)


@dataclass
class Job:
    """A command that writes one folder, `out`."""

    command: str
    out: Path
    arguments: list[str]
    processes: int = 1
    whole: dict = field(default_factory=dict)  # what it ends with
    calls: int = 0  # of the file system
    seconds: float = 0.0
    resumes: bool = False  # whether its next run has to

    @property
    def name(self) -> str:
        return f"{self.command} in {self.processes} process(es)"

    @property
    def output(self) -> Path:
        return self.out.with_name(f"{self.out.name}.txt")

    def start(self, fatal: int = 0) -> list[BaseProcess]:
        """Start it, or start it again; the main process kills itself at call number `fatal`."""
        arguments, port, started = self.arguments, free_port(), []
        if self.command == "train" and folders.step_folders(self.out):
            arguments = [*arguments, "--init_from=resume"]
        for rank in range(self.processes):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.processes}
            place |= {"LOCAL_WORLD_SIZE": self.processes}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in place.items()}
            words = (self.command, environment, arguments, str(self.out), 0 if rank else fatal)
            started.append(workers.context.Process(target=work, args=words))
            started[-1].start()
        return started

    def run(self) -> None:
        """Run it to its end."""
        processes = self.start()
        for process in processes:
            process.join(timeout=120)
        ended = [process.exitcode for process in processes]
        assert ended == [0] * self.processes, f"{self.name}: {ended}\n{self.said()}"

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def is_done(self) -> bool:
        """Whether a kill came too late to change anything but the exit status."""
        if self.command == "prepare":
            return (self.out / "dataset.json").exists()
        if self.command == "train":
            return (self.out / f"step_{STEPS:06d}").exists()
        return self.out.exists() and any(self.out.iterdir())

    def ends(self) -> dict:
        """What it left, but for the clock's part and the settings of the last start."""
        if self.command != "train":
            paths = [path for path in self.out.iterdir() if path.is_file()]
            return {path.name: path.read_bytes() for path in paths if path.name != locks.NAME}
        timing = {"tokens_per_s", "dt_ms", "mfu", "peak_mem_gib"}
        records = run_folder.read_records(self.out / "metrics.jsonl")
        left = {"metrics": [{k: v for k, v in each.items() if k not in timing} for each in records]}
        left["names"] = sorted(path.name for path in self.out.iterdir())
        for folder in folders.step_folders(self.out):
            state = json.loads((folder / "state.json").read_text())
            left[folder.name] = {
                "files": sorted(path.name for path in folder.iterdir()),
                "weights": (folder / "model.safetensors").read_bytes(),
                "optimizer": comparable(store.read_optimizer(folder)),
                "losses": [state["step"], state["loss"], state["val_loss"]],
            }
        return left

    def check_promise(self) -> None:
        """That a kill has lost nothing that was said to be saved."""
        if self.command == "prepare":
            partial = self.out / ".partial"
            saved, prepared = partial / "progress.json", partial / "dataset.json"
            self.resumes = saved.exists() and not prepared.exists()
        if self.command == "train":
            lines = [line.split() for line in self.said().splitlines() if ": saved " in line]
            found = folders.step_folders(self.out)
            for folder in found:
                store.load_model(folder)
                store.read_optimizer(folder)
            newest = int(found[-1].name[5:]) if found else 0
            promised = max((int(words[1][:-1]) for words in lines), default=0)
            best = self.out / "best"
            assert (best / "state.json").exists() or not best.is_symlink(), self.name
            assert newest >= promised, f"{self.name}: {promised} was saved, {newest} is there"


def comparable(value):
    if isinstance(value, dict):
        return {key: comparable(each) for key, each in value.items()}
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def work(
    command: str, environment: dict[str, str], arguments: list[str], out: str, fatal: int
) -> None:
    """In a process of its own: run a command, up to call number `fatal` of the file system."""
    os.environ.update(environment)
    with open(f"{out}.txt", "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    builder.SAVE_SECONDS, encoding.CHUNK, cutting.BLOCK = 0.01, 900, 500
    calls = 0

    def count(*_) -> None:
        nonlocal calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, details: tuple) -> None:
        if event in EVENTS or (event == "open" and str(details[0]).startswith(out)):
            count()

    def counted(function: Callable) -> Callable:
        def call(*words, **named):
            count()
            return function(*words, **named)

        return call

    for owner, name in CALLS:
        setattr(owner, name, counted(getattr(owner, name)))
    sys.addaudithook(audit)
    status = COMMANDS[command].main(arguments)
    if environment["RANK"] == "0":
        Path(f"{out}.calls").write_text(str(calls))
    sys.exit(status)


def jobs_in(folder: Path) -> list[Job]:
    """Small ones, prepared and run once: what the killed ones have to end with."""
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "😀", "naïve"]
    talks = [
        {"instruction": " ".join(rng.choice(words, 6)), "output": " ".join(rng.choice(words, 9))}
        for _ in range(60)
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    data, model = folder / "data", folder / "model"
    prepared = [f"--sources={folder}/talks.jsonl", "--template=alpaca", "--tokenizer=bpe"]
    prepared += ["--vocab_size=300", "--val_fraction=0.2", "--shard_tokens=1500", "--workers=1"]
    trained = [f"--data_dir={data}", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16"]
    trained += ["--batch_size=4", f"--max_steps={STEPS}", f"--save_interval={SAVE_EVERY}"]
    trained += [f"--eval_interval={SAVE_EVERY}", "--keep_checkpoints=1", "--log_interval=1"]
    trained += ["--sample_interval=0", "--dropout=0.1", "--device=cpu"]
    jobs = [
        Job("prepare", data, [*prepared, f"--data_dir={data}"]),
        Job("train", model, [*trained, f"--out_dir={model}"]),
        Job("train", folder / "pair", [*trained, f"--out_dir={folder}/pair"], processes=2),
        Job("export", folder / "gift", [f"--checkpoint={model}", f"--out_dir={folder}/gift"]),
    ]
    jobs[0].run()  # which waits for the imports that all of them share
    clean(jobs[0])
    for job in jobs:
        began = time.monotonic()
        job.run()
        job.seconds = time.monotonic() - began
        job.whole = job.ends()
        job.calls = int(job.out.with_name(f"{job.out.name}.calls").read_text())
    aside = folder / "aside"  # training and exporting need what is killed in other jobs
    aside.mkdir()
    for needed in (data, model):
        shutil.copytree(needed, aside / needed.name)
    for job in jobs[1:]:
        for needed in (data, model):
            changed = f"={aside / needed.name}"
            job.arguments = [
                word.replace(f"={needed}", changed) if "--out_dir" not in word else word
                for word in job.arguments
            ]
    return jobs


def kill_at_calls(job: Job, calls: list[int]) -> int:
    """Kill a fresh run at each of these calls, and run it again to its end."""
    kills = 0
    for call in calls:
        clean(job)
        processes = job.start(fatal=call)
        kills += was_killed(job, processes, processes[0])
        end(job, f"killed at call {call}")
    return kills


def kill_at_random(job: Job, wanted: int, rng: np.random.Generator) -> int:
    """Kill runs at random moments, up to three times each before they may end."""
    kills = 0
    while kills < wanted:
        clean(job)
        moments = rng.uniform(0, 1.1 * job.seconds, rng.integers(1, 4))
        for moment in moments:
            processes = job.start()
            victim = processes[rng.integers(len(processes))]
            victim.join(timeout=moment)
            victim.kill()
            kills += was_killed(job, processes, victim)
            if job.is_done():
                break
        end(job, f"killed after {moments} s")
    return kills


def was_killed(job: Job, processes: list[BaseProcess], victim: BaseProcess) -> bool:
    """Wait for a process that is to die; then end the others, as torchrun does."""
    victim.join(timeout=120)
    for process in processes:
        if victim.exitcode:
            process.kill()
        process.join(timeout=120)
    assert victim.exitcode in (0, -signal.SIGKILL), f"{job.name}: {victim}\n{job.said()}"
    job.check_promise()
    return victim.exitcode != 0


def end(job: Job, how: str) -> None:
    """Run a job that was killed to its end, which has to be that of one that was not."""
    late = job.is_done()
    if not late:
        resumes, job.resumes = job.resumes, False
        job.run()
        assert not resumes or "resuming" in job.said(), f"{job.name}, {how}: it started over"
    left, whole = job.ends(), job.whole
    if late and job.command == "train":  # a checkpoint more, if it died before it removed that
        left = {name: left.get(name) for name in whole if name != "names"}
        whole = {name: whole[name] for name in left}
    names = left.keys() | whole.keys()
    different = sorted(name for name in names if left.get(name) != whole.get(name))
    assert not different, f"{job.name}, {how}: {different} differ\n{job.said()}"
    beside = sorted(path.name for path in job.out.parent.glob(".*"))
    assert late or not beside, f"{job.name}, {how}: {beside} are left"


def clean(job: Job) -> None:
    shutil.rmtree(job.out, ignore_errors=True)
    job.output.unlink(missing_ok=True)


def kill(wanted: int, folder: Path, seed: int | None = None) -> dict[str, int]:
    """Kill about `wanted` times in all; return how many by job."""
    rng, done = np.random.default_rng(seed), {}
    for job, share in zip(jobs_in(folder), (0.4, 0.3, 0.07, 0.23)):
        mine = max(2, round(share * wanted))
        at_calls = job.calls if mine >= job.calls else mine // 2
        calls = np.unique(np.linspace(1, job.calls, at_calls).round().astype(int)).tolist()
        began = time.monotonic()
        kills = kill_at_calls(job, calls)
        random = kill_at_random(job, mine - kills, rng)
        done[job.name] = kills + random
        seconds = time.monotonic() - began
        print(
            f"{job.name}: {kills} kills at {len(calls)} of {job.calls} calls of the file system, "
            f"{random} at random moments, {seconds:.0f} s",
            flush=True,
        )
    return done


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        done = kill(int(sys.argv[1]), Path(name))
    print(f"{sum(done.values())} kills, and every run ended as if there had been none")
