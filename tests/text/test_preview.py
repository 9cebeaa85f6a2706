"""What the first look at a source says, before anything is written."""

import json
import os
import shlex
import sys
import zipfile

import pytest

import prepare
from plaingpt.text.text_files import codec_of

MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
ALPACA = {"instruction": "Add.", "input": "", "output": "3"}
SYNTH = {"query": "Why?", "synthetic_reasoning": "", "synthetic_answer": "So."}


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """`say(*arguments)` runs prepare.py in a folder of its own and returns its last line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = prepare.main([*arguments, "--tokenizer=bytes"])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert (status == 0) == any(tmp_path.glob("data/*"))
        return (out if status == 0 else err).splitlines()[-1]

    return run


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_a_csv_with_another_separator_is_recognized(say, tmp_path):
    for mark in (";", "\t"):
        (tmp_path / "a.csv").write_text(f"title{mark}body\nA{mark}Some text.\n")
        assert f"its separator seems to be {mark!r}, but only commas" in say("--sources=a.csv")


@pytest.mark.parametrize(
    ("record", "given", "wanted"),
    [
        (ALPACA, (), "--template=alpaca"),
        (SYNTH, (), "--template=synth"),
        ({"messages": MESSAGES}, (), "--template=chat"),
        ({"conversations": MESSAGES, "id": "7"}, (), "--template=chat"),
        (ALPACA, ("--template=chat",), "--template=alpaca"),
        ({"messages": MESSAGES}, ("--template=synth",), "--template=chat"),
        ({"id": 7, "body": "Some text."}, (), "--template=text --text_field=body"),
        ({"text": "Some."}, ("--template=chat",), "--template=text --text_field=text"),
        ({"text": "Some."}, ("--text_field=txt",), "--template=text --text_field=text"),
    ],
)
@pytest.mark.parametrize("bad_records", ["refuse", "skip"])
def test_records_of_another_template_are_recognized(
    say, tmp_path, record, given, wanted, bad_records
):
    write_jsonl(tmp_path / "my tasks.jsonl", [record] * 3)
    line = say("--sources=my tasks.jsonl", f"--bad_records={bad_records}", *given)
    fields = ", ".join(map(repr, record))
    assert "my tasks.jsonl, line 1: no " in line and f"(its fields: {fields})" in line
    assert line.endswith(f"; use {wanted}")
    settings = ("--data_dir=data/tasks", *shlex.split(wanted))
    assert say("--sources=my tasks.jsonl", *settings).startswith("wrote data/tasks")


def test_fields_that_fit_nothing_are_listed(say, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"n": 1, "m": [2]}])
    assert say("--sources=a.jsonl").endswith("no field 'text' (its fields: 'n', 'm')")
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "Why?", "completion": "So."}])
    assert "choose one with --text_field, or rename question" in say("--sources=a.jsonl")


def test_bad_records_are_passed_over_if_a_good_one_comes(say, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": " \n"}, 3, {"text": "good"}, {"text": "more"}])
    assert "line 1: empty (--bad_records=skip leaves" in say("--sources=a.jsonl")
    assert say("--sources=a.jsonl", "--bad_records=skip").startswith("wrote ")


def test_records_that_are_all_bad_are_refused_even_if_bad_ones_are_skipped(say, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": ""}, 3])
    line = say("--sources=a.jsonl", "--bad_records=skip")
    assert "'a.jsonl' has no good record among its first 2; " in line and "line 1: empty" in line


NOTHING = {
    "blank.txt": b" \n\t\r\n" * 99,
    "empty.txt": b"",
    "empty.jsonl": b"\n\n",
    "empty.json": b"[]",
    "header.csv": b"text,n\n",
}


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("beside", [False, True])
def test_a_source_without_text_is_refused(say, tmp_path, name, beside):
    (tmp_path / name).write_bytes(NOTHING[name])
    (tmp_path / "good.txt").write_text("some text\n" * 9)
    line = say("--sources=" + "good.txt," * beside + name)
    assert line.startswith(f"error: there is no text in source '{name}': it ")


FOREIGN = {
    "utf16.txt": ("ab\ncd".encode("utf-16"), "not UTF-8, but UTF-16: convert it"),
    "utf16le.txt": ("Some text of Windows\r\n".encode("utf-16-le"), "not UTF-8, but UTF-16"),
    "utf32.txt": ("Some text.".encode("utf-32"), "not UTF-8, but UTF-32: convert it"),
    "utf16.csv": ("text\nx\n".encode("utf-16"), "not UTF-8, but UTF-16"),
    "utf16.jsonl": ('{"text": "x"}\n'.encode("utf-16-be"), "not UTF-8, but UTF-16"),
    "paper.txt": (b"%PDF-1.7\n%\xe2\xe3", "not text, but a PDF: extract its text"),
    "picture.txt": (b"\x89PNG\r\n\x1a\n", "not text, but an image"),
    "packed.txt": (b"\x1f\x8b\x08\x00", "not text, but compressed: its name must end with .gz"),
    "program.txt": (
        b"\x7fELF\2\1\0\0\xff",
        "is not UTF-8: byte 0xff at 8; it seems to be a binary file",
    ),
    "latin.txt": ("café".encode("latin-1"), "is not UTF-8: byte 0xe9 at 3; convert it"),
    "latin.json": ('[{"text": "café"}]'.encode("latin-1"), "byte 0xe9 at 14; convert it"),
    "latin.jsonl": ('{"text": "é"}\n'.encode("latin-1") * 2, "line 1: not UTF-8: convert it"),
    "commas.jsonl": (b'{"text": "x"},\r\n' * 2, "line 1: not JSON: a comma ends the line"),
    "plain.txt.gz": (b"just text", "is damaged, or not compressed as its name says"),
    "plain.jsonl.gz": (b'{"text": "x"}', "is damaged, or not compressed as its name says"),
    "pretty.json": (b'{\n "text": "x"\n}\n', "begins with a JSON object over several lines"),
    "pretty.jsonl": (b'{\n "text": "x"\n}\n{', "begins with a JSON object over several lines"),
    "twins.csv": (b"text,,,text\nx,,,y\n", "has two columns 'text': rename or remove one"),
    "quote.csv": (b'text\n"never closed\n1\n2\n3\n', "line 2: a quote that opens in this record"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_that_is_not_what_it_seems_is_refused(say, tmp_path, name):
    content, said = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    line = say(f"--sources={name}", "--bad_records=skip")
    assert name in line and said in line


def test_a_quote_that_is_never_closed_takes_nothing_in(say, tmp_path):
    (tmp_path / "a.csv").write_text('text\none\ntwo\n"three\nfour\nfive\n')
    line = say("--sources=a.csv", "--bad_records=skip")
    assert "a.csv, line 4: a quote that opens in this record is never closed" in line


def test_other_kinds_of_files_are_told_what_to_do(say, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "novel.docx", "w") as file:
        file.writestr("word/document.xml", "<w:t>text</w:t>")
    (tmp_path / "scans").mkdir()
    for name in ("1.pdf", "2.pdf", "3.png"):
        (tmp_path / "scans" / name).write_bytes(b"\0")
    assert "'novel.docx' is of an unsupported kind: only .csv" in say("--sources=novel.docx")
    line = say("--sources=scans")
    assert "matches 2 .pdf, 1 .png, but no file of these kinds: .csv" in line
    assert "convert them to one of these, plain text with names that end in .txt" in line
    (tmp_path / "scans" / "4.py").write_text("x = 1\n" * 9)
    (tmp_path / "scans" / "5.c").write_text("int x;\n" * 9)
    (tmp_path / "scans" / "6.py").write_text("x = 2\n" * 9)
    assert "other text needs a pattern, such as 'scans/**/*.py'" in say("--sources=scans")
    assert prepare.main(["--sources=scans/**/*.py", "--tokenizer=bytes", "--data_dir=code"]) == 0
    assert "2 documents" in capsys.readouterr().out
    for name in ("4.py", "5.c", "6.py"):
        (tmp_path / "scans" / name).unlink()
    assert "no file of these kinds: .csv, .json, .jsonl, .parquet, .py" in say("--sources=*.py")
    (tmp_path / "scans" / "4.txt").write_text("some text\n" * 9)
    assert prepare.main(["--sources=scans", "--tokenizer=bytes"]) == 0
    out, err = capsys.readouterr()
    wanted = "3: a file of an unsupported kind (the first: "
    assert f"scans: left out {wanted}" in err and f"skipped {wanted}" in out


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nvoel.txt", "did you mean 'novel.txt'?"),
        ("txets/novel.txt", "matches no file"),
        ("texts/novle.txt", "did you mean 'texts/novel.txt'?"),
        ("stdlbi", "did you mean 'stdlib'?"),
        ("roneneldan/TinyStories", "for a dataset on the hub, write hf:roneneldan/TinyStories"),
        ("https://example.com/novel.txt", "download it first, or write hf:"),
        ("novel.txt,novel.txt", "source 'novel.txt' is given twice"),
        ("hf:own/er,hf:own/er", "source 'hf:own/er' is given twice"),
    ],
)
def test_a_source_that_leads_nowhere_names_the_closest(say, tmp_path, source, said):
    (tmp_path / "texts").mkdir()
    for folder in (tmp_path, tmp_path / "texts"):
        (folder / "novel.txt").write_text("text")
    line = say(f"--sources={source}")
    assert said in line and line.count("did you mean") == said.count("did you mean")


def test_a_codec_that_is_missing_is_named(say, tmp_path, monkeypatch):
    for name, package in (("a.txt.zst", "backports.zstd"), ("a.jsonl.lz4", "lz4")):
        if not (codec := codec_of(name)).startswith(package):  # Python 3.14 has zstd
            continue
        monkeypatch.setitem(sys.modules, codec, None)
        (tmp_path / name).write_bytes(b"text")
        said = say(f"--sources={name}")
        assert f"{name} needs a package: pip install {package}" in said and "reading" in said


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
def test_only_files_are_read(say, tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for name, to in (
        ("loop.txt", "loop.txt"),
        ("gone.txt", "nowhere.txt"),
        ("zero.txt", "/dev/zero"),
    ):
        (tmp_path / name).symlink_to(to)
    for name in ("pipe.txt", "loop.txt", "gone.txt", "zero.txt", "/dev/zero"):
        assert say(f"--sources={name}").endswith(
            "is not a file but a pipe, a device or a broken link"
        )
    assert "but no file of these kinds" in say(f"--sources={tmp_path}")


def test_a_template_for_text_files_is_mentioned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text\n" * 9)
    write_jsonl(tmp_path / "b.jsonl", [ALPACA])
    for sources, said in (("a.txt", True), ("a.txt,b.jsonl", False)):
        arguments = [
            f"--sources={sources}",
            "--template=alpaca",
            "--tokenizer=bytes",
            "--overwrite",
        ]
        assert prepare.main(arguments) == 0
        assert ("--template=alpaca is for records" in capsys.readouterr().err) == said


def test_a_share_to_validate_on_beside_sources_for_it_is_refused(say, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"the text of {name}\n" * 9)
    sources = ("--sources=a.txt", "--val_sources=b.txt")
    assert "val_fraction does not combine with val_sources: leave it out" in say(
        *sources, "--val_fraction=0.1"
    )
    assert say(*sources, "--val_fraction=0").startswith("wrote ")
