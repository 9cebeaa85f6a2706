"""Ids to text, one by one."""

import random

import pytest
from test_tokenizer import TEXTS, bpe, tokenizer  # noqa: F401

from plaingpt.text.spelling import Speller
from plaingpt.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()


def spelled(tokenizer, ids, stop=(), silent=frozenset()) -> list[str]:  # noqa: F811
    ids, speller = list(ids), Speller(tokenizer, stop, silent)
    return [speller.text(token, final=n == len(ids)) for n, token in enumerate(ids, start=1)]


def test_pieces_are_the_text_and_whole_characters(tokenizer):  # noqa: F811
    for text in TEXTS:
        pieces = spelled(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == text
        assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_any_ids_spell_what_they_decode_to(tokenizer):  # noqa: F811
    rng = random.Random(0)
    ids = [each for each in range(tokenizer.vocab_size) if each != tokenizer.eot_id]
    for _ in range(200):
        drawn = rng.choices(ids, k=rng.randint(1, 30))
        assert "".join(spelled(tokenizer, drawn)) == tokenizer.decode(drawn)


def test_a_character_comes_with_its_last_byte():
    assert spelled(BYTES, "aé😀".encode()) == ["a", "", "é", "", "", "", "😀"]
    assert spelled(BYTES, b"a\xf0\x9f") == ["a", "", "\ufffd"]


@pytest.mark.parametrize(
    ("stop", "pieces"),
    [
        (["xyz"], ["o", "n", "e", "\n", "t", "w", "o", "\n", "\n"]),
        (["two"], ["o", "n", "e", "\n", "", "", "", "", ""]),
        (["\n\n"], ["o", "n", "e", "", "\nt", "w", "o", "", ""]),
        (["\n\n", "o\n"], ["", "on", "e", "", "\nt", "w", "", "", ""]),
        (["o\nx"], ["", "on", "e", "\n", "t", "w", "", "", "o\n\n"]),  # only its beginning
        (["one\ntwo\n\nx"], [""] * 8 + ["one\ntwo\n\n"]),
    ],
)
def test_a_stop_string_ends_the_text_before_it(stop, pieces):
    assert spelled(BYTES, b"one\ntwo\n\n", tuple(stop)) == pieces


def test_silent_tokens_and_the_end_of_text_have_no_text():
    assert spelled(BYTES, [97, 256, 98, 99], silent=frozenset({98})) == ["a", "", "", "c"]
