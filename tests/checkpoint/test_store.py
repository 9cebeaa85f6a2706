"""Folders that `transformers` opens, that are whole or absent, and that refuse what is broken."""

import contextlib
import json
import os
import pickle
import shutil
import signal
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from model import GPT, GPTConfig
from plaingpt.checkpoint import folders, hugging_face, store
from plaingpt.text.tokenizer import Tokenizer

SHAPE = GPTConfig(vocab_size=257, block_size=16, n_layer=2, n_head=4, n_embd=32)
IDX = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(0))


def save(out_dir, step=1, config=SHAPE, val_loss=None, seed=1):
    model = GPT(config).init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) / 10)
    state = {"step": step, "val_loss": val_loss, "data": "x", "settings": {}}
    optimizer = {"parameters": {"a": {"m": torch.ones(2)}}, "scaler": {}}
    return model, store.save(
        out_dir, step, model.config, model.state_dict(), Tokenizer.bytes(), optimizer, state
    )


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
    with pytest.raises(ValueError, match="block_size=32 is beyond the 16 positions"):
        store.load_model(folder, block_size=32)


def test_loaded_weights_do_not_depend_on_the_file(tmp_path):
    model, folder = save(tmp_path)
    loaded = store.load_model(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    assert torch.equal(loaded(IDX), model(IDX))


# --- finding and pruning


def test_find_takes_the_newest_step_or_the_folder_itself(tmp_path):
    for step in (5, 1_000_000, 20):
        save(tmp_path, step)
    assert [p.name for p in folders.steps(tmp_path)] == [
        "step_000005",
        "step_000020",
        "step_1000000",
    ]
    assert folders.find(tmp_path).name == "step_1000000"
    assert folders.find(tmp_path / "step_000020").name == "step_000020"
    with pytest.raises(ValueError, match="nowhere does not exist"):
        folders.find(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no checkpoint"):
        folders.find(tmp_path / "empty")


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, loss in enumerate([5.0, 2.0, None, 3.0, 4.0], start=1):
        save(tmp_path, step, val_loss=loss)
        folders.prune(tmp_path, keep=2)
    assert [int(p.name[5:]) for p in folders.steps(tmp_path)] == [2, 4, 5]


# --- whole or absent


def test_leftovers_of_a_killed_save_vanish(tmp_path):
    (tmp_path / ".partial_step_000007").mkdir()
    (tmp_path / ".partial_old_step_000003").mkdir()
    save(tmp_path, 8)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000008"]


@pytest.mark.skipif(os.name == "nt", reason="RLIMIT_FSIZE is POSIX")
@pytest.mark.parametrize("limit", [200, 40_000, 112_000])
def test_a_full_disk_is_an_oserror_that_leaves_nothing(tmp_path, limit):
    import resource

    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match="step_000002"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000001"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_system_call_of_a_save_leaves_whole_folders(tmp_path, monkeypatch):
    """Kill -9 a process at each step of saving and pruning in turn, and open what is left."""
    deadly_calls = [
        (os, "fsync"),
        (os, "rename"),
        (os, "unlink"),
        (os, "rmdir"),
        (os, "mkdir"),
        (torch, "save"),
        (safetensors.torch, "save_file"),
        (store, "write_json"),
    ]

    def save_and_die(out_dir, fatal):
        calls = 0

        def deadly(function):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for owner, name in deadly_calls:
            monkeypatch.setattr(owner, name, deadly(getattr(owner, name)))
        save(out_dir, 2)
        folders.prune(out_dir, keep=1)
        os._exit(0)

    killed = 0
    while True:
        out_dir = tmp_path / str(killed)
        save(out_dir, 1)
        child = os.fork()
        if child == 0:
            save_and_die(out_dir, killed + 1)
        status = os.waitpid(child, 0)[1]
        found = folders.steps(out_dir)
        assert found
        for folder in found:
            store.load_model(folder)
            store.read_optimizer(folder)
            folders.read_state(folder)
        save(out_dir, 3)
        assert not list(out_dir.glob(".*"))
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed += 1
    assert killed > 20


# --- what is refused


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
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        store.load_model(damaged(tmp_path, what))


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "optimizer.pt"])
def test_a_pickle_is_never_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    _, folder = save(tmp_path / "out")
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    read = store.read_optimizer if name == "optimizer.pt" else store.load_model
    with pytest.raises(ValueError, match="damaged|pickle"):
        read(folder)
    assert not (tmp_path / "exploded").exists()
    torch.save({"parameters": Bomb()}, folder / "optimizer.pt")
    with pytest.raises(ValueError, match="or holds code: not loaded"):
        store.read_optimizer(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"n_inner": 64}, "n_inner=64"),
        ({"n_layer": 3}, "fewer than the 3 layers"),
        ({"n_embd": 36}, "wte.weight has shape"),
        ({"n_head": 5}, "does not divide"),
        ({"n_layer": "2"}, "n_layer"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(tmp_path, change, message):
    _, folder = save(tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        store.load_model(folder)


def test_a_missing_or_damaged_config_is_refused(tmp_path):
    _, folder = save(tmp_path)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        store.load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"step_000001 is no checkpoint: it has no config.json"):
        store.load_model(tmp_path)


def test_an_unprefixed_half_precision_file_opens(tmp_path):
    model, folder = save(tmp_path)
    weights = hugging_face.to_hugging_face(model.state_dict(), model.config)
    bare = {name.removeprefix("transformer."): t.bfloat16() for name, t in weights.items()}
    shutil.copytree(folder, tmp_path / "bare")
    safetensors.torch.save_file(bare, tmp_path / "bare" / "model.safetensors")
    opened = store.load_model(tmp_path / "bare")
    assert opened.lm_head.weight.dtype == torch.float32
    torch.testing.assert_close(opened(IDX), model(IDX), atol=0.2, rtol=0.1)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"[]", "holds no object"),
        ("config.json", b'{"model_type": "gpt2", "n_positions": null}', "n_positions=None is no"),
        ("config.json", b'{"model_type": "gpt2", "n_embd": -8}', "n_embd=-8 is no size"),
    ],
)
def test_a_config_of_another_kind_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        store.load_model(tmp_path)


