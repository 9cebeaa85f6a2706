"""How long a step takes: measured on this machine, or by the data sheet of another."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from plaingpt.runtime import Runtime
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training.batches import Batch
from plaingpt.training.devices import MACHINE
from plaingpt.training.memory import memory_gib
from plaingpt.training.plan import Plan, divisors
from plaingpt.training.start import Start
from plaingpt.training.state import TrainState, make_state
from plaingpt.wording import quantity

TRIAL_S = 1.0  # of work in a measured step, at the speed of matrix products
LONGEST_S = 4.0  # beyond which a single sequence is not tried
# nanoGPT's 4 days for 300 billion tokens on 8 A100s are 30% of their peak; llm.c reports up to 60%.
PEAK_SHARE = 0.4
# NCCL reaches 370 of NVLink's nominal 450 GB/s (NVIDIA/nccl-tests, issue 212).
LINK_SHARE = 0.8
# The fixed cost of an operation between machines, on top of its bytes: 64 MiB move at 150 GB/s
# between 16 machines with 8 H100s (NVIDIA/nccl, issue 1469).
DELAY_S = 0.5e-3
BUCKET = 25 * 2**20  # bytes of gradients that DDP averages in one operation
Step = Callable[[TrainState, Batch, float, Plan, Runtime], Any]


def step_seconds(start: Start, plan: Plan, rt: Runtime, step: Step) -> tuple[float, str]:
    """The seconds that a step takes on this machine, measured on a few real steps with random ids,
    and a phrase that says how they were found. Takes a few seconds itself.

    A step too large for that is extrapolated from one with fewer sequences, or from the speed of
    matrix products alone.
    """
    speed = rt.sum(torch.tensor(product_flops(rt.device, rt.dtype))).item()  # of all processes
    sequence_s = plan.flops_per_step / plan.batch_size / (speed / rt.world_size)
    sizes = divisors(plan.micro_batch_size)
    micro = next((size for size in sizes if size * sequence_s <= TRIAL_S), 1)
    trial = replace(plan, micro_batch_size=micro)
    available = plan.device.memory_gib
    if sequence_s > LONGEST_S or (available and memory_gib(trial) > available):
        how = "at the speed of matrix products alone: it will take longer"
        return plan.flops_per_step / speed, how
    micro_steps = 1
    if micro == plan.micro_batch_size:
        micro_steps = max(1, min(plan.micro_steps, int(TRIAL_S / (micro * sequence_s))))
    sequences = micro * micro_steps
    steps = max(2, min(10, int(TRIAL_S / (sequences * sequence_s))))  # the same in all processes
    seconds = timed(start, trial, rt, step, sequences, steps)
    share = plan.batch_size // plan.world_size
    how = "as measured here"
    if sequences < share:
        how += f" on {sequences:,} of its {quantity(share, 'sequence')}"
    return seconds * share / sequences, how


def timed(start: Start, plan: Plan, rt: Runtime, step: Step, sequences: int, steps: int) -> float:
    """The median seconds of `steps` steps, each with `sequences` in this process."""
    model = start.model.to_empty(device="cpu")
    model.tie_head()
    model.init_weights(seed=0)
    state = make_state(replace(start, model=model), Tokenizer.bytes(), plan, rt)
    shape = (sequences, plan.config.block_size)
    x = torch.randint(plan.config.vocab_size, shape, device=rt.device)
    mask = torch.ones(shape, device=rt.device) if plan.masked else None
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        step(state, (x, x.clone(), mask), 0.0, plan, rt)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])  # the first is slower


def product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product alone, the best of ten, or of fewer if they are slow."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds: list[float] = []
    while len(seconds) < 10 and sum(seconds) < 1:
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the GPU
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def nominal_seconds(plan: Plan) -> tuple[float, str]:
    """The seconds of a step on known devices, and a phrase that says how they were found."""
    peak = plan.device.peak_flops or math.nan
    compute_s = plan.flops_per_step / (peak * PEAK_SHARE * plan.world_size)
    how = (
        f"at {PEAK_SHARE:.0%} of the {peak / 1e12:,.0f} TFLOP/s of each {plan.device.name}: an "
        "assumption (nanoGPT reaches about 30%, llm.c up to 60%)"
    )
    if plan.world_size == 1:
        return compute_s, how
    size, operations = sent(plan)
    sending_s = size / (LINK_SHARE * (plan.device.link or math.nan))
    sending_s += operations * DELAY_S * (plan.world_size > MACHINE)
    waiting_s = max(0, sending_s - hidden(plan, compute_s))
    how += (
        f"; in a step, each process sends {size / 1e9:.3g} GB and waits {1000 * waiting_s:.3g} ms "
        f"for it: an efficiency of {compute_s / (compute_s + waiting_s):.0%} (docs/scaling.md)"
    )
    return compute_s + waiting_s, how


def sent(plan: Plan) -> tuple[int, int]:
    """The bytes that each process sends in a step, and in how many operations.

    DDP averages the gradients: 2(W-1)/W of their size. FSDP gathers the weights of the blocks twice
    in each micro-step, the other weights once, and scatters the gradients: (W-1)/W each. All are
    float32 except the gathered blocks, in the plan's dtype, and Muon's updates, in bfloat16.
    """
    sizes, processes = plan.sizes, plan.world_size
    size = 4 * 2 * sizes.trained
    operations = 1 if plan.compile else math.ceil(4 * sizes.trained / BUCKET)
    if plan.sharded:
        blocks = 2 * sizes.matrices * plan.dtype.itemsize
        others = 4 * (sizes.total - sizes.matrices)
        size = plan.micro_steps * (blocks + others + 4 * sizes.trained)
        operations = plan.micro_steps * (3 * plan.config.n_layer + 2)
    if plan.optimizer.name == "muon":
        size += 4 * sizes.trained_matrices // (processes if plan.sharded else 1)
    return size * (processes - 1) // processes, operations


def hidden(plan: Plan, compute_s: float) -> float:
    """The seconds of a step's arithmetic during which a process can send.

    FSDP is assumed to send all the time. DDP sends during the last backward pass, two thirds of a
    micro-step, unless that is compiled: all of its gradients are then ready at the end.
    """
    if plan.sharded:
        return compute_s
    return 0.0 if plan.compile else compute_s * 2 / 3 / plan.micro_steps
