"""The three commands one after another, every command of the docs, and every file in config/."""

import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import hf_trainer
import make_instructions
import pytest
import to_gguf
import torch.distributed.run
import yaml
from conftest import save_checkpoint
from transformers import AutoTokenizer, GPT2LMHeadModel

import configurator
import prepare
import sample
import train
from model import GPT, GPTConfig
from plaingpt.text.tokenizer import Tokenizer
from tools import bench, compare, eval, experiment, export, figures, pairs, serve

REPO = Path(__file__).parents[1]
CLASSES = {
    "prepare.py": prepare.PrepareConfig,
    "train.py": train.TrainConfig,
    "sample.py": sample.SampleConfig,
    "tools.export": export.ExportConfig,
    "tools.serve": serve.ServeConfig,
    "tools.eval": eval.EvalConfig,
    "tools.compare": compare.CompareConfig,
    "tools.experiment": experiment.ExperimentConfig,
    "tools.pairs": pairs.PairsConfig,
    "tools.figures": figures.FiguresConfig,
}
EXAMPLES = {"examples/hf_trainer.py": hf_trainer, "examples/to_gguf.py": to_gguf}
EXAMPLES |= {"runs/make_instructions.py": make_instructions}
OTHERS = {"pytest", "ruff", "mypy", "transformers", "ct2-transformers-converter", "vllm", "hf"}
OTHERS |= {"llama-server", "git", "curl", "head", "tail", "cd", "yes", "venv", "cmake"}
PROGRAMS = {"python", "torchrun", "pip", "uv", "sh", *OTHERS}
CONFIGS = sorted(path.relative_to(REPO).as_posix() for path in (REPO / "config").glob("*.py"))
DOCS = sorted(path.relative_to(REPO).as_posix() for path in REPO.glob("*.md"))
DOCS += sorted(path.relative_to(REPO).as_posix() for path in (REPO / "docs").rglob("*.md"))
WORKFLOW = REPO / ".github" / "workflows" / "tests.yml"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


# --- finding commands, and checking them


def fenced_lines(markdown: str) -> list[str]:
    """The lines of all ```sh blocks, continued ones joined, without comments and assignments."""
    blocks = "\n".join(body for language, body in FENCE.findall(markdown) if language == "sh")
    lines = re.sub(r"\\\n\s*", "", blocks).splitlines()
    return [line for line in lines if line and not re.match(r"#|\w+=\$\(", line)]


def inline_commands(markdown: str) -> list[str]:
    """The `commands` in running text and tables: spans of several words, the first a program."""
    spans = re.findall(r"`([^`]+)`", FENCE.sub("", markdown))
    spans = [" ".join(span.split()) for span in spans]
    return [span for span in spans if " " in span and first_word(span) in PROGRAMS]


def header_lines(path: str) -> list[str]:
    """The commands in a file's docstring: indented lines whose first word is a program."""
    header = (REPO / path).read_text(encoding="utf-8").split('"""')[1]
    lines = re.sub(r"\\\n\s*", "", header).splitlines()
    lines = [line.strip() for line in lines if re.match(r"    \S", line)]
    return [line for line in lines if first_word(line) in PROGRAMS]


def first_word(command: str) -> str:
    """The program, after `time`, `srun` and environment variables."""
    return re.sub(r"^\s*(time |srun |[A-Z_]+=\S+ )*", "", command).split()[0]


def commands_of(lines: list[str]) -> list[tuple[str, list[str]]]:
    """(program, arguments) of each command; for Python, the program is the script or module."""
    found = []
    for line in lines:
        for command in re.sub(r"\s+# .*", "", line).split(" && "):
            words = shlex.split(command.partition(" > ")[0])
            words = words[words.index(first_word(command)) :]
            if words[0] == "uv":
                words = [word for word in words[1:] if word not in ("run", "--no-project")]
                words = ["python", *words] if words[0].endswith(".py") else words
            if words[0] == "python":
                words = [word for word in words[1:] if word != "-m"]
            found.append((words[0], words[1:]))
            if words[0] == "cd":  # the rest of the line runs in another project's folder
                break
    return found


