"""Values of settings: which ones a type allows, and how they are written on a command line."""

import ast
import os
import re
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from plaingpt.wording import shown

BOOLEANS = {"true": True, "yes": True, "on": True, "1": True}
BOOLEANS |= {"false": False, "no": False, "off": False, "0": False}
INVALID = object()  # returned by `check` and `parse` for a value that does not fit its type


def options_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def check(value: Any, hint: Any) -> Any:
    """`value` converted to the type `hint` (an int to float, a list to a tuple), or INVALID."""
    options = options_of(hint)
    for option in options:
        if get_origin(option) is Literal:
            if any(type(value) is type(word) and value == word for word in get_args(option)):
                return value
        elif get_origin(option) is tuple:
            if isinstance(value, (tuple, list)):
                items = tuple(check(item, get_args(option)[0]) for item in value)
                if not any(item is INVALID for item in items):
                    return items
        elif type(value) is int and option is int:
            return value if abs(value) < 2**63 else INVALID
        elif type(value) is str and option is str:
            return INVALID if "\0" in value else value  # a file name cannot contain it
        elif type(value) is option or (value is None and option is type(None)):
            return value
    if float in options and type(value) is int and abs(value) < 1e300:
        return float(value)
    return INVALID


def parse(text: str, hint: Any) -> Any:
    """The value that `text` means on a command line, or INVALID."""
    for option in sorted(options_of(hint), key=lambda option: option is str):
        if option is type(None) and text.lower() == "none":
            return None
        if option is bool and text.lower() in BOOLEANS:
            return BOOLEANS[text.lower()]
        if get_origin(option) is Literal:
            for word in get_args(option):
                if text == str(word):
                    return word
        elif get_origin(option) is tuple:
            return parse_tuple(text, get_args(option)[0])
        elif option in (int, float, str):
            try:
                return option(text)
            except ValueError:
                continue
    return INVALID


def parse_tuple(text: str, item_hint: Any) -> Any:
    """The tuple that a text means: `a,b`, Python's own `("a", "b")`, or the name of an existing
    file that contains a comma. INVALID if it means none.

    Blanks count, as in a stop string, except after a comma."""
    if item_hint is str and os.path.exists(os.path.expanduser(text)):
        return (text,)
    if text.startswith(("(", "[")):
        try:
            return check(ast.literal_eval(text), tuple[item_hint, ...])
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return INVALID  # the last three: [{[]}], and brackets nested too deeply
    items = tuple(parse(item, item_hint) for item in re.split(r",\s*", text) if item)
    nothing = bool(text) and not items  # but commas
    return INVALID if nothing or any(item is INVALID for item in items) else items


def describe(hint: Any) -> str:
    words = []
    for option in options_of(hint):
        if get_origin(option) is Literal:
            words += [str(word) for word in get_args(option)]
        elif get_origin(option) is tuple:
            item = describe(get_args(option)[0])
            words.append('str,… or ["str", …]' if item == "str" else f"{item},…")
        else:
            words.append("None" if option is type(None) else option.__name__)
    return " or ".join(words)


def misfit(name: str, value: Any, hint: Any) -> str:
    """The message for a value that `check` finds INVALID."""
    huge = type(value) is int and abs(value) >= 2**63  # repr() may refuse it
    given = "an integer beyond 64 bits" if huge else shown(value)
    return f"{name} expects {describe(hint)}, not {given}"
