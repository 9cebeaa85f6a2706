"""Runs of several processes, which torchrun starts on this machine's CPU with gloo."""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_model
import torch
import torch.distributed as dist
import workers
from conftest import free_port, masked_copy
from test_train import assert_same_end, cfg, records, same  # noqa: F401

import train
from plaingpt import runtime
from plaingpt.checkpoint import adapters, folders, hugging_face, store
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training import parallel, samples
from plaingpt.training.samples import Prompt
from plaingpt.training.state import maybe_compiled

REPO = Path(__file__).parents[2]
HERE = "127.0.0.1"
KILLS = int(os.environ.get("PLAINGPT_TEST_KILLS", 1))


def arguments(cfg: train.TrainConfig) -> list[str]:  # noqa: F811
    return [f"--{name}={value}" for name, value in vars(cfg).items()]


def torchrun(processes: int, script: Path, *words: str, options=("--standalone",), **popen):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    command = [*start, *options, str(script), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def finish(run: subprocess.Popen) -> str:
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    return out


@pytest.fixture
def run_of(cfg, tmp_path):  # noqa: F811
    """A short run in float32, whose rounding can be compared, in its own folder."""

    def settings(name: str, **changes) -> train.TrainConfig:
        base = replace(cfg, dtype="float32", dropout=0.0, max_steps=8, learning_rate=0.003)
        return replace(base, out_dir=str(tmp_path / name), **changes)

    return settings


def newest(out_dir: str) -> int:
    """The step of the newest checkpoint, or 0 without one."""
    return max((int(path.name[5:]) for path in folders.step_folders(Path(out_dir))), default=0)


def assert_close(one: train.TrainConfig, other: train.TrainConfig) -> None:
    """Losses, gradient norms, weights and moments that differ by rounding only."""
    for mine, theirs in zip(records(one.out_dir), records(other.out_dir), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)
    for read in (weights, lambda at: moments(store.read_optimizer(at))):
        mine, theirs = read(folders.find(one.out_dir)), read(folders.find(other.out_dir))
        assert mine.keys() == theirs.keys()
        for name in mine:
            apart = (mine[name].float() - theirs[name].float()).norm()
            assert apart <= 0.02 * theirs[name].float().norm(), name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "model.safetensors").exists():
        return hugging_face.read_weights(folder)
    return adapters.read_adapter(folder)[1]


def moments(saved: dict) -> dict[str, torch.Tensor]:
    each = saved["parameters"].items()
    return {f"{name} {key}": state[key] for name, state in each for key in state}


