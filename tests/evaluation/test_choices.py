"""Choices equal those of a plain computation, one choice at a time, and bad items are one line."""

import json
import os
import re
import sys
from contextlib import nullcontext

import made_up
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import workers

from model import GPT, GPTConfig, Transformer
from plaingpt import packing, runtime
from plaingpt.checkpoint import store
from plaingpt.evaluation import items, likelihood
from plaingpt.evaluation.likelihood import Sequence
from plaingpt.evaluation.tasks import TASKS
from plaingpt.text import hub
from plaingpt.text.sources import Position, find_source
from plaingpt.text.tokenizer import Tokenizer
from tools import eval


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_text):
    return made_up.checkpoint(tmp_path_factory.mktemp("checkpoint"), tiny_text, block_size=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    made_up.write_tasks(folder)
    return folder


@torch.inference_mode()
def plainly(model: GPT, sequence: Sequence) -> tuple[float, bool]:
    """One choice alone, without a cache, padding or a batch."""
    ids = torch.tensor(sequence.ids[-model.config.block_size - 1 :])
    found = model(ids[None, :-1])[0, -sequence.scored :].double().log_softmax(-1)
    wanted = ids[-sequence.scored :]
    likely = found.gather(1, wanted[:, None]).sum().item()
    return likely, bool((found.argmax(1) == wanted).all())


@pytest.mark.parametrize("name", TASKS)
def test_batches_and_shared_prefixes_change_nothing(checkpoint, folder, name, monkeypatch):
    monkeypatch.setattr(likelihood, "CPU_TOKENS", 1000)  # several batches
    monkeypatch.setattr(likelihood, "HEAD_TOKENS", 7)
    model, tokenizer = store.load(checkpoint)
    asked = items.read(name, str(folder), 0, None)
    result = made_up.score(checkpoint, name, folder)
    hits = {"acc": [], "acc_norm": []}
    for item, given in zip(asked.items, result.items):
        pairs = zip(item.contexts, item.continuations)
        plain = [plainly(model, likelihood.encode(tokenizer, *pair)) for pair in pairs]
        values = [value for value, _ in plain]
        assert given["log_likelihoods"] == pytest.approx(values, rel=1e-6, abs=1e-5)
        lengths = [len(text) - 1 for text in item.continuations]
        if name == "hellaswag_completion":
            lengths = [len(tokenizer.encode(text)) for text in item.continuations]
        means = [value / length for value, length in zip(values, lengths)]
        best, best_norm = values.index(max(values)), means.index(max(means))
        hits["acc"].append(plain[0][1] if name == "lambada_openai" else best == item.answer)
        hits["acc_norm"].append(best_norm == item.answer)
    for figure in {"acc", "acc_norm"} & result.figures.keys():
        assert result.figures[figure] == pytest.approx(sum(hits[figure]) / len(hits[figure]))
        assert [item[figure] for item in result.items] == hits[figure]
    if name == "lambada_openai":
        loss = -sum(item["log_likelihoods"][0] for item in result.items) / len(result.items)
        assert result.figures["perplexity"] == pytest.approx(2.718281828**loss)


ITEMS = [
    [Sequence([5, 6, 7], 1), Sequence([5, 6, 8], 1)],  # differ in the last token only
    [Sequence([5, 6], 1), Sequence([7, 6], 1)],  # in the first
    [Sequence([5, 6, 7, 8], 3), Sequence([5, 6, 7, 9, 9], 3), Sequence([5, 6, 7], 2)],
    [Sequence([*range(120)], 4), Sequence([*range(121)], 96)],  # lose their beginning
    [Sequence([*range(90), 5, end], 2) for end in range(40)],  # longer together than the context
    [Sequence([9, 9], 1)] * 2,
    [Sequence([9, 8, 7, 6], 3), Sequence([9, 7, 5], 2)],
]


@pytest.mark.parametrize("largest", [likelihood.LARGEST, 100, 5])
def test_sequences_that_share_all_or_nothing(checkpoint, monkeypatch, largest):
    monkeypatch.setattr(likelihood, "LARGEST", largest)
    model, _ = store.load(checkpoint)
    found = likelihood.score(model.eval(), ITEMS, runtime.start("cpu", "float32"), "")
    for item, scores in zip(ITEMS, found, strict=True):
        for sequence, each in zip(item, scores):
            value, greedy = plainly(model, sequence)
            assert each.log_likelihood == pytest.approx(value, rel=1e-6, abs=1e-5)
            assert each.greedy == greedy


def test_compiled_blocks_read_branches_like_whole_sequences(checkpoint, monkeypatch):
    model, _ = store.load(checkpoint)
    rt = runtime.start("cpu", "float32")
    packing.place(model, rt, "float32", "int8")
    together = likelihood.score(model, ITEMS, rt, "")
    monkeypatch.setattr(likelihood, "LARGEST", 0)
    for scores, others in zip(together, likelihood.score(model, ITEMS, rt, ""), strict=True):
        for one, other in zip(scores, others, strict=True):
            assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-6, abs=1e-5)


