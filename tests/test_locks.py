"""A folder has one writer at a time, and none once its writer is dead."""

import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import workers
from test_train import cfg, command  # noqa: F401

import prepare
import train
from configurator import UserError
from plaingpt import files, locks

HOLD = """
import os, sys, time
from pathlib import Path
from plaingpt.locks import locked
with locked(Path(sys.argv[1])):
    child = os.fork() if "fork" in sys.argv else None
    if child != 0:
        print("held", child, flush=True)
    time.sleep(60)
"""
TAKE_TURNS = """
import os, sys
from pathlib import Path
from configurator import UserError
from plaingpt.locks import locked
folder, inside = Path(sys.argv[1]), Path(sys.argv[2])
had = 0
while had < 40:
    try:
        with locked(folder):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another is inside
            inside.unlink()
            had += 1
    except UserError as refused:
        assert "in use by -c, process " in str(refused), refused
"""


def start(code, *words, **popen) -> subprocess.Popen:
    arguments = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(arguments, text=True, **popen)


@contextlib.contextmanager
def held_elsewhere(folder, *words):
    """Another process that holds `folder`, until it is killed here with kill -9."""
    with start(HOLD, folder, *words, stdout=subprocess.PIPE) as process:
        process.child = process.stdout.readline().removeprefix("held ").strip()
        yield process
        process.kill()


def is_free(folder) -> bool:
    try:
        with locks.locked(folder):
            return True
    except UserError:
        return False


def test_a_folder_is_refused_by_naming_who_has_it_until_that_process_is_dead(tmp_path):
    folder = tmp_path / "new" / "folder"
    with held_elsewhere(folder) as other:
        who = rf"{folder} is in use by -c, process {other.pid} on {re.escape(socket.gethostname())}"
        since = r", since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC: wait for it to end, stop it, or"
        with pytest.raises(UserError, match=who + since), locks.locked(folder):
            pass
    assert list(folder.iterdir()) == [folder / locks.NAME]  # left by kill -9
    with locks.locked(folder):
        assert str(os.getpid()) in (folder / locks.NAME).read_text()
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_does_not_keep_the_lock_of_a_killed_parent(tmp_path):
    with held_elsewhere(tmp_path, "fork") as parent:
        assert not is_free(tmp_path)
        parent.kill()
        parent.wait()
        os.kill(int(parent.child), 0)  # it is alive
        assert is_free(tmp_path)
        os.kill(int(parent.child), signal.SIGKILL)


def test_processes_that_start_at_once_take_turns(tmp_path):
    """Each makes the folder, its lock file and removes both, forty times."""
    words = (tmp_path / "folder", tmp_path / "inside")
    crowd = [start(TAKE_TURNS, *words, stderr=subprocess.PIPE) for _ in range(4)]
    errors = [process.communicate(timeout=60)[1] for process in crowd]
    assert [process.returncode for process in crowd] == [0] * 4, errors


def test_what_locking_made_goes_and_what_was_written_stays(tmp_path):
    with locks.locked(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), locks.locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "x").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a" / "x"]
    with (
        pytest.raises(UserError, match="x is a file, not a folder"),
        locks.locked(tmp_path / "a" / "x"),
    ):
        pass


def test_a_link_to_a_folder_is_that_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with held_elsewhere(tmp_path / "folder"):
        assert not is_free(tmp_path / "link")


def test_a_folder_made_again_belongs_to_its_new_holder(tmp_path):
    folder = tmp_path / "folder"
    with contextlib.ExitStack() as stack:
        with locks.locked(folder):
            shutil.rmtree(folder)
            stack.enter_context(held_elsewhere(folder))
        assert not is_free(folder)


def test_a_file_system_without_locks_is_said_to_have_none(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with locks.locked(tmp_path):
        pass
    assert capsys.readouterr().err == (
        f"{tmp_path} is on a file system without locks: nothing keeps a second process out of it\n"
    )


def test_a_folder_that_cannot_be_written_to_is_named_rather_than_its_lock(tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system", tmp_path / locks.NAME)

    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(OSError) as found, locks.locked(tmp_path / "dangling"):
        pass
    assert str(found.value) == f"cannot write to {tmp_path / 'dangling'}: File exists"
    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(OSError) as found, locks.locked(tmp_path):
        pass
    assert str(found.value) == f"cannot write to {tmp_path}: Read-only file system"


# --- the commands


def test_a_second_preparation_is_refused_and_touches_nothing(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text\n" * 50)
    target = tmp_path / "data"
    words = [f"--sources={tmp_path}/a.txt", f"--data_dir={target}", "--tokenizer=bytes"]
    with held_elsewhere(target) as other:
        assert prepare.main(words) == 2
        assert f"error: {target} is in use by -c, process {other.pid} " in capsys.readouterr().err
        assert list(target.iterdir()) == [target / locks.NAME]
    assert prepare.main(words) == 0
    with held_elsewhere(target):  # nothing to write: no lock
        assert prepare.main(words) == 0 and prepare.main([f"--inspect={target}"]) == 0
        assert prepare.main([*words, "--seed=1", "--overwrite"]) == 2


def test_a_second_training_is_refused_and_touches_nothing(cfg, tmp_path, capsys):  # noqa: F811
    out_dir = tmp_path / "out"
    words = command(cfg, out_dir, max_steps=1)[2:]
    with held_elsewhere(out_dir) as other:
        for more in ([], ["--overwrite"]):
            assert train.main([*words, *more]) == 2
            line = f"error: {out_dir} is in use by -c, process {other.pid} on "
            assert line in capsys.readouterr().err
        assert list(out_dir.iterdir()) == [out_dir / locks.NAME]
        assert train.main([*words, "--plan"]) == 0
    assert train.main(words) == 0


def test_a_training_holds_its_folder_to_the_end(cfg, tmp_path, monkeypatch):  # noqa: F811
    really, codes = train.save, []

    def save(*arguments):
        really(*arguments)
        with start(HOLD, tmp_path, stderr=subprocess.PIPE) as other:
            codes.append("is in use by" in other.communicate(timeout=60)[1])

    monkeypatch.setattr(train, "save", save)
    assert train.main(command(cfg, tmp_path, max_steps=8)[2:]) == 0
    assert codes == [True, True]
    assert is_free(tmp_path) and not (tmp_path / locks.NAME).exists()


def test_of_several_processes_the_main_one_holds_the_folder(cfg, tmp_path):  # noqa: F811
    out_dir = tmp_path / "out"
    runs = [command(cfg, out_dir, max_steps=2)[2:]]
    with held_elsewhere(out_dir) as other:
        group = workers.start_all(2, tmp_path, runs)
        told = workers.finish(group, tmp_path, status=2)
        assert told.count(f"error: {out_dir} is in use by -c, process {other.pid} on ") == 1
        assert told.count(f"error: the main process cannot use {out_dir}") == 1
    workers.run_all(2, tmp_path, runs)


@pytest.mark.skipif(os.name == "nt", reason="POSIX links")
def test_a_link_is_never_written_through(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / locks.NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError), locks.locked(tmp_path / "folder"):
        pass
    (tmp_path / ".partial_run.json").symlink_to(tmp_path / "precious")
    with files.atomic_file(tmp_path / "run.json") as partial:
        partial.write_text("new")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_run_folder_is_not_prepared(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    arguments = [f"--data_dir={tmp_path}/run", f"--sources={__file__}", "--tokenizer=bytes"]
    assert prepare.main(arguments) == 2
    assert f"{tmp_path}/run holds a training run" in capsys.readouterr().err
