"""`transformers` opens our folders, we open its, and whatever does not fit is refused."""

import json
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from test_store import IDX, SHAPE, save
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from configurator import UserError
from model import GPT, GPTConfig
from plaingpt.checkpoint import hugging_face, store
from plaingpt.text.tokenizer import Tokenizer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
def test_transformers_opens_our_folders(tmp_path, bias, tie_weights):
    model, folder = save(tmp_path, config=replace(SHAPE, bias=bias, tie_weights=tie_weights))
    theirs, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(theirs.eval()(IDX).logits, model(IDX), atol=1e-4, rtol=0)
    again = store.load_model(folder)
    assert again.config == model.config
    assert torch.equal(again(IDX), model(IDX))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Ünï\n   \t😀<|endoftext|>x"
    assert tokenizer(text)["input_ids"] == Tokenizer.load(folder).encode(text)
    assert theirs.generation_config.eos_token_id == tokenizer.eos_token_id == 256


@pytest.mark.parametrize("tie", [True, False])
def test_we_open_the_folders_of_transformers(tmp_path, tie):
    shape = {"vocab_size": 257, "n_positions": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
    theirs = GPT2LMHeadModel(GPT2Config(**shape, tie_word_embeddings=tie)).eval()
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(
        store.load_model(tmp_path)(IDX), theirs(IDX).logits, atol=1e-4, rtol=0
    )


def test_biases_trained_elsewhere_are_kept(tmp_path):
    _, folder = save(tmp_path, config=replace(SHAPE, bias=False))
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs.transformer.h[1].mlp.c_fc.bias.fill_(0.5)
    theirs.save_pretrained(tmp_path / "elsewhere")
    ours = store.load_model(tmp_path / "elsewhere")
    torch.testing.assert_close(ours(IDX), theirs(IDX).logits, atol=1e-4, rtol=0)


def test_a_shorter_context_is_an_argument_of_loading(tmp_path):
    model, folder = save(tmp_path)
    short = store.load_model(folder, block_size=8)
    assert short.config.block_size == 8
    assert torch.equal(short(IDX[:, :8]), model(IDX[:, :8]))
    with pytest.raises(UserError, match="block_size=32 is beyond the 16 positions"):
        store.load_model(folder, block_size=32)


def test_an_unprefixed_half_precision_file_opens(tmp_path):
    model, folder = save(tmp_path)
    (folder / "SHA256SUMS").unlink()  # which would notice the change
    weights = hugging_face.to_file_layout(model.weights(), model.config)
    bare = {name.removeprefix("transformer."): t.bfloat16() for name, t in weights.items()}
    shutil.copytree(folder, tmp_path / "bare")
    safetensors.torch.save_file(bare, tmp_path / "bare" / "model.safetensors")
    opened = store.load_model(tmp_path / "bare")
    assert opened.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(opened(IDX), model(IDX), atol=0.2, rtol=0.1)


OPENAI = {
    "gpt2": (12, 12, 768, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1_557_611_200),
}


@pytest.mark.parametrize("name", OPENAI)
def test_openais_models_have_our_names_and_shapes(name):
    n_layer, n_head, n_embd, parameters = OPENAI[name]
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
        ours = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd))
    wanted = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    found = {
        name: tuple(tensor.shape)[:: -1 if name.endswith(hugging_face.TRANSPOSED) else 1]
        for name, tensor in ours.state_dict().items()
    }
    assert found == wanted
    assert ours.num_params() == theirs.num_parameters() == parameters


LAYOUTS = {
    "prefixed": {},
    "bare": {"prefix": ""},
    "old mask buffers": {"masks": True},
    "bare with masks": {"prefix": "", "masks": True},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "shards": {"shards": 3},
    "padded vocabulary": {"vocab_size": 264},
    "untied": {"tie_word_embeddings": False},
    "a tied head stored twice": {"head": True},
}


