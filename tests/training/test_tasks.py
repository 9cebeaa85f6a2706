"""Tasks that are measured on the way: the figures of tools.eval, and a run that does not notice."""

import json
import re
import shutil
from dataclasses import replace

import made_up
import pytest
from test_train import cfg, records, same  # noqa: F401

import train
from configurator import UserError
from plaingpt.checkpoint import folders, hugging_face, store
from plaingpt.evaluation import choices
from plaingpt.generation import NOT_FINITE
from plaingpt.training import run_folder
from tools import eval

WORDS = ["alpha", "beta", "gamma", "delta"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Items whose choices a model of four words tells apart, a gap, and a text."""
    folder = tmp_path_factory.mktemp("items")
    asked = [{"context": word, "choices": WORDS, "answer": n} for n, word in enumerate(WORDS)]
    made_up.write(folder / "mine.jsonl", asked * 3)
    made_up.write(folder / "gaps.json", [{"context": "al", "continuation": "pha"}])
    made_up.write(folder / "piqa.jsonl", made_up.items_of("piqa", 7, seed=0))
    for name in ("mine.jsonl", "piqa.jsonl"):  # the context is 16 bytes
        lines = (folder / name).read_text().splitlines()
        short = [
            {key: value[:9] if isinstance(value, str) else value for key, value in each.items()}
            for each in map(json.loads, lines)
        ]
        made_up.write(folder / name, short)
    (folder / "words.txt").write_text("alpha beta gamma delta\n" * 9)
    return folder


@pytest.fixture
def asking(cfg, folder, tmp_path):  # noqa: F811
    names = (f"{folder}/mine.jsonl", f"{folder}/gaps.json", "piqa", f"{folder}/words.txt")
    out_dir = str(tmp_path / "run")
    return replace(cfg, out_dir=out_dir, tasks=names, task_dir=str(folder), dtype="float32")


def figures_of(record: dict) -> dict:
    return {name: value for name, value in record.items() if "/" in name}


def without_figures(out_dir) -> list[dict]:
    return [{key: r[key] for key in r if "/" not in key} for r in records(out_dir)]


def test_a_run_does_not_notice_its_tasks_and_resumes_exactly(asking, tmp_path, capsys):
    train.train(asking)
    plain = replace(asking, tasks=(), out_dir=str(tmp_path / "plain"))
    train.train(plain)
    run = tmp_path / "run"
    one, other = folders.find(run), folders.find(plain.out_dir)
    assert same(hugging_face.read_weights(one), hugging_face.read_weights(other))
    assert same(store.read_optimizer(one), store.read_optimizer(other))
    assert without_figures(run) == records(plain.out_dir)
    whole = records(run)
    assert [r["step"] for r in whole if figures_of(r)] == [10, 20]
    for step in (14, 20):
        shutil.rmtree(run / f"step_{step:06d}")
    train.train(replace(asking, init_from="resume"))
    assert records(run) == whole


def test_the_figures_are_those_of_tools_eval(asking, capsys):
    last = train.train(replace(asking, task_limit=5, task_interval=7))
    out = capsys.readouterr().out
    sizes = "mine (5 items), gaps (1 item), piqa (5 items), words (80 tokens)"
    assert f"Tasks: {sizes}; measured 3 times, " in out
    known = records(asking.out_dir)
    assert [r["step"] for r in known if figures_of(r)] == [7, 14, 20]
    results = eval.score(
        eval.EvalConfig(
            checkpoint=asking.out_dir,
            tasks=asking.tasks,
            task_dir=asking.task_dir,
            limit=5,
            device="cpu",
            dtype="float32",
        )
    )
    expected = {
        f"{name}/{figure}": value
        for name, result in zip(("mine", "gaps", "piqa", "words"), results)
        for figure, value in result.scores.items()
    }
    assert figures_of(last) == pytest.approx(expected, rel=1e-5) == figures_of(known[-1])
    assert {"mine/acc_norm", "gaps/perplexity", "words/bits_per_byte"} <= expected.keys()
    assert "words/tokens" not in expected
    line = f"step 20: mine: {results[0].in_words()} (5 items, "
    assert re.search(rf"^{re.escape(line)}\d+\.\d s\)$", out, re.M)
    assert re.search(r"acc \d\.\d{4} ± \d\.\d{4}, acc_norm", line)


def test_a_fine_tuning_is_measured_before_its_first_step(asking, cfg, tmp_path):  # noqa: F811
    train.train(replace(cfg, out_dir=str(tmp_path / "base"), max_steps=1))
    tuned = replace(asking, init_from=str(tmp_path / "base"), max_steps=2, task_interval=50)
    train.train(tuned)
    assert [r["step"] for r in records(tuned.out_dir) if figures_of(r)] == [0, 2]


def test_answers_to_questions_are_measured(cfg, shard_folder, tmp_path, capsys):  # noqa: F811
    data = shard_folder([list(b"alpha beta " * 50)], [list(b"alpha beta " * 5)], manifest=False)
    mask = [byte == ord("b") for byte in b"alpha beta " * 5]
    (data / "val_000000.mask.bin").write_bytes(bytes(mask))
    run = replace(cfg, data_dir=str(data), out_dir=str(tmp_path), max_steps=1, tasks=("answers",))
    last = train.train(replace(run, task_limit=3))
    assert figures_of(last).keys() == {
        f"answers/{name}" for name in ["exact", "f1", "bleu", "chrf"]
    }
    assert "step 1: answers: exact 0.0000, f1 " in capsys.readouterr().out


def test_a_model_that_is_not_finite_has_no_figures_and_trains_on(asking, monkeypatch, capsys):
    real = choices.measure

    def not_finite(encoded, model, rt):
        if encoded.asked.name == "piqa":
            raise UserError(NOT_FINITE)
        return real(encoded, model, rt)

    monkeypatch.setattr(choices, "measure", not_finite)
    last = train.train(asking)
    assert f"step 20: piqa: not measured: {NOT_FINITE}" in capsys.readouterr().out
    assert "mine/acc" in last and "piqa/acc" not in last and last["step"] == 20


@pytest.mark.parametrize(
    "tasks, content, message",
    [
        (("helaswag",), "", "unknown task 'helaswag'; did you mean 'hellaswag'?"),
        (("perplexity",), "", "unknown task 'perplexity'; expected a file (.jsonl, "),
        (("nowhere.jsonl",), "", "nowhere.jsonl is not a file"),
        (("nowhere.txt",), "", "nowhere.txt is not a file"),
        (("piqa", "{here}/piqa.jsonl"), "", "2 tasks are named piqa: their figures need names"),
        (("hellaswag",), "", "has no hellaswag.jsonl, hellaswag.json, hellaswag.parquet"),
        (
            ("{here}/piqa.jsonl",),
            '{"context": "a", "choices": ["b", "c"]}',
            "line 1: missing field",
        ),
        (
            ("{here}/piqa.jsonl",),
            '{"context": "a", "continuation": "a word of 17 bytes"}',
            "line 1: a choice has 19 tokens; the model's context is 16",
        ),
        (("answers",), "", "there are no questions in "),
    ],
)
def test_a_task_that_cannot_be_measured_ends_the_run_at_its_start(
    asking, tmp_path, tasks, content, message
):
    (tmp_path / "piqa.jsonl").write_text(content)
    names = tuple(name.format(here=tmp_path) for name in tasks)
    with pytest.raises(UserError, match=re.escape(message)):
        train.train(replace(asking, tasks=names, task_dir=str(tmp_path)))
    assert not (tmp_path / "run").exists()


@pytest.mark.plots
def test_shares_have_a_panel_of_their_own(tmp_path):
    records = [{"step": step, "loss": 5 / step} for step in range(1, 9)]

    def height() -> int:
        run_folder.plot(records, tmp_path / "loss.png")
        return int.from_bytes((tmp_path / "loss.png").read_bytes()[20:24], "big")

    before = height()
    records[-1]["words/perplexity"] = 9.0
    assert height() == before
    records[-1] |= {"mine/acc": 0.5, "mine/acc_norm": 0.4, "piqa/acc": None}
    assert height() > before


def test_a_run_that_ends_early_measures_its_tasks_at_the_end(asking):
    ending = {"max_steps": 20, "eval_interval": 2, "patience": 1, "task_interval": 15}
    train.train(replace(asking, learning_rate=100.0, **ending))
    steps = [record["step"] for record in records(asking.out_dir) if figures_of(record)]
    assert len(steps) == 1 and steps[0] < 15