def check(program: str, arguments: list[str]) -> None:
    """Fail for an unknown program, and for arguments that the program would reject."""
    if "--help" in arguments:
        with pytest.raises(SystemExit):
            if program == "tools.bench":
                bench.answer_help(arguments)
            configurator.answer_help(CLASSES[program], arguments)
    elif program in CLASSES:
        cfg, _ = configurator.resolve(CLASSES[program], arguments)
        configurator.validate(cfg)
    elif program == "tools.bench":
        cfg, _ = configurator.resolve(bench.SETTINGS[arguments[0]], arguments[1:])
        if isinstance(cfg, bench.TrainBench):
            check("train.py", shlex.split(cfg.settings))
    elif program == "torchrun":
        known = torch.distributed.run.get_args_parser().parse_args(arguments)
        check(known.training_script, known.training_script_args)
    elif program in EXAMPLES:
        inspect.signature(EXAMPLES[program].main).bind(*arguments)
    elif program == "sh":
        assert (REPO / arguments[0]).is_file(), arguments
    elif program == "pip":
        assert arguments[0] == "install"
        for before, name in pairwise(arguments):
            assert before != "-r" or (REPO / name).is_file(), name
    else:
        assert program in OTHERS, f"{program} {arguments}"


OTHER_PACKAGES = "transformers accelerate peft starlette uvicorn wandb trackio pytest gguf openai"