def test_two_processes_train_as_one(run_of, cfg, tmp_path):  # noqa: F811
    """DDP and FSDP, both optimizers, accumulation, masks, recomputing, LoRA, skipped steps, tasks,
    and an early end."""
    data_dir = masked_copy(cfg.data_dir, tmp_path / "masked")
    items = [{"context": "a", "choices": ["b" * n, "cd"], "answer": 0} for n in range(1, 8)]
    (tmp_path / "items.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in items))
    (tmp_path / "text.txt").write_text("some text " * 9)
    (tmp_path / "window.txt").write_text("short")
    tasks = tuple(f"{tmp_path}/{name}" for name in ("items.jsonl", "text.txt", "window.txt"))
    base = run_of("base", max_steps=1)
    train.train(base)
    variants: dict[str, dict] = {
        "ddp": {"micro_batch_size": 1},
        "ddp_adamw_masks": {"optimizer": "adamw", "data_dir": data_dir},
        "ddp_lora": {"init_from": base.out_dir, "lora_rank": 4, "micro_batch_size": 1},
        "ddp_nan": {},
        "ddp_patience": {"learning_rate": 1e-30, "eval_interval": 1, "patience": 2, "tasks": tasks},
        "fsdp": {"fsdp": True, "sample_interval": 4},
        "fsdp_adamw_masks": {
            "fsdp": True,
            "optimizer": "adamw",
            "data_dir": data_dir,
            "micro_batch_size": 1,
            "activation_checkpointing": True,
        },
        "fsdp_lora": {"init_from": base.out_dir, "lora_rank": 4, "fsdp": True},
        "fsdp_nan": {"fsdp": True},
        "fsdp_tasks": {"fsdp": True, "learning_rate": 1e-30, "tasks": tasks},
    }
    many = {name: run_of(name, **changes) for name, changes in variants.items()}
    out = workers.run_all(2, tmp_path, [arguments(run) for run in many.values()])
    assert out.count("not finite") == 4 and "in 2 processes × 2 micro-steps of 1 sequence." in out
    for name, run in many.items():
        if "nan" not in name:
            alone = replace(run, out_dir=f"{run.out_dir}_alone", fsdp=False, micro_batch_size=None)
            train.train(alone)
            assert_close(run, alone)
            assert newest(run.out_dir) == (3 if "patience" in name else 8)
        else:
            assert [r["skipped"] for r in records(run.out_dir)] == [0, 0, 1, 2, 2, 2, 2, 2]
            first = {"init_from": "resume", "max_steps": 9}  # what they saved opens in one process
            assert train.train(replace(run, fsdp=False, **first))["step"] == 9


def share_matrices(rank: int, port: int) -> None:
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=3)
    generator = torch.Generator().manual_seed(1)
    for n, rows in ((4, 5), (2, 7), (1, 1), (9, 2)):  # not all processes have a matrix, or a row
        whole = torch.randn(n, rows, 6, generator=generator)
        heights = [len(part) for part in torch.arange(rows).chunk(3)] + [0, 0]
        first = sum(heights[:rank])
        mine = whole[:, first : first + heights[rank]].contiguous()

        def squared(matrices: torch.Tensor) -> torch.Tensor:
            return matrices @ matrices.mT @ matrices

        expected = squared(whole)
        torch.testing.assert_close(parallel.divided(squared, whole), expected)
        shards = parallel.at_owners(squared, mine, rows)
        torch.testing.assert_close(shards, expected[:, first : first + heights[rank]])


def test_shared_results_take_no_more_to_send_with_more_processes(monkeypatch):
    sizes = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 512)
    monkeypatch.setattr(dist, "all_reduce", lambda results: sizes.append(len(results)))
    stack = torch.ones(4, 2, 3)
    for rank, mine in ((1, [0, 2, 0, 0]), (4, [0, 0, 0, 0])):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        assert parallel.divided(lambda matrices: 2 * matrices, stack)[:, 0, 0].tolist() == mine
    assert sizes == [4, 4]


def compile_for_ddp(rank: int, port: int) -> None:
    from torch._dynamo.testing import CompileCounter

    address, counter, really = f"tcp://127.0.0.1:{port}", CompileCounter(), torch.compile
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=1)
    torch.compile = lambda model, **settings: really(model, backend=counter, **settings)
    model, rt = test_model.tiny().train(), runtime.Runtime(torch.device("cpu"), torch.float32)
    plan = SimpleNamespace(compile=True, micro_batch_size=2, masked=False)
    step_model = parallel.average_gradients(maybe_compiled(model, plan, rt), True, rt)
    for seed in range(3):
        x, y = (test_model.tokens(2, 16, seed=2 * seed + n) for n in range(2))
        step_model(x, y, None).backward()
    assert counter.frame_count == 2  # steps and evaluations
    buckets = step_model._get_ddp_logging_data()["rebuilt_bucket_sizes"]
    assert buckets == str(sum(p.nbytes for p in model.parameters()))


def compile_sharded(rank: int, port: int) -> None:
    from torch._dynamo.testing import CompileCounter

    address, really = f"tcp://127.0.0.1:{port}", torch.compile
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=1)
    rt = runtime.Runtime(torch.device("cpu"), torch.float32)
    plan = SimpleNamespace(compile=True, micro_batch_size=2, masked=False)
    counts = []
    x, y = (test_model.tokens(2, 16, seed=n) for n in range(2))
    # beyond 8 versions of a function, torch.compile gives up
    for layers, recompute in ((2, False), (10, False), (10, True)):
        counter = CompileCounter()
        torch.compile = functools.partial(really, backend=counter)
        plain, model = (test_model.tiny(n_layer=layers).train() for _ in range(2))
        model.transformer.recompute = recompute
        parallel.shard(model, rt)
        step_model = maybe_compiled(model, plan, rt)
        counts.append((counter.frame_count, counter.op_count))
        for each in (plain, step_model):
            each(x, y, None).backward()
        for wanted, found in zip(plain.parameters(), model.parameters()):
            torch.testing.assert_close(parallel.full_tensor(found.grad), wanted.grad)
        with torch.no_grad(), parallel.unsharded(model, rt):
            model.transformer(x[:, :5])
        step_model(y, x, None).backward()
        assert (counter.frame_count, counter.op_count) == counts[-1]
        torch._dynamo.reset()
    assert counts[0] == counts[1] == counts[2] and counts[0][1] > 20


