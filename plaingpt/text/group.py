"""
The processes that prepare one folder together, and how each knows that the others are alive.

They share a file system and nothing else: each rewrites a small file of its own every second. One
whose file no longer changes has died; clocks are not compared.
"""

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from configurator import UserError
from plaingpt.files import PARTIAL, Count

FOLDER = ".group"  # in the data folder
BEAT_SECONDS = 1.0
DEAD_SECONDS = 120.0  # without a sign of life; network file systems show changes up to 60 s late
POLL_SECONDS = 0.05  # between two looks at what others may have written
ENDED = "process 0 has ended: its own message says why"


Stage = Literal["starting", "encoding", "done"]


class Beat(msgspec.Struct, frozen=True):
    """What a process says about itself."""

    count: Count
    stage: Stage
    settings: str  # a hash
    units: tuple[Count, ...]  # of process 0: by source, the unit that it is putting in place


class Group:
    """This process among those that torchrun, or whatever sets RANK and WORLD_SIZE, started."""

    def __init__(self, data_dir: Path, rank: int, size: int, settings: str) -> None:
        self.rank, self.size, self.settings = rank, size, settings
        self.folder = data_dir / FOLDER
        self.stage: Stage = "starting"
        self.units: list[int] = []
        self.count = 0
        self.seen: dict[int, tuple[Beat | None, float]] = {}  # by rank: its beat, and since when

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Within this, show the others that this process is alive. Process 0 makes the folder for
        it, and removes it."""
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)  # left over from a killed one
        if self.size == 1:
            yield
            return
        if self.rank == 0:
            self.folder.mkdir()
        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(BEAT_SECONDS):
                self.beat()

        self.beat()
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.beat()  # with the last stage
            if self.rank == 0:
                shutil.rmtree(self.folder, ignore_errors=True)

    def beat(self) -> None:
        self.count += 1
        beat = Beat(self.count, self.stage, self.settings, tuple(self.units))
        partial = self.folder / f"{PARTIAL}{self.rank}"
        with contextlib.suppress(OSError):  # the others will notice
            partial.write_bytes(msgspec.json.encode(beat))  # not flushed: worthless after a crash
            partial.replace(self.folder / str(self.rank))

    def look(self, rank: int) -> Beat | None:
        """The last beat of a process, or None."""
        try:
            found = msgspec.json.decode((self.folder / str(rank)).read_bytes(), type=Beat)
        except (OSError, msgspec.MsgspecError):
            found = None
        if rank not in self.seen or found != self.seen[rank][0]:
            self.seen[rank] = (found, time.monotonic())
        return found

    def check(self, rank: int) -> None:
        """Raises UserError if a process has shown no sign of life for DEAD_SECONDS."""
        self.look(rank)
        if time.monotonic() - self.seen[rank][1] > DEAD_SECONDS:
            raise UserError(
                f"process {rank} of {self.size} has shown no sign of life for {DEAD_SECONDS:g} "
                "seconds; the same command continues from the last saved progress"
            )

    def is_done(self) -> bool:
        """Whether process 0 needs no more parts. Raises UserError if it ended before."""
        beat = self.look(0)
        if beat is None and not self.folder.exists():
            raise UserError(ENDED)
        return beat is not None and beat.stage == "done"

    def merging(self) -> Sequence[int]:
        """By source, the unit that process 0 is putting in place; empty if it cannot be read."""
        if self.rank == 0:
            return self.units
        beat = self.look(0)
        return beat.units if beat else ()

    def wait_for_first(self, is_prepared: Callable[[], bool]) -> bool:
        """Wait until process 0 is encoding, or the folder `is_prepared`; return whether it encodes.

        Raises UserError if it does not begin, or has other settings.
        """
        before = self.look(0)  # which may be left over from an earlier start
        while True:
            if is_prepared():
                return False
            now = self.look(0)
            if now and now != before and now.stage != "starting":
                break
            self.check(0)
            time.sleep(POLL_SECONDS)
        if now.settings != self.settings:
            raise UserError("process 0 was started with other settings: use the same for all")
        return True

    def wait_for_others(self) -> None:
        """In process 0: wait until all others know that it is done, or show no sign of life."""

        def is_awaited(rank: int) -> bool:
            try:
                self.check(rank)
            except UserError:
                return False
            beat, _ = self.seen[rank]
            return beat is None or beat.stage != "done"

        while [rank for rank in range(1, self.size) if is_awaited(rank)]:
            time.sleep(POLL_SECONDS)
