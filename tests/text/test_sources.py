"""What a source string finds, and what each kind of file yields, intact or damaged."""

import bz2
import csv
import gzip
import json
import lzma
import os
import random
import socket
import threading
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import prepare
from configurator import UserError
from plaingpt.text import cutting, network, text_files, tokenizer
from plaingpt.text import hub as hub_module
from plaingpt.text.records import BATCH, Row
from plaingpt.text.sources import Position, find_source
from plaingpt.text.text_files import CONVERT, TextFile
from plaingpt.text.tokenizer import Tokenizer

RECORDS = [{"text": "One — é 😀\nsecond line", "n": 1}, {"text": "Two", "n": 2}]


def parquet(path, records):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)


def write(path, records):
    """Write `records` in the format of the file name's suffix."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    name = path.name
    if name.endswith(".parquet"):
        parquet(path, records)
    elif name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    elif name.endswith(".json"):
        path.write_text(json.dumps(records))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".bz2"):
        path.write_bytes(bz2.compress(lines.encode()))
    elif name.endswith(".xz"):
        path.write_bytes(lzma.compress(lines.encode()))
    else:
        path.write_text(lines)
    return str(path)


def items(text, start=None):
    return [item for item, _ in find_source(text).items(start or Position())]


KINDS = ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.jsonl.bz2", "a.json.xz"]


@pytest.mark.parametrize("name", KINDS)
def test_records_of_every_kind_of_file(tmp_path, name):
    rows = items(write(tmp_path / name, RECORDS))
    assert [row.value["text"] for row in rows] == [record["text"] for record in RECORDS]
    assert [int(row.value["n"]) for row in rows] == [1, 2]
    assert all(str(tmp_path / name) in row.where and row.problem is None for row in rows)


@pytest.mark.parametrize("name", KINDS)
def test_reading_resumes_after_any_item(tmp_path, name):
    write(tmp_path / name, RECORDS)
    write(tmp_path / f"b{name}", RECORDS)
    (tmp_path / "c.txt").write_text("text")
    everything = list(find_source(str(tmp_path)).items(Position()))
    assert len(everything) == 5
    for number, (_, position) in enumerate(everything):
        assert items(str(tmp_path), position) == [item for item, _ in everything[number + 1 :]]


def test_the_bytes_read_never_exceed_the_size(tmp_path):
    for name in KINDS:
        write(tmp_path / name, RECORDS)
    source = find_source(str(tmp_path))
    read = [position.read for _, position in source.items(Position())]
    assert read == sorted(read) and 0 < read[-1] <= source.size


def test_a_json_file_may_hold_a_record_a_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"text": "x"}\n\n{"text": "y"}\n')
    assert [row.value["text"] for row in items(str(path))] == ["x", "y"]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_may_be_called_jsonl(tmp_path, indent):
    (tmp_path / "a.jsonl").write_text(json.dumps(RECORDS, indent=indent))
    assert [row.value for row in items(f"{tmp_path}/a.jsonl")] == RECORDS


def test_the_name_of_a_compressed_file_is_only_a_name(tmp_path):
    (tmp_path / "a::b*.TXT.GZ").write_bytes(gzip.compress(b"text"))
    (text,) = items(str(tmp_path))
    assert "".join(text.pieces()) == "text"


def test_zstandard_frames_are_read_to_the_last(tmp_path):
    zstd = pytest.importorskip(text_files.codec_of("a.zst"))
    frames = b"".join(zstd.compress(b'{"text": "x"}\n' * 999) for _ in range(2))
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert len(items(f"{tmp_path}/a.jsonl.zst")) == 2 * 999
    (tmp_path / "b.txt.zst").write_bytes(frames[:-9])
    (text,) = items(f"{tmp_path}/b.txt.zst")
    with pytest.raises(UserError, match=r"b\.txt\.zst is damaged"):
        list(text.pieces())


@pytest.mark.parametrize("error", [MemoryError(), PermissionError(13, "Permission denied")])
def test_a_compressed_file_is_not_damaged_if_something_else_fails(tmp_path, monkeypatch, error):
    path = write(tmp_path / "a.jsonl.gz", RECORDS)

    def fail(*_):
        raise error

    monkeypatch.setattr(gzip, "open", fail)
    with pytest.raises(type(error)):
        items(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_line_without_end_does_not_fill_the_memory(tmp_path, monkeypatch, name):
    for module in ("text_files", "records"):
        monkeypatch.setattr(f"plaingpt.text.{module}.MAX_LINE", 1 << 20)
    monkeypatch.setattr(cutting, "BLOCK", 1 << 16)
    path = write(tmp_path / name, [{"text": "x" * 1_000_000}])
    assert len(items(path)) == 1
    write(tmp_path / name, [{"text": "x" * 2_000_000}])
    with pytest.raises(UserError, match=f"{name}.* longer than 1 MiB"):
        items(path)


def test_a_field_with_two_columns_is_refused(tmp_path):
    table = pyarrow.table([["x"], ["y"], [1], [2]], names=["text", "text", "n", "n"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = find_source(f"{tmp_path}/a.parquet")
    with pytest.raises(UserError, match="has two columns 'text'"):
        list(source.items(Position(), ("text",)))


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
def test_hidden_files_are_no_text_of_a_folder(tmp_path):
    for name in ("a.txt", "._a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "b/.c.txt", "b/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = find_source(str(tmp_path))
    assert [Path(file.path).name for file in found.files] == ["a.txt", "d.txt"]
    assert find_source(str(tmp_path / ".ipynb_checkpoints")).files  # asked for


def test_links_that_lead_nowhere_are_counted(tmp_path):
    write(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "b.jsonl").symlink_to("gone")
    assert find_source(str(tmp_path)).others == (f"{tmp_path}/b.jsonl",)


def test_a_malformed_csv_header_is_reported(tmp_path):
    (tmp_path / "a.csv").write_text('"te"xt,n\nx,1\n')
    assert items(f"{tmp_path}/a.csv")[0].problem.startswith("not CSV")


def test_a_byte_order_mark_is_not_text(tmp_path):
    bom = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(bom + b"text")
    (tmp_path / "b.csv").write_bytes(bom + b"text\r\nx\r\n")
    (tmp_path / "c.json").write_bytes(bom + b'[{"text": "y"}]')
    (tmp_path / "d.jsonl").write_bytes(bom + b'{"text": "z"}\n')
    text, *rows = items(str(tmp_path))
    assert "".join(text.pieces()) == "text"
    assert [row.value for row in rows] == [{"text": "x"}, {"text": "y"}, {"text": "z"}]


def test_malformed_records_are_located(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": \n\n"\xff"\n3\n' + b"[" * 100_000)
    (tmp_path / "b.csv").write_text('text,n\nx,1\nx,1,2\n"y""\n z",2\n')
    found = [(row.where.rsplit("/")[-1], row.problem) for row in items(str(tmp_path))]
    assert found == [
        ("a.jsonl, line 1", None),
        ("a.jsonl, line 2", "not JSON"),
        ("a.jsonl, line 4", f"not UTF-8: {CONVERT}"),
        ("a.jsonl, line 5", None),
        ("a.jsonl, line 6", "not JSON"),
        ("b.csv, line 2", None),
        ("b.csv, line 3", "a different number of fields from the header"),
        ("b.csv, line 5", None),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt.gz", gzip.compress(random.Random(0).randbytes(99_999).hex().encode())[:-20]),
        ("a.jsonl.gz", b"no gzip at all"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 1000)[:-9]),
        ("a.json", b'[{"text": 1},'),
        ("a.parquet", b"PAR1 and then nothing"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        for item in items(str(tmp_path / name)):
            if isinstance(item, TextFile):
                list(item.pieces())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("missing.txt", "matches no file of these kinds"),
        ("hf:justaname extra", "write hf:OWNER/NAME"),
        ("stdlib=0", "above 0"),
        ("README.md=-1", "source 'README.md': a weight must be above 0"),
    ],
)
def test_a_source_that_leads_nowhere_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        find_source(text)


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "locked").mkdir()
    really_scan = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return really_scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match="Permission denied: '.*locked'"):
        find_source(str(tmp_path))


def test_weights_and_files_whose_names_look_weighed(tmp_path):
    (tmp_path / "a=0.5").mkdir()
    (tmp_path / "a=0.5" / "b.txt").write_text("x")
    assert find_source(f"{tmp_path}/a=0.5").weight is None
    weighed = find_source(f"{tmp_path}/a=0.5=.25")
    assert weighed.weight == 0.25 and weighed.name == f"{tmp_path}/a=0.5"


# --- long texts


def test_pieces_give_the_ids_of_the_whole(tiny_text, monkeypatch, tmp_path):
    """Cut wherever a boundary comes last, the ids are those of the uncut text."""
    bpe = Tokenizer.train([tiny_text], 1000)
    signs = [
        "\n",
        "\n\n",
        "  ",
        "\t",
        "'s",
        "'",
        "_",
        "x²",
        "日本",
        "é",
        "5",
        "-",
        "\x1c",
        "\u3000",
        "…",
    ]
    rng = random.Random(1)
    odd = "".join(rng.choice(signs) + rng.choice(["", "a", " b", "12"]) for _ in range(20_000))
    for text in (tiny_text, odd, "a" * 5000, " " * 5000, "a b" * 3000):
        (tmp_path / "text.txt").write_bytes(text.encode())
        for size in (64, 1000):
            monkeypatch.setattr(cutting, "BLOCK", size)
            pieces = list(TextFile(str(tmp_path / "text.txt"), 0).pieces())
            blocks = (text[at : at + size] for at in range(0, len(text), size))
            regrouped = list(cutting.in_pieces(blocks))
            assert "".join(pieces) == "".join(regrouped) == text
            for parts in (pieces, regrouped):
                ids = [token for part in parts for token in bpe.encode(part)]
                assert ids == bpe.encode(text)
    assert len(pieces) > 5 and max(map(len, pieces)) < 3000


def test_a_part_of_a_text(tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "BLOCK", 7)
    (tmp_path / "a.txt").write_text("äbc déf ghi jkl", encoding="utf-8")
    for start, stop in ((0, None), (3, None), (0, 8), (5, 9), (0, 0)):
        part = TextFile(str(tmp_path / "a.txt"), 0, start, stop)
        assert "".join(part.pieces()) == "äbc déf ghi jkl"[start:stop]


def test_a_bad_byte_deep_in_a_text_is_located(tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "BLOCK", 10)
    (tmp_path / "a.txt").write_bytes("é".encode() * 17 + b"ab\xff" + b"x" * 50)
    with pytest.raises(ValueError, match="byte 0xff at 36"):
        list(TextFile(str(tmp_path / "a.txt"), 0).pieces())


# --- the hub, from a folder of the same layout: `datasets` opens both with the same call


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    for name, records in {
        "data/train-0.parquet": [{"text": f"train {i}"} for i in range(2500)],
        "data/train-1.parquet": [{"text": f"train {i}"} for i in range(2500, 3000)],
        "data/test-0.parquet": [{"text": "test"}],
        "many/b.parquet": [{"text": "b"}],
        "many/a.parquet": [{"text": "a"}],
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, records)
    (folder / "README.md").write_text("""---
