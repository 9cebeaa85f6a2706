"""Perplexity equals that of transformers by the recipe of its documentation."""

import math

import made_up
import numpy as np
import pytest
import torch
from conftest import save_checkpoint
from transformers import GPT2LMHeadModel

import configurator
from model import GPT, GPTConfig
from plaingpt import runtime
from plaingpt.checkpoint import store
from plaingpt.evaluation import perplexity
from plaingpt.text import dataset
from plaingpt.text.tokenizer import Tokenizer
from tools import eval

BLOCK_SIZE = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_text):
    return made_up.checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_text, BLOCK_SIZE)


@pytest.fixture(scope="module")
def text(tmp_path_factory, tiny_text):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny_text[:601], encoding="utf-8")
    return path


@torch.no_grad()
def documented(folder, ids: list[int], stride: int, one_less: bool) -> float:
    """The loop of https://huggingface.co/docs/transformers/perplexity. With `one_less`, a window
    weighs one token fewer than it scores, as there; otherwise as many as it scores."""
    model, encoded = GPT2LMHeadModel.from_pretrained(folder).eval(), torch.tensor([ids])
    total = counted = before = 0
    for begin in range(0, len(ids), stride):
        end = min(begin + model.config.n_positions, len(ids))
        target_length = end - before
        input_ids = encoded[:, begin:end]
        target_ids = input_ids.clone()
        target_ids[:, :-target_length] = -100
        loss = model(input_ids, labels=target_ids).loss
        valid = (target_ids != -100).sum().item() - 1
        valid = valid if one_less else (target_ids[:, 1:] != -100).sum().item()
        total, counted, before = total + loss.item() * valid, counted + valid, end
        if end == len(ids):
            break
    return math.exp(total / counted)


def figures_of(checkpoint, **settings):
    given = {"device": "cpu", "dtype": "float32"} | settings
    [result] = eval.score(eval.EvalConfig(str(checkpoint), **given))
    return result.figures


@pytest.mark.parametrize("stride", [1, 10, 16, BLOCK_SIZE])
def test_strides_equal_the_recipe_of_transformers(checkpoint, text, stride):
    ids = store.load(checkpoint)[1].encode(text.read_text(encoding="utf-8"))
    found = figures_of(checkpoint, text=str(text), stride=stride)
    exact = documented(checkpoint, ids, stride, one_less=False)
    assert found["perplexity"] == pytest.approx(exact, rel=1e-5)
    if stride > 1:  # with stride 1, the documented weights are 0
        rough = documented(checkpoint, ids, stride, one_less=True)
        assert found["perplexity"] == pytest.approx(rough, rel=0.01)
    skipped = math.ceil(len(ids) / stride) if stride == BLOCK_SIZE else 1  # firsts of windows
    assert found["tokens"] == len(ids) - skipped


def test_windows_that_do_not_overlap_score_every_token(checkpoint, text):
    model, tokenizer = store.load(checkpoint)
    ids = torch.tensor(tokenizer.encode(text.read_text(encoding="utf-8")))
    losses = []
    for start in range(0, len(ids) - 1, BLOCK_SIZE):
        window = ids[start : start + BLOCK_SIZE + 1]
        with torch.no_grad():
            loss = model.eval()(window[None, :-1], window[None, 1:])
        losses += [loss.item()] * (len(window) - 1)
    found = figures_of(checkpoint, text=str(text))
    assert found["tokens"] == len(losses) == len(ids) - 1
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    bits = found["loss"] / math.log(2) * len(ids) / text.stat().st_size
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    fewer = figures_of(checkpoint, text=str(text), limit=2)
    assert fewer["tokens"] == 2 * BLOCK_SIZE
    assert fewer["loss"] == pytest.approx(np.mean(losses[: 2 * BLOCK_SIZE]), rel=1e-5)


