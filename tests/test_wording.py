"""Counts, sizes, times and values as messages write them."""

import re

import pytest
from test_house import FILES

from plaingpt.wording import byte_size, compact, duration, quantity, shorten, shown


@pytest.mark.parametrize(
    ("number", "noun", "plural", "words"),
    [
        (0, "token", None, "0 tokens"),
        (1, "token", None, "1 token"),
        (2000, "token", None, "2,000 tokens"),
        (1, "process", "processes", "1 process"),
        (2, "process", "processes", "2 processes"),
    ],
)
def test_a_noun_agrees_with_its_number(number, noun, plural, words):
    assert quantity(number, noun, plural) == words


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (12_340_000, "12.3 MB"),
        (6_600_000_000, "6.6 GB"),
        (21e9, "21 GB"),
        (1.5e12, "1.5 TB"),
        (1234e12, "1,234 TB"),
    ],
)
def test_a_size_has_three_digits_and_the_unit_that_suits_it(size, words):
    assert byte_size(size) == words


def test_a_value_is_shown_whatever_it_is():
    class Unshowable:
        def __repr__(self):
            raise OSError("no")

    deep = []
    for _ in range(10**5):
        deep = [deep]
    assert shown("a\nb") == r"'a\nb'"
    assert shown((10**5000,)) == "a value of type tuple"
    assert shown(deep) == "a value of type list"
    assert shown(Unshowable()) == "a value of type Unshowable"
    assert shown("x" * 10**6).startswith("'xxx") and len(shown("x" * 10**6)) < 210


def test_a_line_loses_its_middle_and_its_line_ends():
    assert shorten("one\ntwo\r\nthree\u2028four", 100) == "one two three four"
    assert shorten("0123456789", 10) == "0123456789"
    assert shorten("0123456789x", 10) == "01234 … 6789x"


def test_every_count_in_a_message_agrees_with_its_noun():
    """Whole numbers are written by `quantity`, but for constants, which are in capitals."""
    nouns = (
        "byte|document|epoch|GPU|head|layer|micro-step|question|record|sequence|step|thread|token"
    )
    alone = re.compile(rf"\{{[^{{}}A-Z]+(?<!f)\}} ({nouns})s\b|\(s\)")
    others = FILES.keys() - {"model"}  # whose only message speaks of two tokens or more
    lines = [line for each in others for line in FILES[each].read_text("utf-8").splitlines()]
    assert [line for line in lines if alone.search(line)] == []


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0"),
        (690, "690"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (1e3, "1.00k"),
        (9_994, "9.99k"),
        (9_996, "10.0k"),
        (84_123, "84.1k"),
        (99_960, "100k"),
        (100_000, "100k"),
        (999_400, "999k"),
        (999_600, "1.00M"),
        (2_269_000, "2.27M"),
        (12_345_678, "12.3M"),
        (1e9, "1.00B"),
        (1.5e11, "150B"),
    ],
)
def test_numbers_have_three_digits_and_a_unit(number, text):
    assert compact(number) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (8.4, "8s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (200, "3m20s"),
        (3599.4, "59m59s"),
        (3599.7, "1h00m"),
        (4321, "1h12m"),
        (100 * 3600 + 59 * 60 + 59, "100h59m"),
    ],
)
def test_durations_are_rounded_once(seconds, text):
    assert duration(seconds) == text
