"""Checkpoints, written in the background except on a CPU."""

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from plaingpt.checkpoint import folders, store
from plaingpt.checkpoint.store import Snapshot
from plaingpt.runtime import Runtime
from plaingpt.training.run_folder import RunLog


class Saver:
    """Writes the checkpoints of a run, and keeps the newest `keep` and the best. On leaving its
    context, none is being written any more."""

    def __init__(self, log: RunLog | None, keep: int, rt: Runtime) -> None:
        """`log` is None in processes that save nothing."""
        self.log, self.keep = log, keep
        # the tensors of a snapshot are copies there, and the next step does not need the cores
        self.in_background = rt.device.type != "cpu"
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.wait()
        except OSError as problem:
            if error is None:
                raise
            print(f"error: {problem}", file=sys.stderr)  # beside the one that ends the run

    def save(self, snapshot: Snapshot, prune: bool) -> None:
        """Write a snapshot, and remove old ones if `prune`. Raises OSError if the disk refuses it;
        in the background, that is for `wait` to raise, which has to be called in between."""
        if self.in_background:
            self.writing = self.thread.submit(self._save, snapshot, prune)
        else:
            self._save(snapshot, prune)

    def wait(self) -> None:
        """Wait until the newest checkpoint is complete."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def _save(self, snapshot: Snapshot, prune: bool) -> None:
        assert self.log
        self.log.sync()
        folder = store.save(self.log.out_dir, snapshot)
        line = f"step {snapshot.state.step}: saved {folder}\n"
        print(line, end="")  # in one write, between those of other threads
        self.log.name_best()
        if prune:
            folders.prune(self.log.out_dir, self.keep)
