"""Our folders as they are in other programs: transformers' pipeline and server, CTranslate2."""

import json
import time
import urllib.request
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import free_port, save_checkpoint
from transformers import AutoTokenizer, pipeline

import sample
from model import GPT, GPTConfig
from plaingpt.checkpoint import store
from plaingpt.text.templates import CHAT_TEMPLATES
from plaingpt.text.tokenizer import Tokenizer
from tools import export

SHAPE = GPTConfig(vocab_size=300, block_size=64, n_layer=2, n_head=2, n_embd=32)
VARIANTS = {
    "plain": {},
    "no_bias": {"bias": False},
    "untied": {"tie_weights": False},
    "padded": {"vocab_size": 320},
}


@pytest.fixture(scope="module")
def tokenizer(tiny_text):
    return Tokenizer.train([tiny_text], 300)


@pytest.fixture(scope="module", params=VARIANTS)
def folder(request, tokenizer, tmp_path_factory):
    """A checkpoint whose greedy text is not one letter."""
    config = replace(SHAPE, **VARIANTS[request.param])
    step = write(tmp_path_factory.mktemp(request.param), config, tokenizer)
    if request.param != "padded":
        return step
    exported = export.ExportConfig(str(step), str(step.parent / "exported"))
    return export.export(exported)  # ids that no tokenizer has are cut off


def write(out_dir, config, tokenizer):
    model = GPT(config).init_weights(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and ".h." in name:
                parameter.mul_(8)
    state = {"step": 1, "data": "", "settings": {}}
    return save_checkpoint(out_dir, model, tokenizer, state=state)


def ours(folder, start: str, tokens: int) -> str:
    """What the model continues `start` with, always the likeliest."""
    settings = {"temperature": 0.0, "max_new_tokens": tokens, "dtype": "float32", "device": "cpu"}
    [text] = sample.samples(
        sample.SampleConfig(checkpoint=str(folder), start=start, stream=False, **settings)
    )
    return text.removeprefix(start)


def test_pipeline(folder):
    texts = pipeline("text-generation", model=str(folder), device="cpu")
    greedy = {"max_new_tokens": 20, "do_sample": False, "return_full_text": False}
    assert texts("def main(", **greedy)[0]["generated_text"] == ours(folder, "def main(", 20)
    torch.manual_seed(0)
    drawn = {texts("def main(")[0]["generated_text"] for _ in range(2)}
    assert len(drawn) == 2  # by itself it draws, and ends within the context


@pytest.fixture
def own_threads():
    """CTranslate2 sets how many OpenMP has for the whole process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_ctranslate2(folder, tmp_path, tokenizer, own_threads):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed")
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(tmp_path / "ct2"))
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu", intra_threads=1)
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode("def main(")
    tokens = theirs.convert_ids_to_tokens(ids)
    logits = torch.tensor(np.array(generator.forward_batch([tokens])))
    model = store.load_model(folder).eval()
    torch.testing.assert_close(logits, model(torch.tensor([ids])), atol=1e-3, rtol=0)
    [found] = generator.generate_batch(
        [tokens], max_length=20, sampling_topk=1, include_prompt_in_result=False
    )
    assert theirs.decode(found.sequences_ids[0]) == ours(folder, "def main(", 20)


def test_transformers_serve_answers_the_openai_client(tokenizer, tmp_path, monkeypatch):
    openai = pytest.importorskip("openai", reason="openai is not installed")
    pytest.importorskip("fastapi", reason="fastapi (transformers[serving]) is not installed")
    from transformers.cli.serve import Serve

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    tokenizer.chat_template = CHAT_TEMPLATES["chat"]
    folder = str(write(tmp_path, SHAPE, tokenizer))
    tokenizer.chat_template = None
    port = free_port()
    server = Serve(
        force_model=folder,
        device="cpu",
        host="127.0.0.1",
        port=port,
        non_blocking=True,
        log_level="error",
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        with closing(client):
            greedy = {"model": folder, "max_tokens": 12, "temperature": 0}
            text = client.completions.create(prompt="def main(", **greedy).choices[0].text
            assert text == ours(folder, "def main(", 12)
            messages = [{"role": "user", "content": "Hello!"}]
            answer = client.chat.completions.create(messages=messages, **greedy)
            wanted = ours(folder, "### User:\nHello!\n\n### Assistant:\n", 12)
            assert answer.choices[0].message.content == wanted
            stream = client.chat.completions.create(messages=messages, stream=True, **greedy)
            pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
            assert "".join(pieces) == wanted and len([piece for piece in pieces if piece]) > 3
            random = greedy | {"temperature": 1, "prompt": "def main("}
            drawn = [client.completions.create(seed=seed, **random) for seed in (1, 2, 1)]
            assert len({completion.choices[0].text for completion in drawn}) == 2
    finally:
        server.kill_server()


def wait_for(url: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


def test_a_folder_says_what_others_ask_for(folder, tokenizer):
    said = json.loads((folder / "tokenizer_config.json").read_text())
    assert said["unk_token"] == said["eos_token"] == "<|endoftext|>"
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == tokenizer.vocab_size and theirs.unk_token_id == tokenizer.eot_id
