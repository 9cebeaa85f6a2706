"""One writer at a time in a folder."""

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from configurator import UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

NAME = ".plaingpt_lock"
BEYOND = 1 << 30  # Windows locks this byte, so that others can still read those before it
TRIES = 1000
HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other process that calls this out of `folder`, which is created if missing.

    The kernel holds the lock: it ends with this process, however that ends, and children do not
    inherit it. On exit the lock file is removed, and so are folders created here that are still
    empty.
    Raises a UserError that names the process using the folder, and OSError if the folder is
    read-only.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file, not a folder")
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    path = folder / NAME
    try:
        handle = acquire(path)
        try:
            sign(handle)
            yield
        finally:
            release(handle, path)
    finally:
        for each in made:
            with contextlib.suppress(OSError):  # it is not empty
                each.rmdir()


def acquire(path: Path) -> int:
    """Open a lock file, creating it and its folder if missing, and lock it; return the handle."""
    for attempt in range(TRIES):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as error:
            moving = isinstance(error, (FileNotFoundError, FileExistsError))
            if moving and attempt < TRIES - 1:  # its last holder is removing the folder
                continue
            raise OSError(f"cannot write to {path.parent}: {error.strerror}") from None
        if not lock(handle, path):
            other = signature(handle)
            os.close(handle)
            raise UserError(
                f"{path.parent} is in use by {other}: wait for it to end, stop it, or use "
                "another folder"
            )
        if is_at(path, handle):
            return handle
        os.close(handle)  # its last holder removed it in the meantime
    raise OSError(f"{path} cannot be locked: it keeps disappearing")


def lock(handle: int, path: Path) -> bool:
    """Lock an open file; False if another process has locked it.

    Of the two kinds of POSIX locks, this one works over NFS and is not inherited by children.
    """
    try:
        if sys.platform == "win32":
            os.lseek(handle, BEYOND, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno not in NO_LOCKS:
            raise
        print(
            f"{path.parent} is on a file system without locks: nothing keeps a second process out "
            "of it",
            file=sys.stderr,
        )
    return True


def sign(handle: int) -> None:
    """Write into the lock file who holds the lock, for `signature`."""
    command = Path(sys.argv[0]).name or "python"
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    text = f"{command}, process {os.getpid()} on {socket.gethostname()}, since {since}"
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, text.encode(errors="replace"))
    os.fsync(handle)  # for readers on other hosts


def signature(handle: int) -> str:
    """Who holds a lock; its holder may be about to write that down."""
    for _ in range(20):
        os.lseek(handle, 0, os.SEEK_SET)
        if text := os.read(handle, 1000):
            return text.decode(errors="replace")
        time.sleep(0.05)
    return "another process"


def is_at(path: Path, handle: int) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def release(handle: int, path: Path) -> None:
    """Remove the lock file and close it, which releases the lock."""
    if sys.platform == "win32":  # open files cannot be removed
        os.close(handle)
        with contextlib.suppress(OSError):  # another process is reading it
            path.unlink()
        return
    if is_at(path, handle):  # not in a folder that has been removed, or made again
        with contextlib.suppress(OSError):  # the folder has become read-only
            path.unlink()
    os.close(handle)
