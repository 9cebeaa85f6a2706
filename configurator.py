"""
One frozen dataclass + Python config files + --key=value → one checked config.

A command's settings are a frozen dataclass, one field per line; the comment after a field is what
--help prints. Later values win: defaults < config files in the order given < command line:

    python train.py config/gpt2_124m.py --batch_size=32 --learning_rate 3e-4 --no-compile

A config file is plain Python whose public names are settings. It sees the values so far, so
`max_steps = 2 * max_steps` works; modules, functions and names that start with _ are ignored.
"""

import contextlib
import inspect
import io
import math
import os
import signal
import sys
import time
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import ModuleType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from plaingpt.advice import explain_import, failure, unknown, unknown_in, unnamed
from plaingpt.values import INVALID, check, describe, misfit, options_of, parse
from plaingpt.wording import shorten, shown

Config = TypeVar("Config")
Saved = Callable[[Any], dict[str, Any]]  # a config → values that replace its defaults
MAX_LINE, MAX_PROBLEMS = 2000, 20  # characters of a line, and lines, of an error message
PATIENCE_S = 5.0  # longer than a process takes to follow another, exit and be noticed by torchrun


class UserError(ValueError):
    """A mistake that the user can fix; `command` shows it as one line, without a traceback."""


# --- types of settings


@dataclass(frozen=True)
class Range:
    """The values a setting may take: how `validate` tests them, and how it words the error."""

    words: str
    holds: Callable[[Any], bool]


IN_64_BITS = Range("below 2**63", lambda value: value < 2**63)
PositiveInt = Annotated[int, Range("at least 1", lambda value: value >= 1), IN_64_BITS]
NonNegativeInt = Annotated[int, Range("at least 0", lambda value: value >= 0), IN_64_BITS]
PositiveFloat = Annotated[
    float, Range("a number above 0 and below 1e30", lambda value: 0 < value < 1e30)
]
NonNegativeFloat = Annotated[
    float, Range("a finite number, 0 or greater", lambda value: 0 <= value < math.inf)
]
Fraction = Annotated[float, Range("in [0, 1]", lambda value: 0 <= value <= 1)]
FractionBelow1 = Annotated[float, Range("in [0, 1)", lambda value: 0 <= value < 1)]
NonEmpty = Annotated[str, Range("non-empty", bool)]
A_PATH = Range("a path", bool)  # where ~ stands for the home folder
A_FOLDER = Range("a folder", lambda value: os.path.isdir(value) or not os.path.exists(value))
PathName = Annotated[str, A_PATH]
Folder = Annotated[str, A_PATH, A_FOLDER]  # which may not exist yet
FractionAbove0 = Annotated[float, Range("above 0 and at most 1", lambda value: 0 < value <= 1)]
DType = Literal["auto", "bfloat16", "float16", "float32"]


# --- a command


def command(
    cls: type[Config],
    run: Callable[[Config], Any],
    argv: list[str] | None = None,
    saved: Saved | None = None,
) -> int:
    """The body of every main(): configure, run, and turn a user's mistake into one line.

    Returns the exit status: 0; 2 after a UserError (bad settings, bad data), an OSError (a full
    disk) or lack of memory; 130 after Ctrl-C; 141 if the reader of the output has exited. Any
    other exception is a bug in plainGPT and keeps its traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Flush at every line, so that logs stay current, and escape what cannot be printed.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # from `begin`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with errors_once():
            run(configure(cls, sys.argv[1:] if argv is None else argv, saved))
            if sys.stdout:  # None if it was closed
                sys.stdout.flush()
    except BrokenPipeError:
        return drop_output()
    except (UserError, OSError) as problem:
        lines = [shorten(line, MAX_LINE) for line in str(problem).splitlines()]
        print("error:", "\n".join(lines), file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        print(f"error: out of memory: use smaller sizes ({one_line(problem)})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


@contextlib.contextmanager
def errors_once() -> Iterator[None]:
    """Let the first process of a machine report an error that all of them have: torchrun ends the
    others once it has exited. An error that only another process has is reported after PATIENCE_S.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt):
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(PATIENCE_S)
        raise


