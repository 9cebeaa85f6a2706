"""Where a run happens: processes, device, dtype, autocast, seeding, signals and memory.

torchrun starts several processes and tells each its rank in environment variables.
"""

import contextlib
import errno
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from configurator import DType, UserError
from model import GPT
from plaingpt import cpu
from plaingpt.environment import from_environment, rank_and_size
from plaingpt.wording import quantity

Gathered = TypeVar("Gathered")
ECHO_S = 2.0  # seconds in which a repeated signal counts as the same request


@dataclass(frozen=True)
class Runtime:
    """One process's place in a run. Matrix products run in `dtype`; float32 means no autocast."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    stop: list[str] = field(default_factory=list, compare=False)  # signals that ask to stop
    progress: bool = True  # whether the main process shows progress bars

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that writes files."""
        return self.rank == 0

    @property
    def hides_progress(self) -> bool | None:
        """For tqdm's `disable`: None shows the bar where stderr is a terminal."""
        return None if self.is_main and self.progress else True

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over all processes, on the device of `values`."""
        if self.world_size == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def gather(self, value: Gathered) -> list[Gathered]:
        """The values of all processes, by rank."""
        found = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(found, value)
        return found

    def any(self, value: bool) -> bool:
        """Whether `value` is true in any process; all get the same answer."""
        if self.world_size == 1:
            return value
        return self.sum(torch.tensor(float(value))).item() > 0

    def all_equal(self, value: int) -> bool:
        """Whether all processes have the same value."""
        return not self.any(self.sum(torch.tensor(float(value))).item() != value * self.world_size)

    def stopping(self) -> bool:
        """Whether any process has been asked to stop; all get the same answer."""
        return self.any(bool(self.stop))

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        # Each weight is used once per step: caching its cast would only take memory.
        return torch.autocast(self.device.type, self.dtype, cache_enabled=False)

    def place(self, model: GPT, dtype: torch.dtype = torch.float32) -> GPT:
        """Move a model to this process's device, with the layers that are fast there."""
        if self.device.type == "cpu":
            cpu.speed_up(model)
        return model.to(self.device, dtype)

    def seed_step(self, seed: int, step: int) -> None:
        """Make the randomness of a step (dropout) a pure function of (seed, step, rank)."""
        mixed = np.random.SeedSequence((seed, step, self.rank)).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed[0]))


def start(device: str = "auto", dtype: DType = "auto", stop: list[str] | None = None) -> Runtime:
    """Choose this process's device and dtype, and join the other processes that torchrun started.
    `stop` is the list that `stop_signals` yields.

    "auto" is the best that this machine has. Raises UserError for a device that it lacks.
    """
    rank, world_size = rank_and_size()
    name = best_device() if device == "auto" else device
    if name == "cuda" and world_size > 1:
        name = f"cuda:{from_environment('LOCAL_RANK')}"
    check_device(name)
    chosen = torch.device(name)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)  # for what names no device: streams, collectives
    if chosen.type == "cpu":
        cpu.keep_freed_memory()
    if world_size > 1:
        join(chosen)
    return Runtime(
        chosen,
        best_dtype(chosen) if dtype == "auto" else getattr(torch, dtype),
        rank=rank,
        world_size=world_size,
        stop=[] if stop is None else stop,
    )


def join(device: torch.device) -> None:
    """Form a process group with the rest of the run: NCCL between GPUs, gloo between CPUs."""
    if device.type == "mps":
        raise UserError("several processes need CUDA or the CPU, not mps: --device=cpu")
    if not dist.is_initialized():
        rank, world_size = from_environment("RANK"), from_environment("WORLD_SIZE")
        store, on_gpu = rendezvous(rank, world_size), device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            device_id=device if on_gpu else None,  # connect NCCL now rather than in the first step
        )