def test_greedy_continuations(checkpoint):
    model, _ = store.load(checkpoint)
    ids = [3, 4]
    for _ in range(3):
        ids.append(model.eval()(torch.tensor([ids]))[0, -1].argmax().item())
    rows = [[Sequence(ids, 3), Sequence([*ids[:-1], (ids[-1] + 1) % 400], 3)]]
    [[yes, no]] = likelihood.score(model, rows, runtime.start("cpu", "float32"), "")
    assert yes.greedy and not no.greedy


def test_most_of_what_is_computed_is_needed(monkeypatch):
    """Few positions are padding, and contexts are read once for four endings."""
    seen = []
    forward = Transformer.forward

    def counting(self, idx, cache=None):
        seen.append(idx.numel())
        return forward(self, idx, cache)

    monkeypatch.setattr(Transformer, "forward", counting)
    model = GPT(GPTConfig(300, 256, n_layer=1, n_head=1, n_embd=4)).init_weights(0).eval()
    tokenizer, rows = Tokenizer.bytes(), []
    for record in made_up.items_of("hellaswag", 100, seed=0):
        item = TASKS["hellaswag"].item(items.as_record(record, TASKS["hellaswag"].record, ""))
        pairs = zip(item.contexts, item.continuations)
        rows.append([likelihood.encode(tokenizer, *pair) for pair in pairs])
    likelihood.score(model, rows, runtime.start("cpu", "float32"), "")
    apart = sum(len(each.ids) - 1 for row in rows for each in row)
    once = sum(group.length for group in likelihood.grouped(rows, block_size=256))
    assert 0.9 * sum(seen) < once < 0.7 * apart
    seen.clear()
    alone = [[row[0]] for row in rows]
    likelihood.score(model, alone, runtime.start("cpu", "float32"), "")
    assert sum(len(row[0].ids) - 1 for row in rows) > 0.8 * sum(seen)


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"quantize": "int8"}])
def test_other_precisions_come_close(checkpoint, folder, settings):
    exact = made_up.score(checkpoint, "arc_easy", folder)
    rough = made_up.score(checkpoint, "arc_easy", folder, **settings)
    for one, other in zip(exact.items, rough.items):
        assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], rel=0.1)
    assert exact.items != rough.items


# --- texts and borders of tokens


def test_hellaswag_loses_its_brackets():
    kind = TASKS["hellaswag"].record
    endings = [" [step] an  ending", "two [title] Parts"]
    record = kind("Making tea", "A cup [header] stands.", "THE pot", endings, "1")
    item = TASKS["hellaswag"].item(record)
    assert item.contexts[0] == "Making tea: A cup stands. The pot"
    assert item.continuations == ("  an ending", " two. Parts")


@pytest.mark.parametrize(
    "context, continuation, before, after",
    [
        ("ab", " c", "ab", " c"),
        ("ab ", " c", "ab", "  c"),
        ("ab\n", "c", "ab", "\nc"),
        ("", " c", None, " c"),
        ("  ", "c", None, "  c"),
    ],
)
def test_where_a_context_ends(context, continuation, before, after):
    tokenizer = Tokenizer.bytes()
    found = likelihood.encode(tokenizer, context, continuation)
    ids = [tokenizer.eot_id] if before is None else tokenizer.encode(before)
    assert found == Sequence([*ids, *tokenizer.encode(after)], len(after))


