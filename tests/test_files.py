"""Files and folders that are written whole or not at all."""

import os

import pytest

from configurator import UserError
from plaingpt import files


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.atomic_file(path) as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with files.atomic_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_only_whole(tmp_path):
    folder = tmp_path / "runs" / "a"
    with pytest.raises(KeyboardInterrupt), files.atomic_folder(folder) as partial:
        (partial / "x").write_text("x")
        raise KeyboardInterrupt
    assert list(folder.parent.iterdir()) == []
    with files.atomic_folder(folder) as partial:
        (partial / "x").write_text("x")
        assert not folder.exists()
    assert list(folder.parent.iterdir()) == [folder] and (folder / "x").read_text() == "x"


def test_an_error_of_the_disk_names_the_folder_and_other_errors_stay_themselves(tmp_path):
    with pytest.raises(OSError, match="could not write .*a: no space left"):  # noqa: SIM117
        with files.atomic_folder(tmp_path / "a"):
            raise OSError("no space left")
    with pytest.raises(ZeroDivisionError), files.atomic_folder(tmp_path / "a"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The order of flushes and renames is what a loss of power depends on."""
    events, really_flush = [], files.flush

    def flush(path):
        names = {path.name for path in tmp_path.iterdir()}
        events.append((path.name.removeprefix(files.PARTIAL), "a" in names))
        really_flush(path)

    monkeypatch.setattr(files, "flush", flush)
    with files.atomic_folder(tmp_path / "a") as partial:
        (partial / "x").write_text("x")
    assert events == [("x", False), ("a", False), (tmp_path.name, True)]
    events.clear()
    files.remove_folder(tmp_path / "a")
    files.write_json(tmp_path / "a", {})
    assert events == [("a", False)]


def test_leftovers_of_a_killed_process_vanish_and_nothing_else(tmp_path):
    (tmp_path / ".partial_step_000007" / "deep").mkdir(parents=True)
    (tmp_path / ".partial_old_step_000003").mkdir()
    (tmp_path / ".partial_run.json").write_text("{")
    kept = {tmp_path / ".partial", tmp_path / "run.json"}
    for path in kept:
        path.mkdir()
    files.remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == kept


def test_json_is_what_was_written(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"ä": [1, 2.5, None, "x"]})
    assert files.read_json(path) == {"ä": [1, 2.5, None, "x"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"loss": float("nan")})
    assert files.read_json(path)["ä"] and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"3", b"[" * 50_000])
def test_damaged_json_is_an_error_of_the_user(tmp_path, content):
    with pytest.raises(UserError, match=r" has no a\.json"):
        files.read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json is damaged: "):
        files.read_json(tmp_path / "a.json")