def rendezvous(rank: int, world_size: int) -> dist.Store:
    """The store through which the processes find each other; the main process hosts it.

    torchrun's own store outlives a restart and keeps the addresses of dead processes, which the
    new ones would wait for (pytorch issue 135712). Here it carries only the port of our own.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), from_environment("MASTER_PORT")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(host, port, world_size, is_master=rank == 0)
    agent = dist.TCPStore(host, port, is_master=False)  # torchrun's
    if rank == 0:
        store = dist.TCPStore(host, 0, world_size, is_master=True, wait_for_workers=False)
        agent.set("plaingpt", str(store.port))
        return store
    while True:
        port = int(agent.get("plaingpt"))  # may still be that of a dead process: try again
        with contextlib.suppress(dist.DistError):
            return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Yield a list to which SIGINT and SIGTERM append their names instead of ending the process.

    A second signal ends the process at once. One that arrives within ECHO_S of the first counts as
    the same request: a terminal and torchrun, or a scheduler and torchrun, may both deliver it.
    A thread receives the signals, because Python runs its handlers only between instructions, and a
    large matrix product is a single one. Outside the main thread, which alone can set handlers, the
    list stays empty.
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        first = 0.0
        while number := reader.recv(1):  # empty once the other end is closed
            if number[0] not in handlers:
                continue
            if not received:
                first = time.monotonic()
                received.append(signal.Signals(number[0]).name)
                words = "stopping soon; a second signal ends the run at once"
                print(f"{received[0]}: {words}", file=sys.stderr)
            elif time.monotonic() - first > ECHO_S:
                os._exit(128 + number[0])

    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    numbers = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # by nohup
        numbers.append(signal.SIGHUP)  # the terminal was closed
    handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    streams = (sys.stdout, sys.stderr)  # None if closed
    out, error = (cast(TextIO, Output(each, received)) if each else None for each in streams)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        writer.close()
        watcher.join()
        reader.close()


class Output:
    """A stream whose reader may leave, as `| tee` does at Ctrl-C: `stop` then gets an entry,
    as from a signal, and the rest is discarded."""

    def __init__(self, stream: TextIO, stop: list[str]) -> None:
        self.stream, self.stop = stream, stop

    def write(self, text: str) -> int:
        return self.unless_broken(lambda: self.stream.write(text)) or len(text)

    def flush(self) -> None:
        self.unless_broken(self.stream.flush)

    def unless_broken(self, use: Callable[[], Any]) -> Any:
        try:
            return use()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # EIO: a terminal that was closed
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.stop.append("the end of its output")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def versions() -> dict[str, str]:
    """The software versions that a checkpoint records."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def revision() -> str | None:
    """The git revision of this code, with "-dirty" after local changes; None without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        run = subprocess.run([*command, "--abbrev=40"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None


def device_memory_gib(device: torch.device) -> float | None:
    """The total memory of the device, or for a CPU this process's share of the machine's; None if
    the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 2**30
    if sys.platform == "win32":
        return None
    pages = os.sysconf("SC_PHYS_PAGES") // from_environment("LOCAL_WORLD_SIZE", default=1, least=1)
    return os.sysconf("SC_PAGE_SIZE") * pages / 2**30


def peak_memory_gib(device: torch.device) -> float | None:
    """The most memory that this process has used so far, on the GPU or else on the machine; None if
    the system does not report it (only Linux does)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        # Not getrusage, whose maximum includes the memory of the process before exec.
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    counts = {"cpu": 1, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}
    kind, _, index = name.partition(":")
    if not counts.get(kind) or not re.fullmatch(r"[a-z]+(:(0|[1-9][0-9]{0,2}))?", name):
        here = ", ".join(kind for kind, number in counts.items() if number)
        raise UserError(f"device {name!r} is not on this machine, which has: {here}")
    if index and int(index) >= counts[kind]:
        nouns = {"cpu": "CPU device", "cuda": "GPU", "mps": "GPU"}
        raise UserError(f"device {name!r}: this machine has {quantity(counts[kind], nouns[kind])}")


def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies in it, fp16 on older GPUs, fp32 otherwise."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if has_bf16 else torch.float16
    if device.type == "cpu" and cpu.has_bf16():
        return torch.bfloat16
    return torch.float32