# --- where items come from


def test_your_own_items(checkpoint, tmp_path):
    choices = {"context": "a b", "choices": ["c", "d e"], "answer": 1}
    path = made_up.write(tmp_path / "mine.jsonl", [choices, choices | {"answer": 0}])
    result = made_up.score(checkpoint, str(path))
    assert result.figures["acc"] == 0.5 and result.task == str(path)
    assert sorted(item["answer"] for item in result.items) == [0, 1]
    path = made_up.write(tmp_path / "gaps.jsonl", [{"context": "", "continuation": "c"}])
    assert set(made_up.score(checkpoint, str(path)).figures) == {"acc", "perplexity"}


def test_parquet_and_the_layout_of_the_hub(checkpoint, folder, tmp_path):
    """A copy of the repository, with its own names for configs and splits, through `datasets`."""
    for name, place in [
        ("arc_easy", "ai2_arc/ARC-Easy/test-00000-of-00001.parquet"),
        ("arc_easy_train", "ai2_arc/ARC-Easy/train-00000-of-00001.parquet"),
        ("hellaswag", "hellaswag/data/validation-00000-of-00001.parquet"),
        ("piqa", "piqa.parquet"),
    ]:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        pq.write_table(pa.Table.from_pylist([json.loads(line) for line in lines]), tmp_path / place)
    files = "\n".join(f"  - split: {s}\n    path: ARC-Easy/{s}-*" for s in ("train", "test"))
    text = f"---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n{files}\n---\n"
    (tmp_path / "ai2_arc/README.md").write_text(text)
    for name, shots in [("hellaswag", 0), ("piqa", 0), ("arc_easy", 2)]:
        here = items.read(name, str(folder), shots, 7)
        there = items.read(name, str(tmp_path), shots, 7)
        assert len(here.items) == 7 and here.items == there.items
        assert here.data.values() != there.data.values()


def test_a_hub_that_does_not_answer(monkeypatch):
    def refuse(*_):
        raise ConnectionError("no answer from the hub: is there a network?")

    monkeypatch.setattr(items, "hub_rows", refuse)
    with pytest.raises(ConnectionError, match="is there a network.*--task_dir reads items from"):
        items.read("piqa", None, 0, None)


def test_a_download_that_breaks_says_what_the_same_command_does(monkeypatch):
    class Stream:
        def iter(self, size):
            raise TimeoutError("no more bytes")
            yield

    monkeypatch.setattr(hub, "hub_streams", lambda *_: [Stream()])
    monkeypatch.setattr(items, "impatient", lambda _: nullcontext())
    with pytest.raises(OSError, match="broke off .*no more bytes.* from the beginning$"):
        items.read("piqa", None, 0, None)
    with pytest.raises(OSError, match="record 0: .* resumes from the last saved progress$"):
        next(find_source("hf:own/er").batches(Position()))


def test_shots_come_from_the_training_split(folder):
    asked = items.read("piqa", str(folder), 3, None)
    plain = items.read("piqa", str(folder), 0, None)
    lines = (folder / "piqa_train.jsonl").read_text().splitlines()
    train = [json.loads(line) for line in lines]
    solved = [f"Question: {r['goal']}\nAnswer: {[r['sol1'], r['sol2']][r['label']]}" for r in train]
    for with_shots, without in zip(asked.items, plain.items):
        *shots, last = with_shots.contexts[0].split("\n\n")
        assert last == without.contexts[0]
        assert len(shots) == 3 == len({*shots} & {*solved})
    assert asked.items == items.read("piqa", str(folder), 3, None).items
    assert len(asked.data) == 2


