"""Checkpoints, written while training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor

from plaingpt.checkpoint import folders, store
from plaingpt.checkpoint.store import Snapshot
from plaingpt.runtime import Runtime
from plaingpt.training.run_folder import RunLog


class Saver:
    """Writes the checkpoints of a run in a thread, one after the other, and keeps the newest `keep`
    and the best. On a CPU, whose cores and memory the next step needs, it waits for each."""

    def __init__(self, log: RunLog, keep: int, rt: Runtime) -> None:
        self.log, self.keep, self.in_background = log, keep, rt.device.type != "cpu"
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future | None = None

    def save(self, snapshot: Snapshot, prune: bool) -> None:
        """Begin to write a snapshot once the one before is complete; `prune` then removes old ones.
        Raises OSError, here or in the next call of `save` or `wait`, if the disk refuses it."""
        self.wait()
        self.writing = self.thread.submit(self._save, snapshot, prune)
        if not self.in_background:
            self.wait()

    def wait(self) -> None:
        """Wait until the newest checkpoint is complete."""
        if self.writing:
            self.writing.result()

    def _save(self, snapshot: Snapshot, prune: bool) -> None:
        folder = store.save(self.log.out_dir, snapshot)
        print(f"step {snapshot.state.step}: saved {folder}\n", end="")  # whole, between the loop's
        self.log.name_best()
        if prune:
            folders.prune(self.log.out_dir, self.keep)