def test_any_damage_of_the_optimizer_file_is_one_error(tmp_path):
    for other in ([1, 2], {"x": 1}):
        torch.save(other, tmp_path / "optimizer.pt")
        with pytest.raises(ValueError, match="is no optimizer file"):
            store.read_optimizer(tmp_path)
    parameters = {"a": {"step": torch.ones(3)}}
    torch.save({"parameters": parameters, "scaler": {}}, tmp_path / "optimizer.pt")
    content = (tmp_path / "optimizer.pt").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            damaged[place] ^= int(rng.integers(1, 256))
        (tmp_path / "optimizer.pt").write_bytes(damaged)
        with contextlib.suppress(ValueError):
            store.read_optimizer(tmp_path)


@pytest.mark.parametrize("change", [{"step": "abc"}, {"data": None}, {"settings": []}])
def test_a_state_of_another_kind_is_refused(tmp_path, change):
    _, folder = save(tmp_path)
    state = folders.read_state(folder)
    (folder / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(ValueError, match=r"state\.json is damaged: "):
        folders.read_state(folder)


def test_folders_of_others_are_no_checkpoints(tmp_path):
    _, folder = save(tmp_path)
    (tmp_path / "step_000999").mkdir()
    (tmp_path / "step_001000").write_text("a file")
    assert folders.find(tmp_path) == folder
    with pytest.raises(OSError, match="step_000999 is in the way"):
        save(tmp_path, 999)


def test_weights_that_are_not_finite_numbers_are_refused(tmp_path):
    _, folder = save(tmp_path)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["transformer.ln_f.weight"][3] = float("nan")
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="not finite numbers"):
        store.load_model(folder)
    weights["transformer.ln_f.weight"] = torch.ones(32, dtype=torch.int32)
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"ln_f\.weight is torch\.int32"):
        store.load_model(folder)


def test_all_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    _, folder = save(tmp_path)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


# --- OpenAI's models, and others of the hub

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


def test_a_shard_that_is_missing_or_cut_short_is_refused(tmp_path, in_the_wild):
    in_the_wild(tmp_path / "model", shards=3)
    part = tmp_path / "model" / "model-00002-of-00003.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors is damaged"):
        store.load_model(tmp_path / "model")
    part.unlink()
    with pytest.raises(ValueError, match="has no model-00002-of-00003.safetensors"):
        store.load_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged: it has no weight_map"):
        store.load_model(tmp_path / "model")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, in_the_wild):
    """huggingface_hub's cache, holding one model in its layout, without a network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def add(repo_id, revision="main"):
        repo = cache / f"models--{repo_id.replace('/', '--')}"
        commit = "0123456789abcdef0123456789abcdef01234567"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / revision).write_text(commit)
        return in_the_wild(repo / "snapshots" / commit)

    return add


@pytest.mark.parametrize("name", ["gpt2", "gpt2-xl", "hf:someone/some-gpt2", "hf:an/other@v1.0"])
def test_a_model_of_the_hub_opens_from_the_cache(hub_cache, name):
    repo_id, _, revision = folders.HUB_NAMES.get(name, name).removeprefix("hf:").partition("@")
    theirs = hub_cache(repo_id, revision or "main")
    ours = store.load_model(name)
    torch.testing.assert_close(ours(IDX), theirs(IDX).logits, atol=1e-4, rtol=0)
    assert Tokenizer.load(folders.find(name)).vocab_size == 257


@pytest.mark.parametrize("name", ["gpt2-medium", "hf:no/where"])
def test_a_model_that_is_not_to_be_had_is_one_error(hub_cache, name):
    with pytest.raises(
        ValueError, match=f"{name.removeprefix('hf:')} is neither in the cache"
    ) as caught:
        folders.find(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["hf:", "hf:alone", "hf:a/b/c", "hf:a b/c"])
def test_a_malformed_hub_name_is_refused(name):
    with pytest.raises(ValueError, match="is not of the form hf:OWNER/NAME"):
        folders.find(name)


def test_more_or_fewer_layers_than_the_config_says_are_refused(tmp_path):
    _, folder = save(tmp_path)
    said = json.loads((folder / "config.json").read_text())
    for layers, word in ((1, "more"), (3, "fewer")):
        (folder / "config.json").write_text(json.dumps(said | {"n_layer": layers}))
        with pytest.raises(ValueError, match=f"has {word} than the {layers} layers"):
            store.load_model(folder)
    (folder / "config.json").write_text("[" * 50_000)
    with pytest.raises(ValueError, match="config.json is damaged"):
        store.load_model(folder)
