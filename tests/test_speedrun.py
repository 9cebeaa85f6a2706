"""runs/speedrun.sh from its first command to its last, and the questions that it asks."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import make_instructions
import pytest
from test_end_to_end import CLASSES

REPO = Path(__file__).parents[1]
# Stands in for python: writes down its arguments, and what a conversation is told.
RECORDER = r"""#!/bin/sh
{ printf '%s\037' "$@"; printf '\036'; } >> "$RECORDED"
case "$*" in *--chat*) cat > "$RECORDED.typed" ;; esac
"""
SHAPE = ["--n_layer=1", "--n_head=1", "--n_embd=32", "--block_size=64"]
SMALL = {
    "train.py": ["--max_steps=3", "--batch_size=2", "--eval_tokens=500", "--sample_interval=0"],
    "tools.eval": ["--limit=3"],
}


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_every_command_of_the_speedrun_runs(tmp_path, tiny_text, monkeypatch, capsys):
    """In this process, and scaled down: the shell only says what to run."""
    recorder = tmp_path / "bin" / "python"
    recorder.parent.mkdir()
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    path = f"{recorder.parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "RECORDED": str(tmp_path / "recorded")}
    script = ["sh", str(REPO / "runs" / "speedrun.sh")]
    done = subprocess.run(
        script, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "recorded").read_text().split("\036")[:-1]
    commands = [command.split("\037")[:-1] for command in commands]
    for command in commands[:-1]:  # the last is part of a pipe
        assert f"+ python {' '.join(command)}" in done.stderr.splitlines()
    typed = (tmp_path / "recorded.typed").read_text()

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(tiny_text, encoding="utf-8")
    monkeypatch.setattr(make_instructions, "ROUNDS", 1)
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    printed = {}
    for command in commands:
        program, *arguments = [word for word in command if word != "-m"]
        if program == "runs/make_instructions.py":
            make_instructions.main(*arguments)
            continue
        arguments = arguments or ["--sources=text.txt", "--vocab_size=400"]  # not the library
        arguments += SMALL.get(program, [])
        if program == "train.py" and not any("init_from" in word for word in arguments):
            arguments += SHAPE
        assert sys.modules[CLASSES[program].__module__].main(arguments) == 0, capsys.readouterr()
        printed[" ".join(command)] = capsys.readouterr().out
    evaluated = [out for command, out in printed.items() if "eval" in command]
    assert len(evaluated) == 3 and "bits per byte" in evaluated[0]
    assert all("answers: " in out and "(3 questions)" in out for out in evaluated[1:])
    *_, conversation = printed.values()
    assert typed.count("\n") >= 3 and len(conversation) > 0


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> dict[str, dict[str, str]]:
    """The answer to each question, of taught.jsonl and of held_out.jsonl."""
    folder = tmp_path_factory.mktemp("questions")
    make_instructions.main(str(folder))
    found = {}
    for path in folder.iterdir():
        turns = [json.loads(line)["messages"] for line in path.open(encoding="utf-8")]
        assert all([turn["role"] for turn in each] == ["user", "assistant"] for each in turns)
        found[path.stem] = {question["content"]: answer["content"] for question, answer in turns}
    return found


def test_questions_are_about_what_python_documents(conversations):
    everything = conversations["taught"] | conversations["held_out"]
    assert everything["What is the signature of bisect.insort?"].startswith("bisect.insort(a, x,")
    assert everything["Which module has OrderedDict?"] == "collections"
    purpose = "Return a list of the substrings in the string, using sep as the separator string."
    assert everything["What does str.split do?"] == purpose
    assert "Which module has open?" not in everything  # os has it, and io, and others
    assert len(everything) > 2000


def test_a_name_is_taught_or_held_out(conversations):
    def names(kind):
        asked = conversations[kind]
        return {
            re.sub(r"^What (does|is the signature of) | do\?$|\?$", "", each)
            for each in asked
            if "module" not in each
        }

    assert names("taught") and names("held_out")
    assert not names("taught") & names("held_out")
    share = len(names("held_out")) / len(names("taught") | names("held_out"))
    assert 0.07 < share < 0.13


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return a copy.", "Return a copy."),
        ("Return the sum,\n    e.g. 3. More words.", "Return the sum, e.g. 3."),
        ("f(x) -> y\n\nSquare x.\n\nLong.", "Square x."),
        ("f(x)", ""),
        ("", ""),
    ],
)
def test_the_first_sentence_of_a_docstring(docstring, sentence):
    assert make_instructions.first_sentence(docstring) == sentence


def test_a_signature_has_names_and_defaults():
    def function(self, a: int, *b: str, c: float = 0.5) -> None: ...

    assert make_instructions.signature(function) == "(a, *b, c=0.5)"
    assert make_instructions.signature(sorted) == "(iterable, /, *, key=None, reverse=False)"
    function.__kwdefaults__["c"] = object()  # whose address would vary
    assert make_instructions.signature(function) is None
