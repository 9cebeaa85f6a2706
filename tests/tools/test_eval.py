"""Scores equal those of training; answers are compared, kept and judged."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import save_checkpoint
from test_train import cfg  # noqa: F401

import prepare
import train
from configurator import UserError
from model import GPT, GPTConfig
from plaingpt.evaluation import judge, loss
from plaingpt.text.tokenizer import Tokenizer
from tools import eval

REPO = Path(__file__).parents[2]
COLOURS = {"sky": "blue", "grass": "green", "snow": "white", "coal": "black"}


@pytest.fixture(scope="module")
def run(cfg, tmp_path_factory):  # noqa: F811
    out_dir = tmp_path_factory.mktemp("run")
    return train.train(replace(cfg, out_dir=str(out_dir))), str(out_dir), cfg.data_dir


@pytest.fixture(scope="module")
def taught(cfg, tmp_path_factory):  # noqa: F811
    """Four questions and answers, and a model that was trained until it knows them."""
    folder = tmp_path_factory.mktemp("taught")
    told = [
        {
            "messages": [
                {"role": "user", "content": f"{what}?"},
                {"role": "assistant", "content": how},
            ]
        }
        for what, how in COLOURS.items()
    ]
    (folder / "qa.json").write_text(json.dumps(told * 2))
    words = [f"--sources={folder}/qa.json", "--template=chat", "--val_fraction=0"]
    assert prepare.main([*words, "--tokenizer=bytes", f"--data_dir={folder}/data"]) == 0
    for name in ("000000.bin", "000000.mask.bin"):  # ask what it was trained on
        shutil.copy(folder / f"data/train_{name}", folder / f"data/val_{name}")
    (folder / "data/dataset.json").unlink()
    changes = {"block_size": 48, "max_steps": 160, "dropout": 0.0, "eval_interval": 1000}
    paths = {"data_dir": f"{folder}/data", "out_dir": f"{folder}/out"}
    train.train(
        replace(
            cfg, **changes, **paths, stride=1, batch_size=8, log_interval=100, save_interval=1000
        )
    )
    return paths


def figures_of(*arguments, **settings):
    [result] = eval.score(eval.EvalConfig(*arguments, **settings))
    return result.figures


def test_the_loss_equals_that_of_training(run, capsys):
    last, out_dir, data_dir = run
    scores = figures_of(out_dir, device="cpu")  # on what it was trained on
    assert scores["loss"] == pytest.approx(last["val_loss"], abs=1e-3)
    assert scores["perplexity"] == pytest.approx(2.718281828 ** scores["loss"])
    out = capsys.readouterr().out
    assert f"{scores['loss']:.4f} nats per token" in out and f"data_dir = '{data_dir}'" in out
    fewer = figures_of(out_dir, data_dir, limit=3, device="cpu")
    assert fewer["tokens"] == 3 * 16 < scores["tokens"]


def test_int8_weights_cost_little(run):
    _, out_dir, data_dir = run
    settings = {"device": "cpu", "dtype": "float32"}
    exact = figures_of(out_dir, data_dir, **settings)["loss"]
    packed = figures_of(out_dir, data_dir, **settings, quantize="int8")["loss"]
    assert packed != exact == pytest.approx(packed, rel=0.01)


def test_bits_per_byte(tmp_path):
    (tmp_path / "text.txt").write_text("All of it counts. " * 300)
    words = [f"--sources={tmp_path}/text.txt", f"--data_dir={tmp_path}/data", "--vocab_size=300"]
    assert prepare.main(words) == 0
    tokenizer = Tokenizer.load(tmp_path / "data")
    shape = GPTConfig(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=1, n_head=1, n_embd=8)
    folder = save_checkpoint(tmp_path / "out", GPT(shape).init_weights(0), tokenizer)
    scores = figures_of(str(folder), str(tmp_path / "data"), device="cpu")
    val = json.loads((tmp_path / "data/dataset.json").read_text())["splits"]["val"]
    bits = scores["loss"] / 0.6931472 * val["tokens"] / val["bytes"]
    assert scores["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert loss.bits_per_byte(0.6931472, 1.0) == pytest.approx(1.0)


def test_learned_answers_match(taught, capsys):
    command = [f"--checkpoint={taught['out_dir']}", f"--data_dir={taught['data_dir']}"]
    assert eval.main([*command, "--tasks=perplexity,answers", "--device=cpu"]) == 0
    out = capsys.readouterr().out
    assert "answers: 100.0% equal, F1 1.000 (8 questions)" in out
    assert "### User:\nsky?" in out and "> blue\n= blue\n" in out
    assert "answers only)" in out and "bits per byte" not in out
    assert eval.main([*command, "--tasks=answers", "--limit=1", "--device=cpu"]) == 0
    assert "(1 question)" in capsys.readouterr().out


def test_answers_are_kept_and_judged(taught, tmp_path, monkeypatch, capsys):
    path, scores = tmp_path / "answers.jsonl", iter(["90", "80"])
    command = [f"--checkpoint={taught['out_dir']}", f"--data_dir={taught['data_dir']}"]
    command += ["--tasks=answers", "--limit=3", "--device=cpu", f"--answers={path}"]
    command += ["--judge=http://127.0.0.1:9/v1", "--judge_model=m", f"--json={tmp_path}/all.json"]

    def ask(judge, prompt, where):
        if score := next(scores, None):
            return score
        raise UserError(f"{where}: no reply")

    monkeypatch.setattr(judge, "ask", ask)
    monkeypatch.setattr(judge, "AT_ONCE", 1)
    assert eval.main(command) == 2
    out, err = capsys.readouterr()
    assert "answers  bleu " in out and "judge" not in out and "line 3: no reply" in err
    scores = iter(["70"])
    assert eval.main(command) == 0
    assert re.search(r"^judge    score +80.0000  ± 5.7735 +3$", capsys.readouterr().out, re.M)
    answers, judgements = json.loads((tmp_path / "all.json").read_text())["results"]
    assert answers["items"] == [json.loads(line) for line in path.read_text().splitlines()]
    assert {"question", "reference", "answer", "exact", "f1"} == answers["items"][0].keys()
    assert answers["figures"].keys() == {"exact", "f1", "bleu", "chrf"}
    assert [item["score"] for item in judgements["items"]] == [90, 80, 70]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks=answers"], "there are no questions in "),
        (["--tasks=perplexty"], "unknown task 'perplexty'; did you mean 'perplexity'?"),
        (["--tasks="], "tasks is empty"),
        (["--answers=a.jsonl"], "--answers needs --tasks=answers"),
        (["--tasks=answers", "--answers=a.txt"], "answers must end with .jsonl, not 'a.txt'"),
        (["--tasks=answers", "--answers=no/a.jsonl"], "the folder of no/a.jsonl does not exist"),
        (
            ["--tasks=answers", "--answers=x.jsonl"],
            "answers=x.jsonl exists and holds something else",
        ),
        (["--tasks=x.jsonl", "--json=x.jsonl"], "x.jsonl is read as well: choose another file"),
        (["--json=."], ". is a folder, where a file is to be written"),
        (
            ["--tasks=answers", "--answers=b.jsonl", "--judge=http://a/v1", "--judge_model=m"],
            "b.judged.jsonl is a folder, where a file is to be written",
        ),
        (["--judge_model=m"], "judging needs --judge, --judge_model and --answers=FILE"),
        (["--judge=127.0.0.1:80"], "judge must be an address like http://"),
        (["--judge=file:///etc/passwd"], "judge must be an address like http://"),
        (["--judge=http://a:b/v1"], "judge must be an address like http://"),
        (["--judge=http://me:secret@a/v1"], "judge must be an address like http://"),
        (["--judge=http://a b/v1"], "judge must be an address like http://"),
        (["--limit=0"], "limit must be at least 1"),
        (["--data_dir=nowhere"], "there is no data in nowhere"),
        (
            ["--data_dir=None", "--checkpoint=foreign"],
            "foreign does not say what it was trained on",
        ),
        (["--checkpoint=nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, monkeypatch, capsys, arguments, message):
    _, out_dir, data_dir = run
    monkeypatch.chdir(tmp_path)
    Path("b.judged.jsonl").mkdir()
    shutil.copytree(f"{out_dir}/best", "foreign", ignore=shutil.ignore_patterns("state.json"))
    Path("x.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 0}\n')
    command = [f"--checkpoint={out_dir}", f"--data_dir={data_dir}", "--device=cpu"]
    assert eval.main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "judgements", "message"),
    [
        ("schlüssel", "", "OPENAI_API_KEY has characters that no key has"),
        ("", "{}\n", "a.judged.jsonl, line 1: missing field question"),
    ],
)
def test_what_a_judge_needs_is_checked_first(
    taught, tmp_path, monkeypatch, capsys, key, judgements, message
):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setattr(eval.questions, "measure", pytest.fail)
    (tmp_path / "a.judged.jsonl").write_text(judgements)
    command = [f"--checkpoint={taught['out_dir']}", f"--data_dir={taught['data_dir']}"]
    command += ["--tasks=answers", "--device=cpu", f"--answers={tmp_path}/a.jsonl"]
    assert eval.main([*command, "--judge=http://127.0.0.1:9/v1", "--judge_model=m"]) == 2
    assert message in capsys.readouterr().err


def test_figures_that_do_not_vary_have_no_standard_error():
    varied, alike = (
        eval.table([eval.Result("t", "", {"acc": 0.5}, [{"acc": each} for each in values])])
        for values in ([1, 0], [1, 1])
    )
    assert "± 0.5000" in varied and "±" not in alike


def test_torchrun_prints_an_error_once():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command = [*torchrun, "--standalone", str(REPO / "tools" / "eval.py"), "--limit=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode and done.stderr.count("error: limit must be at least 1") == 1


def test_data_of_another_tokenizer_is_refused(run, tmp_path, tiny_text, capsys):
    _, out_dir, data_dir = run
    for path in Path(data_dir).glob("*.bin"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    Tokenizer.train([tiny_text], 300).save(tmp_path)
    assert eval.main([f"--checkpoint={out_dir}", f"--data_dir={tmp_path}"]) == 2
    assert "have different tokenizers" in capsys.readouterr().err
