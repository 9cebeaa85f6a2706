"""
The answers of two models side by side, for a rater who does not know which is whose, and what the
rater's choices say.
"""

import hashlib
import json
import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import msgspec

from configurator import UserError
from plaingpt.evaluation.answers import Answer, read_answers, read_lines
from plaingpt.wording import shown

Model = Literal["a", "b"]
MODELS: tuple[Model, Model] = ("a", "b")
OTHER: dict[Model, Model] = {"a": "b", "b": "a"}
Z = 1.959964  # standard deviations to either side that hold 95% of a normal distribution


class Pair(msgspec.Struct, frozen=True):
    """A line of a file of pairs: all that a rater sees."""

    pair: str  # its number, and a hash of the rest
    question: str
    left: str
    right: str


class Key(msgspec.Struct, frozen=True):
    """Which answer is whose."""

    a: str  # the file of the answers
    b: str
    left: dict[str, Model]  # of each pair, whose answer is on the left


class Choice(msgspec.Struct, frozen=True):
    """A line of a file of choices."""

    pair: str
    choice: Literal["left", "right", "tie"]


@dataclass(frozen=True)
class Tally:
    """How often the answer of either model was chosen."""

    a: int
    b: int
    ties: int

    @property
    def rated(self) -> int:
        return self.a + self.b + self.ties

    @property
    def win_rate(self) -> float:
        """Of a; a tie is half a win."""
        return (self.a + self.ties / 2) / self.rated

    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the win rate (Wilson 1927). It is for wins and losses; ties
        vary less than these, so it is too wide when there are many."""
        n, rate = self.rated, self.win_rate
        centre = (rate + Z**2 / (2 * n)) / (1 + Z**2 / n)
        spread = Z / (1 + Z**2 / n) * math.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2))
        return max(centre - spread, 0.0), min(centre + spread, 1.0)

    def p_value(self) -> float:
        """Of the two-sided sign test, which leaves out ties: how likely a difference at least this
        large would be if both models won equally often."""
        n = self.a + self.b
        tail = sum(math.comb(n, wins) for wins in range(min(self.a, self.b) + 1))
        return min(1.0, 2 * tail / 2**n)


def make_pairs(a: str, b: str, seed: int) -> tuple[list[Pair], Key]:
    """A pair for each question of two files of answers, in the order of the first, with its two
    answers in random order.

    Raises UserError for a question that a file has twice, or that only one of them has.
    """
    first, second = by_question(a), by_question(b)
    for mine, others, other in ((first, second, b), (second, first, a)):
        for asked, (where, _) in mine.items():
            if asked not in others:
                raise UserError(f"{where}: {other} lacks this question (with this reference)")
    order = random.Random(seed)
    pairs: list[Pair] = []
    left: dict[str, Model] = {}
    for number, (asked, (_, answer)) in enumerate(first.items(), 1):
        texts: dict[Model, str] = {"a": answer.answer, "b": second[asked][1].answer}
        sides = order.sample(MODELS, 2)
        seen = (answer.question, *(texts[model] for model in sides))
        name = f"{number}-{hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:12]}"
        pairs.append(Pair(name, *seen))
        left[name] = sides[0]
    return pairs, Key(a, b, left)


def by_question(path: str) -> dict[tuple[str, str], tuple[str, Answer]]:
    """The answers of a file and their places, by question and reference. Raises UserError for a
    line that repeats an earlier one."""
    found: dict[tuple[str, str], tuple[str, Answer]] = {}
    for where, answer in read_answers(path):
        asked = answer.question, answer.reference
        if asked in found:
            earlier = f"the same question and reference as in {found[asked][0]}"
            raise UserError(
                f"{where}: {earlier}: remove one of the two, and its counterpart in the other file"
            )
        found[asked] = where, answer
    return found


def count_choices(path: str, key: Key) -> Tally:
    """Raises UserError for a choice that does not fit the key, a pair that was rated twice, and a
    file without choices."""
    places: dict[str, str] = {}
    won: Counter[str] = Counter()
    for where, choice in read_lines(path, Choice):
        if choice.pair not in key.left:
            raise UserError(
                f"{where}: the key has no pair {shown(choice.pair)}: was another set rated?"
            )
        if choice.pair in places:
            raise UserError(f"{where}: pair {choice.pair} has a choice in {places[choice.pair]}")
        places[choice.pair] = where
        left = key.left[choice.pair]
        won[{"left": left, "right": OTHER[left], "tie": "tie"}[choice.choice]] += 1
    if not places:
        raise UserError(f"there are no choices in {path}")
    return Tally(won["a"], won["b"], won["tie"])
