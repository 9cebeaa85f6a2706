"""
One frozen dataclass + Python config files + --key=value → one checked config.

Every command's settings are a frozen dataclass, one field a line; the comment behind a field is
what --help prints. The order is defaults < config files as given < command line:

    python train.py config/gpt2_124m.py --batch_size=32 --learning_rate 3e-4 --no-compile

A config file is plain Python whose public names are settings. It sees the values so far, so
`max_steps = 2 * max_steps` works; modules, functions and names that begin with _ are its own.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import math
import os
import sys
import tokenize
import traceback
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

Config = TypeVar("Config")
WORDS = {"true": True, "yes": True, "on": True, "1": True}
WORDS |= {"false": False, "no": False, "off": False, "0": False}
INVALID = object()  # what parse and check return for a value that does not fit


# --- types of settings


DType = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class Range:
    """The values that a setting may have, as `validate` checks and explains them."""

    words: str
    holds: Callable[[Any], bool]


IN_64_BITS = Range("below 2**63", lambda value: value < 2**63)
PositiveInt = Annotated[int, Range("at least 1", lambda value: value >= 1), IN_64_BITS]
NonNegativeInt = Annotated[int, Range("at least 0", lambda value: value >= 0), IN_64_BITS]
PositiveFloat = Annotated[float, Range("a number above 0", lambda value: 0 < value < math.inf)]
NonNegativeFloat = Annotated[float, Range("a number from 0", lambda value: 0 <= value < math.inf)]
Fraction = Annotated[float, Range("in [0, 1]", lambda value: 0 <= value <= 1)]
FractionBelow1 = Annotated[float, Range("in [0, 1)", lambda value: 0 <= value < 1)]
FractionAbove0 = Annotated[float, Range("above 0 and at most 1", lambda value: 0 < value <= 1)]


class UserError(ValueError):
    """Something that a user can put right; it is shown as one line, without a traceback."""


Saved = Callable[[Config], dict[str, Any]]


def configure(cls: type[Config], argv: list[str], saved: Saved | None = None) -> Config:
    """Resolve `argv` into a `cls`, and print what differs from the defaults to stderr.

    `saved` returns values that take the place of the defaults, given what `argv` says.
    Raises UserError with all problems at once, one a line; SystemExit(0) after --help.
    """
    config, origin = resolve(cls, argv)
    if saved:
        config, origin = resolve(cls, argv, saved(config))
    defaults = {field.name: default_of(field) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name, where in origin.items():
        value = getattr(config, name)
        if value != defaults[name] and os.environ.get("RANK", "0") == "0":
            print(f"{name} = {value!r} (default {defaults[name]!r}, {where})", file=sys.stderr)
    return config


def command(
    cls: type[Config],
    run: Callable[[Config], Any],
    argv: list[str] | None = None,
    saved: Saved | None = None,
) -> int:
    """The body of every main(): configure, run, and turn a user's mistake into one line.

    Returns the exit status: 0, or 2 after a UserError (bad settings, bad data), an OSError (a full
    disk) or a lack of memory, 130 after Ctrl-C. Anything else is our own bug and keeps its
    traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A log shows each line at once, and one that cannot spell a sample does not end the run.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        run(configure(cls, sys.argv[1:] if argv is None else argv, saved))
        if sys.stdout:  # None where it was closed
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UserError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
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


def validate(config: Any, problems: typing.Iterable[str] = ()) -> None:
    """Raises UserError that lists every setting outside its `Range`, then the caller's `problems`.

    A command calls it first, so that settings given from Python are checked as well.
    """
    found = []
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        for allowed in ranges_of(hint):
            if value is not None and not allowed.holds(value):
                found.append(f"{name} must be {allowed.words}, not {value}")
    if found := [*found, *problems]:
        raise UserError("; ".join(found))


def ranges_of(hint: Any) -> list[Range]:
    """The ranges of a type, or of the members of a union."""
    return [
        each
        for option in options_of(hint)
        if typing.get_origin(option) is Annotated
        for each in option.__metadata__
    ]


def is_out_of_memory(problem: BaseException) -> bool:
    """numpy's and CUDA's kinds of error, and that of PyTorch's allocator on a CPU."""
    return isinstance(problem, MemoryError) or "memory" in str(problem).lower()


