"""Several processes prepare one folder: how many, and which of them die, makes no difference."""

import contextlib
import io
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import workers

import prepare
from configurator import UserError
from plaingpt.text import (
    builder,
    cutting,
    dataset,
    documents,
    encoding,
    group,
    parts,
    sources,
)
from plaingpt.text.group import Group
from plaingpt.text.progress import Progress
from plaingpt.text.validation import Validation

LIMITS = {"BEAT_SECONDS": 0.05, "DEAD_SECONDS": 60.0, "POLL_SECONDS": 0.005}


def work(
    rank: int, size: int, arguments: list[str], output: str, last: int = 0, dies: bool = False
) -> None:
    """In a process of its own: prepare.py in small pieces. Before its part `last` it dies (unless
    it is process 0, once that has saved how far it got), or waits to be killed. One that is alone,
    and so writes no parts, dies once it has saved its progress."""
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in place.items()})
    small()
    written = 0
    really_write = parts.write_part

    def write(path, part):
        nonlocal written
        written += 1
        if written == last:
            end = time.monotonic() + 5
            while not dies or (rank and time.monotonic() < end):
                time.sleep(0.01)
                if dies and [*Path(output).rglob("progress.json")]:
                    break
            os._exit(9)
        really_write(path, part)

    def save(*args):
        really_save(*args)
        os._exit(9)

    parts.write_part = write
    if dies and size == 1:
        really_save, Progress.save = Progress.save, save
    with (
        open(f"{output}_{rank}", "w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        status = prepare.main(arguments)
    raise SystemExit(status)


def small() -> None:
    """Many units, parts and shards of a small source; signs of life in quick succession."""
    sources.UNIT, parts.PART_SECONDS, builder.SAVE_SECONDS = 3000, 0.0, 0.01
    encoding.CHUNK, cutting.BLOCK = 900, 500
    for name, seconds in LIMITS.items():
        setattr(group, name, seconds)


def run(folder: Path, size: int, arguments: list[str], fatal: tuple[int, int] = (0, 0)) -> list:
    """Prepare in `size` processes, of which number fatal[0] dies before its part fatal[1]; the
    others, which wait before their sixth part, are then killed, as torchrun does. Returns their
    exit codes."""
    words = [*arguments, f"--data_dir={folder}"]
    started = []
    for rank in range(size):
        dies = bool(fatal[1]) and rank == fatal[0]
        last = fatal[1] if dies or not fatal[1] else 6
        place = (rank, size, words, str(folder), last, dies)
        process = workers.context.Process(target=work, args=place)
        process.start()
        started.append(process)
    if fatal[1]:
        started[fatal[0]].join(timeout=60)
        for process in started:
            process.kill()
    for process in started:
        process.join(timeout=60)
    return [process.exitcode for process in started]


def said(folder: Path, rank: int = 0) -> str:
    return Path(f"{folder}_{rank}").read_text(encoding="utf-8")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    """Arguments for texts, records in lines and in tables, bad ones, and limits."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = " ".join(rng.choice(["alpha", "beta", "naïve", "😀", "\n"], 3000))
    records = [{"text": words[at : at + 40] + "."} for at in rng.integers(0, len(words), 400)]
    lines = [json.dumps(record) for record in records]
    lines[200:200] = ["oops", "", json.dumps({"text": ""})]
    (folder / "a.jsonl").write_text("\n".join(lines))
    table = pyarrow.Table.from_pylist(records[:150])
    pyarrow.parquet.write_table(table, folder / "b.parquet")
    (folder / "texts").mkdir()
    for number in range(8):
        (folder / "texts" / f"{number}.txt").write_text(words[number * 900 :][: number * 400 + 1])
    paths = ",".join(f"{folder}/{name}" for name in ("texts", "a.jsonl", "b.parquet"))
    wanted = [f"--sources={paths}", "--bad_records=skip", "--tokenizer=bytes", "--workers=1"]
    return [*wanted, "--shard_tokens=5000", "--val_tokens=3000", "--max_record_tokens=47"]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> dict[str, bytes]:
    """What one process makes of the corpus."""
    folder = tmp_path_factory.mktemp("alone") / "data"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert prepare.main([*corpus, f"--data_dir={folder}"]) == 0
    made = content(folder)
    assert len(made) > 6 and b"more than 47 tokens" in made["dataset.json"]
    return made


@pytest.mark.parametrize("size", [2, 3])
def test_every_byte_is_that_of_one_process(corpus, alone, tmp_path, size):
    folder = tmp_path / "data"
    assert run(folder, size, corpus) == [0] * size
    assert content(folder) == alone
    assert "wrote" in said(folder) and not any(said(folder, rank) for rank in range(1, size))


def test_run_again_it_touches_nothing_and_overwrites_when_asked_to(tmp_path):
    folder, arguments = tmp_path / "data", [f"--sources={tmp_path}/a.jsonl", "--tokenizer=bytes"]
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": "some text"}) + "\n") * 9)
    assert run(folder, 2, arguments) == [0, 0]
    before = content(folder)
    assert run(folder, 2, arguments) == [0, 0]
    assert "already prepared" in said(folder) and content(folder) == before
    assert run(folder, 2, [*arguments, "--overwrite", "--val_fraction=0"]) == [0, 0]
    assert "val_000000.bin" not in content(folder)


def test_shards_of_a_dataset_of_the_hub_are_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "own" / "er" / "data"
    data.mkdir(parents=True)
    for number in range(3):
        records = [{"text": f"text {number} {row}"} for row in range(700)]
        table = pyarrow.Table.from_pylist(records)
        pyarrow.parquet.write_table(table, data / f"train-{number}.parquet", row_group_size=300)
    arguments = ["--sources=hf:own/er", "--tokenizer=bytes", "--workers=1"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert prepare.main([*arguments, f"--data_dir={tmp_path}/one"]) == 0
    assert run(tmp_path / "two", 2, arguments) == [0, 0]
    assert content(tmp_path / "two") == content(tmp_path / "one")
    assert dataset.open_dataset(tmp_path / "two").manifest.splits.train.documents > 1900


def test_turns_by_weight_and_a_limit_are_the_same(tmp_path, corpus):
    texts, lines, table = corpus[0].removeprefix("--sources=").split(",")
    weighed = f"--sources={lines}=1,{table}=2,{texts}=0.5"
    arguments = [weighed, *corpus[1:5], "--max_tokens=15000"]
    assert run(tmp_path / "one", 1, arguments) == [0]
    assert run(tmp_path / "two", 2, arguments) == [0, 0]
    assert content(tmp_path / "one") == content(tmp_path / "two")


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_killed_in_any_group_it_ends_with_the_same_bytes_in_any_other(corpus, alone, tmp_path):
    folder = tmp_path / "data"
    assert run(folder, 1, corpus, (0, 1)) == [9]
    run(folder, 2, corpus, (1, 3))
    assert "resuming" in said(folder)
    for size, fatal in ((3, (0, 5)), (2, (1, 4)), (1, (0, 0))):
        run(folder, size, corpus, fatal)
    assert content(folder) == alone


def test_the_first_bad_record_ends_all_with_one_message(corpus, tmp_path):
    arguments = [word for word in corpus if not word.startswith(("--bad", "--max"))]
    folder = tmp_path / "data"
    processes = []
    for rank in range(2):
        words = (rank, 2, [*arguments, f"--data_dir={folder}"], str(folder))
        processes.append(workers.context.Process(target=work, args=words))
        processes[-1].start()
    processes[0].join(timeout=60)
    processes[1].kill()  # as torchrun does
    processes[1].join(timeout=60)
    assert processes[0].exitcode == 2
    assert "a.jsonl, line 201: not JSON (--bad_records=skip" in said(folder)


# --- the others


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(group, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(group, "DEAD_SECONDS", 0.3)
    monkeypatch.setattr(group, "POLL_SECONDS", 0.01)


def test_a_process_that_no_longer_beats_is_named(tmp_path, quick):
    first, second = (Group(tmp_path, rank, 2, "x") for rank in range(2))
    with first.beating():
        with second.beating():
            for _ in range(60):
                time.sleep(0.01)
                first.check(1)
                second.check(0)
        with pytest.raises(UserError, match=r"process 1 of 2 has shown no sign of life for 0\.3 s"):
            for _ in range(100):
                time.sleep(0.01)
                first.check(1)
        first.wait_for_others()  # returns: they need not be waited for
    assert list(tmp_path.iterdir()) == []


def test_the_dead_are_waited_for_together(tmp_path, quick):
    first = Group(tmp_path, 0, 20, "x")
    with first.beating():
        began = time.monotonic()
        first.wait_for_others()
    assert 0.3 <= time.monotonic() - began < 3.0  # 5.7 one after another


def test_process_0_is_waited_for_until_it_encodes(tmp_path, quick):
    first, second = (Group(tmp_path, rank, 2, "x") for rank in range(2))
    stale = tmp_path / group.FOLDER
    stale.mkdir()
    beat = group.Beat(5, "encoding", "x", ())
    (stale / "0").write_bytes(msgspec.json.encode(beat))  # left over from a killed process
    with pytest.raises(UserError, match="process 0 of 2 has shown no sign of life"):
        second.wait_for_first(lambda: False)
    assert second.wait_for_first(lambda: True) is False
    with first.beating():
        encodes = threading.Timer(0.1, setattr, (first, "stage", "encoding"))
        encodes.start()
        assert second.wait_for_first(lambda: False) is True
        with pytest.raises(UserError, match="started with other settings"):
            Group(tmp_path, 1, 2, "y").wait_for_first(lambda: False)


def test_a_part_that_is_missing_or_damaged_is_noticed(tmp_path, quick):
    """By process 0, which waits for it, with a message that says what to do."""
    path = tmp_path / "part"
    part = parts.Part([], sources.Position(), sources.Position(7), True, None)
    parts.write_part(path, part)
    assert parts.read_part(path) == part
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"part is damaged \(its checksum differs\): remove"):
        parts.read_part(path)


@pytest.fixture
def streams(corpus) -> list[documents.Stream]:
    """One source, of one unit."""
    reading = documents.Reading("text", "text", "skip", Validation(0.0, 0, math.inf, math.inf))
    _, lines, _ = corpus[0].removeprefix("--sources=").split(",")
    return documents.open_streams((lines,), (), reading)


def nothing(stream: documents.Stream) -> Iterator[encoding.Encoded]:
    return iter(())


def unreadable(stream: documents.Stream) -> Iterator[encoding.Encoded]:
    raise UserError("no package to read this")
    yield


def test_what_could_not_be_read_is_tried_again_by_the_next_run(streams, tmp_path, quick):
    first = Group(tmp_path, 0, 2, "x")
    with first.beating(), pytest.raises(UserError, match="no package"):
        next(parts.Parts(tmp_path / "parts", first, streams, (), unreadable).merged(streams[0]))
    with first.beating():
        made = parts.Parts(tmp_path / "parts", first, streams, (), nothing)
        assert list(made.merged(streams[0])) == []


@pytest.mark.parametrize("name", ["1", ""])  # it may die between making and writing its claim
def test_a_dead_process_ends_process_0_with_a_line(streams, tmp_path, quick, name):
    """If it was encoding something; without torchrun nobody else ends the others."""
    first = Group(tmp_path, 0, 2, "x")
    with first.beating():
        made = parts.Parts(tmp_path / "parts", first, streams, (), nothing)
        made.claim_path(0, 0).write_text(name)
        with pytest.raises(UserError, match="process 1 of 2 has shown no sign of life"):
            next(made.merged(streams[0]))


@pytest.mark.parametrize("removed", ["all", "parts"])
def test_the_others_end_with_a_line_when_process_0_has_ended(streams, tmp_path, quick, removed):
    """It removes the folder of parts first, and then its own."""
    first, second = (Group(tmp_path, rank, 2, "x") for rank in range(2))

    def ended(stream: documents.Stream) -> Iterator[encoding.Encoded]:
        shutil.rmtree(tmp_path / "parts")
        if removed == "all":
            shutil.rmtree(first.folder)
        return iter(())

    first.folder.mkdir()
    first.units = [0]
    first.beat()
    made = parts.Parts(tmp_path / "parts", second, streams, (), ended)
    with pytest.raises(UserError, match="process 0 has ended"):
        made.help()
    assert not (tmp_path / "parts").exists()


def test_process_0_whose_beat_cannot_be_read_decides_nothing(streams, tmp_path, quick):
    second = Group(tmp_path, 1, 2, "x")
    second.folder.mkdir()
    made = parts.Parts(tmp_path / "parts", second, streams, (), nothing)
    assert made.work() is False
    with pytest.raises(UserError, match="process 0 of 2 has shown no sign of life"):
        made.help()


def test_a_part_may_be_removed_while_another_process_looks_for_it(streams, tmp_path, monkeypatch):
    """Process 0 has then put all of its unit in place."""
    first = Group(tmp_path, 0, 2, "x")
    with first.beating():
        made = parts.Parts(tmp_path / "parts", first, streams, (), nothing)
        assert made.work()
        made.claim_path(0, 0).unlink()
        made.jobs[0] = parts.Job(streams[0], made.jobs[0].units)
        really_read = parts.read_part

        def read(path: Path) -> parts.Part:
            path.unlink()
            return really_read(path)

        monkeypatch.setattr(parts, "read_part", read)
        assert made.work() is False


def test_without_the_others_process_0_encodes_everything(corpus, alone, tmp_path):
    folder = tmp_path / "data"
    words = (0, 2, [*corpus, f"--data_dir={folder}"], str(folder))
    process = workers.context.Process(target=lonely, args=words)
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0 and content(folder) == alone


def lonely(*arguments) -> None:
    LIMITS["DEAD_SECONDS"] = 0.5
    work(*arguments)
