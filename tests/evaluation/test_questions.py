"""Each question is answered as if it were alone."""

import json

import pytest
import torch
import workers
from conftest import save_checkpoint
from test_choices import evaluate

from model import GPT, GPTConfig
from plaingpt.evaluation.questions import EXTRA_TOKENS, answer
from plaingpt.generation import continuation
from plaingpt.sampling import Sampling
from plaingpt.text.tokenizer import Tokenizer
from tools import eval


@pytest.fixture
def model():
    """It writes texts of many lengths."""
    model = GPT(GPTConfig(257, block_size=64, n_layer=2, n_head=2, n_embd=32)).init_weights(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 10
        model.transformer.wte.weight[256] = 1.1 * model.transformer.wte.weight[ord("o")]
    return model.eval()


def test_answers_do_not_depend_on_what_is_asked_with_them(model):
    """Some questions are longer than the context, and more are asked than fit side by side."""
    tokenizer = Tokenizer.bytes()
    asked = [([97 + n] * (1 + 9 * n), [65] * (n % 4)) for n in range(10)]
    found = list(answer(model, tokenizer, asked))
    assert len({len(each.answer) for each in found}) > 4
    for (question, reference), each in zip(asked, found):
        sampling = Sampling(temperature=0, max_new_tokens=len(reference) + EXTRA_TOKENS)
        alone = continuation(model, tokenizer, question, sampling)
        assert each.answer == "".join(drawn.piece for drawn in alone).strip()
        assert each.question == tokenizer.decode(question)
        assert each.reference == tokenizer.decode(reference)


def test_two_processes_answer_as_one(model, shard_folder, tmp_path):
    """The first answers two of three questions."""
    ids = [97, 98, 99, 256, 100, 101, 102, 256, 103, 104, 105, 256]
    folder = shard_folder(train=[[1]], val=[ids], manifest=False)
    (folder / "val_000000.mask.bin").write_bytes(bytes([0, 0, 1, 1] * 3))
    checkpoint = save_checkpoint(tmp_path / "out", model)
    settings = [f"--checkpoint={checkpoint}", f"--data_dir={folder}", "--device=cpu"]
    settings += ["--tasks=answers", f"--answers={tmp_path}/two.jsonl"]
    told = workers.run_all(2, tmp_path, [settings], evaluate)
    assert told.count("\n--- ") + told.startswith("--- ") == 3
    assert eval.main([*settings, f"--answers={tmp_path}/one.jsonl"]) == 0
    lines = (tmp_path / "one.jsonl").read_text().splitlines()
    assert [json.loads(line)["question"] for line in lines] == ["ab", "de", "gh"]
    assert (tmp_path / "two.jsonl").read_text().splitlines() == lines
    assert list(answer(model, Tokenizer.bytes(), [])) == []  # a process with nothing to do
