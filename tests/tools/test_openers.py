"""The prompts that the page offers: from the model's own validation text, or neutral ones."""

import json

import pytest
from conftest import save_checkpoint
from pages import SHAPE

import prepare
from model import GPT
from plaingpt.text.dataset import open_dataset
from plaingpt.text.templates import CHAT
from tools import openers

PARAGRAPHS = "".join(
    f"def function_{number}(first, second):\n    return {number}\n\n    indented again\n\n"
    for number in range(40)
)


def checkpoint_of(tmp_path, data_dir):
    """A checkpoint that says it was trained on `data_dir`, with its tokenizer."""
    settings = {"data_dir": str(data_dir)}
    state = {"step": 1, "data": "0", "settings": settings}
    tokenizer = open_dataset(data_dir).tokenizer
    out = save_checkpoint(tmp_path / "out", GPT(SHAPE).init_weights(1), tokenizer, state=state)
    return out, tokenizer


def prepared(tmp_path, records, template):
    source = tmp_path / "source.jsonl"
    source.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    data_dir = tmp_path / "data"
    prepare.prepare(
        prepare.PrepareConfig(
            sources=(str(source),),
            data_dir=str(data_dir),
            tokenizer="bytes",
            template=template,
            val_fraction=0.5,
        )
    )
    return data_dir


def test_a_text_model_offers_beginnings_of_its_text(tmp_path):
    data_dir = prepared(tmp_path, [{"text": PARAGRAPHS + str(n)} for n in range(8)], "text")
    out, tokenizer = checkpoint_of(tmp_path, data_dir)
    found = openers.examples(str(out), tokenizer)
    assert len(set(found)) == 4
    assert all(each in PARAGRAPHS and each.startswith("def function_") for each in found)


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_a_chat_model_offers_questions_of_its_text(tmp_path, template):
    asked = [f"What is {n} + {n}?" for n in range(40)] + ["too long " * 20] * 4
    if template == "chat":
        records = [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "?"}]}
            for q in asked
        ]
    else:
        records = [{"instruction": question, "input": "", "output": "?"} for question in asked]
    out, tokenizer = checkpoint_of(tmp_path, prepared(tmp_path, records, template))
    found = openers.examples(str(out), tokenizer)
    assert len(set(found)) == 4 and set(found) <= set(asked[:40])


def test_without_its_text_they_are_neutral(tmp_path):
    data_dir = prepared(tmp_path, [{"text": "x" + str(n)} for n in range(8)], "text")
    out, tokenizer = checkpoint_of(tmp_path, data_dir)
    assert openers.examples(str(out), tokenizer) == openers.TEXTS  # too little text
    (data_dir / "dataset.json").write_text("{", encoding="utf-8")
    assert openers.examples(str(out), tokenizer) == openers.TEXTS
    tokenizer.chat_template = CHAT
    assert openers.examples(str(out), tokenizer) == openers.QUESTIONS
    assert openers.examples("gpt2", tokenizer) == openers.QUESTIONS  # without a network
