"""Prompts that the page offers to start with, taken from the model's own validation text."""

import re
from collections.abc import Iterator

from configurator import UserError
from plaingpt import generation
from plaingpt.checkpoint import folders
from plaingpt.text import dataset
from plaingpt.text.tokenizer import Tokenizer

COUNT = 4
TOKENS = 1 << 16  # of validation text to choose from
WORDS, CHARACTERS = 8, 80  # of the longest prompt
TEXTS = ["Once upon a time", "The most important thing about", "In the early morning", "def main("]
QUESTIONS = [
    "Who are you?",
    "Name three animals.",
    "What is the capital of France?",
    "Write a short poem about the sea.",
]
QUESTION = re.compile(r"### (?:User|Instruction):\n(.+?)\n\n###", re.DOTALL)


def examples(checkpoint: str, tokenizer: Tokenizer) -> list[str]:
    """Four prompts that suit a model: questions if it holds conversations, beginnings otherwise.

    They come from its validation text, or are neutral ones if that is not on this machine.
    """
    chat = generation.holds_conversations(tokenizer)
    text = validation_text(checkpoint, tokenizer)
    found = list(dict.fromkeys(questions(text) if chat else beginnings(text, tokenizer.eot)))
    if len(found) < COUNT:
        return QUESTIONS if chat else TEXTS
    return [found[(2 * place + 1) * len(found) // (2 * COUNT)] for place in range(COUNT)]


def validation_text(checkpoint: str, tokenizer: Tokenizer) -> str:
    """The beginning of the validation text of the run that made a checkpoint, or "" if that is not
    here."""
    if folders.on_hub(checkpoint):
        return ""
    try:
        settings = folders.read_state(folders.find(checkpoint)).settings
        data = dataset.open_dataset(str(settings.get("data_dir", "")))
        if not (data.folder / "tokenizer.json").exists():  # GPT-2's, perhaps to be downloaded
            return ""
        if data.tokenizer.fingerprint != tokenizer.fingerprint:
            return ""
        split = data.split("val")
        return tokenizer.decode(split.tokens(0, min(TOKENS, len(split))).tolist())
    except (UserError, OSError):  # another machine's checkpoint, data that was removed
        return ""


def questions(text: str) -> Iterator[str]:
    """The short questions of conversations and instructions."""
    for match in QUESTION.finditer(text):
        if len(match[1]) <= CHARACTERS:
            yield match[1].strip()


def beginnings(text: str, end: str) -> Iterator[str]:
    """The first words of the paragraphs that are not indented."""
    for paragraph in text.replace(end, "\n\n").split("\n\n"):
        line = paragraph.lstrip("\n").partition("\n")[0]
        words = " ".join(line.split(" ")[:WORDS])
        if line[:1].strip() and 4 <= len(words) <= CHARACTERS and re.search(r"\w\w", words):
            yield words.rstrip()
