"""Command lines and config files at random: each gives settings or a short message."""

import contextlib
import functools
import io
import itertools
import random
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
from test_end_to_end import CLASSES, CONFIGS, DOCS, commands_of, fenced_lines

import configurator
from configurator import UserError
from tools import bench

REPO = Path(__file__).parents[1]
ALL = {**CLASSES, **{f"tools.bench {name}": cls for name, cls in bench.SETTINGS.items()}}
COMMAND_LINES = 18_000
FILES = 2_500
LITTER = [" ", "=", "--", "-", ",", "(", "]", "{", "'", '"', "\\", "#", ":", "\n", "\t", "\0", "~"]
LITTER += ["\u2028", "é", "٣", "😀", "\udcff", "\ufeff", "\x1b[31m", "*", "None", "true", "1e9"]
VALUES = ["", "\0", "a\0.py", "\udcff", "é😀", "\n", "a\nb", "9" * 30, "9" * 5000, "x" * 10**5]
VALUES += ["[{[]}]", "({1:{}},{{}})", "[" * 300, "[" * 9000 + "]" * 9000, "(" + "-" * 9000 + "1)"]
PLAIN = "0 -1 3 1e-3 1e400 nan inf -inf 0x10 1_000 True no none auto cosine a,b , ,, () [1,2] = a=b"
PATHS = "~ ~/x ~nobody/x FILE: hf: README.md README.md=-1 -- - x.py config/gtp2.py ('a',)"
VALUES += [*PLAIN.split(), *PATHS.split()]
OTHERS = ["lr", "max_iters", "dataset", "prompt", "gradient_accumulation_steps", "no_bias", "no_lr"]
CODE = [
    *("raise ValueError('one\ntwo')", "raise ValueError('one\\ntwo')", "import sys; sys.exit()"),
    *("import sys; sys.exit('bye\\n' * 99)", "raise GeneratorExit", "raise SystemExit(0)"),
    *("class E(BaseException): pass\nraise E", "def f(): f()\nf()", "x = " + "(" * 300),
    "class E(Exception):\n  def __str__(self): 1/0\nraise E",
    *("x = " + "-" * 9000 + "1", "x = " + "[" * 90 + "]" * 90, "1 +" * 3000 + " 1"),
    "a = []\nfor _ in range(9999): a = [a]\nsources = seed = data_dir = a",
    "a = []\na.append(a)\nsources = lora_targets = tasks = a",
    *("seed = 10**5000", "sources = (10**5000,)", "for _i in range(500): globals()[f'x{_i}'] = _i"),
    "class A:\n  def __repr__(self): 1/0\nseed = data_dir = A()",
    "class A:\n  def __repr__(self): return 'x\\n' * 10**5\nseed = data_dir = A()",
    "class A:\n  def __eq__(self, other): 1/0\ncompile = dtype = optimizer = A()",
    "import numpy\nseed = compile = dtype = device = numpy.zeros(3)",
    *("import warnings\nwarnings.warn('x')", "x = '\\d'", "globals()[1] = 2", "globals().clear()"),
    *("__builtins__ = None\nseed = len", "del seed", "import no_such_module", "open('nowhere')"),
    *("seed = 1\n  lr = 2", "return 1", "yield", "lambda: 0", "seed = lr", "naïve = 3", "\0"),
    *("data_dir = '\\ud800'", "data_dir = 'a\\0b'", "data_dir = 'x' * 10**6", "seed = 'x' * 10**6"),
    *("x" * 10**5 + " = 1", "sources = 'a.txt'", "sources = ['a', 1]", "sources = {'a'}"),
    *("compile = 1", "dropout = True", "seed = 1.0", "max_steps = None", "bias = None"),
    *("\ufeffseed = 1", "seed = 1 #" + "é" * 9999, "from os import *", "import os as seed"),
    *("async def seed(): pass", "seed: int = 3", "seed += 1", "seed = (1\n", "match = 3"),
    *("# coding: latin-1\nseed = 1", "assert False, 'no\\nno'"),
]


def outcome(cls: type, argv: list[str]) -> str:
    """The error message, or ""; fails if it or what is printed is long, or for any other error."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            assert isinstance(configurator.configure(cls, argv), cls)
            said = ""
        except UserError as problem:
            said = str(problem)
            assert said
        except SystemExit as end:
            assert end.code == 0 and {"-h", "--help"} & set(argv)
            return ""
    lines = (said + printed.getvalue()).splitlines()
    assert len(lines) <= 60 and max(map(len, lines), default=0) <= 2100
    return said


def written_commands() -> list[tuple[type, list[str]]]:
    """The commands in the docs."""
    found = []
    for path in DOCS:
        for program, arguments in commands_of(fenced_lines((REPO / path).read_text("utf-8"))):
            if program == "tools.bench":
                program, arguments = f"{program} {arguments[0]}", arguments[1:]
            if program in ALL:
                found.append((ALL[program], arguments))
    return found


def mutated(text: str, rng: random.Random) -> str:
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, end = sorted(rng.randint(0, len(text)) for _ in range(2))
        kind = rng.randrange(4)
        if kind == 0:
            text = text[:at] + rng.choice(LITTER) + text[at:]
        elif kind == 1:
            text = text[:at] + text[at + 1 :]
        elif kind == 2:
            text = text[:at] + text[end:]
        else:
            text = text[:end] + text[at:end] + text[end:]
    return text


def random_line(words: list[str], names: list[str], rng: random.Random) -> list[str]:
    argv = list(words)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        name, value = rng.choice(names), rng.choice(VALUES)
        argv += rng.choice(([f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [value]))
    if argv and rng.random() < 0.5:
        at = rng.randrange(len(argv))
        argv[at] = mutated(argv[at], rng)
    rng.shuffle(argv)
    return argv


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """In this folder, with what is known of a class looked up once."""
    monkeypatch.chdir(REPO)
    for name in ("get_type_hints", "help_text"):
        monkeypatch.setattr(configurator, name, functools.cache(getattr(configurator, name)))


def test_any_command_line_gives_settings_or_a_short_message():
    rng = random.Random(0)
    commands = written_commands() + [(cls, []) for cls in ALL.values()]
    assert {cls for cls, _ in commands} == set(ALL.values())
    accepted = refused = 0
    for _ in range(COMMAND_LINES):
        cls, words = rng.choice(commands)
        names = [field.name for field in fields(cls)]
        said = outcome(cls, random_line(words, names * 3 + OTHERS, rng))
        accepted, refused = accepted + (not said), refused + bool(said)
    assert min(accepted, refused) > COMMAND_LINES / 10


def test_any_config_file_gives_settings_or_a_short_message(tmp_path):
    rng = random.Random(1)
    path = tmp_path / "config.py"
    good = [(REPO / name).read_text("utf-8").replace(" * ", "") for name in CONFIGS]
    cases = list(itertools.product(CODE, ALL.values()))
    for _ in range(FILES):
        text = rng.choice(good)
        cases.append((mutated(text, rng), ALL["prepare.py" if "sources" in text else "train.py"]))
    accepted = refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an invalid escape sequence, say
        for number, (text, cls) in enumerate(cases):
            encoding = "utf-16" if number % 50 == 7 else "utf-8"
            path.write_bytes(text.encode(encoding, errors="surrogatepass"))
            said = outcome(cls, [str(path)])
            accepted, refused = accepted + (not said), refused + bool(said)
    assert min(accepted, refused) > FILES / 10