def gather_in_bf16(rank: int, port: int) -> None:
    """What happens on GPUs, whose autocast takes bf16 weights for a LayerNorm."""
    address, really = f"tcp://127.0.0.1:{port}", torch.nn.functional.layer_norm
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.nn.functional.layer_norm = lambda x, shape, weight, bias, eps: really(
        x, shape, weight.float(), bias.float(), eps
    )
    rt = runtime.Runtime(torch.device("cpu"), torch.bfloat16, rank=rank, world_size=2)
    x, y = (test_model.tokens(2, 16, seed=n) for n in range(2))
    used: set[torch.dtype] = set()
    found = []
    for parallel.gathered_dtype in (lambda rt: torch.float32, lambda rt: torch.bfloat16):
        model = test_model.tiny(vocab_size=257).train()
        parallel.shard(model, rt)
        norm = model.transformer.h[1].ln_2
        norm.register_forward_hook(lambda norm, given, out: used.add(norm.weight.dtype))
        with rt.autocast():
            loss = model(x[rank:], y[rank:])
        loss.backward()
        gradients = [parallel.full_tensor(p.grad) for p in model.parameters()]
        assert {g.dtype for g in gradients} == {torch.float32}
        found.append((loss.item(), torch.cat([g.flatten() for g in gradients])))
        samples.SAMPLE_TOKENS = 3 + 4 * rank  # texts may differ in length
        prompts = [Prompt("ab", [1, 2]), Prompt("", [60])]
        written = [
            samples.print_samples(each, Tokenizer.bytes(), prompts, 1, 1, rt)
            for each in (model, test_model.tiny(vocab_size=257))
        ]
        assert len(written[0]) == 2 and (used != {torch.float32} or written[0] == written[1])
        with torch.no_grad(), parallel.unsharded(model, rt):
            if rank:
                model(x)
        with rt.autocast():
            again = model(x[rank:], y[rank:])
        again.backward()
        assert again.item() == loss.item()
    assert used == {torch.float32, torch.bfloat16}
    (loss, gradient), (other_loss, other_gradient) = found
    assert abs(loss - other_loss) < 0.005
    assert 0 < (gradient - other_gradient).norm() < 0.02 * gradient.norm()


@pytest.mark.parametrize(
    "work, count",
    [(share_matrices, 3), (compile_for_ddp, 1), (compile_sharded, 1), (gather_in_bf16, 2)],
)
def test_in_processes(work, count):
    """Matrices are shared out whatever their number and height. DDP compiles a model once, FSDP one
    block for all. What FSDP gathers in bf16 gives the same losses and gradients to rounding."""
    port = free_port()
    processes = [
        workers.context.Process(target=work, args=(rank, port), daemon=True)
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * count


def test_one_two_and_four_processes_go_on_from_each_other(run_of, tmp_path):
    constant = {
        "max_steps": 12,
        "decay_fraction": 0.0,
        "eval_interval": 4,
    }  # whatever max_steps is on the way
    alone, moving = run_of("alone", **constant), run_of("moving", **constant)
    train.train(alone)
    workers.run_all(4, tmp_path, [arguments(replace(moving, max_steps=4))])
    onwards = replace(moving, init_from="resume")
    workers.run_all(2, tmp_path, [arguments(replace(onwards, max_steps=8, fsdp=True))])
    train.train(onwards)
    assert_close(moving, alone)
    starts = json.loads((tmp_path / "moving" / "run.json").read_text())["starts"]
    assert [(start["world_size"], start["step"]) for start in starts] == [(4, 0), (2, 4), (1, 8)]


def test_two_nodes_on_the_loopback(run_of, tmp_path):
    """As on two machines, each with its own torchrun, that meet at one address."""
    with socket.create_server((HERE, 0)) as server:
        port = server.getsockname()[1]
    options = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint={HERE}:{port}"]
    run = run_of("nodes")
    nodes = [
        torchrun(1, REPO / "train.py", *arguments(run), options=[*options, "--rdzv_id=7"])
        for _ in range(2)
    ]
    told = [finish(node) for node in nodes]
    assert sorted("step 8/8" in out for out in told) == [False, True]  # one process speaks
    alone = run_of("alone")
    train.train(alone)
    assert_close(run, alone)


def workers_of(run: subprocess.Popen) -> list[int]:
    children = subprocess.run(["ps", "-ww", "-o", "pid=,args=", "--ppid", str(run.pid)], **CAPTURED)
    lines = [line.split(maxsplit=1) for line in children.stdout.splitlines()]
    return [int(pid) for pid, command in lines if "train.py" in command]


CAPTURED = {"capture_output": True, "text": True}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="ps of Linux")


