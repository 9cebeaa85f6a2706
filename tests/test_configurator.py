"""Settings from defaults, files and the command line: their order, their types, their errors."""

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import configurator
import prepare
import sample
import train
from configurator import (
    Folder,
    Fraction,
    FractionAbove0,
    FractionBelow1,
    NonNegativeFloat,
    NonNegativeInt,
    PathName,
    PositiveFloat,
    PositiveInt,
    UserError,
)

REPO = Path(__file__).parents[1]


@dataclass(frozen=True)
class Settings:
    steps: int = 10  # how many
    lr: float = 0.5  # how fast
    name: str = "plain"  # what it is called
    note: str | None = None  # what is said about it
    limit: int | None = 5  # how many at most
    fast: bool = False  # whether to hurry
    frills: bool = True  # whether to decorate
    no_frills: bool = False  # a name that starts with no
    mode: Literal["slow", "quick"] = "slow"  # how to go
    build: bool | Literal["auto"] = "auto"  # whether to build
    files: tuple[str, ...] = ("a.txt",)  # what to read
    sizes: tuple[int, ...] = ()  # how large
    max_new_tokens: int = 1  # a name of several words


def resolve(*argv: str) -> Settings:
    return configurator.resolve(Settings, list(argv))[0]


def problems(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve(*argv)
    return str(caught.value)


@pytest.fixture
def config_file(tmp_path):
    def write(text: str, name: str = "config.py") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# --- order


def test_no_arguments_give_the_defaults():
    assert resolve() == Settings()


def test_defaults_then_files_in_order_then_the_command_line(config_file):
    first = config_file("steps = 1\nlr = 1.0\nname = 'first'", "first.py")
    second = config_file("lr = 2.0\nname = 'second'", "second.py")
    config, origin = configurator.resolve(Settings, ["--name=last", first, second])
    assert (config.steps, config.lr, config.name, config.fast) == (1, 2.0, "last", False)
    assert origin == {"steps": first, "lr": second, "name": "command line"}
    assert resolve(second, first).name == "first"


def test_the_last_of_two_on_the_command_line_counts():
    assert resolve("--steps=1", "--steps=2").steps == 2


# --- the command line


@pytest.mark.parametrize(
    "argv, name, value",
    [
        ("--steps=3", "steps", 3),
        ("--steps 3", "steps", 3),
        ("--steps=-3", "steps", -3),
        ("--steps -3", "steps", -3),
        ("--lr -1e-3", "lr", -1e-3),
        ("--lr=3", "lr", 3.0),
        ("--max-new-tokens=7", "max_new_tokens", 7),
        ("--max-new-tokens 7", "max_new_tokens", 7),
        ("--fast", "fast", True),
        ("--fast=true", "fast", True),
        ("--fast on", "fast", True),
        ("--fast=false", "fast", False),
        ("--fast --no-fast", "fast", False),
        ("--fast --no_fast", "fast", False),
        ("--no_frills", "no_frills", True),
        ("--no_frills", "frills", True),
        ("--no_frills --no-no-frills", "no_frills", False),
        ("--limit=none", "limit", None),
        ("--limit None", "limit", None),
        ("--limit=7", "limit", 7),
        ("--note=none", "note", None),
        ("--note=7", "note", "7"),
        ("--name=none", "name", "none"),
        ("--name=", "name", ""),
        ("--name=a=b", "name", "a=b"),
        ("--name a=b", "name", "a=b"),
        ("--name=--x", "name", "--x"),
        ("--mode quick", "mode", "quick"),
        ("--build=auto", "build", "auto"),
        ("--build=yes", "build", True),
        ("--build", "build", True),
        ("--no-build", "build", False),
        ("--build auto", "build", "auto"),
        ("--files=b.txt", "files", ("b.txt",)),
        ("--files a.txt,b.txt", "files", ("a.txt", "b.txt")),
        ("--files=('b,c.txt',)", "files", ("b,c.txt",)),
        ("--files=['b','c']", "files", ("b", "c")),
        ("--files=", "files", ()),
        ("--sizes=1,2", "sizes", (1, 2)),
        ("--sizes=(1,2)", "sizes", (1, 2)),
    ],
)
def test_a_value_can_be_written_as(argv, name, value):
    given = getattr(resolve(*argv.split(" ")), name)
    assert given == value and type(given) is type(value)


def test_a_string_keeps_its_spaces():
    assert resolve("--name", "Once upon a time").name == "Once upon a time"
    assert resolve("--name= x = y ").name == " x = y "
    assert resolve("--files=a b.txt, c.txt").files == ("a b.txt", "c.txt")
    assert resolve("--files=\n").files == ("\n",)
    assert resolve("--files= def,\n  d").files == (" def", "d")
    assert resolve("--files=").files == ()


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--steps=1.5", "steps expects int, not '1.5'"),
        ("--steps=many", "steps expects int, not 'many'"),
        ("--steps=none", "steps expects int, not 'none'"),
        ("--steps=true", "steps expects int, not 'true'"),
        ("--lr=fast", "lr expects float, not 'fast'"),
        ("--fast=maybe", "fast expects bool, not 'maybe'"),
        ("--mode=warp", "mode expects slow or quick, not 'warp'"),
        ("--build=maybe", "build expects bool or auto, not 'maybe'"),
        ("--limit=few", "limit expects int or None, not 'few'"),
        ("--sizes=1,x", "sizes expects int,…, not '1,x'"),
        ("--sizes=(1,", "sizes expects int,…, not '(1,'"),
        ("--sizes=(1,'x')", "sizes expects int,…, not \"(1,'x')\""),
        ("--sizes=[{[]}]", "sizes expects int,…, not '[{[]}]'"),
        ("--sizes=({1:{}},{{}})", "sizes expects int,…, not '({1:{}},{{}})'"),
        ("--files=,", "files expects str,… or [\"str\", …], not ','"),
        ("--no-steps", "steps expects int, not False"),
        ("--steps", "--steps needs a value"),
        ("--steps --fast", "--steps needs a value"),
        ("--stepz=1", "unknown setting 'stepz'; did you mean 'steps'?"),
        ("--max-new-token 3", "unknown setting 'max_new_token'; did you mean 'max_new_tokens'?"),
        ("--zzzzzz=1", "unknown setting 'zzzzzz'"),
        ("steps=1", "'steps=1' is neither a config file (*.py) nor --key=value"),
    ],
)
def test_a_mistake_on_the_command_line_is_reported(argv, message):
    text = problems(*argv.split(" "))
    assert f"command line: {message}" in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("text", ["[" * 5000, "[" * 10**5 + "]" * 10**5, "(" + "-" * 10**5 + "1)"])
