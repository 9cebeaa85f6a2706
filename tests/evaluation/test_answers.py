"""Answers are compared as for SQuAD, and as sacrebleu does."""

import json

import pytest
import sacrebleu

import configurator
from plaingpt.evaluation.answers import Answer, corpus_figures, f1, read_answers, words

PAIRS = [
    ("The cat sat on the mat, and it purred.", "A cat sat on the mat and purred."),
    ("It is\nblue.", "The sky is blue today, is it not?"),
    ("", "nothing"),
]
ANSWERS = [Answer("?", reference, given) for given, reference in PAIRS]


def test_words_are_compared_as_for_squad():
    assert words("The  Cat, a dog; an-d\nthem!") == ["cat", "dog", "and", "them"]
    assert f1(["x", "y"], ["y", "z", "y"]) == pytest.approx(2 * 1 / 5)
    assert f1(["y", "y"], ["y"]) == pytest.approx(2 / 3)
    assert f1([], []) == 1.0 and f1([], ["x"]) == 0.0
    assert Answer("?", "The sky.", "sky").exact and not Answer("?", "sky", "the sea").exact


def test_bleu_and_chrf_are_those_of_sacrebleu():
    figures, signatures = corpus_figures(ANSWERS)
    given, references = [each[0] for each in PAIRS], [[each[1] for each in PAIRS]]
    assert figures["bleu"] == sacrebleu.corpus_bleu(given, references).score > 10
    assert figures["chrf"] == sacrebleu.corpus_chrf(given, references).score > 10
    for part in ("tok:13a", "smooth:exp", "nc:6", "nw:0", f"version:{sacrebleu.__version__}"):
        assert part in signatures


def test_answers_are_read_back_with_their_lines(tmp_path):
    path = tmp_path / "answers.jsonl"
    lines = [json.dumps(each.scored()) for each in ANSWERS]
    path.write_text("\n\n".join(lines))
    places = [f"{path}, line {number}" for number in (1, 3, 5)]
    assert read_answers(str(path)) == list(zip(places, ANSWERS))
    path.write_text(f"{lines[0]}\n{lines[1][:-1]}\n")
    with pytest.raises(configurator.UserError, match="line 2: not JSON"):
        read_answers(str(path))