def drop_output() -> int:
    """Discard the remaining output after its reader has exited, as `| head` does; return 141."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    return 141


def configure(cls: type[Config], argv: list[str], saved: Saved | None = None) -> Config:
    """Resolve `argv` into a `cls`, and print what differs from the defaults to stderr.

    `saved` is called with the config that `argv` alone gives, and returns values that replace the
    defaults, such as the settings of a run to resume. Raises UserError with all problems, one per
    line; SystemExit(0) after --help.
    """
    config, origin = resolve(cls, argv)
    if saved:
        config, origin = resolve(cls, argv, saved(config))
    defaults = defaults_of(cls)
    for name, where in origin.items():
        value = getattr(config, name)
        if value != defaults[name] and os.environ.get("RANK", "0") == "0":
            line = f"{name} = {shown(value)} (default {shown(defaults[name])}, {where})"
            print(shorten(line, MAX_LINE), file=sys.stderr)
    return config


def validate(config: Any, problems: Iterable[str] = ()) -> None:
    """Raise a UserError that lists every setting (or item of a tuple) outside its `Range`, then
    `problems`.

    Commands call it themselves, so that configs built in Python are checked as well.
    """
    found = []
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        for option in options_of(hint):
            several = get_origin(option) is tuple
            kind, values = (get_args(option)[0], value) if several else (option, [value])
            for allowed in getattr(kind, "__metadata__", ()):  # of an Annotated
                for each in values:
                    if each is not None and not allowed.holds(each):
                        found.append(f"{name} must be {allowed.words}, not {each!r}")
    if found := [*found, *problems]:
        raise UserError("; ".join(found))


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether numpy, CUDA or PyTorch's CPU allocator (a plain RuntimeError) ran out of memory."""
    words = ("out of memory", "allocate memory", "not enough memory", "storage size")
    return isinstance(problem, MemoryError) or any(w in str(problem).lower() for w in words)


