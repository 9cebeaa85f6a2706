"""Where texts may be cut, and that the longest runs take seconds to learn and to encode."""

import random
import time

import numpy as np
import pytest

from plaingpt.text import cutting
from plaingpt.text.cutting import BORDER, LONGEST_RUN, cut_runs, in_pieces
from plaingpt.text.tokenizer import Tokenizer

SIGNS = ["\n", "\n\n", "  ", "\t", "'s", "'", "_", "x²", "Ⅷ", "日本", "。", "、", "！", "（"]
SIGNS += ["é", "5", "٣", "-", "\x1c", "\u3000", "\u200b", "…", "“", "।", "،", "e\u0301", "\0", "A1"]


def odd_text(length: int, seed: int = 1) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(SIGNS) + rng.choice(["", "a", " b", "12"]) for _ in range(length))


@pytest.mark.parametrize("digits", [False, True])
def test_a_cut_at_any_border_changes_no_id(digits):
    text = odd_text(700)
    trained = Tokenizer.train([text * 3], 1500)
    tokenizer = Tokenizer(trained.ranks, digits=digits)
    ids = tokenizer.encode(text)
    borders = [border.start() for border in BORDER.finditer(text)]
    assert len(borders) > 500
    for border in borders:
        assert tokenizer.encode(text[:border]) + tokenizer.encode(text[border:]) == ids


def test_ordinary_text_is_not_cut(tiny_text):
    chinese = "他说：“今天下雨，路上没有人。”" * 1000
    base64, hexadecimal = "data:" + "QUJD+/9a" * 2000, "0123456789abcdef" * 1000
    longest = "ab" + " " + "x" * (LONGEST_RUN - 1) + " ab"
    for text in ("", "x", tiny_text * 5, base64, hexadecimal, chinese, longest):
        assert cut_runs(text) == [text]


def test_a_long_run_is_cut_at_multiples_of_the_longest_from_its_beginning():
    run = "x" * (2 * LONGEST_RUN + 5)
    text = "ab " + run + " cd"
    first, second, third = cut_runs(text)
    assert first == "ab" + " " + "x" * (LONGEST_RUN - 1)  # the run begins with its space
    assert len(second) == LONGEST_RUN and third == "x" * 6 + " cd"


def test_a_text_is_cut_alike_in_pieces_and_whole(monkeypatch):
    monkeypatch.setattr(cutting, "LONGEST_RUN", 40)
    rng = random.Random(2)
    for _ in range(300):
        runs = [rng.choice("a \n0é😀,") * rng.randint(1, 200) for _ in range(rng.randint(1, 9))]
        text = "".join(runs)
        whole = cut_runs(text)
        assert "".join(whole) == text
        size = rng.randint(40, 300)
        monkeypatch.setattr(cutting, "BLOCK", size)
        pieces = list(in_pieces(text[at : at + size] for at in range(0, len(text), size)))
        again = [part for piece in pieces for part in cut_runs(piece)]
        assert "".join(again) == text

        def cuts(parts):
            return set(np.cumsum([len(part) for part in parts]).tolist())

        borders = {border.start() for border in BORDER.finditer(text)} | {len(text)}
        assert cuts(whole) <= cuts(again) <= cuts(whole) | borders
        assert max(map(len, pieces)) <= 2 * size + 40


RUNS = {
    "blanks": " ",
    "line ends": "\n",
    "zeros": "\0",
    "letters": "a",
    "accents": "\u0301",
    "families": "👩\u200d",
    "digits": "7",
}


@pytest.mark.parametrize("kind", RUNS)
def test_two_million_equal_characters_are_learnt_and_encoded_in_seconds(kind):
    text = "before " + RUNS[kind] * (2_000_000 // len(RUNS[kind])) + "x after"
    began = time.monotonic()
    tokenizer = Tokenizer.train([text], 300)
    ids, ends = tokenizer.encode_joined([text, "next"])
    assert time.monotonic() - began < 10
    assert ids[: ends[0] - 1].tolist() == tokenizer.encode(text)
    assert tokenizer.decode(ids[: ends[0] - 1].tolist()) == text
    assert len(ids) < len(text) / 10