def one_line(problem: BaseException) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def resolve(
    cls: type[Config], argv: list[str], saved: dict[str, Any] | None = None
) -> tuple[Config, dict[str, str]]:
    """`configure` without the printing: the config, and where each given value came from."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values = {name: default_of(field) for name, field in fields.items()}
    origin: dict[str, str] = {}
    problems: list[str] = []

    def put(name: str, value: Any, where: str) -> None:
        checked = check(value, hints[name])
        if checked is INVALID:
            wanted = describe(hints[name])
            problems.append(f"{where}: {name} expects {wanted}, not {value!r}")
        else:
            values[name], origin[name] = checked, where

    for name, value in (saved or {}).items():
        put(name, value, "the run so far")
    files, pairs = split_arguments(cls, argv, hints, problems)
    for path in files:
        for name, value in run_file(path, values, problems).items():
            if name in fields:
                put(name, value, path)
            else:
                problems.append(f"{path}: {unknown(name, fields)}")
    for name, value in pairs:
        put(name, value, "command line")
    if problems:
        raise UserError("\n       ".join(problems))
    return cls(**values), origin


def split_arguments(
    cls: type, argv: list[str], hints: dict[str, Any], problems: list[str]
) -> tuple[list[str], list[tuple[str, Any]]]:
    """Config files and (name, parsed value) pairs of a command line; problems are appended."""
    files: list[str] = []
    pairs: list[tuple[str, Any]] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        answer_help(cls, [argument])
        if not argument.startswith("--"):
            if argument.endswith(".py"):
                files.append(argument)
            else:
                problems.append(
                    f"command line: {argument!r} is neither a config file (*.py) nor --key=value "
                    "(quote a value that holds spaces or *)"
                )
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
    return files, pairs


def run_file(path: str, values: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Run a config file on top of `values`; return the public names that it assigned."""
    space = {**values, "__name__": "config", "__file__": path}
    try:
        with open(path, encoding="utf-8") as file:
            exec(compile(file.read(), path, "exec"), space)
    except (Exception, SystemExit) as error:  # the user's own code: anything can come out of it
        where = path
        if isinstance(error, SyntaxError):
            where += f":{error.lineno}"
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == path:
                where = f"{path}:{frame.lineno}"
        reason = error.strerror if isinstance(error, OSError) else str(error)
        problems.append(f"{where}: {type(error).__name__}: {reason}")
        return {}
    assigned = {}
    for name, value in space.items():
        ours = name.startswith("_") or isinstance(value, types.ModuleType) or callable(value)
        if not ours and (name not in values or value is not values[name]):
            assigned[name] = value
    return assigned


def unknown(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"unknown setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")


# --- types: what a value may be, and how it is written on a command line


def default_of(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def options_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def check(value: Any, hint: Any) -> Any:
    """`value` as a `hint` (an int for a float becomes one, a list a tuple), or INVALID."""
    options = options_of(hint)
    for option in options:
        if typing.get_origin(option) is Literal:
            if any(value == word and type(value) is type(word) for word in typing.get_args(option)):
                return value
        elif typing.get_origin(option) is tuple:
            if isinstance(value, (tuple, list)):
                items = tuple(check(item, typing.get_args(option)[0]) for item in value)
                if not any(item is INVALID for item in items):
                    return items
        elif type(value) is option or (value is None and option is type(None)):
            return value
    if float in options and type(value) is int and abs(value) < 1e300:
        return float(value)
    return INVALID


def parse(text: str, hint: Any) -> Any:
    """The value that `text` from a command line stands for, or INVALID."""
    for option in sorted(options_of(hint), key=lambda option: option is str):
        if option is type(None) and text.lower() == "none":
            return None
        if option is bool and text.lower() in WORDS:
            return WORDS[text.lower()]
        if typing.get_origin(option) is Literal:
            for word in typing.get_args(option):
                if text == str(word):
                    return word
        elif typing.get_origin(option) is tuple:
            return parse_tuple(text, typing.get_args(option)[0])
        elif option in (int, float, str):
            try:
                return option(text)
            except ValueError:
                continue
    return INVALID


def parse_tuple(text: str, item_hint: Any) -> Any:
    """`a,b` or Python's own ("a", "b")."""
    if text[:1] in ("(", "["):
        try:
            return check(ast.literal_eval(text), tuple[item_hint, ...])
        except (ValueError, SyntaxError):
            return INVALID
    items = tuple(parse(item.strip(), item_hint) for item in text.split(",") if item.strip())
    return INVALID if any(item is INVALID for item in items) else items


def describe(hint: Any) -> str:
    words = []
    for option in options_of(hint):
        if typing.get_origin(option) is Literal:
            words += [str(word) for word in typing.get_args(option)]
        elif typing.get_origin(option) is tuple:
            words.append(f"{describe(typing.get_args(option)[0])},…")
        else:
            words.append("None" if option is type(None) else option.__name__)
    return " or ".join(words)


# --- help


def answer_help(cls: type, argv: list[str] | None = None) -> None:
    """Print the help and exit if it is asked for.

    Scripts call it before they import torch, which takes longer than printing the help.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if "-h" in arguments or "--help" in arguments:
        print(help_text(cls))
        raise SystemExit(0)


def help_text(cls: type) -> str:
    """The docstring of the command, then a line a setting: name, type, default, comment."""
    hints, comments = typing.get_type_hints(cls), comments_of(cls)
    lines = [inspect.cleandoc(sys.modules[cls.__module__].__doc__ or ""), "", "settings:"]
    inherited = [
        field for field in dataclasses.fields(cls) if field.name not in cls.__annotations__
    ]
    own = [field for field in dataclasses.fields(cls) if field not in inherited]
    for field in [*own, *inherited]:
        kind = f"{describe(hints[field.name])}, default {default_of(field)!r}"
        lines += [f"  --{field.name:<18} {comments.get(field.name, '')} ({kind})"]
    return "\n".join(lines)


def comments_of(cls: type) -> dict[str, str]:
    """The comment behind each field, read from the source of the dataclass and its bases."""
    comments: dict[str, str] = {}
    for each in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        name = ""
        for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(each)).readline):
            before = token.line[: token.start[1]]
            if token.type == tokenize.NAME and not before.strip():
                name = token.string
            elif token.type == tokenize.COMMENT and before.strip():
                comments[name] = token.string.lstrip("# ")
    return comments
