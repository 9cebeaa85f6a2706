"""Processes that run train.py, forked from one that has imported it already: most of the time of a
short training is the start of Python and torch."""

import math
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from conftest import free_port

import train
from model import GPT

# Windows has no fork.
context = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
PRELOAD = ["train", "torch.distributed.fsdp", "torch.distributed.tensor"]
context.set_forkserver_preload(PRELOAD)


def start(arguments: list[str], output: str | Path = os.devnull) -> BaseProcess:
    """`python train.py ARGUMENTS`."""
    process = context.Process(target=work, args=({}, [arguments], str(output)))
    process.start()
    return process


def start_all(
    world_size: int, folder: Path, runs: list[list[str]], target: Callable | None = None
) -> list[BaseProcess]:
    """Trainings one after the other, all in the same `world_size` processes, as torchrun would
    start them; each writes what it prints to folder/RANK.

    In a run whose out_dir ends with "_nan" the 3rd and 4th loss of one process is NaN. `target`
    replaces `work`.
    """
    port, processes = free_port(), []
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
        place |= {"LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        text = {name: str(value) for name, value in place.items()}
        arguments = (text, runs, str(folder / str(rank)))
        processes.append(context.Process(target=target or work, args=arguments, daemon=True))
        processes[-1].start()
    return processes


def finish(processes: list[BaseProcess], folder: Path, status: int = 0) -> str:
    """Wait for all processes, which have to end with `status`; return what they printed."""
    for process in processes:
        process.join(timeout=300)
    told = "".join((folder / str(rank)).read_text() for rank in range(len(processes)))
    assert [process.exitcode for process in processes] == [status] * len(processes), told
    return told


def run_all(
    world_size: int, folder: Path, runs: list[list[str]], target: Callable | None = None
) -> str:
    return finish(start_all(world_size, folder, runs, target), folder)


def work(environment: dict[str, str], runs: list[list[str]], output: str) -> None:
    os.environ.update(environment)
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    real, calls = GPT.forward, 0

    def nan_in_one_process(self, idx, targets=None, *rest):
        nonlocal calls
        loss = real(self, idx, targets, *rest)
        if self.training and targets is not None:
            calls += 1
            if calls in (3, 4) and environment["RANK"] == "1":
                return loss * math.nan
        return loss

    train.configurator.PATIENCE_S = 0  # no torchrun ends the others after an error
    train.runtime.leave = lambda: None  # the next run needs the other processes as well
    for run in runs:
        calls = 0
        out_dir = next(word for word in run if word.startswith("--out_dir="))
        GPT.forward = nan_in_one_process if out_dir.endswith("_nan") else real
        if status := train.main(run):
            sys.exit(status)
