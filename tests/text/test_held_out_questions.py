"""Which questions a split asks, and their answers."""

import numpy as np
import pytest
from conftest import split_of, write_shard

from plaingpt.text.questions import questions
from plaingpt.text.tokenizer import Tokenizer

BYTES = Tokenizer.bytes()
EOT = BYTES.eot_id


def split(tmp_path, ids: list[int], mask: list[int]):
    write_shard(tmp_path / "val_000000.bin", np.array(ids))
    (tmp_path / "val_000000.mask.bin").write_bytes(bytes(mask))
    return split_of(tmp_path, "val", 257)


def talks(tmp_path, texts: list[tuple[str, str]]):
    """A split of questions, which do not count in the loss, and answers, which do."""
    ids, mask = [], []
    for question, answer in texts:
        ids += [*question.encode(), *answer.encode(), EOT]
        mask += [0] * len(question) + [1] * (len(answer) + 1)
    return split(tmp_path, ids, mask)


def test_each_question_has_its_own_answer(tmp_path):
    ids = [1, 2, 3, EOT, 4, 5, EOT, 9, 6, 7, EOT, 8, EOT]
    mask = [0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0, 0]
    pairs = list(questions(split(tmp_path, ids, mask), BYTES))
    assert pairs == [([1, 2], [3]), ([4], [5]), ([6], [7])]


def test_a_text_that_counts_from_its_start_asks_nothing(tmp_path):
    told = [("", "a text that counts"), *((f"Ask {n}?", "Yes." * n) for n in range(1, 4))]
    found = [
        (BYTES.decode(question), BYTES.decode(answer))
        for question, answer in questions(talks(tmp_path, told), BYTES)
    ]
    assert found == told[1:]


@pytest.mark.parametrize("end, asked", [(6, []), (7, ["Ask 1?"]), (15, ["Ask 1?"])])
def test_a_question_whose_answer_is_beyond_the_end_is_left_out(tmp_path, end, asked):
    held_out = talks(tmp_path, [("Ask 1?", "No."), ("Ask 2?", "No.")])  # 10 tokens each
    assert [BYTES.decode(ids) for ids, _ in questions(held_out, BYTES, end)] == asked


def test_text_without_questions_has_none(tmp_path):
    assert list(questions(talks(tmp_path, [("", "only text")]), BYTES)) == []
    (tmp_path / "val_000000.mask.bin").unlink()
    assert list(questions(split_of(tmp_path, "val", 257), BYTES)) == []
