"""The command that lets a model write."""

import json

import pytest
import torch

import checkpoint
import sample
from model import GPT, GPTConfig
from tokenizer import Tokenizer

SHAPE = GPTConfig(vocab_size=320, block_size=16, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a padded vocabulary (320 ids for 257) that draws every byte."""
    model = GPT(SHAPE).init_weights(1)
    with torch.no_grad():
        model.transformer.wte.weight[257:] += 1.0
    return checkpoint.save(
        tmp_path_factory.mktemp("out"),
        1,
        model.config,
        model.state_dict(),
        Tokenizer.bytes(),
        {},
        {},
    )


def run(folder, *arguments) -> int:
    return sample.main([f"--checkpoint={folder}", "--device=cpu", *arguments])


def test_the_text_goes_to_stdout_and_nothing_else(folder, capsys):
    assert run(folder, "--start", "def main(", "--max_new_tokens=40") == 0
    out, err = capsys.readouterr()
    assert out.startswith("def main(") and len(out) > 20
    assert "max_new_tokens = 40" in err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_and_whole_are_the_same_text(folder, capsys, dtype):
    outs = []
    for flag in ("--stream", "--no-stream"):
        assert run(folder, "--start=é", flag, "--max_new_tokens=60", f"--dtype={dtype}") == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]
    assert outs[0].startswith("é")


def test_samples_are_one_batch_that_a_seed_repeats(folder, capsys):
    many = ["--num_samples=3", "--max_new_tokens=30"]
    outs = []
    for seed in (1, 1, 2):
        assert run(folder, *many, f"--seed={seed}") == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]
    assert outs[0].count("--- sample ") == 3


def test_a_sample_ends_at_the_end_of_text(folder, tmp_path, capsys):
    model = checkpoint.load_model(folder)
    with torch.no_grad():  # every logit but that of <|endoftext|> is about 0
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[256] * 1e4)
    ends = checkpoint.save(tmp_path, 1, model.config, model.state_dict(), Tokenizer.bytes(), {}, {})
    assert run(ends, "--start=The end.") == 0
    assert run(ends, "--start=The end.", "--num_samples=2") == 0
    expected = "The end.\n--- sample 1 of 2\nThe end.\n--- sample 2 of 2\nThe end.\n"
    assert capsys.readouterr().out == expected


def test_the_prompt_can_come_from_a_file(folder, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("Über alles", encoding="utf-8")
    assert run(folder, f"--start=FILE:{tmp_path}/prompt.txt", "--max_new_tokens=1") == 0
    assert capsys.readouterr().out.startswith("Über alles")
    (tmp_path / "prompt.txt").write_bytes(b"\xff\xfe")
    assert run(folder, f"--start=FILE:{tmp_path}/prompt.txt") == 2
    assert run(folder, "--start=FILE:nowhere.txt") == 2
    assert "nowhere.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--temperature=-1", "--top_k=0"], "temperature must be"),
        (["--top_p=0"], "top_p must be above 0"),
        (["--min_p=1.5"], "min_p must be above 0"),
        (["--num_samples=0"], "num_samples must be at least 1"),
        (["--tempreture=1"], "did you mean 'temperature'"),
        (["--device=tpu"], "device 'tpu' is not on this machine"),
        (["hello"], "neither a config file"),
    ],
)
def test_bad_settings_are_one_line_and_status_2(folder, capsys, arguments, message):
    assert run(folder, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err


def test_a_missing_or_foreign_checkpoint_is_one_line(folder, tmp_path, capsys):
    assert run(tmp_path / "nowhere") == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    Tokenizer.bytes().save(tmp_path / "llama")
    assert run(tmp_path / "llama") == 2
    assert "model_type is 'llama'" in capsys.readouterr().err
