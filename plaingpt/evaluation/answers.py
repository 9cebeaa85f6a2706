"""Answers to held-out questions: kept in a file, and compared with the reference answers."""

import re
import string
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from configurator import UserError
from plaingpt.files import as_record
from plaingpt.text.records import line_rows

Record = TypeVar("Record")


class Answer(msgspec.Struct, frozen=True):
    """A line of a file of answers, whose other fields are ignored."""

    question: str  # as the model saw it, with the words of its template
    reference: str
    answer: str

    @property
    def exact(self) -> bool:
        return words(self.answer) == words(self.reference)

    @property
    def f1(self) -> float:
        return f1(words(self.answer), words(self.reference))

    def scored(self) -> dict[str, Any]:
        """The fields of a line that tools.eval writes."""
        return msgspec.structs.asdict(self) | {"exact": self.exact, "f1": self.f1}


def words(text: str) -> list[str]:
    """The words of a text, without case, punctuation and articles."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(given: list[str], wanted: list[str]) -> float:
    """The harmonic mean of precision and recall of the words `given`."""
    if not given or not wanted:
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted))


def corpus_figures(answers: list[Answer]) -> tuple[dict[str, float], str]:
    """BLEU and chrF of all answers together, from 0 to 100, and the signatures under which
    sacrebleu compares them with those of others."""
    from sacrebleu.metrics import BLEU, CHRF  # not at the top: 0.3 s

    given, wanted = [each.answer for each in answers], [[each.reference for each in answers]]
    figures, signatures = {}, []
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        figures[name] = metric.corpus_score(given, wanted).score
        signatures.append(f"{name} {metric.get_signature()}")
    return figures, ", ".join(signatures)


# --- files


def read_lines(path: str, kind: type[Record]) -> Iterator[tuple[str, Record]]:
    """The records of a file of JSON lines, each with its place for messages. Blank lines are
    skipped.

    Raises UserError for a line that is not such a record, OSError for a file that cannot be read.
    """
    for row in line_rows(path):
        if row.problem:
            raise UserError(f"{row.where}: {row.problem}")
        yield row.where, as_record(row.value, kind, row.where)


def read_answers(path: str) -> list[tuple[str, Answer]]:
    """All answers of a file, each with its place. Raises UserError as `read_lines`, and for a
    file without any."""
    if not (found := list(read_lines(path, Answer))):
        raise UserError(f"there are no answers in {path}")
    return found
