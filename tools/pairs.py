"""
Compare two models by hand: pairs of answers for a rater who does not know which is whose.

    python -m tools.pairs --a=one.jsonl --b=two.jsonl --out=pairs.jsonl
    python -m tools.pairs --out=pairs.jsonl --read=choices.jsonl  # who wins how often

The first command reads two files of answers (tools.eval --answers). It writes pairs.jsonl, the same
as a page to open in a browser (pairs.html), and which answer is whose (pairs.key.json, not for the
rater). The page needs no network; its button downloads the choices as choices.jsonl.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # for python tools/pairs.py

import configurator
from configurator import NonNegativeInt, PathName, UserError


@dataclass(frozen=True)
class PairsConfig:
    a: PathName | None = None  # answers of a model, as tools.eval --answers writes them
    b: PathName | None = None  # answers of another model to the same questions
    out: PathName = "pairs.jsonl"  # the pairs; the page and the key are written beside it
    seed: NonNegativeInt = 1337  # of the random order of the two answers
    read: PathName | None = None  # the choices of a rater, to count them


if __name__ == "__main__":
    configurator.answer_help(PairsConfig)

import json

import msgspec

from plaingpt.evaluation.pairs import Key, Pair, Tally, count_choices, make_pairs
from plaingpt.files import atomic_file, read_json, write_json
from plaingpt.wording import quantity

PAGE = Path(__file__).with_name("pairs.html")


def compare(cfg: PairsConfig) -> Tally | None:
    """Write the pairs, or return and print how the models compare.

    Raises UserError for settings that do not go together, files that exist already, and for the
    line of a file that does not fit the others.
    """
    configurator.validate(cfg, problems_of(cfg))
    out = Path(cfg.out)
    page, key_file = out.with_suffix(".html"), out.with_suffix(".key.json")
    if cfg.read:
        key = read_json(key_file, Key)
        tally = count_choices(cfg.read, key)
        print(summary(tally, key))
        return tally
    assert cfg.a and cfg.b
    if there := [str(path) for path in (out, page, key_file) if path.exists()]:
        raise UserError(f"{there[0]} already exists: choose another --out, or remove it")
    pairs, key = make_pairs(cfg.a, cfg.b, cfg.seed)
    write_json(key_file, key)
    lines = "".join(f"{json.dumps(msgspec.structs.asdict(pair))}\n" for pair in pairs)
    for path, text in ((out, lines), (page, page_of(pairs))):
        with atomic_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    print(f"wrote {quantity(len(pairs), 'pair')}: {out}, {page} for a rater, and {key_file}")
    return None


def problems_of(cfg: PairsConfig) -> Iterator[str]:
    if not cfg.out.endswith(".jsonl"):
        yield f"out must end with .jsonl, not {cfg.out!r}"
    if cfg.read and (cfg.a or cfg.b):
        yield "read cannot be combined with a or b"
    if cfg.a and cfg.b and Path(cfg.a).resolve() == Path(cfg.b).resolve():
        yield f"a and b are the same file, {cfg.a}: name the answers of two models"
    if not cfg.read and not (cfg.a and cfg.b):
        yield "expected the answers of two models, --a and --b, or a rater's choices, --read"


def page_of(pairs: list[Pair]) -> str:
    """The page of a rater. No text of a pair can end the element that holds them all."""
    data = json.dumps([msgspec.structs.asdict(pair) for pair in pairs])
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    before, _, after = PAGE.read_text(encoding="utf-8").partition("[/* pairs */]")
    return before + data + after


def summary(tally: Tally, key: Key) -> str:
    low, high = tally.interval()
    counts = f"{quantity(tally.a, 'win')}, {quantity(tally.b, 'loss', 'losses')}"
    return (
        f"{key.a} against {key.b}: {counts}, {quantity(tally.ties, 'tie')} in "
        f"{tally.rated:,} of {quantity(len(key.left), 'pair')}\n"
        f"win rate {tally.win_rate:.1%}, 95% interval {low:.1%} to {high:.1%} (Wilson; a tie is "
        f"half a win)\n"
        f"sign test without ties: p = {tally.p_value():.3g} (two-sided)"
    )


def main(argv: list[str] | None = None) -> int:
    return configurator.command(PairsConfig, compare, argv)


if __name__ == "__main__":
    sys.exit(main())
