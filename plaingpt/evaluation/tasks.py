"""
Multiple-choice and cloze tasks, as lm-evaluation-harness (version 0.4) defines them.

A task is where its items are, what a record looks like, and how a record becomes an `Item`.
hellaswag_completion is llm.c's.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from plaingpt.text.hub import HubDataset


@dataclass(frozen=True)
class Item:
    """Continuations, each scored after its own context; `answer` is the number of the right one."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    answer: int = 0


@dataclass(frozen=True)
class Task:
    """`figures` are among acc (the right choice is the likeliest; of a cloze: each token is),
    acc_norm (it is the likeliest per character, or per token) and perplexity (of a cloze)."""

    record: type[msgspec.Struct]
    item: Callable[[Any], Item]
    figures: tuple[str, ...]
    hub: HubDataset | None = None  # None: only files
    file: str = ""  # the name of its files, if it is not that of the task
    per_token: bool = False


def multiple_choice(context: str, choices: list[str], answer: int) -> Item:
    """An item whose choices follow the same context after a space."""
    return Item((context,) * len(choices), tuple(f" {choice}" for choice in choices), answer)


# --- what records look like, and how they are asked

Choices = Annotated[list[str], msgspec.Meta(min_length=1)]
NonBlank = Annotated[str, msgspec.Meta(pattern=r"\S")]
Number = Annotated[str, msgspec.Meta(pattern=r"^\d{1,9}$")]


class HellaSwag(msgspec.Struct, frozen=True):
    activity_label: str
    ctx_a: str
    ctx_b: str
    endings: Choices
    label: int | Number


def hellaswag(record: HellaSwag) -> Item:
    context = f"{record.activity_label}: {record.ctx_a} {record.ctx_b.capitalize()}"
    endings = [without_markup(ending) for ending in record.endings]
    return multiple_choice(without_markup(context), endings, int(record.label))


class HellaSwagCompletion(msgspec.Struct, frozen=True):
    ctx: str
    endings: Choices
    label: int | Number


def hellaswag_completion(record: HellaSwagCompletion) -> Item:
    """As llm.c asks: without the activity, and with brackets."""
    return multiple_choice(record.ctx, record.endings, int(record.label))


def without_markup(text: str) -> str:
    """A text of WikiHow without its brackets."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


class Lambada(msgspec.Struct, frozen=True):
    text: Annotated[str, msgspec.Meta(pattern=r" \S")]


def lambada(record: Lambada) -> Item:
    context, _, word = record.text.rpartition(" ")
    return Item((context,), (f" {word}",))


class ArcChoices(msgspec.Struct, frozen=True):
    text: Choices
    label: list[str]


class Arc(msgspec.Struct, frozen=True):
    question: str
    choices: ArcChoices
    answerKey: str


def arc(record: Arc) -> Item:
    labels, key = record.choices.label, record.answerKey
    answer = labels.index(key) if key in labels else len(labels)
    return multiple_choice(f"Question: {record.question}\nAnswer:", record.choices.text, answer)


class Piqa(msgspec.Struct, frozen=True):
    goal: str
    sol1: str
    sol2: str
    label: int


def piqa(record: Piqa) -> Item:
    choices = [record.sol1, record.sol2]
    return multiple_choice(f"Question: {record.goal}\nAnswer:", choices, record.label)


class Winogrande(msgspec.Struct, frozen=True):
    sentence: Annotated[str, msgspec.Meta(pattern="_")]
    option1: str
    option2: str
    answer: Literal["1", "2"]


def winogrande(record: Winogrande) -> Item:
    """The options fill the gap of the context; the rest of the sentence is scored."""
    before, _, after = record.sentence.partition("_")
    contexts = (before + record.option1, before + record.option2)
    return Item(contexts, (f" {after.strip()}",) * 2, int(record.answer) - 1)


class Choosing(msgspec.Struct, frozen=True):
    context: str
    choices: Annotated[list[NonBlank], msgspec.Meta(min_length=2)]
    answer: int  # from 0

    def __post_init__(self) -> None:
        """Raises ValueError for equal choices. (The published tasks are scored as they are.)"""
        for number, choice in enumerate(self.choices):
            if choice in self.choices[:number]:
                same = self.choices.index(choice)
                raise ValueError(f"choices[{number}] is the same as choices[{same}]")


def choosing(record: Choosing) -> Item:
    return multiple_choice(record.context, record.choices, record.answer)


class Cloze(msgspec.Struct, frozen=True):
    context: str
    continuation: NonBlank


def cloze(record: Cloze) -> Item:
    return Item((record.context,), (f" {record.continuation}",))


# --- the tasks

CHOICE, CLOZE = ("acc", "acc_norm"), ("acc", "perplexity")
ARC, LAMBADA = "allenai/ai2_arc", "EleutherAI/lambada_openai"
HELLASWAG = HubDataset("Rowan/hellaswag", None, None, "validation")
TASKS = {
    "hellaswag": Task(HellaSwag, hellaswag, CHOICE, HELLASWAG),
    "hellaswag_completion": Task(
        HellaSwagCompletion, hellaswag_completion, CHOICE, HELLASWAG, "hellaswag", per_token=True
    ),
    "lambada_openai": Task(Lambada, lambada, CLOZE, HubDataset(LAMBADA, "default", None, "test")),
    "arc_easy": Task(Arc, arc, CHOICE, HubDataset(ARC, "ARC-Easy", None, "test")),
    "arc_challenge": Task(Arc, arc, CHOICE, HubDataset(ARC, "ARC-Challenge", None, "test")),
    "piqa": Task(Piqa, piqa, CHOICE, HubDataset("baber/piqa", None, None, "validation")),
    "winogrande": Task(
        Winogrande,
        winogrande,
        ("acc",),
        HubDataset("allenai/winogrande", "winogrande_xl", None, "validation"),
    ),
}
OWN = {"choices": Task(Choosing, choosing, CHOICE), "continuation": Task(Cloze, cloze, CLOZE)}