def one_line(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


# --- from files and arguments to a config


def resolve(
    cls: type[Config], argv: list[str], saved: dict[str, Any] | None = None
) -> tuple[Config, dict[str, str]]:
    """The config, and the origin of each value that was given. Raises as `configure` does."""
    hints, kinds = get_type_hints(cls), get_type_hints(cls, include_extras=True)
    values = defaults_of(cls)
    origin: dict[str, str] = {}
    problems: list[str] = []

    def put(name: str, value: Any, where: str) -> None:
        checked = check(value, hints[name])
        if checked is INVALID:
            problems.append(f"{where}: {misfit(name, value, hints[name])}")
        else:
            values[name] = with_home(checked) if has_path(kinds[name]) else checked
            origin[name] = where

    for name, value in (saved or {}).items():
        put(name, value, "the resumed run")
    files, pairs = split_arguments(cls, argv, problems)
    for path in files:
        found = run_file(path, values, problems)
        problems += unknown_in(path, [name for name in found if name not in values], values)
        for name in filter(values.__contains__, found):
            put(name, found[name], path)
    for name, value in pairs:
        put(name, value, "command line")
    if problems:
        lines = [shorten(problem, MAX_LINE) for problem in problems[:MAX_PROBLEMS]]
        more = [f"and {len(problems) - MAX_PROBLEMS:,} more"] * (len(problems) > MAX_PROBLEMS)
        raise UserError("\n       ".join(lines + more))
    return cls(**values), origin


def split_arguments(
    cls: type, argv: list[str], problems: list[str]
) -> tuple[list[str], list[tuple[str, Any]]]:
    """The config files and the (name, parsed value) pairs of a command line.

    A value that cannot be parsed stays text. Appends to `problems`; exits after --help.
    """
    hints = get_type_hints(cls)
    files: list[str] = []
    pairs: list[tuple[str, Any]] = []
    bare: list[str] = []  # words that are neither a config file nor a setting
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            print(help_text(cls), flush=True)
            raise SystemExit(0)
        if not argument.startswith("--"):
            (files if argument.endswith(".py") else bare).append(argument)
            continue
        name, equals, text = argument[2:].partition("=")
        name = name.replace("-", "_")
        negated = name.startswith("no_") and name not in hints and name[3:] in hints
        name = name[3:] if negated else name
        if name not in hints:
            problems.append(f"command line: {unknown(name, hints)}")
            if not equals and rest and not rest[0].startswith("--"):
                rest.pop(0)
            continue
        if negated:
            if equals:
                problems.append(f"command line: --no-{name} takes no value")
            pairs.append((name, False))
            continue
        if not equals:
            is_flag = bool in options_of(hints[name])
            if is_flag and (not rest or parse(rest[0], hints[name]) is INVALID):
                pairs.append((name, True))
                continue
            if not rest or rest[0].startswith("--"):
                problems.append(f"command line: --{name} needs a value: --{name}=VALUE")
                continue
            text = rest.pop(0)
        value = parse(text, hints[name])
        pairs.append((name, text if value is INVALID else value))
    if bare:
        problems.append(f"command line: {unnamed(bare, hints, dict(pairs))}")
    return files, pairs


def run_file(path: str, values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The public names that a config file assigns when it runs on top of `values`.

    Appends to `problems` whatever the file raises, with its line.
    """
    space = {**values, "__name__": "config", "__file__": path}
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("not a file")
        with open(path, encoding="utf-8-sig") as file:
            exec(compile(file.read(), path, "exec"), space)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's own code may raise anything
        problems.append(failure(path, error))
        return {}
    return {
        name: value
        for name, value in space.items()
        if isinstance(name, str)
        and not (name.startswith("_") or isinstance(value, ModuleType) or callable(value))
        and (name not in values or value is not values[name])
    }


# --- fields and paths


def defaults_of(cls: type) -> dict[str, Any]:
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(cls)
    }


def has_path(hint: Any) -> bool:
    """Whether a type, including its Annotated parts, is or contains a path."""
    return hint == A_PATH or any(map(has_path, get_args(hint)))


def with_home(value: Any) -> Any:
    """`value`, a string or a tuple of them, with ~ replaced by the home folder."""
    if isinstance(value, tuple):
        return tuple(map(with_home, value))
    return os.path.expanduser(value) if isinstance(value, str) else value


# --- help


def begin() -> None:
    """For a script, before its slow imports: until `command` runs, Ctrl-C ends it without a
    traceback, and a package that cannot be imported is explained in a line."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.excepthook = explain_import


def answer_help(cls: type, argv: list[str] | None = None) -> None:
    """Print the help and exit if the command line asks for it.

    Commands call this before they import torch, which takes seconds.
    """
    if argv is None:
        begin()
    try:
        split_arguments(cls, sys.argv[1:] if argv is None else argv, problems=[])
    except BrokenPipeError:
        sys.exit(drop_output())
    except OSError as problem:  # a full disk
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)


def help_text(cls: type) -> str:
    """The docstring of the command, then a line per setting (name, comment, type, default) under
    the headings of the dataclass.

    A command's own settings come before those that it inherits.
    """
    hints, comments, defaults = get_type_hints(cls), comments_of(cls), defaults_of(cls)
    lines = [inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")]
    above = ""
    for name in dict.fromkeys([*cls.__annotations__, *defaults]):
        heading, comment = comments.get(name, ("settings", ""))
        if heading != above:
            lines += ["", f"{heading}:"]
            above = heading
        kind = f"{describe(hints[name])}, default {defaults[name]!r}"
        lines += [f"  --{name:<18} {comment} ({kind})"]
    return "\n".join(lines)


def comments_of(cls: type) -> dict[str, tuple[str, str]]:
    """The heading above each field (a comment on a line of its own) and the comment after it, read
    from the source of the dataclass and its bases."""
    comments: dict[str, tuple[str, str]] = {}
    for each in reversed([base for base in cls.__mro__ if is_dataclass(base)]):
        name, heading = "", "settings"
        for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(each)).readline):
            before, text = token.line[: token.start[1]], token.string.lstrip("# ")
            if token.type == tokenize.NAME and not before.strip():
                name = token.string
            elif token.type == tokenize.COMMENT and before.strip():
                comments[name] = heading, text
            elif token.type == tokenize.COMMENT:
                heading = text
    return comments