def test_an_item_is_not_its_own_example(folder, tmp_path):
    records = made_up.items_of("hellaswag", 4, 0)
    for name in ("hellaswag", "hellaswag_train"):
        made_up.write(tmp_path / f"{name}.jsonl", records)
    asked = items.read("hellaswag", str(tmp_path), 3, None)
    plain = items.read("hellaswag", str(tmp_path), 0, None)
    for number, item in enumerate(asked.items):
        others = {items.solved(each) for n, each in enumerate(plain.items) if n != number}
        *shots, last = item.contexts[0].split("\n\n")
        assert {f"{shot}\n\n" for shot in shots} == others and last == plain.items[number].contexts[
            0
        ]


def test_examples_that_are_under_test_are_counted(checkpoint, tmp_path, capsys):
    records = made_up.items_of("winogrande", 12, 0)
    made_up.write(tmp_path / "winogrande.jsonl", records[:8])
    pool = made_up.write(tmp_path / "winogrande_train.jsonl", records[3:])
    made_up.score(checkpoint, "winogrande", tmp_path, shots=1)
    told = f"winogrande: the examples in {pool} include 5 of the 8 items under test\n"
    assert told in capsys.readouterr().err
    made_up.write(pool, records[8:])
    made_up.score(checkpoint, "winogrande", tmp_path, shots=1)
    assert "under test" not in capsys.readouterr().err


def test_copies_of_an_item_are_not_its_examples(tmp_path):
    first, second, third = made_up.items_of("piqa", 3, 0)
    made_up.write(tmp_path / "piqa.jsonl", [first] * 20)
    made_up.write(tmp_path / "piqa_train.jsonl", [first, first, first, second, third])
    copy = items.read("piqa", str(tmp_path), 0, 1).items[0]
    for item in items.read("piqa", str(tmp_path), 2, None).items:
        assert item.contexts[0].count("Answer:") == 3
        assert items.solved(copy) not in item.contexts[0]
    made_up.write(tmp_path / "piqa_train.jsonl", [first, first, first, second])
    with pytest.raises(
        eval.UserError, match="too few training items for --shots: 1, expected at least 2"
    ):
        items.read("piqa", str(tmp_path), 2, None)


# --- several processes


def evaluate(environment: dict[str, str], runs: list[list[str]], output: str) -> None:
    os.environ.update(environment)
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.exit(eval.main(runs[0]))


def test_two_processes_answer_as_one(checkpoint, folder, tmp_path):
    (tmp_path / "text.txt").write_text("A text of several windows, whatever it says. " * 20)
    tasks = ("perplexity", "hellaswag", "lambada_openai")
    settings = [f"--checkpoint={checkpoint}", f"--task_dir={folder}", "--device=cpu", "--stride=20"]
    settings += [f"--tasks={','.join(tasks)}", f"--text={tmp_path}/text.txt", "--dtype=float32"]
    found = []
    for world_size in (1, 2):
        place = tmp_path / str(world_size)
        place.mkdir()
        told = workers.run_all(world_size, place, [[*settings, f"--json={place}/a.json"]], evaluate)
        assert len(re.findall("^task  ", told, re.MULTILINE)) == 1
        found.append(json.loads((place / "a.json").read_text())["results"])
    for one, two in zip(*found, strict=True):
        assert one["figures"] == pytest.approx(two["figures"], rel=1e-6)
        for item, other in zip(one["items"], two["items"], strict=True):
            values = pytest.approx(item.pop("log_likelihoods"), rel=1e-6, abs=1e-5)
            assert other.pop("log_likelihoods") == values and item == other


# --- bad input