def run(command: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """A command in a process of its own that has only what requirements.txt installs, and no
    network; stdout and stderr share a pipe."""
    (cwd / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({OTHER_PACKAGES.split()}))\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{cwd}{os.pathsep}{REPO}", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_none"}
    environment.pop("PYTHONUNBUFFERED", None)
    script = [str(REPO / command)] if command.endswith(".py") else ["-m", command]
    return subprocess.run(
        [sys.executable, *script, *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        timeout=60,
    )


def test_from_nothing_to_text_with_the_default_paths(tmp_path):
    """The quick start, with a smaller vocabulary, model and number of steps: all that it prints
    comes in order."""
    tiny = "--n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --max_steps=6 --eval_tokens=2000"
    training = r"step 3/6.*validation loss.*saved.*step 6/6.*validation loss.*saved"
    steps = [
        (
            "prepare.py --vocab_size=300 --max_tokens=500_000",
            "vocab_size = 300 .*about 1 MB of shards.*stdlib: .*train: .*wrote data/stdlib",
        ),
        (f"train.py {tiny} --eval_interval=3", f"max_steps = 6 .*Model: .*Memory: .*{training}"),
        (f"train.py {tiny} --max_steps=8 --init_from=resume", "max_steps = 8 .*Model: .*step 8/8"),
        (
            "sample.py --start 'def main(' --max_new_tokens=20",
            r"max_new_tokens = 20 .*\ndef main\(",
        ),
        ("tools.eval --limit=3", r"limit = 3 .*perplexity "),
        (
            "tools.export --push_to_hub=me/it --dry_run",
            "dry_run = True .*would be uploaded to me/it",
        ),
    ]
    for command, printed in steps:
        done = run(*shlex.split(command), cwd=tmp_path)
        assert done.returncode == 0, done.stdout
        assert re.search(printed, done.stdout, re.DOTALL), done.stdout
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
        if script not in ("prepare.py", "tools.experiment", "tools.pairs"):
            assert main([]) == 2
            err = capsys.readouterr().err
            assert err.startswith("error: ") and "stdlib" in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sample.py", "error: out/stdlib does not exist; "),
        ("tools.serve", "error: uvicorn is not installed: pip install -r requirements-serve.txt"),
        ("tools.bench train --repeats=0", "error: repeats must be at least 1, not 0"),
        (
            "tools.export --checkpoint={model} --push_to_hub=me/it",
            "error: could not upload to me/it",
        ),
        ("examples/hf_trainer.py a b c 1", "error: accelerate is not installed: pip install "),
        (
            "examples/to_gguf.py . {model} x",
            "error: llama.cpp's converter needs gguf: pip install gguf",
        ),
    ],
)
def test_what_is_missing_is_one_line_in_a_new_process(tmp_path, tiny_text, command, said):
    """A checkpoint, a package or the network."""
    gpt, tokenizer = GPT(GPTConfig(300, 8, 1, 1, 8)), Tokenizer.train([tiny_text], 300)
    state = {"step": 1, "data": "", "settings": {}}
    model = save_checkpoint(tmp_path, gpt.init_weights(1), tokenizer, state=state)
    (tmp_path / "convert_hf_to_gguf.py").write_text("import gguf")
    began = time.monotonic()
    done = run(*command.format(model=model).split(), cwd=tmp_path)
    assert done.returncode in (1, 2) and time.monotonic() - began < 20
    assert done.stdout.splitlines()[-1].startswith(said) and "Traceback" not in done.stdout


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_loads_and_its_header_names_commands_that_parse(path, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    header = (REPO / path).read_text(encoding="utf-8").split('"""')[1]
    commands = commands_of(header_lines(path))
    assert any(path in arguments for _, arguments in commands)
    for word in () if "data_" in path else ("Hardware:", "Tokens:", "Expect:"):
        assert word in header
    for program, arguments in commands:
        check(program, arguments)
    if "data_" not in path:  # before the data is there
        assert train.main([path, "--plan"]) == 0
        out = capsys.readouterr().out
        ids, size = ("257", "828,672") if "shakespeare_cpu" in path else ("50,", "")
        assert "does not exist yet; python prepare.py config/data_" in out
        assert f"vocabulary {ids}" in out and size in out and "Time: about " in out


def test_a_config_holds_only_what_differs_from_the_defaults(monkeypatch):
    monkeypatch.chdir(REPO)
    for path in CONFIGS:
        cls = prepare.PrepareConfig if "data_" in path else train.TrainConfig
        defaults = {field.name: field.default for field in fields(cls)}
        cfg, origin = configurator.resolve(cls, [path])
        assert [name for name in origin if getattr(cfg, name) == defaults[name]] == [], path


@pytest.mark.parametrize("script", [*CLASSES, "tools.bench", *EXAMPLES])
def test_every_command_of_a_scripts_header_parses(script, monkeypatch):
    monkeypatch.chdir(REPO)
    path = script if script.endswith(".py") else script.replace(".", "/") + ".py"
    commands = commands_of(header_lines(path))
    assert script in {program for program, _ in commands}
    for program, arguments in commands:
        check(program, arguments)


@pytest.mark.parametrize("path", DOCS)
def test_every_command_of_the_docs_parses(path, monkeypatch):
    monkeypatch.chdir(REPO)
    text = (REPO / path).read_text(encoding="utf-8")
    for program, arguments in commands_of([*fenced_lines(text), *inline_commands(text)]):
        check(program, arguments)


@pytest.mark.parametrize("path", DOCS)
def test_no_command_of_the_docs_is_overlooked(path):
    """Counts them in a second way: lines and code spans that start with what runs Python."""
    text = (REPO / path).read_text(encoding="utf-8")
    start = r"(?:^|&& |(?<!`)`)(?:time |srun |[A-Z_]+=\S+ )*(?:python|torchrun|uv run)\s"
    written = re.findall(start, text, flags=re.MULTILINE)
    commands = commands_of([*fenced_lines(text), *inline_commands(text)])
    programs = {*CLASSES, *EXAMPLES, "tools.bench", "torchrun"}
    found = [program for program, _ in commands if program in programs or program == "cd"]
    assert len(found) == len(written)


def test_every_command_of_the_workflow_parses(monkeypatch):
    monkeypatch.chdir(REPO)
    jobs = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    commands = commands_of(lines)
    assert {"pip", "prepare.py", "train.py", "sample.py", "pytest"} <= {
        name for name, _ in commands
    }
    for program, arguments in commands:
        check(program, arguments)


def test_the_readme_and_the_docs_name_every_command():
    programs = set()
    for path in DOCS:
        text = (REPO / path).read_text(encoding="utf-8")
        programs |= {program for program, _ in commands_of(fenced_lines(text))}
    assert {*CLASSES, *EXAMPLES, "tools.bench", "torchrun"} <= programs


@pytest.mark.parametrize("path", DOCS)
def test_python_in_the_docs_compiles_and_links_lead_somewhere(path):
    text = (REPO / path).read_text(encoding="utf-8")
    for language, body in FENCE.findall(text):
        if language == "python":
            compile(body, path, "exec")
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", text)):
        name, _, anchor = target.partition("#")
        file = (REPO / path).parent / name if name else REPO / path
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text("utf-8")), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in slugs, target


@pytest.mark.parametrize(
    "line",
    [
        "python train.py --no_such_setting=1",
        "torchrun --no-such-flag train.py",
        "torchrun --standalone train.py --batch_size=0.5",
        "python -m tools.bench train --settings=--no_such_setting=1",
        "python examples/to_gguf.py llama.cpp",
        "pip install -r no_such_file.txt",
        "uv run no_such_file.py",
        "no-such-program",
    ],
)
def test_a_wrong_command_would_be_found(line):
    [(program, arguments)] = commands_of([line])
    with pytest.raises((ValueError, TypeError, AssertionError, SystemExit)):
        check(program, arguments)


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
