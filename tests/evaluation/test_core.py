"""CORE on a made-up bundle: by hand for a model that guesses, and as nanochat for another."""

import random

import made_up
import pytest
import torch
import yaml
from conftest import save_checkpoint

from configurator import UserError
from model import GPT, GPTConfig
from plaingpt.checkpoint import store
from plaingpt.evaluation import core
from plaingpt.evaluation.likelihood import Sequence
from plaingpt.text.tokenizer import Tokenizer
from tools import eval

CHOICES = [
    {"query": f"Is {n} even?", "choices": ["certainly", "no"], "gold": int(n % 3 > 0)}
    for n in range(6)
]
SCHEMAS = [
    {"context_options": [f"{n} cats", f"{n} dogs are"], "continuation": "asleep", "gold": n % 2}
    for n in range(5)
]
CLOZES = [{"context": f"count to {n}: ", "continuation": "\0" if n else "1"} for n in range(4)]
TASKS = {  # label → kind, shots, delimiter, guessing in percent, records
    "parity": ("multiple_choice", 2, "\nAnswer: ", 25, CHOICES),
    "animals": ("schema", 1, " ", 50, SCHEMAS),
    "counting": ("language_modeling", 0, "", 0, CLOZES),
}


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "eval_bundle"
    (folder / "eval_data" / "more").mkdir(parents=True)
    listed, guessing = [], ["Eval Task,Task Category,Random baseline"]
    for label, (kind, shots, delimiter, percent, records) in TASKS.items():
        uri = f"more/{label}.jsonl"
        made_up.write(folder / "eval_data" / uri, records)
        entry = {"label": label, "dataset_uri": uri, "num_fewshot": [shots, 9]}
        entry |= {"icl_task_type": kind, "has_categories": False}
        listed.append(entry if delimiter == " " else entry | {"continuation_delimiter": delimiter})
        guessing.append(f"{label},other,{percent}")
    (folder / "core.yaml").write_text(yaml.dump({"icl_tasks": listed}))
    (folder / "eval_meta_data.csv").write_text("\n".join(guessing))
    return folder


def checkpoint(folder, factor: float):
    model = GPT(GPTConfig(257, block_size=64, n_layer=2, n_head=2, n_embd=16)).init_weights(0)
    for parameter in model.parameters():
        parameter.data *= factor
    return save_checkpoint(folder / "out", model)


def figures_of(folder, bundle, **settings):
    return made_up.score(checkpoint(folder, **settings), "core", bundle).figures


def test_a_model_that_finds_all_equally_likely_takes_the_first(bundle, tmp_path):
    """2 of 6 parities, 3 of 5 animals, and 3 of 4 counts are right: the first id is a zero."""
    figures = figures_of(tmp_path, bundle, factor=0)
    by_hand = {"parity": 1 / 9, "animals": 1 / 5, "counting": 3 / 4}
    assert figures == pytest.approx({"core": (1 / 9 + 1 / 5 + 3 / 4) / 3} | by_hand)


def test_the_space_before_a_continuation_belongs_to_it():
    task = core.CoreTask("", "", [1], "language_modeling")
    items = [task.item(core.Cloze(context, "two")) for context in ("one ", "1")]
    [found] = core.encode(task, items, 0, Tokenizer.bytes())
    assert found == Sequence([256, *b"1 two\n\none two"], scored=4)


def prompts(label: str, records: list, number: int) -> tuple[list[str], str]:
    """The texts of an item, and its context alone, as nanochat's templates have them."""
    kind, shots, between, _, _ = TASKS[label]
    record, others = records[number], [n for n in range(len(records)) if n != number]
    solved = ""
    for each in (records[n] for n in random.Random(1234 + number).sample(others, shots)):
        if kind == "multiple_choice":
            solved += f"{each['query']}{between}{each['choices'][each['gold']]}\n\n"
        else:
            solved += f"{each['context_options'][each['gold']]}{between}{each['continuation']}\n\n"
    if kind == "multiple_choice":
        return [f"{solved}{record['query']}{between}{each}" for each in record["choices"]], ""
    if kind == "schema":
        texts = [f"{each}{between}{record['continuation']}" for each in record["context_options"]]
        return [solved + text for text in texts], ""
    context = f"{record['context'].strip()}{between}"
    return [context + record["continuation"]], context.strip()


