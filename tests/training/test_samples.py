"""The prompts whose continuations show how a run is doing."""

import json

import numpy as np
import pytest
from conftest import split_of, write_shard

import prepare
from model import GPT, GPTConfig
from plaingpt.text.dataset import open_dataset
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training import samples
from plaingpt.training.samples import Prompt, held_out_questions, print_samples

BYTES = Tokenizer.bytes()


def split(tmp_path, talks: list[tuple[str, str]]):
    """A split of questions, which do not count in the loss, and answers, which do."""
    ids, mask = [], []
    for question, answer in talks:
        ids += [*question.encode(), *answer.encode(), BYTES.eot_id]
        mask += [0] * len(question) + [1] * (len(answer) + 1)
    write_shard(tmp_path / "val_000000.bin", np.array(ids))
    (tmp_path / "val_000000.mask.bin").write_bytes(bytes(mask))
    return split_of(tmp_path, "val", 257)


def test_the_first_questions_of_a_split_are_asked(tmp_path):
    talks = [("", "a text that counts"), *((f"Ask {n}?", "Yes." * n) for n in range(1, 6))]
    found = held_out_questions(split(tmp_path, talks), BYTES)
    assert found == [Prompt(f"Ask {n}?", list(f"Ask {n}?".encode())) for n in (1, 2, 3)]


@pytest.mark.parametrize("searched, asked", [(6, []), (7, ["Ask 1?"]), (15, ["Ask 1?"])])
def test_a_question_without_its_answer_is_not_asked(tmp_path, monkeypatch, searched, asked):
    monkeypatch.setattr(samples, "SEARCHED", searched)
    talks = [("Ask 1?", "No."), ("Ask 2?", "No.")]  # 10 tokens each
    found = held_out_questions(split(tmp_path, talks), BYTES)
    assert [prompt.text for prompt in found] == asked


def test_text_without_questions_has_none(tmp_path):
    assert held_out_questions(split(tmp_path, [("", "only text")]), BYTES) == []
    (tmp_path / "val_000000.mask.bin").unlink()
    assert held_out_questions(split_of(tmp_path, "val", 257), BYTES) == []


def test_the_draws_are_the_same_each_time_and_differ_between_prompts(capsys):
    model = GPT(GPTConfig(257, block_size=16, n_layer=1, n_head=1, n_embd=8)).init_weights(0)
    prompts = [Prompt("two\nlines", list(b"two\nlines")), Prompt("", [256]), Prompt("", [256])]
    first = print_samples(model, BYTES, prompts, seed=1, step=5)
    out = capsys.readouterr().out
    assert out.startswith("  > two\n  > lines\n  | ") and out.count("  > ") == 2
    assert model.training and {sample.step for sample in first} == {5}
    assert first[1].text != first[2].text
    assert print_samples(model, BYTES, prompts, seed=1, step=5) == first


def test_without_a_file_questions_are_asked_in_their_template(tmp_path, shard_folder):
    talks = [{"instruction": f"say {n}", "output": "yes"} for n in range(20)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    words = [f"--sources={tmp_path}/talks.jsonl", "--template=alpaca", "--tokenizer=bytes"]
    assert prepare.main([*words, "--val_fraction=0.5", f"--data_dir={tmp_path}/data"]) == 0
    asked = samples.prompts_for(open_dataset(tmp_path / "data"), None)
    assert len(asked) == 3
    for prompt in asked:
        assert prompt.text.startswith("Below is an instruction")
        assert prompt.text.endswith("\n\n### Response:\n")
    plain = open_dataset(shard_folder([list(b"text " * 9)], [list(b"text " * 9)]))
    assert samples.prompts_for(plain, None) == [Prompt("", [plain.tokenizer.eot_id])]
    (tmp_path / "some.jsonl").write_text('{"prompt": "é"}\n{"prompt": ""}\n')
    given = samples.prompts_for(plain, str(tmp_path / "some.jsonl"))
    assert given == [Prompt("é", list("é".encode())), Prompt("", [plain.tokenizer.eot_id])]
