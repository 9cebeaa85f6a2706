"""Files and folders that are written whole or not at all."""

import json
import os

import msgspec
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
    (tmp_path / ".partial_old_step_000004").symlink_to(tmp_path / ".partial")
    files.remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == kept


def test_of_a_folder_that_is_a_link_the_link_is_removed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").symlink_to("elsewhere")
    files.remove_folder(tmp_path / "a")
    assert os.listdir(tmp_path) == ["elsewhere"]


def test_json_is_what_was_written(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"ä": [1, 2.5, None, "x"]})
    assert files.read_json(path, dict) == {"ä": [1, 2.5, None, "x"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"loss": float("nan")})
    assert files.read_json(path, dict)["ä"] and os.listdir(tmp_path) == ["a.json"]


class Point(msgspec.Struct, frozen=True, omit_defaults=True):
    x: files.Count
    name: str | None = None
    before: tuple["Point", ...] = ()


def test_a_record_is_read_as_it_was_written(tmp_path):
    path, name = tmp_path / "a.json", os.fsdecode(b"caf\xe9")  # not UTF-8: half a surrogate pair
    point = Point(3, before=(Point(1), Point(2, name)))
    files.write_json(path, point)
    assert files.read_json(path, Point) == point
    assert json.loads(path.read_text()) == {"x": 3, "before": [{"x": 1}, {"x": 2, "name": name}]}
    path.write_text('{"x": 3, "unknown": [1]}')
    assert files.read_json(path, Point) == Point(3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged: Expecting value: line 1"),
        (b"{", "is damaged: "),
        (b"\xff", "is damaged: 'utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "is damaged: maximum recursion depth exceeded"),
        (b'{"x": NaN}', "is damaged: NaN is not a finite number"),
        (b'{"x": 1e999}', "is damaged: 1e999 is not a finite number"),
        (b'{"x": 1%s}' % (b"0" * 5000), "is damaged: Exceeds the limit"),
        (b"[]", ": expected an object, got a list"),
        (b"3", ": expected an object, got a whole number"),
        (b"{}", ": missing field x"),
        (b'{"x": 1.0}', ": x: expected a whole number, got a number"),
        (b'{"x": -5}', ": x: expected a whole number >= 0"),
        (b'{"x": 1%s}' % (b"0" * 30), ": x: expected a whole number <= "),
        (b'{"x": 1, "name": 2}', ": name: expected a string or null, got a whole number"),
        (b'{"x": 1, "before": [{"x": 1}, {}]}', ": before[1]: missing field x"),
        (b'{"\\udc80": 1, "x": 1}', "a.json"),
    ],
)
def test_a_file_that_is_no_such_record_is_one_line(tmp_path, content, message):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r" has no a\.json"):
        files.read_json(path, Point)
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        files.read_json(path, Point, "make it again")
    error = str(caught.value)
    assert str(path) in error and message in error and error.endswith("; make it again")
    assert "\n" not in error and len(error) < 300


@pytest.mark.skipif(os.name == "nt", reason="pipes and devices are POSIX")
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "zeros"):
        with pytest.raises(UserError, match=f"{name} is a .*: expected a file"):
            files.read_json(tmp_path / name, Point)
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", files.MAX_BYTES + 1)
    with pytest.raises(UserError, match="large is larger than 128 MiB: not read"):
        files.read_json(tmp_path / "large", Point)
    files.write_json(tmp_path / "a.json", Point(1))
    (tmp_path / "link").symlink_to("a.json")
    assert files.read_json(tmp_path / "link", Point) == Point(1)
