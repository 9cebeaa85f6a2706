"""The example scripts run, and Hugging Face's Trainer sees the losses that we see."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import hf_trainer
import numpy as np
import pytest
import to_gguf
import torch
from conftest import save_checkpoint, write_shard
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from model import GPT, GPTConfig
from plaingpt.checkpoint import store
from plaingpt.text import dataset
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training import batches

REPO = Path(__file__).parents[1]
SHAPE = GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint, and shards with a mask over some windows."""
    base = tmp_path_factory.mktemp("trainer")
    step = save_checkpoint(base, GPT(SHAPE).init_weights(1))
    data_dir = base / "data"
    data_dir.mkdir()
    Tokenizer.bytes().save(data_dir)
    rng = np.random.default_rng(0)
    for name in ("train", "val"):
        write_shard(data_dir / f"{name}_000000.bin", rng.integers(97, 105, 32 * 20))
        mask = (rng.random(32 * 20) < 0.5).astype(np.uint8)
        mask.tofile(data_dir / f"{name}_000000.mask.bin")
    return step, data_dir


def test_both_loops_have_the_same_loss_on_the_same_batch(folders, tmp_path):
    step, data_dir = folders
    windows = hf_trainer.Windows(str(data_dir), "train", 32)
    assert len(windows) == 20
    theirs = GPT2LMHeadModel.from_pretrained(step)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(theirs.train(), arguments, train_dataset=windows)
    batch = trainer.data_collator([windows[n] for n in range(4)])
    loss = trainer.compute_loss(theirs.eval(), batch)
    split = dataset.open_dataset(data_dir).split("train")
    x, y, mask = batches.windows_at(split, np.arange(4) * 32, 31)
    ours = store.load_model(step).eval()(x, y, mask)
    torch.testing.assert_close(loss, ours, atol=1e-5, rtol=0)


CONVERTER = """
import json, sys
from conversion.base import TextModel
def main():
    told = {"arguments": sys.argv[1:], "splits as": TextModel().get_vocab_base_pre(None)}
    json.dump(told, open(sys.argv[-1], "w"))
"""


def test_llama_cpps_converter_is_told_how_our_tokenizers_split(folders, tmp_path, tiny_text):
    """Its place is taken by one that writes what it is told; docs/elsewhere.md has the real one."""
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "base.py").write_text("class TextModel: pass")
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    step = tmp_path / "step"
    step.mkdir()
    Tokenizer.train([tiny_text], 300).save(step)
    (step / "config.json").write_text("{}")
    command = [sys.executable, str(REPO / "examples" / "to_gguf.py"), str(tmp_path)]
    subprocess.run([*command, step, tmp_path / "x.gguf", "--outtype", "q8_0"], check=True)
    told = json.loads((tmp_path / "x.gguf").read_text())
    assert told["splits as"] == "gpt-2" and told["arguments"][0] == str(step)
    assert told["arguments"][1:3] == ["--outtype", "q8_0"]
    done = subprocess.run([*command, "nowhere", "y"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: nowhere does not exist")
    for llama_cpp, where, reason in (
        (tmp_path, folders[0], "GGUF takes a BPE with merges"),  # bytes have none
        ("nowhere", step, "is not a copy of llama.cpp"),
    ):
        with pytest.raises(ValueError, match=reason):
            to_gguf.main(str(llama_cpp), str(where), "y")


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")
def test_the_example_runs(folders, tmp_path, monkeypatch, capsys):
    step, data_dir = folders
    script = REPO / "examples" / "hf_trainer.py"
    others = shutil.copytree(data_dir, tmp_path / "others")
    Tokenizer.train(["some text"], 260).save(others)
    words = [str(word) for word in (script, step, data_dir, tmp_path / "out", "3")]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(script), run_name="__main__")
    out = capsys.readouterr().out
    assert "before: " in out and "after: " in out
    for place, wrong, said in (
        (1, "nowhere", "error: nowhere does not exist"),
        (2, "nowhere", "error: there is no data in nowhere"),
        (2, str(others), f"error: {step} and {others} have different tokenizers"),
        (4, "many", "error: steps must be a positive integer, not 'many'"),
    ):
        monkeypatch.setattr(sys, "argv", [*words[:place], wrong, *words[place + 1 :]])
        with pytest.raises(SystemExit, match=f"^{said}"):
            runpy.run_path(str(script), run_name="__main__")
    assert store.load_model(tmp_path / "out").config == SHAPE
    assert Tokenizer.load(tmp_path / "out").vocab_size == 257