def test_a_value_that_is_nested_too_deeply_is_a_wrong_value(text):
    assert "command line: sizes expects int,…" in problems(f"--sizes={text}")


def test_a_value_behind_a_negated_flag_is_not_dropped():
    assert "--no-fast" in problems("--no-fast=false")


# --- config files


def test_expressions_see_the_values_so_far(config_file):
    first = config_file("steps = 2 * steps\nmax_new_tokens = steps + 1", "first.py")
    second = config_file("steps = steps + 5 * 8", "second.py")
    config = resolve(first, second, "--lr=0.1")
    assert (config.steps, config.max_new_tokens) == (60, 21)


def test_modules_functions_and_underscores_are_ignored(config_file):
    path = config_file(
        "import math\n"
        "from os.path import join\n"
        "_half = 2\n"
        "def double(x):\n    return _half * x\n"
        "steps = double(math.floor(2.5))\n"
        "files = tuple(join('x', name) for name in 'ab')\n"
    )
    assert resolve(path) == Settings(steps=4, files=("x/a", "x/b"))


def test_files_leave_no_names_behind(config_file):
    path = config_file("_secret = 1\nsteps = 3")
    resolve(path)
    assert not hasattr(configurator, "_secret") and not hasattr(configurator, "steps")
    assert resolve() == Settings()


@pytest.mark.parametrize(
    "line, name, value",
    [
        ("lr = 1", "lr", 1.0),
        ("limit = None", "limit", None),
        ("files = ['b', 'c']", "files", ("b", "c")),
        ("build = False", "build", False),
        ("mode = 'quick'", "mode", "quick"),
        ("fast = True", "fast", True),
    ],
)
def test_a_file_may_say(config_file, line, name, value):
    given = getattr(resolve(config_file(line)), name)
    assert given == value and type(given) is type(value)