def test_it_equals_a_plain_computation(bundle, tmp_path):
    """Contexts of the first task are longer than the model's."""
    model, _ = store.load(checkpoint(tmp_path, factor=5))
    expected, expected_values = {}, []
    for label, (kind, _, _, percent, records) in TASKS.items():
        shuffled = list(records)
        random.Random(1337).shuffle(shuffled)
        right = []
        for number, record in enumerate(shuffled):
            texts, context = prompts(label, shuffled, number)
            rows = [[256, *text.encode()] for text in texts]
            before = [len({*column}) == 1 for column in zip(*rows)]
            behind = [len({*column}) == 1 for column in zip(*(row[::-1] for row in rows))]
            values, means, greedy = [], [], []
            for row in rows:
                if kind == "multiple_choice":
                    count = len(row) - before.index(False)
                elif kind == "schema":
                    count = behind.index(False)
                else:
                    count = len(row) - 1 - len(context.encode())
                ids = torch.tensor(row[-64:])
                with torch.no_grad():
                    logs = model.eval()(ids[None])[0].log_softmax(-1)[-count - 1 : -1]
                found = logs.gather(1, ids[-count:, None])
                values.append(found.sum().item())
                means.append(found.mean().item())
                greedy.append(bool((logs.argmax(-1) == ids[-count:]).all()))
            expected_values.append(pytest.approx(values, rel=1e-5))
            right.append(greedy[0] if context else means.index(max(means)) == record["gold"])
        expected[label] = (sum(right) / len(right) - percent / 100) / (1 - percent / 100)
    found = made_up.score(tmp_path / "out", "core", bundle)
    assert found.figures == pytest.approx({"core": sum(expected.values()) / 3} | expected)
    assert [item["log_likelihoods"] for item in found.items] == expected_values
    assert len(found.items) == 15 and found.standard_error("parity") > 0
    few = made_up.score(tmp_path / "out", "core", bundle, limit=3)
    assert len(few.items) == 9 and few.figures["core"] != found.figures["core"]


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("core.yaml", "icl_tasks: [", "core.yaml is damaged: while parsing"),
        ("core.yaml", "icl_tasks: []", "core.yaml: icl_tasks: expected a list of length >= 1"),
        ("core.yaml", None, "eval_bundle has no core.yaml"),
        ("eval_meta_data.csv", "a,b\n1,2", "expected Eval Task and Random baseline (KeyError"),
        ("eval_meta_data.csv", "Eval Task,Random baseline\n", "has no random baseline for parity"),
        ("eval_data/more/parity.jsonl", None, "more/parity.jsonl is not a file"),
        ("eval_data/more/parity.jsonl", '{"query": ""}', "line 1: missing field"),
        (
            "eval_data/more/parity.jsonl",
            '{"query": "", "choices": ["a"], "gold": 0}',
            "too few items for the 2 shots of parity",
        ),
    ],
)
def test_a_bundle_that_is_damaged_is_one_line(bundle, tmp_path, file, content, message):
    if content is None:
        (bundle / file).unlink()
    else:
        (bundle / file).write_text(content)
    with pytest.raises(UserError) as caught:
        core.read(bundle, None, Tokenizer.bytes(), 64)
    assert message in str(caught.value)


def test_a_limit_below_the_shots_and_a_long_item_are_found_before_measuring(bundle):
    with pytest.raises(UserError, match="limit=2 is too small for the 2 shots of parity"):
        core.read(bundle, 2, Tokenizer.bytes(), 64)
    with pytest.raises(UserError, match="the model's context is 3"):
        core.read(bundle, None, Tokenizer.bytes(), 4)


def test_it_needs_its_bundle(tmp_path, capsys):
    assert eval.main([f"--checkpoint={checkpoint(tmp_path, factor=1)}", "--tasks=core"]) == 2
    assert "--tasks=core needs --task_dir" in capsys.readouterr().err
