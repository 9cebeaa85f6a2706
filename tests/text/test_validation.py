"""What is held out for validation, and when validation is full."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from plaingpt.text.sources import find_source
from plaingpt.text.validation import Validation

VALIDATION = Validation(fraction=0.25, seed=1, max_tokens=math.inf, max_documents=math.inf)


@pytest.fixture
def source(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02d}.txt").write_text("word " * 20)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    return find_source(str(tmp_path))


def test_files_that_are_held_out_come_first(source):
    reordered, held_out = VALIDATION.hold_out_part(source)
    assert set(reordered.files) == set(source.files)
    assert len(held_out.files) == 10
    assert set(reordered.files[:10]) == held_out.files


@pytest.mark.parametrize(("others", "held"), [(["a.jsonl"], 20), (["a.txt"], 60)])
def test_of_texts_that_are_too_large_the_smallest_is_cut(tmp_path, others, held):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "a.txt").write_text("a word\n" * 160)
    (tmp_path / "b.txt").write_text("a word\n" * 80)
    found = find_source(f"{tmp_path}/[ab].*")
    wanted = {*others, "b.txt"}
    files = tuple(file for file in found.files if Path(file.path).name in wanted)
    source, held_out = VALIDATION.hold_out_part(replace(found, files=files))
    val, other, train = source.files
    assert held_out.files == {val} and other.path.endswith(others[0])
    assert ["".join(file.pieces()).count("word") for file in (val, train)] == [held, 80 - held]


def test_a_validation_source_is_held_out_entirely(source):
    same, held_out = VALIDATION.hold_out_all(source)
    assert same == source and held_out.files == set(source.files)
    digests = np.full(8, 2**64 - 1, np.uint64)
    assert held_out.has_records(np.arange(1, 9), digests).all()


def test_records_are_held_out_by_digest_and_the_second_always(source):
    _, held_out = VALIDATION.hold_out_part(source)
    digests = np.array([0, 2**62 - 1, 2**62, 2**64 - 1], np.uint64)
    assert held_out.has_records(np.full(4, 3), digests).tolist() == [True, True, False, False]
    assert held_out.has_records(np.full(4, 2), digests).all()


def test_a_fraction_of_0_holds_out_nothing(source):
    same, held_out = replace(VALIDATION, fraction=0.0).hold_out_part(source)
    assert same == source and not held_out.files
    assert not held_out.has_records(np.arange(1, 9), np.zeros(8, np.uint64)).any()


def test_validation_is_full_at_either_limit():
    limited = replace(VALIDATION, max_tokens=100, max_documents=5)
    assert not limited.is_full(99, 4) and limited.is_full(100, 0) and limited.is_full(0, 5)
    assert not VALIDATION.is_full(10**12, 10**12)
