"""peft opens our adapters, we open its, and one that does not fit is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import torch.nn as nn
from conftest import save_checkpoint
from test_lora import CONFIG, IDX, SHAPE, adapted
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

import sample
from model import GPT
from plaingpt import lora
from plaingpt.checkpoint import adapters, store
from plaingpt.checkpoint.folders import State
from plaingpt.text.tokenizer import Tokenizer


def save(folder: Path, base: Path, model: GPT) -> Path:
    adapter = adapters.adapter_for(base, str(base), folder, CONFIG)
    adapter = replace(adapter, base_fingerprint=lora.fingerprint(store.load_model(base)))
    adapters.keep_base(base, folder)
    weights = lora.adapter_tensors(model.weights())
    state = State(step=1, data="", settings={})
    snapshot = store.Snapshot(SHAPE, weights, Tokenizer.bytes(), {}, state, adapter)
    return store.save(folder, snapshot)


@pytest.fixture
def plain(tmp_path):
    """The folder of the model that `adapted` has adapters of."""
    return save_checkpoint(tmp_path / "plain", GPT(SHAPE).init_weights(1))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
def test_peft_opens_our_adapters(plain, tmp_path):
    model = adapted()
    folder = save(tmp_path / "ours", plain, model)
    theirs = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(plain), folder).eval()
    torch.testing.assert_close(theirs(IDX).logits, model(IDX), atol=1e-4, rtol=0)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(merged(IDX).logits, model(IDX), atol=1e-4, rtol=0)
    by_itself = AutoModelForCausalLM.from_pretrained(folder).eval()  # finds the base
    torch.testing.assert_close(by_itself(IDX).logits, model(IDX), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*")
@pytest.mark.parametrize("targets", [["c_attn", "mlp.c_proj"], r".*\.1\..*c_fc"])
def test_we_open_pefts_adapters(plain, tmp_path, targets):
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=3, lora_alpha=9, target_modules=targets, fan_in_fan_out=True)
    theirs = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(plain), settings)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    logits = theirs.eval()(IDX).logits
    for merged in (True, False):
        ours, tokenizer = store.load(tmp_path / "theirs", merged=merged)
        torch.testing.assert_close(ours.eval()(IDX), logits, atol=1e-4, rtol=0)
        assert tokenizer.vocab_size == 257  # the model's: peft saves none


def test_an_adapter_for_another_model_is_refused(plain, tmp_path, capsys):
    folder = save(tmp_path / "ours", plain, adapted())
    (folder / "SHA256SUMS").unlink()  # which would notice the change
    about = folder / "adapter_config.json"
    said = json.loads(about.read_text())

    def refused(**changes) -> str:
        about.write_text(json.dumps({**said, **changes}))
        assert sample.main([f"--checkpoint={folder}", "--device=cpu"]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("error: ") == 1
        return err.rpartition("error: ")[2]

    for name, shape in {"weights": SHAPE, "width": replace(SHAPE, n_embd=64)}.items():
        other = str(save_checkpoint(tmp_path / name, GPT(shape).init_weights(2)))
        assert "is an adapter for other weights than" in refused(base_model_name_or_path=other)
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    file = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(tensors, file)  # as made elsewhere: by whom is not known
    error = refused(base_model_name_or_path=other)
    assert "is not an adapter for" in error and "has shape (4, 32), not (4, 64)" in error
    shutil.move(folder.parent / "base", tmp_path / "away")
    assert "which does not exist; if it was moved" in refused(base_model_name_or_path="/no/where")
    assert "is not in the cache" in refused(base_model_name_or_path="owner/name")
    shutil.move(tmp_path / "away", folder.parent / "base")
    assert "is an adapter for another adapter" in refused(base_model_name_or_path=str(folder))
    assert "use_dora=True is not plain LoRA" in refused(use_dora=True)
    assert "bias='all' is not plain LoRA" in refused(bias="all")
    assert "peft_type is 'IA3'" in refused(peft_type="IA3")
    assert "LoRA's rank must be at least 1, not 0" in refused(r=0)
    assert "lora_alpha: expected a number, got null" in refused(lora_alpha=None)
    assert "is damaged: Infinity is not a finite number" in refused(r=float("inf"))
    assert "LoRA's alpha must be above 0 and below 1e30" in refused(lora_alpha=1e308)
    safetensors.torch.save_file({name: each / 0 for name, each in tensors.items()}, file)
    assert "holds NaN, infinite or non-float values" in refused()
    safetensors.torch.save_file({name: each.int() for name, each in tensors.items()}, file)
    assert "holds NaN, infinite or non-float values" in refused()
    renamed = {name.replace("c_attn", "q_proj"): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(renamed, file)
    assert "no linear layer is named" in refused()
    safetensors.torch.save_file(dict(list(tensors.items())[1:]), file)
    assert "missing base_model.model.transformer.h.0.attn.c_attn.lora_A.weight" in refused()
    file.write_bytes(file.read_bytes()[:-10])
    assert "is damaged or not a safetensors file" in refused()
    file.unlink()
    assert "has no adapter_model.safetensors" in refused()


@pytest.mark.parametrize(
    "where, base, again",
    [
        ("gpt2", "openai-community/gpt2", "hf:openai-community/gpt2"),
        ("hf:owner/name", "owner/name", "hf:owner/name"),
        ("hf:owner/name@v1", "owner/name", "hf:owner/name@v1"),
    ],
)
def test_an_adapter_of_a_model_of_the_hub_names_it_as_the_hub_does(plain, where, base, again):
    adapter = adapters.adapter_for(plain, where, plain, CONFIG)
    assert adapter.base == base
    (plain.parent / adapters.BASE).mkdir()  # of an earlier run in this folder
    assert adapters.base_of(plain, adapter) == again
    assert adapters.base_of(plain, replace(adapter, base="gpt2", revision=None)) == (
        "hf:openai-community/gpt2"  # as most of those for it say
    )
