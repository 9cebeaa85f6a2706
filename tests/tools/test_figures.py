"""The pictures of docs/walk."""

import numpy as np
import pytest
import torch
from conftest import save_checkpoint

from model import GPT, GPTConfig
from plaingpt.text.tokenizer import Tokenizer
from tools import figures

SHAPE = GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(tmp_path / "run", GPT(SHAPE).init_weights(1))


@pytest.fixture(scope="module")
def data_dir(shard_folder):
    return shard_folder(train=[np.arange(100)])


def test_every_picture_is_drawn(checkpoint, data_dir, tmp_path):
    names = [f"--checkpoint={checkpoint}", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/new"]
    assert figures.main([*names, "--text=a b\té日"]) == 0
    drawn = {path.stem: path.read_bytes() for path in (tmp_path / "new").iterdir()}
    assert drawn.keys() == {"tokens", "attention", "loss", "muon", "schedule"}
    assert all(content.startswith(b"\x89PNG") for content in drawn.values())


def test_a_map_of_attention_shows_where_each_token_looks(checkpoint):
    """The weights with which the values are mixed: the output of attention follows from them."""
    model, ids = GPT(SHAPE).init_weights(1).eval(), [1, 2, 3, 4, 5]
    panels = figures.draw_attention(model, ids, Tokenizer.bytes()).axes
    maps = torch.tensor(np.stack([panel.images[0].get_array() for panel in panels[:2]]))
    attn, x = model.transformer.h[0].attn, torch.tensor([ids])
    with torch.no_grad():
        x = model.transformer.h[0].ln_1(model.transformer.wte(x) + model.transformer.wpe.weight[:5])
        v = attn.c_attn(x)[0, :, 32:].unflatten(-1, (2, 8)).transpose(0, 1)  # (H, T, D)
        mixed = attn.c_proj((maps @ v).transpose(0, 1).flatten(1))
        torch.testing.assert_close(mixed, attn(x, 0, None)[0])


@pytest.mark.parametrize("text", ["a", "a" * 33])
def test_a_text_of_one_token_or_too_many_is_refused(checkpoint, data_dir, text, capsys):
    names = [f"--checkpoint={checkpoint}", f"--data_dir={data_dir}"]
    assert figures.main([*names, f"--text={text}"]) == 2
    assert "expected 2 to 32" in capsys.readouterr().err


def test_data_of_another_tokenizer_is_refused(
    checkpoint, tmp_path, tiny_text, shard_folder, capsys
):
    folder = shard_folder(train=[np.arange(100)], manifest=False)
    Tokenizer.train([tiny_text], 300).save(folder)
    assert figures.main([f"--checkpoint={checkpoint}", f"--data_dir={folder}"]) == 2
    assert "have different tokenizers" in capsys.readouterr().err
