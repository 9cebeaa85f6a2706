"""Device, dtype and seeds of a process; what importing the files does; no network in tests."""

import contextlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configurator import UserError
from plaingpt import runtime
from plaingpt.runtime import Runtime

REPO = Path(__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def has(monkeypatch, *, gpus=0, mps=False, capability=(8, 0), bf16_cpu=False):
    """Pretend that this machine has these devices."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(runtime.cpu, "has_bf16", lambda: bf16_cpu)


@pytest.mark.parametrize(
    "machine, device, dtype",
    [
        ({"gpus": 1, "capability": (9, 0)}, "cuda", torch.bfloat16),
        ({"gpus": 1, "capability": (8, 0)}, "cuda", torch.bfloat16),
        ({"gpus": 1, "capability": (7, 5)}, "cuda", torch.float16),
        ({"gpus": 1, "capability": (7, 0), "bf16_cpu": True}, "cuda", torch.float16),
        ({"gpus": 1, "mps": True}, "cuda", torch.bfloat16),
        ({"mps": True, "bf16_cpu": True}, "mps", torch.float32),
        ({"bf16_cpu": True}, "cpu", torch.bfloat16),
        ({}, "cpu", torch.float32),
    ],
)
def test_auto_is_the_best_that_the_machine_has(monkeypatch, machine, device, dtype):
    has(monkeypatch, **machine)
    assert runtime.start() == Runtime(torch.device(device), dtype)


def test_a_named_device_and_dtype_are_used(monkeypatch):
    has(monkeypatch, gpus=2, capability=(7, 0), bf16_cpu=True)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert runtime.start("cpu") == Runtime(CPU, torch.bfloat16)
    assert runtime.start("cuda:1") == Runtime(torch.device("cuda:1"), torch.float16)
    assert runtime.start("cpu", "float32") == Runtime(CPU, torch.float32)
    assert runtime.start("auto", "bfloat16") == Runtime(CUDA, torch.bfloat16)
    assert current == [torch.device("cuda:1")]


@pytest.mark.parametrize(
    "name",
    ["gpu", "cuda", "cuda:0", "mps", "cpu:x", "cpu:", "cpu:٣", "cpu:9999999999", "", "meta"],
)
def test_a_device_that_the_machine_lacks_is_refused(monkeypatch, name):
    has(monkeypatch)
    with pytest.raises(UserError, match="device '.*' is not on this machine, which has: cpu$"):
        runtime.start(name)


def test_a_gpu_beyond_the_last_is_refused(monkeypatch):
    has(monkeypatch, gpus=2)
    with pytest.raises(UserError, match="'cuda:2': this machine has 2 GPUs"):
        runtime.start("cuda:2")


def draw(seed, step, rank):
    Runtime(CPU, torch.float32, rank=rank, world_size=8).seed_step(seed, step)
    return torch.rand(4)


def test_the_randomness_of_a_step_depends_on_seed_step_and_rank_only():
    places = [(s, t, r) for s in (0, 1, 1337) for t in (0, 1, 10**6) for r in (0, 1)]
    drawn = [draw(*place) for place in places]
    torch.rand(100)
    for place, before in zip(reversed(places), reversed(drawn)):
        assert torch.equal(draw(*place), before)
    assert len({tuple(values.tolist()) for values in drawn}) == len(places)


def test_float32_runs_without_autocast():
    rt = Runtime(CPU, torch.float32)
    assert isinstance(rt.autocast(), contextlib.nullcontext)
    a = torch.ones(2, 2)
    with rt.autocast():
        assert (a @ a).dtype == torch.float32
    with Runtime(CPU, torch.bfloat16).autocast():
        assert (a @ a).dtype == torch.bfloat16


def test_importing_any_file_prints_nothing_and_sets_nothing():
    files = [*REPO.glob("*.py"), *REPO.glob("plaingpt/**/*.py"), *REPO.glob("tools/*.py")]
    parts = sorted(path.relative_to(REPO).with_suffix("").parts for path in files)
    names = ", ".join(".".join(part) for part in parts)
    code = (
        "import os; before = dict(os.environ)\n"
        f"import {names}\n"
        "assert dict(os.environ) == before\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- what conftest.py promises


@pytest.mark.parametrize("family, host", [(socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "::2")])
def test_no_test_reaches_the_network(family, host):
    with socket.socket(family) as ours, pytest.raises(RuntimeError, match="tried to reach"):
        ours.connect((host, 80))
    with pytest.raises(RuntimeError, match="tried to find"):
        socket.create_connection(("example.com", 80))
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_tests_reach_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


@pytest.mark.parametrize(
    "environment, problem",
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "1"}, "RANK=1 is not below WORLD_SIZE=1"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_PORT is not set"),
    ],
)
def test_variables_that_torchrun_did_not_set_are_refused(monkeypatch, environment, problem):
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(problem)):
        runtime.start("cpu")