GOOD = {"context": "a", "choices": ["b", "c"], "answer": 0}
BROKEN = [
    ("", "mine.jsonl has no items"),
    ("{]", "mine.jsonl, line 1: not JSON"),
    ("[1, 2]", "mine.jsonl, record 1: expected {context, choices, answer} or {context, continuat"),
    ('{"goal": "a"}', "mine.jsonl, line 1: expected {context, choices, answer} or {context, cont"),
    (json.dumps(GOOD) + "\n{]", "mine.jsonl, line 2: not JSON"),
    (json.dumps(GOOD | {"answer": 2}), "line 1: the right answer is not among its 2 choices"),
    (json.dumps(GOOD | {"answer": -1}), "line 1: the right answer is not among its 2 choices"),
    (json.dumps(GOOD | {"answer": "b"}), "line 1: answer: expected a whole number, got a string"),
    (json.dumps(GOOD | {"choices": []}), "line 1: choices: expected"),
    (json.dumps(GOOD | {"choices": ["b", 1]}), "line 1: choices[1]: expected a string, got a"),
    (json.dumps(GOOD | {"choices": ["b"]}), "line 1: choices: expected a list of length >= 2"),
    (json.dumps(GOOD | {"choices": ["b", " "]}), "line 1: choices[1]: expected a string that is"),
    (json.dumps(GOOD | {"choices": ["b", "c", "b"]}), "1: choices[2] is the same as choices[0]"),
    (json.dumps(GOOD | {"continuation": "d"}), "line 1 has continuation, but the items of this"),
    (
        json.dumps(GOOD) + '\n{"context": "a", "continuation": "d"}',
        "mine.jsonl, line 2 has continuation, but the items of this file have choices: a file",
    ),
    (json.dumps(GOOD | {"context": 7}), "line 1: context: expected a string, got a whole number"),
    (json.dumps(GOOD | {"choices": ["b", "c " * 99]}), "line 1: a choice has "),
    ('{"context": "a", "continuation": ""}', "line 1: continuation: expected"),
]


@pytest.mark.parametrize("content, message", BROKEN)
def test_a_malformed_item_is_one_line(checkpoint, tmp_path, capsys, content, message):
    (tmp_path / "mine.jsonl").write_text(content)
    command = [f"--checkpoint={checkpoint}", f"--tasks={tmp_path}/mine.jsonl", "--device=cpu"]
    assert eval.main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") <= 4, error


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("hellaswag", {"label": ""}, "hellaswag.jsonl, line 3: label: expected"),
        ("hellaswag", {"label": "4"}, "line 3: the right answer is not among its 4 choices"),
        ("hellaswag", {"endings": None}, "line 3: endings: expected a list, got null"),
        ("arc_easy", {"answerKey": "F"}, "line 3: the right answer is not among its "),
        ("arc_easy", {"choices": ["a"]}, "line 3: choices: expected an object, got a list"),
        ("piqa", {"label": 2}, "line 3: the right answer is not among its 2 choices"),
        ("winogrande", {"sentence": "no gap"}, "line 3: sentence: expected"),
        ("winogrande", {"answer": ""}, "line 3: answer: "),
        ("lambada_openai", {"text": "word"}, "line 3: text: expected"),
    ],
)
def test_a_record_of_another_layout_names_its_line(folder, tmp_path, name, change, message):
    records = made_up.items_of(name, 4, 0)
    records[2] |= change
    made_up.write(tmp_path / f"{name}.jsonl", records)
    with pytest.raises(eval.UserError) as caught:
        items.read(name, str(tmp_path), 0, None)
    assert message in str(caught.value)
    assert len(items.read(name, str(tmp_path), 0, 2).items) == 2  # what is not read does not matter


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks=helaswag"], "unknown task 'helaswag'; did you mean 'hellaswag'?"),
        (["--tasks=lambada"], "unknown task 'lambada'; did you mean 'lambada_openai'?"),
        (["--tasks=xyz"], "unknown task 'xyz'; expected a file (.jsonl, "),
        (["--tasks=nowhere.jsonl"], "nowhere.jsonl is not a file"),
        (["--tasks=piqa", "--stride=3"], "text and stride are for --tasks=perplexity"),
        (["--tasks=perplexity", "--shots=3"], "shots and task_dir are for tasks that have items"),
        (["--tasks=piqa", "--shots=-1"], "shots must be at least 0, not -1"),
        (["--tasks=piqa", "--json=no/where/a.json"], "the folder of no/where/a.json does not"),
        (["--tasks=piqa", "--task_dir=nowhere"], "nowhere has no piqa.jsonl, piqa.json, piqa.par"),
        (["--tasks=lambada_openai", "--shots=2"], "lambada_openai_train.jsonl, which does not"),
        (
            ["--tasks=piqa", "--shots=12"],
            "too few training items for --shots: 12, expected at least 13",
        ),
        (
            ["--tasks=arc_easy", "--shots=13"],
            "too few training items for --shots: 12, expected at least 13",
        ),
    ],
)
def test_settings_that_do_not_fit_are_one_line(checkpoint, folder, capsys, arguments, message):
    command = [f"--checkpoint={checkpoint}", "--device=cpu"]
    if not {"--tasks=perplexity", "--task_dir=nowhere"} & {*arguments}:
        command.append(f"--task_dir={folder}")
    assert eval.main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("broken.jsonl", "broken.jsonl, line 2: missing field"),
        ("arc_easy", "broken has no arc_easy.jsonl"),
        ("perplexity", "text.txt has 1 token: expected at least 2"),
    ],
)
def test_all_is_read_before_the_first_model_runs(
    checkpoint, folder, tmp_path, capsys, monkeypatch, last, message
):
    (tmp_path / "broken").mkdir()
    for path in (tmp_path / "broken.jsonl", tmp_path / "broken" / "piqa.jsonl"):
        made_up.write(path, made_up.items_of("piqa", 3, 0) if path.stem == "piqa" else [GOOD, {}])
    (tmp_path / "text.txt").write_text("a")
    monkeypatch.setattr(Transformer, "forward", pytest.fail)
    tasks = f"piqa,{tmp_path / last if '.' in last else last}"
    command = [f"--checkpoint={checkpoint}", f"--task_dir={tmp_path}/broken", f"--tasks={tasks}"]
    command += [f"--text={tmp_path}/text.txt"] if last == "perplexity" else []
    assert eval.main([*command, "--device=cpu"]) == 2
    assert message in capsys.readouterr().err