@pytest.mark.parametrize(
    "line, message",
    [
        ("steps = 1.0", "steps expects int, not 1.0"),
        ("steps = True", "steps expects int, not True"),
        ("steps = '3'", "steps expects int, not '3'"),
        ("steps = None", "steps expects int, not None"),
        ("lr = True", "lr expects float, not True"),
        ("lr = '1e-3'", "lr expects float, not '1e-3'"),
        ("fast = 1", "fast expects bool, not 1"),
        ("mode = 'warp'", "mode expects slow or quick, not 'warp'"),
        ("build = 1", "build expects bool or auto, not 1"),
        ("files = 'a.txt'", "files expects str,… or [\"str\", …], not 'a.txt'"),
        ("files = ('a', 1)", "files expects str,… or [\"str\", …], not ('a', 1)"),
        ("stepz = 1", "unknown setting 'stepz'; did you mean 'steps'?"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(config_file, line, message):
    path = config_file(line)
    assert problems(path) == f"{path}: {message}"


def test_all_problems_are_reported_at_once(config_file):
    first = config_file("stepz = 1\nlr = 'x'", "first.py")
    second = config_file("fast = 3", "second.py")
    text = problems(first, second, "--mode=warp", "--nam=x", "stray", "--limit")
    assert len(text.splitlines()) == 7
    for wrong in ("stepz", "lr", "fast", "mode", "'nam'", "stray", "--limit"):
        assert wrong in text


def test_a_file_that_cannot_be_run_names_file_and_line(config_file, tmp_path):
    assert problems(config_file("steps = 1\nlr = = 2")).startswith(f"{tmp_path}/config.py:2: Synt")
    path = config_file("steps = 1\n\nlr = 1 / 0")
    assert problems(path) == f"{path}:3: ZeroDivisionError: division by zero"
    path = config_file("lr = learning")
    assert f"{path}:1: NameError: name 'learning' is not defined" in problems(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    missing = str(tmp_path / "missing.py")
    assert problems(missing) == f"{missing}: No such file or directory"
    latin = tmp_path / "latin.py"
    latin.write_bytes("name = 'é'".encode("latin-1"))
    assert problems(str(latin)).startswith(f"{latin}: UnicodeDecodeError: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise ValueError('one\\ntwo')", ":1: ValueError: one two"),
        ("raise ValueError", ":1: ValueError"),
        ("import sys\nsys.exit(3)", ":2: SystemExit: 3"),
        ("def f(): f()\nf()", ":1: RecursionError: maximum recursion depth exceeded"),
        ("class E(BaseException): pass\nraise E('x')", ":2: E: x"),
        ("class E(Exception):\n  def __str__(self): 1/0\nraise E", ":3: E"),
        ("steps = [[10**5000]]", ": steps expects int, not a value of type list"),
        ("globals()[3] = 3\nlr = 'x'", ": lr expects float, not 'x'"),
        ("class A:\n  def __eq__(self, other): 1/0\nmode = A()", ": mode expects slow or quick"),
        ("x" * 10**6 + " = 3", ": unknown setting 'xxx"),
    ],
)
def test_whatever_a_file_does_is_one_line(config_file, text, message):
    path = config_file(text)
    said = problems(path)
    assert said.startswith(f"{path}{message}") and len(said.splitlines()) == 1 and len(said) < 1000


def test_a_file_may_begin_with_a_byte_order_mark(config_file):
    assert resolve(config_file("\ufeffsteps = 3")).steps == 3


def test_an_interrupted_file_interrupts_the_command(config_file):
    path = config_file("raise KeyboardInterrupt")
    assert configurator.command(Settings, pytest.fail, [path]) == 130


def test_of_many_problems_the_first_are_listed(config_file):
    path = config_file("for _n in range(1000): globals()[f'x{_n}'] = 1")
    lines = problems(path).splitlines()
    assert len(lines) == 21 and lines[-1].strip() == "and 980 more"


def test_long_values_are_shortened(capsys):
    long = "x" * 10**6
    for argv in (["--name", long], ["--files", long], ["--mode", long], [f"--{long}"], [long]):
        configurator.command(Settings, lambda cfg: Path(cfg.name).read_text(), argv)
        assert 0 < len(capsys.readouterr().err) < 5000


# --- paths


@dataclass(frozen=True)
class Paths:
    path: PathName = "a"  # a path
    paths: tuple[PathName, ...] = ()  # several
    folder: Folder | None = None  # a folder
    text: str = ""  # not a path


def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    argv = ["--path=~/a", "--paths=~/b,c,~", "--folder=~", "--text=~/d"]
    assert configurator.resolve(Paths, argv)[0] == Paths(
        "/home/me/a", ("/home/me/b", "c", "/home/me"), "/home/me", "~/d"
    )
    (tmp_path / "x.py").write_text("paths = ['~/b']")
    assert configurator.resolve(Paths, [str(tmp_path / "x.py")])[0].paths == ("/home/me/b",)


def test_the_name_of_a_file_may_hold_a_comma(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "(c).txt"):
        (tmp_path / name).touch()
        assert configurator.resolve(Paths, [f"--paths={name}"])[0].paths == (name,)
    assert configurator.resolve(Paths, ["--paths=a,c.txt"])[0].paths == ("a", "c.txt")


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "file").touch()
    configurator.validate(Paths(folder=str(tmp_path)))
    configurator.validate(Paths(folder=str(tmp_path / "new")))
    with pytest.raises(UserError) as caught:
        configurator.validate(Paths(path="", folder=str(tmp_path / "file")))
    assert str(caught.value) == (
        f"path must be a path, not ''; folder must be a folder, not '{tmp_path}/file'"
    )


# --- ranges


@dataclass(frozen=True)
class Ranged:
    count: PositiveInt = 1
    seed: NonNegativeInt = 0
    most: PositiveInt | None = None
    rate: PositiveFloat = 0.5
    decay: NonNegativeFloat = 0.0
    share: Fraction = 1.0
    dropout: FractionBelow1 = 0.0
    top_p: FractionAbove0 | None = 1.0
    name: str = ""
    sizes: tuple[PositiveInt, ...] = (1, 2)


def test_settings_within_their_ranges_pass():
    configurator.validate(Ranged())
    configurator.validate(Ranged(most=1, seed=2**63 - 1, share=0.0, top_p=None), problems=[])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("count", 0, "at least 1"),
        ("seed", -1, "at least 0"),
        ("seed", 2**63, "below 2**63"),
        ("count", 10**400, "below 2**63"),
        ("most", 0, "at least 1"),
        ("rate", 0.0, "a number above 0 and below 1e30"),
        ("rate", float("inf"), "a number above 0 and below 1e30"),
        ("rate", float("nan"), "a number above 0 and below 1e30"),
        ("decay", -0.1, "a finite number, 0 or greater"),
        ("share", 1.1, "in [0, 1]"),
        ("dropout", 1.0, "in [0, 1)"),
        ("top_p", 0.0, "above 0 and at most 1"),
    ],
)
def test_a_setting_outside_its_range_is_named_with_its_value(name, value, words):
    with pytest.raises(UserError) as caught:
        configurator.validate(Ranged(**{name: value}))
    assert str(caught.value) == f"{name} must be {words}, not {value!r}"


