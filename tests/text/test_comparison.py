"""prepare.py --inspect with a text: tokens between bars, ids below, one tokenizer after another."""

import pytest

import prepare
from plaingpt.text.comparison import compare, lines_of, visible
from plaingpt.text.tokenizer import Tokenizer


@pytest.fixture
def run(tmp_path, tiny_text):
    """A folder with a trained tokenizer, and one with bytes."""
    Tokenizer.train([tiny_text], 400).save(tmp_path)
    return tmp_path


def test_tokens_stand_between_bars_above_their_ids(capsys):
    compare("a b\n", {"mine": Tokenizer.bytes()})
    assert capsys.readouterr().out.splitlines() == [
        "mine, 257 ids: 4 tokens, 1.00 bytes per token",
        "│a │· │b │↵ │",
        "│97│32│98│10│",
    ]


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (b" the", "·the"),
        (b"\n\t ", "↵→·"),
        ("é日".encode(), "é日"),
        ("é".encode()[:1], r"\xc3"),
        (b"\r\x00", r"\r\x00"),
        ("\u200b".encode(), r"\u200b"),
    ],
)
def test_every_token_can_be_seen(token, shown):
    assert visible(token) == shown


def test_lines_fit_the_terminal_and_lose_no_token(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    text = b"abcdefghijklmnop"
    lines = list(lines_of(list(text), Tokenizer.bytes()))
    assert all(16 < len(line) <= 20 for line in lines[:-2])
    above, below = ("".join(each).split("│") for each in (lines[::2], lines[1::2]))
    assert "".join(above).replace(" ", "").encode() == text
    assert bytes(int(number) for number in below if number) == text


def test_tokenizers_are_compared_on_one_text(run, capsys):
    """The tokenizers of a data folder (bpe), of bytes and of a folder, each with its figures."""
    arguments = [f"--data_dir={run}", f"--tokenizer=bpe,bytes,{run}/tokenizer.json"]
    (run / "val_000000.bin").write_bytes(b"")  # all that makes it a data folder
    assert prepare.main([f"--inspect={'bakolin ' * 5}", *arguments]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if " ids: " in line]
    trained = Tokenizer.load(run)
    count = len(trained.encode("bakolin " * 5))
    words = f"400 ids: {count} tokens, {40 / count:.2f} bytes per token"
    assert count < 40 and heads == [
        f"{run}, {words}",
        "bytes, 257 ids: 40 tokens, 1.00 bytes per token",
        f"{run}/tokenizer.json, {words}",
    ]


def test_a_text_may_come_from_a_file_and_only_its_beginning_is_shown(tmp_path, capsys):
    (tmp_path / "long.txt").write_text("x" * 1000)
    assert prepare.main([f"--inspect=FILE:{tmp_path}/long.txt", "--tokenizer=bytes"]) == 0
    out = capsys.readouterr().out
    assert "1,000 tokens" in out and out.count("120│") == 300
    assert out.endswith("… and 700 more tokens\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--inspect=no/folder"], "error: there is no data in no/folder; "),
        (["--inspect=FILE:", "--tokenizer=bytes"], "--inspect=FILE:prompt.txt"),
        (["--inspect=FILE:none.txt", "--tokenizer=bytes"], "none.txt"),
        (["--inspect=some text"], "error: there is no data in data/stdlib; python prepare.py"),
        (["--inspect=some text", "--tokenizer=bytes,bites"], "tokenizer='bites' is not bpe"),
        (["--inspect=some \udcff", "--tokenizer=bytes"], "error: inspect is not UTF-8"),
    ],
)
def test_what_cannot_be_shown_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert prepare.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1] and sum(line.startswith("error: ") for line in lines) == 1
    assert list(tmp_path.iterdir()) == []