def test_a_text_may_be_named_as_a_task(checkpoint, text):
    for stride in (None, 10):
        named = figures_of(checkpoint, tasks=(str(text),), stride=stride)
        assert named == figures_of(checkpoint, text=str(text), stride=stride)


def test_a_uniform_model_needs_log2_of_its_vocabulary_per_token(tmp_path):
    """Bytes as tokens: 257 ids, so log2(257) bits for each byte of the text."""
    model = GPT(GPTConfig(257, 8, n_layer=1, n_head=1, n_embd=4)).init_weights(0)
    for parameter in model.parameters():
        parameter.data.zero_()
    folder = save_checkpoint(tmp_path / "out", model, Tokenizer.bytes())
    (tmp_path / "text.txt").write_text("Straße, naïve 日本語" * 9, encoding="utf-8")
    for stride in (None, 3):
        found = figures_of(folder, text=str(tmp_path / "text.txt"), stride=stride)
        assert found["bits_per_byte"] == pytest.approx(math.log2(257))
        assert found["perplexity"] == pytest.approx(257)


def test_a_stride_over_a_split_counts_its_mask_only(shard_folder):
    ids, mask = list(range(60)), [i % 3 == 0 for i in range(60)]
    folder = shard_folder(train=[[1]], val=[ids], manifest=False)
    (folder / "val_000000.mask.bin").write_bytes(bytes(mask))
    data = dataset.open_dataset(folder)
    model = GPT(GPTConfig(257, 16, n_layer=1, n_head=1, n_embd=4)).init_weights(0).eval()
    result = perplexity.of_split(model, data, 5, None, runtime.start("cpu", "float32"))
    losses, scored = [], 1
    for start, end in [(start, min(start + 16, 60)) for start in range(0, 49, 5)]:
        window = torch.tensor(ids[start:end])
        with torch.no_grad():
            found = -model(window[None])[0].log_softmax(-1)
        losses += [found[i - start - 1, ids[i]].item() for i in range(scored, end) if mask[i]]
        scored = end
    assert result.figures["tokens"] == len(losses) == sum(mask[1:])
    assert result.figures["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert result.protocol == "windows of 16 tokens every 5, only new tokens scored, answers only"


def test_the_protocol_says_if_the_first_token_of_a_window_is_never_scored():
    first = ", but never the first of a window"
    assert perplexity.protocol_of(16, 16).endswith(f"every 16, only new tokens scored{first}")
    assert first not in perplexity.protocol_of(16, 15) + perplexity.protocol_of(16, None)


@pytest.mark.parametrize(
    "content, settings, message",
    [
        (b"", {}, "text.txt has 0 tokens: expected at least 2"),
        (b"a", {}, "text.txt has 1 token: expected at least 2"),
        (b"\xff\xfe\xff", {}, "text.txt is not UTF-8"),
        (None, {}, "text.txt"),
        (b"some text", {"stride": 33}, "stride=33 exceeds the context, 32"),
        (b"some text", {"stride": 0}, "stride must be at least 1, not 0"),
    ],
)
def test_a_text_that_cannot_be_measured(checkpoint, tmp_path, content, settings, message):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises((configurator.UserError, OSError), match=message):
        figures_of(checkpoint, text=str(tmp_path / "text.txt"), **settings)


def test_bits_per_byte_are_those_of_the_tokens_that_are_read(checkpoint, tmp_path):
    """The letter that ends the text, of three bytes, lies beyond the limit."""
    path = tmp_path / "mixed.txt"
    path.write_text("a" * 2 * BLOCK_SIZE + "\u20ac" * BLOCK_SIZE, encoding="utf-8")
    one = figures_of(checkpoint, text=str(path), limit=1)
    _, tokenizer = store.load(checkpoint)
    ids = tokenizer.encode(path.read_text(encoding="utf-8"))[: BLOCK_SIZE + 1]
    expected = one["loss"] / math.log(2) * len(ids) / len(tokenizer.decode(ids).encode())
    assert one["bits_per_byte"] == pytest.approx(expected)