def test_ranges_and_other_problems_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        configurator.validate(Ranged(count=0, share=2.0, sizes=(3, -4)), ["too much", "too late"])
    assert str(caught.value) == (
        "count must be at least 1, not 0; share must be in [0, 1], not 2.0; "
        "sizes must be at least 1, not -4; too much; too late"
    )


def test_a_range_does_not_change_how_a_type_is_read_and_described():
    assert configurator.resolve(Ranged, ["--most=7", "--rate=1"])[0] == Ranged(most=7, rate=1.0)
    with pytest.raises(UserError, match="most expects int or None, not 'x'"):
        configurator.resolve(Ranged, ["--most=x"])


# --- what is printed


def test_the_difference_from_the_defaults_is_printed_with_its_origin(config_file, capsys):
    path = config_file("steps = 10\nlr = 1")
    configurator.configure(Settings, [path, "--name=x", "--limit=5"])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"lr = 1.0 (default 0.5, {path})",
        "name = 'x' (default 'plain', command line)",
    ]


def test_only_the_main_process_prints(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert configurator.configure(Settings, ["--steps=3"]).steps == 3
    assert capsys.readouterr() == ("", "")


def test_help_is_every_setting_with_its_comment(capsys):
    with pytest.raises(SystemExit) as caught:
        resolve("--steps=x", "--help")
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == __doc__
    assert [line.split()[0] for line in lines[3:]] == [
        f"--{field.name}" for field in dataclasses.fields(Settings)
    ]
    assert lines[3].split(maxsplit=1)[1] == "how many (int, default 10)"
    assert "how many at most (int or None, default 5)" in lines[7]
    assert "how to go (slow or quick, default 'slow')" in "\n".join(lines)


def test_help_has_the_headings_of_the_source(capsys):
    with pytest.raises(SystemExit):
        configurator.resolve(train.TrainConfig, ["--help"])
    sections = capsys.readouterr().out.split("\n\n")
    titles = {section.splitlines()[0]: section for section in sections}
    assert "  --batch_size " in titles["the steps and the optimizer:"]
    assert "  --seed " in titles["the machine:"] and "  --plan " not in titles["the machine:"]
    assert "settings:" not in titles
    with pytest.raises(SystemExit):
        configurator.resolve(sample.SampleConfig, ["--help"])
    *_, own, inherited = capsys.readouterr().out.strip().split("\n\n")
    assert own.startswith("settings:\n  --checkpoint ") and "  --top_k " not in own
    assert inherited.startswith("how tokens are drawn:\n  --max_new_tokens ")


@pytest.mark.parametrize(
    "cls", [prepare.PrepareConfig, train.TrainConfig, sample.SampleConfig], ids=lambda c: c.__name__
)
def test_every_setting_of_a_command_has_a_comment(cls):
    comments = configurator.comments_of(cls)
    assert [f.name for f in dataclasses.fields(cls) if not comments.get(f.name, ("", ""))[1]] == []


# --- command


def test_a_command_that_works_returns_0(capsys):
    seen = []
    assert configurator.command(Settings, seen.append, ["--steps=3"]) == 0
    assert seen == [Settings(steps=3)]


@pytest.mark.parametrize(
    "error", [configurator.UserError("too few tokens"), OSError("too few tokens")]
)
def test_a_users_mistake_is_one_line_and_status_2(capsys, error):
    def run(_):
        raise error

    assert configurator.command(Settings, run, []) == 2
    assert capsys.readouterr() == ("", "error: too few tokens\n")


def test_a_wrong_setting_is_one_line_and_the_command_does_not_run(capsys):
    assert configurator.command(Settings, pytest.fail, ["--stepz=3"]) == 2
    assert capsys.readouterr().err == (
        "error: command line: unknown setting 'stepz'; did you mean 'steps'?\n"
    )


@pytest.mark.parametrize(("local_rank", "waits"), [("0", []), ("1", [configurator.PATIENCE_S])])
def test_an_error_is_left_to_the_first_process(monkeypatch, capsys, local_rank, waits):
    """The others wait for torchrun to end them; if it does not, they alone have the error."""
    slept = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(configurator.time, "sleep", slept.append)
    assert configurator.command(Settings, lambda _: None, []) == 0 and slept == []
    assert configurator.command(Settings, pytest.fail, ["--stepz=3"]) == 2 and slept == waits
    assert capsys.readouterr().err.count("error: ") == 1


def test_our_own_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        configurator.command(Settings, lambda _: 1 / 0, [])


def test_an_interrupt_is_status_130(capsys):
    def run(_):
        raise KeyboardInterrupt

    assert configurator.command(Settings, run, []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_left_is_not_an_error():
    code = (
        "import sys, configurator, dataclasses\n"
        "settings = dataclasses.make_dataclass('S', [])\n"
        "sys.exit(configurator.command(settings, lambda _: print('x' * 10**6), []))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPO
    )
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 9 GiB"), "out of memory: use smaller sizes (Unable"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9\nmore"), "out of memory"),
    ],
)
def test_a_lack_of_memory_is_one_line(capsys, error, said):
    def run(config):
        raise error

    assert configurator.command(Settings, run, []) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, OverflowError, TypeError])
def test_other_errors_keep_their_traceback(kind):
    def run(config):
        raise kind("a bug")

    with pytest.raises(kind, match="a bug"):
        configurator.command(Settings, run, [])


def test_a_reader_of_the_help_that_left_is_not_an_error():
    command = [sys.executable, "prepare.py", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPO)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_a_closed_output_is_not_an_error(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert configurator.command(Settings, print, []) == 0


def test_what_no_machine_can_hold_is_a_wrong_value(tmp_path, capsys):
    (tmp_path / "huge.py").write_text("steps = 10**5000\n")
    assert configurator.command(Settings, pytest.fail, [str(tmp_path / "huge.py")]) == 2
    assert "steps expects int, not an integer beyond 64 bits" in capsys.readouterr().err
    (tmp_path / "nul.py").write_text("name = 'a\\0b'\n")
    assert configurator.command(Settings, pytest.fail, [str(tmp_path / "nul.py")]) == 2
    assert r"name expects str, not 'a\x00b'" in capsys.readouterr().err