@LINUX
def test_killed_workers_come_back_by_themselves(run_of, tmp_path):
    """kill -9 at random moments, and torchrun --max-restarts: the end of a run never killed."""
    steps = 20 + 20 * KILLS
    run = run_of("killed", max_steps=steps, save_interval=1, eval_interval=steps, dropout=0.1)
    whole = replace(run, out_dir=str(tmp_path / "whole"))
    workers.run_all(2, tmp_path, [arguments(whole)])

    rng = np.random.default_rng()
    options = ["--standalone", f"--max-restarts={KILLS}", "--monitor-interval=0.2"]
    with (tmp_path / "err").open("w+") as err:
        streams = {"stdout": subprocess.DEVNULL, "stderr": err}
        group = torchrun(2, REPO / "train.py", *arguments(run), options=options, **streams)
        seen: set[int] = set()
        for _ in range(KILLS):
            while not set(workers_of(group)) - seen:
                assert group.poll() is None
                time.sleep(0.05)
            before = newest(run.out_dir)
            while newest(run.out_dir) == before:  # no kill before there is a checkpoint
                assert group.poll() is None
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            alive = set(workers_of(group)) - seen
            os.kill(rng.choice(sorted(alive)), signal.SIGKILL)
            seen |= alive
        assert group.wait(timeout=300) == 0, (tmp_path / "err").read_text()
    assert_same_end(Path(whole.out_dir), Path(run.out_dir))
    starts = json.loads((Path(run.out_dir) / "run.json").read_text())["starts"]
    assert len(starts) == KILLS + 1 and starts[-1]["step"] > 0


LONG = {"max_steps": 100_000, "save_interval": 100_000, "eval_interval": 100_000}


def assert_stopped(run: train.TrainConfig, out: str) -> None:
    step = int(re.search(r"stopped by .* continues from step (\d+)", out)[1])
    assert newest(run.out_dir) == step == records(run.out_dir)[-1]["step"]


@LINUX
def test_a_signal_to_any_worker_of_torchrun_saves_and_ends_all_with_0(run_of):
    run = run_of("stopped", **LONG)
    group = torchrun(2, REPO / "train.py", *arguments(run))
    for line in group.stdout:
        if line.startswith("step 000005"):
            break
    os.kill(max(workers_of(group)), signal.SIGTERM)
    assert_stopped(run, finish(group))


def test_ctrl_c_in_one_process_saves_and_ends_all_with_0(run_of, tmp_path):
    run = run_of("stopped", **LONG)
    group = workers.start_all(2, tmp_path, [arguments(run)])
    while not (Path(run.out_dir) / "metrics.jsonl").exists() or len(records(run.out_dir)) < 5:
        assert all(process.is_alive() for process in group)
        time.sleep(0.02)
    os.kill(group[1].pid, signal.SIGINT)
    assert_stopped(run, workers.finish(group, tmp_path))


def test_what_does_not_divide_is_one_line(run_of, tmp_path):
    run = run_of("odd", batch_size=3)
    group = workers.start_all(2, tmp_path, [arguments(run)])
    told = workers.finish(group, tmp_path, status=2)
    assert told.count("error: batch_size=3 cannot be divided among 2 processes") == 2
    assert "Traceback" not in told
    assert not Path(run.out_dir).exists()