@pytest.fixture
def in_the_wild(tmp_path):
    """`in_the_wild(folder, …)` writes a random GPT-2 in a layout that is found on the hub."""

    def write(
        folder, prefix="transformer.", masks=False, dtype=None, shards=1, head=False, **shape
    ):
        sizes = {"vocab_size": 257, "n_positions": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(**sizes | shape)).eval()
        model.to(dtype or torch.float32).save_pretrained(folder)
        weights = safetensors.torch.load_file(folder / "model.safetensors")
        weights = {name.replace("transformer.", prefix): each for name, each in weights.items()}
        if masks:
            for layer in range(2):
                mask = torch.ones(16, 16).tril().bool()[None, None]
                weights[f"{prefix}h.{layer}.attn.bias"] = mask
                weights[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        if head:
            weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()
        (folder / "model.safetensors").unlink()
        parts = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
        if shards == 1:
            parts = ["model.safetensors"]
        of_tensor = {name: parts[n % shards] for n, name in enumerate(weights)}
        for part in parts:
            content = {name: weights[name] for name in weights if of_tensor[name] == part}
            safetensors.torch.save_file(content, folder / part, metadata={"format": "pt"})
        if shards > 1:
            index = {"metadata": {}, "weight_map": of_tensor}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        Tokenizer.bytes().save(folder)
        return model.float()

    return write


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_the_wild_opens(tmp_path, in_the_wild, layout):
    theirs = in_the_wild(tmp_path / "model", **LAYOUTS[layout])
    ours = store.load_model(tmp_path / "model")
    torch.testing.assert_close(ours(IDX), theirs(IDX).logits, atol=1e-4, rtol=0)
    short = store.load_model(tmp_path / "model", block_size=8)
    torch.testing.assert_close(short(IDX[:, :8]), ours(IDX[:, :8]))


# --- damage


def test_a_shard_that_is_missing_or_cut_short_is_refused(tmp_path, in_the_wild):
    in_the_wild(tmp_path / "model", shards=3)
    part = tmp_path / "model" / "model-00002-of-00003.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors is damaged"):
        store.load_model(tmp_path / "model")
    part.unlink()
    with pytest.raises(UserError, match="has no model-00002-of-00003.safetensors"):
        store.load_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="index.json: missing field weight_map"):
        store.load_model(tmp_path / "model")


def damaged(tmp_path, what):
    _, folder = save(tmp_path)
    path = folder / "model.safetensors"
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif what == "garbage":
        path.write_bytes(b"\xff" * 5000)
    elif what == "empty":
        path.write_bytes(b"")
    return folder


@pytest.mark.parametrize("what", ["truncated", "garbage", "empty"])
def test_damaged_weights_are_refused(tmp_path, what):
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        store.load_model(damaged(tmp_path, what))


def test_weights_that_are_not_finite_numbers_are_refused(tmp_path):
    _, folder = save(tmp_path)
    (folder / "SHA256SUMS").unlink()  # which would notice the change
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["transformer.ln_f.weight"][3] = float("nan")
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match="NaN or infinite"):
        store.load_model(folder)
    weights["transformer.ln_f.weight"] = torch.ones(32, dtype=torch.int32)
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"ln_f\.weight is torch\.int32"):
        store.load_model(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"n_inner": 64}, "n_inner=64"),
        ({"n_layer": 3}, "fewer than the 3 layers"),
        ({"n_embd": 36}, "wte.weight has shape"),
        ({"n_head": 5}, "is not divisible"),
        ({"n_layer": "2"}, "n_layer"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, message):
    _, folder = save(tmp_path)
    (folder / "SHA256SUMS").unlink()  # which would notice the change
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        store.load_model(folder)


def test_a_missing_or_damaged_config_is_refused(tmp_path):
    _, folder = save(tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged"):
        store.load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"step_000001 has no config.json"):
        store.load_model(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "config.json: expected an object, got a list"),
        ('{"model_type": "gpt2", "n_positions": null}', "n_positions: expected a whole number"),
        ('{"model_type": "gpt2", "n_embd": -8}', "n_embd: expected a whole number >= 1"),
        ('{"model_type": "gpt2", "n_layer": 1000000000}', "n_layer: expected a whole number <= "),
        ('{"model_type": "gpt2", "n_head": 7}', "config.json: n_embd=768 is not divisible"),
    ],
)
def test_a_config_of_another_kind_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        store.load_model(tmp_path)


def test_more_or_fewer_layers_than_the_config_says_are_refused(tmp_path):
    _, folder = save(tmp_path)
    (folder / "SHA256SUMS").unlink()  # which would notice the change
    said = json.loads((folder / "config.json").read_text())
    for layers, word in ((1, "more"), (3, "fewer")):
        (folder / "config.json").write_text(json.dumps(said | {"n_layer": layers}))
        with pytest.raises(UserError, match=f"has {word} than the {layers} layers?\\b"):
            store.load_model(folder)
    (folder / "config.json").write_text("[" * 50_000)
    with pytest.raises(UserError, match="config.json is damaged"):
        store.load_model(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_a_tensor_of_a_type_that_no_gpt2_has_is_named(tmp_path, dtype):
    _, folder = save(tmp_path)
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"].to(dtype)
    safetensors.torch.save_file(weights, path)
    with pytest.raises(UserError, match=r"model\.safetensors: transformer\.wpe\.weight is of type"):
        store.load_model(folder)


def test_a_header_of_too_many_tensors_is_refused_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(hugging_face, "MAX_TENSORS", 20)
    _, folder = save(tmp_path)
    with pytest.raises(UserError, match=r"model\.safetensors has more than 20 tensors"):
        store.load_model(folder)


def test_a_tensor_of_another_rank_is_refused(tmp_path):
    _, folder = save(tmp_path)
    (folder / "SHA256SUMS").unlink()  # which would notice the change
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["transformer.h.0.attn.c_attn.weight"] = torch.ones(2, 2, 2)
    weights["transformer.wpe.weight"] = torch.tensor(1.0)
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"c_attn.weight has shape \(2, 2, 2\), not \(96, 32\)"):
        store.load_model(folder)
