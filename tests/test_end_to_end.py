"""The three commands one after another, the README's commands, and every file in config/."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2LMHeadModel

import configurator
import prepare
import sample
import train
from tools import eval, export, serve

REPO = Path(__file__).parents[1]
CLASSES = {
    "prepare.py": prepare.PrepareConfig,
    "train.py": train.TrainConfig,
    "sample.py": sample.SampleConfig,
    "tools.export": export.ExportConfig,
    "tools.serve": serve.ServeConfig,
    "tools.eval": eval.EvalConfig,
}
CONFIGS = sorted(path.relative_to(REPO).as_posix() for path in (REPO / "config").glob("*.py"))


def commands_of(text: str) -> list[tuple[str, list[str]]]:
    """(script, arguments) of each `python script.py …` command, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", text)
    found = []
    for line in re.findall(r"^(?:    )?((?:pip|python) .*)$", text, flags=re.MULTILINE):
        for command in line.split("  #")[0].split(" && "):
            words = shlex.split(command)
            words = [word for word in words if word != "-m"]
            if words[0] == "python" and words[1] in CLASSES:
                found.append((words[1], words[2:]))
    return found


def run(script: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / script), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8")


def test_from_nothing_to_text_with_the_default_paths(tmp_path):
    """The quick start, with a smaller vocabulary, model and number of steps."""
    tiny = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --max_steps=6 --eval_tokens=2000"
    steps = [
        ("prepare.py", ["--vocab_size=300"]),
        ("train.py", [*tiny.split(), "--eval_interval=3"]),
        ("train.py", [*tiny.split(), "--max_steps=8", "--init_from=resume"]),
        ("sample.py", ["--start", "def main(", "--max_new_tokens=20"]),
    ]
    for script, arguments in steps:
        done = run(script, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def main(")
    step = tmp_path / "out" / "stdlib" / "step_000008"
    model = GPT2LMHeadModel.from_pretrained(step)
    tokenizer = AutoTokenizer.from_pretrained(step)
    ids = tokenizer("def main(", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=5).shape[1] == ids["input_ids"].shape[1] + 5


def test_bad_input_is_one_line_and_status_2_in_every_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for script, cls in CLASSES.items():
        main = sys.modules[cls.__module__].main
        assert main(["--no_such_setting=1"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: command line: unknown setting 'no_such_setting'")
        if script != "prepare.py":
            assert main([]) == 2
            err = capsys.readouterr().err
            assert err.startswith("error: ") and "stdlib" in err and len(err.splitlines()) == 1
    done = run("sample.py", cwd=tmp_path)  # and as a process
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_loads_and_its_header_names_commands_that_parse(path, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    header = (REPO / path).read_text(encoding="utf-8").split('"""')[1]
    commands = commands_of(header)
    assert any(path in arguments for _, arguments in commands)
    for word in () if "data_" in path else ("Hardware:", "Tokens:", "Expect:"):
        assert word in header
    for script, arguments in commands:
        configurator.resolve(CLASSES[script], arguments)
    if "finetune_" in path:
        assert train.main([path, "--plan"]) == 2  # for want of data
        assert "there is no data in data/" in capsys.readouterr().err
    elif "data_" not in path:
        assert train.main([path, "--plan"]) == 0
        assert "parameters" in capsys.readouterr().out


def test_a_config_holds_only_what_differs_from_the_defaults(monkeypatch):
    monkeypatch.chdir(REPO)
    for path in CONFIGS:
        cls = prepare.PrepareConfig if "data_" in path else train.TrainConfig
        defaults = {field.name: field.default for field in fields(cls)}
        cfg, origin = configurator.resolve(cls, [path])
        assert [name for name in origin if getattr(cfg, name) == defaults[name]] == [], path


def test_every_command_of_a_scripts_header_parses(monkeypatch):
    monkeypatch.chdir(REPO)
    for script in CLASSES:
        path = script if script.endswith(".py") else script.replace(".", "/") + ".py"
        header = (REPO / path).read_text(encoding="utf-8").split('"""')[1]
        commands = commands_of(header)
        assert commands
        for name, arguments in commands:
            configurator.resolve(CLASSES[name], arguments)


def test_every_command_of_the_readme_parses(monkeypatch):
    monkeypatch.chdir(REPO)
    commands = commands_of((REPO / "README.md").read_text(encoding="utf-8"))
    assert {script for script, _ in commands} == set(CLASSES)
    for script, arguments in commands:
        configurator.resolve(CLASSES[script], arguments)


def test_gpt2_124m_trains_on_a_cpu(tmp_path, monkeypatch):
    """Two real steps at full width and vocabulary, of fewer layers, on short windows."""
    monkeypatch.chdir(REPO)
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 400)
    source = f"--sources={tmp_path}/text.txt"
    assert prepare.main([source, f"--data_dir={tmp_path}/data", "--vocab_size=300"]) == 0
    cfg, _ = configurator.resolve(train.TrainConfig, ["config/gpt2_124m.py"])
    short = {"n_layer": 2, "block_size": 32, "batch_size": 2, "micro_batch_size": 1, "max_steps": 2}
    paths = {"data_dir": f"{tmp_path}/data", "out_dir": f"{tmp_path}/out"}
    last = train.train(
        replace(cfg, **short, **paths, vocab_multiple=50304, sample_interval=0, warmup_steps=1)
    )
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/metrics.jsonl").open()]
    assert last["step"] == len(losses) == 2 and losses[1] < losses[0] - 0.1
