"""
Make questions and answers from the documentation of Python's standard library.

    python runs/make_instructions.py data/questions

Writes conversations for prepare.py --template=chat to the folder: taught.jsonl, and held_out.jsonl
with all questions about one name in ten. Those that are taught come ten times, in another order
each time: in the same order, a model learns to tell an answer by the questions before it. A name is
that of a function, a class or a method of a built-in type. It is asked for

- its purpose: the first sentence of its docstring;
- its signature: its parameters, with defaults;
- its module, if no other module here has the name.
"""

import builtins
import importlib
import inspect
import json
import random
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODULES = """
    argparse array ast asyncio base64 bisect builtins calendar cmath codecs collections colorsys
    configparser contextlib copy csv dataclasses datetime decimal difflib dis email enum filecmp
    fileinput fnmatch fractions functools gc getpass gettext glob gzip hashlib heapq hmac html
    inspect io ipaddress itertools json keyword linecache locale logging math mimetypes
    multiprocessing operator os os.path pathlib pickle platform pprint queue random re sched
    secrets select shelve shlex shutil signal socket stat statistics string struct subprocess sys
    sysconfig tarfile tempfile textwrap threading time timeit tokenize traceback types unicodedata
    unittest urllib.parse urllib.request uuid warnings weakref webbrowser zipfile
""".split()  # noqa: SIM905 (a line for each of them would be longer)
TYPES = (str, bytes, int, float, list, tuple, dict, set)  # whose methods are asked for
LONGEST = 160  # characters of an answer
HELD_OUT = 10  # one name in ten
ROUNDS = 10  # in which all questions are taught


@dataclass(frozen=True)
class Documented:
    """A function, a class or a method."""

    module: str
    name: str  # within its module
    purpose: str
    signature: str | None

    @property
    def full_name(self) -> str:
        return self.name if self.module == "builtins" else f"{self.module}.{self.name}"

    @property
    def held_out(self) -> bool:
        """The same in every version of Python."""
        return zlib.crc32(self.full_name.encode()) % HELD_OUT == 0


def documented(module_name: str) -> Iterator[Documented]:
    """What a module has that is public, documented, and its own."""
    module = importlib.import_module(module_name)
    public = dir(builtins) if module is builtins else getattr(module, "__all__", None)
    for name, thing in inspect.getmembers(module, callable):
        home = getattr(thing, "__module__", None) or ""  # _bisect, for what is written in C
        own = name in public if public else home.removeprefix("_") == module_name
        if own and not name.startswith("_"):
            yield from described(module_name, name, thing)
    for kind in TYPES if module is builtins else ():
        for name, method in inspect.getmembers(kind, callable):
            if not name.startswith("_"):
                yield from described(module_name, f"{kind.__name__}.{name}", method)


def described(module: str, name: str, thing: Any) -> Iterator[Documented]:
    docstring = thing.__doc__
    purpose = first_sentence(docstring) if isinstance(docstring, str) else ""
    if purpose and len(purpose) <= LONGEST and purpose.isascii():
        yield Documented(module, name, purpose, signature(thing))


def first_sentence(docstring: str) -> str:
    """The first sentence, on one line, after the signature with which some docstrings begin; "" for
    a docstring without one."""
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        if not re.match(r"[\w.]+\(", paragraph):
            text = " ".join(paragraph.split())
            return re.split(r"(?<=[.!?]) (?=[A-Z])", text)[0]
    return ""


def signature(thing: Any) -> str | None:
    """Such as (obj, indent=None): without types; None if it is unknown, or too long."""
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):  # some built-in ones
        return None
    parameters = [each for each in found.parameters.values() if each.name != "self"]
    plain = [each.replace(annotation=each.empty) for each in parameters]
    text = str(found.replace(parameters=plain, return_annotation=found.empty))
    return text if len(text) <= LONGEST and not re.search(r"<.* at 0x|<class", text) else None


def questions(everything: list[Documented]) -> Iterator[tuple[Documented, str, str]]:
    """Each question with its answer, after what it is about."""
    modules = Counter(each.name for each in everything)
    for each in everything:
        name = each.full_name
        yield each, f"What does {name} do?", each.purpose
        if each.signature:
            yield each, f"What is the signature of {name}?", f"{name}{each.signature}"
        if modules[each.name] == 1 and each.module != "builtins":
            yield each, f"Which module has {each.name}?", each.module


def main(folder: str) -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    found = list(questions([each for module in MODULES for each in documented(module)]))
    for name, held_out, rounds in (("taught", False, ROUNDS), ("held_out", True, 1)):
        chosen = [pair for pair in found if pair[0].held_out is held_out]
        path = Path(folder, f"{name}.jsonl")
        with path.open("w", encoding="utf-8") as file:
            for number in range(rounds):
                random.Random(number).shuffle(chosen)
                file.writelines(map(line_of, chosen))
        print(f"{path}: {len(chosen):,} questions")


def line_of(pair: tuple[Documented, str, str]) -> str:
    _, question, answer = pair
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__.strip())
        sys.exit(0 if {"-h", "--help"} & {*sys.argv} else 2)
    main(sys.argv[1])