def test_weights_that_are_not_finite_are_refused(checkpoint, folder):
    model, tokenizer = store.load(checkpoint)
    model.transformer.ln_f.weight.data.fill_(float("inf"))
    asked = items.read("piqa", str(folder), 0, None)
    encoded = eval.choices.encoded(asked, tokenizer, model.config.block_size)
    with pytest.raises(eval.UserError, match="logits are not finite"):
        eval.choices.measure(encoded, model, runtime.start("cpu", "float32"))


# --- results


def test_figures_survive_a_later_task(checkpoint, folder, tmp_path, capsys, monkeypatch):
    """They are printed and written; the error is the last line, and the exit status is 2."""
    really, names = likelihood.score, iter(["piqa"])

    def score(*arguments):
        if next(names, None):
            return really(*arguments)
        raise eval.UserError("out of order")

    monkeypatch.setattr(likelihood, "score", score)
    command = [f"--checkpoint={checkpoint}", f"--task_dir={folder}", "--device=cpu"]
    command += ["--tasks=piqa,arc_easy,hellaswag", f"--json={tmp_path}/a.json"]
    assert eval.main(command) == 2
    out, err = capsys.readouterr()
    assert "piqa  acc_norm  " in out and "arc_easy" not in out
    assert err.endswith("error: out of order\n")
    saved = json.loads((tmp_path / "a.json").read_text())
    assert [result["task"] for result in saved["results"]] == ["piqa"]


def test_the_json_file_holds_everything(checkpoint, folder, tmp_path):
    path = tmp_path / "a.json"
    result = made_up.score(checkpoint, "hellaswag", folder, json=str(path), limit=5)
    saved = json.loads(path.read_text())
    assert saved["checkpoint"] == str(checkpoint) and "torch" in saved["versions"]
    assert saved["settings"]["tasks"] == ["hellaswag"] and saved["settings"]["limit"] == 5
    [found] = saved["results"]
    assert found["figures"] == result.figures and found["items"] == result.items
    assert len(found["items"]) == 5 and found["items"][4]["item"].endswith("line 5")
    assert list(found["data"]) == [str(folder / "hellaswag.jsonl")]
    values = torch.tensor([float(item["acc"]) for item in result.items])
    assert found["standard_errors"]["acc"] == pytest.approx(values.std().item() / 5**0.5)
    assert "lm-evaluation-harness" in found["protocol"]