configs:
- config_name: main
  default: true
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
- config_name: many
  data_files:
  - {split: one, path: many/b*}
  - {split: two, path: many/a*}
---
""")
    return folder


def texts(found):
    return [row.value["text"] for row in found]


def test_a_dataset_of_the_hub(hub):
    assert texts(items("hf:owner/name")) == [f"train {i}" for i in range(3000)]
    assert texts(items("hf:owner/name:main@main#test")) == ["test"]
    assert texts(items("hf:owner/name:many")) == ["b", "a"]  # no train: all splits in order


def test_only_the_columns_that_are_wanted_are_read(hub, tmp_path):
    for name in ("train-0", "train-1", "test-0"):
        write(hub / f"data/{name}.parquet", [{"text": "x", "other": "y" * 99}] * 3)
    paths = ("hf:owner/name", str(hub / "data" / "train-0.parquet"))
    for path in paths:
        for fields, wanted in ((("text", "no"), {"text"}), (("no",), {"text", "other"})):
            found = [item.value for item, _ in find_source(path).items(Position(), fields)]
            assert found and all(set(value) == wanted for value in found)


@pytest.mark.parametrize("at", [0, 999, 1000, 2499, 2700, 2999])
def test_a_dataset_of_the_hub_resumes_in_the_middle(hub, at):
    everything = list(find_source("hf:owner/name").items(Position()))
    position = Position(*json.loads(json.dumps(everything[at][1])))  # as progress.json keeps it
    assert texts(items("hf:owner/name", position)) == [f"train {i}" for i in range(at + 1, 3000)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hf:owner/name:nothing", "nothing"),
        ("hf:owner/name#val", "no split 'val', but train, test"),
        ("hf:owner/other", "owner/other"),
    ],
)
def test_what_the_hub_does_not_have(hub, text, said):
    with pytest.raises((ValueError, ConnectionError), match=said):
        items(text)


@pytest.mark.parametrize(
    "sources",
    ["--sources=hf:owner/name#trian", "--sources=a.txt --val_sources=hf:owner/name#trian"],
)
def test_a_misspelt_split_is_said_before_anything_is_written(hub, tmp_path, sources, capsys):
    (tmp_path / "a.txt").write_text("some text")
    assert prepare.main([*sources.split(), "--tokenizer=bytes"]) == 2
    assert "no split 'trian', but train, test" in capsys.readouterr().err
    assert not any(tmp_path.glob("data/*"))


def test_at_the_start_a_connection_is_not_tried_for_minutes(hub, tmp_path, monkeypatch):
    import datasets

    tried = []
    really_open = hub_module.hub_streams

    def opened(*arguments):
        tried.append(datasets.config.STREAMING_READ_MAX_RETRIES)
        return really_open(*arguments)

    monkeypatch.setattr(hub_module, "hub_streams", opened)
    assert prepare.main(["--sources=hf:owner/name", "--tokenizer=bytes"]) == 0
    assert tried == [2, 20]


def test_a_broken_connection_is_explained(hub, monkeypatch):
    import datasets

    def broken():
        yield from ({"text": str(number)} for number in range(BATCH + 5))
        raise ConnectionError("Server Disconnected")

    stream = datasets.IterableDataset.from_generator(broken)
    monkeypatch.setattr(hub_module, "hub_streams", lambda *_: [stream])
    found = find_source("hf:owner/name").items(Position())
    assert next(found)[0] == Row("hf:owner/name, record 1", {"text": "0"})
    with pytest.raises(
        OSError, match=f"record {BATCH}: reading broke off after it .*Disconnected.*resumes"
    ):
        list(found)


# --- no network


@pytest.fixture
def silent_server():
    """The address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_does_not_answer_is_said_at_once(silent_server, monkeypatch, tmp_path, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", silent_server)
    assert network.SECONDS < 8
    monkeypatch.setattr(network, "SECONDS", 0.2)
    began = time.monotonic()
    wanted = ["--sources=hf:own/er", f"--data_dir={tmp_path}/data", "--tokenizer=bytes"]
    assert prepare.main(wanted) == 2
    assert time.monotonic() - began < 5
    assert f"error: no answer from {silent_server} (" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_that_cannot_be_downloaded_is_said_at_once(
    silent_server, monkeypatch, no_gpt2_files
):
    monkeypatch.setattr(tokenizer, "GPT2_URL", f"{silent_server}/vocab.bpe")
    monkeypatch.setattr(network, "SECONDS", 0.2)
    with pytest.raises(UserError, match=f"no answer from {silent_server}.*--tokenizer=bpe or"):
        Tokenizer.gpt2()


@pytest.mark.parametrize("status", ["200 OK", "404 Not Found", "503 Service Unavailable"])
def test_any_answer_is_a_network(status):
    def answer(server):
        connection, _ = server.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode())

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        network.require_answer(f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()
