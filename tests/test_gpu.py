"""
On a GPU: equality with the CPU, exactness, and what would slow a step down.

PLAINGPT_TEST_DEVICE=cpu runs the same tests where there is no GPU, to try the tests themselves.
"""

import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import free_port, write_words

import train
from model import GPT, GPTConfig
from plaingpt.checkpoint import folders, hugging_face
from plaingpt.runtime import Runtime
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training import parallel, run_folder
from plaingpt.training.devices import Device
from plaingpt.training.plan import make_plan
from plaingpt.training.start import Start
from plaingpt.training.state import make_state

DEVICE = torch.device(os.environ.get("PLAINGPT_TEST_DEVICE", "cuda"))
HERE = DEVICE.type != "cuda" or torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HERE, reason="needs a CUDA device")]
SHAPE = GPTConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=64)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory) -> train.TrainConfig:
    folder = tmp_path_factory.mktemp("data")
    write_words(folder, 9000, 200)
    return train.TrainConfig(
        data_dir=str(folder),
        n_layer=2,
        n_head=2,
        n_embd=64,
        block_size=64,
        batch_size=8,
        micro_batch_size=4,
        max_steps=20,
        eval_interval=20,
        log_interval=1,
        sample_interval=0,
        device=str(DEVICE),
        dtype="float32",
        compile=False,
    )


def ids(batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(SHAPE.vocab_size, (batch, SHAPE.block_size + 1), generator=generator)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def gradient(rt: Runtime, compiled: bool = False) -> tuple[float, torch.Tensor]:
    """The loss of a fresh model, and all of its gradient."""
    model = rt.place(GPT(SHAPE).init_weights(1))
    x, y = (part.to(rt.device) for part in ids(4))
    with rt.autocast():
        loss = (torch.compile(model) if compiled else model)(x, y)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


@pytest.mark.parametrize(
    "dtype, compiled, tolerance",
    [("float32", False, 1e-4), ("bfloat16", False, 2e-2), ("bfloat16", True, 2e-2)],
)
def test_the_loss_and_its_gradient_are_those_of_a_cpu(dtype, compiled, tolerance):
    loss, wanted = gradient(Runtime(torch.device("cpu"), torch.float32))
    there, found = gradient(Runtime(DEVICE, getattr(torch, dtype)), compiled)
    assert there == pytest.approx(loss, abs=tolerance)
    assert (found - wanted).norm() < tolerance * wanted.norm()


def losses(cfg: train.TrainConfig, out_dir) -> np.ndarray:
    train.train(replace(cfg, out_dir=str(out_dir)))
    found = [r["loss"] for r in run_folder.read_records(out_dir / "metrics.jsonl")]
    assert None not in found  # a step that was not finite
    return np.array(found)


@pytest.mark.parametrize(
    "changes, tolerance",
    [
        ({}, 1e-2),  # Muon's bf16 turns the last bit of a gradient into 0.002
        ({"optimizer": "adamw"}, 1e-4),
        ({"dtype": "bfloat16"}, 5e-2),
        ({"dtype": "float16"}, 5e-2),
    ],
)
def test_a_run_learns_as_on_a_cpu(cfg, tmp_path, changes, tolerance):
    if DEVICE.type == "cpu" and changes.get("dtype") == "float16":
        pytest.skip("a CPU does not train in float16")
    there = losses(replace(cfg, **changes), tmp_path / "there")
    plain = {**changes, "dtype": "float32", "device": "cpu"}
    assert np.abs(there - losses(replace(cfg, **plain), tmp_path / "cpu")).max() < tolerance


@pytest.mark.parametrize(
    "optimizer, dtype, tolerance",
    [("adamw", "float32", 1e-4), ("muon", "float32", 1e-2), ("muon", "bfloat16", 2e-2)],
)
def test_a_resumed_run_ends_like_a_whole_one(cfg, tmp_path, optimizer, dtype, tolerance):
    """Not bit for bit: the order of a GPU's sums varies."""
    cfg = replace(
        cfg, optimizer=optimizer, dtype=dtype, decay_fraction=0.0, dropout=0.1, save_interval=10
    )
    parts = replace(cfg, out_dir=str(tmp_path / "parts"))
    losses(cfg, tmp_path / "whole")
    train.train(replace(parts, max_steps=10))
    train.train(replace(parts, init_from="resume"))
    one, other = (
        hugging_face.read_weights(folders.find(tmp_path / name)) for name in ("whole", "parts")
    )
    assert all((one[n] - other[n]).norm() <= tolerance * one[n].norm() for n in one)


def state_of(cfg: train.TrainConfig, rt: Runtime, sharded: bool = False):
    """A fresh state for SHAPE, and the plan of its steps."""
    start = Start(GPT(SHAPE).init_weights(1))
    plan = make_plan(vars(cfg), start, None, 4, rt, Device(str(DEVICE), DEVICE.type))
    if sharded:
        parallel.shard(start.model, rt)
    return make_state(start, Tokenizer.bytes(), plan, rt), plan


@pytest.mark.skipif(DEVICE.type != "cuda", reason="counts what only CUDA reports")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_waits_for_the_gpu_once(cfg, optimizer):
    rt = Runtime(DEVICE, torch.bfloat16)
    state, plan = state_of(replace(cfg, optimizer=optimizer), rt)
    x, y = (part.to(DEVICE) for part in ids(8))
    train.optimizer_step(state, (x, y, None), 0.01, plan, rt)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train.optimizer_step(state, (x, y, None), 0.01, plan, rt)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) == 1


def test_a_compiled_run_compiles_steps_and_evaluations_once(cfg, tmp_path, monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, really = CompileCounterWithBackend("inductor"), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, **settings: really(model, backend=counter, **settings)
    )
    run = replace(cfg, dtype="bfloat16", compile=True, max_steps=6, eval_interval=3)
    train.train(replace(run, out_dir=str(tmp_path)))
    assert counter.frame_count == 2


@pytest.fixture
def one_process():
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group(backend, init_method=address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_sharded_step_is_a_plain_one(cfg, one_process, compiled):
    """FSDP2 in a single process, under the device's own backend."""
    cfg, rt, ends = replace(cfg, compile=compiled), Runtime(DEVICE, torch.bfloat16), []
    for sharded in (False, True):
        state, plan = state_of(cfg, rt, sharded)
        for seed in range(2):
            x, y = (part.to(DEVICE) for part in ids(8, seed))
            loss, *_ = train.optimizer_step(state, (x, y, None), 0.01, plan, rt)
        weights = [parallel.full_tensor(p.detach()).cpu() for p in state.model.parameters()]
        ends.append((loss, torch.cat([weight.flatten() for weight in weights])))
    (loss, wanted), (other, found) = ends
    assert other == pytest.approx(loss, abs=1e-2)
    assert (found - wanted).norm() < 0.03 * wanted.norm()
