"""The prompts whose continuations show how a run is doing."""

import json

import torch

import prepare
from model import GPT, GPTConfig
from plaingpt.runtime import Runtime
from plaingpt.text.dataset import open_dataset
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training import samples
from plaingpt.training.samples import Prompt, print_samples

BYTES, RT = Tokenizer.bytes(), Runtime(torch.device("cpu"), torch.float32)


def test_the_draws_are_the_same_each_time_and_differ_between_prompts(capsys):
    model = GPT(GPTConfig(257, block_size=16, n_layer=1, n_head=1, n_embd=8)).init_weights(0)
    prompts = [Prompt("two\nlines", list(b"two\nlines")), Prompt("", [256]), Prompt("", [256])]
    first = print_samples(model, BYTES, prompts, seed=1, step=5, rt=RT)
    out = capsys.readouterr().out
    assert out.startswith("  > two\n  > lines\n  | ") and out.count("  > ") == 2
    assert model.training and {sample.step for sample in first} == {5}
    assert first[1].text != first[2].text
    assert print_samples(model, BYTES, prompts, seed=1, step=5, rt=RT) == first


def test_samples_do_not_depend_on_those_beside_them():
    """More prompts than fit side by side, some of which fill the context."""
    model = GPT(GPTConfig(257, block_size=64, n_layer=2, n_head=2, n_embd=32)).init_weights(0)
    prompts = [Prompt("", [97 + number] * (1 + 8 * number)) for number in range(10)]
    together = print_samples(model, BYTES, prompts, seed=1, step=1, rt=RT)
    alone = [
        print_samples(model, BYTES, [prompt], seed=1 + number, step=1, rt=RT)[0]
        for number, prompt in enumerate(prompts)
    ]
    assert together == alone and len({sample.text for sample in alone}) == 10


def test_without_a_file_questions_are_asked_in_their_template(tmp_path, shard_folder):
    talks = [{"instruction": f"say {n}", "output": "yes"} for n in range(20)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    words = [f"--sources={tmp_path}/talks.jsonl", "--template=alpaca", "--tokenizer=bytes"]
    assert prepare.main([*words, "--val_fraction=0.5", f"--data_dir={tmp_path}/data"]) == 0
    asked = samples.prompts_for(open_dataset(tmp_path / "data"), None)
    assert len(asked) == 3
    for prompt in asked:
        assert prompt.text.startswith("Below is an instruction")
        assert prompt.text.endswith("\n\n### Response:\n")
    plain = open_dataset(shard_folder([list(b"text " * 9)], [list(b"text " * 9)]))
    assert samples.prompts_for(plain, None) == [Prompt("", [plain.tokenizer.eot_id])]
    (tmp_path / "some.jsonl").write_text('{"prompt": "é"}\n{"prompt": ""}\n')
    given = samples.prompts_for(plain, str(tmp_path / "some.jsonl"))
    assert given == [Prompt("é", list("é".encode())), Prompt("", [plain.tokenizer.eot_id])]
