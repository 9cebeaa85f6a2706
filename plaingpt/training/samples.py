"""The texts that a run writes at its evaluations: continuations of the same prompts each time."""

from dataclasses import dataclass
from itertools import islice

import msgspec

from model import GPT
from plaingpt.files import Count
from plaingpt.generation import Batch, Text, write_in_order
from plaingpt.prompts import read_prompts
from plaingpt.runtime import Runtime
from plaingpt.sampling import Sampling
from plaingpt.text.dataset import Dataset
from plaingpt.text.questions import questions
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training import parallel

SAMPLE_TOKENS = 100  # at most, in each text
BATCH_SIZE = 8  # texts that are written side by side
QUESTIONS = 3  # held-out ones that are asked
SEARCHED = 2**16  # tokens at the start of a split, for questions


class Sample(msgspec.Struct, frozen=True):
    """A line of samples.jsonl."""

    step: Count
    prompt: str
    text: str


@dataclass(frozen=True)
class Prompt:
    text: str
    ids: list[int]


def prompts_for(dataset: Dataset, path: str | None) -> list[Prompt]:
    """The prompts of a file; without one, the first few held-out questions, as their template words
    them and without earlier turns, or where there are none, the empty prompt of a new document.

    Raises UserError for a file that holds no prompts, and for a damaged split.
    """
    tokenizer = dataset.tokenizer
    if path is None:
        held_out = islice(questions(dataset.split("val"), tokenizer, SEARCHED), QUESTIONS)
        asked = [Prompt(tokenizer.decode(ids), ids) for ids, _ in held_out]
        return asked or [Prompt("", [tokenizer.eot_id])]
    texts = read_prompts(path)
    return [Prompt(text, tokenizer.encode(text) or [tokenizer.eot_id]) for text in texts]


def print_samples(
    model: GPT, tokenizer: Tokenizer, prompts: list[Prompt], seed: int, step: int, rt: Runtime
) -> list[Sample]:
    """Print (> prompt, | continuation) and return what the model writes after each prompt, with
    the same draws each time. Several are written side by side."""
    texts = [
        Text(prompt.ids, Sampling(seed=seed + number, max_new_tokens=SAMPLE_TOKENS), tokenizer)
        for number, prompt in enumerate(prompts)
    ]
    longest = max(len(prompt.ids) for prompt in prompts) + SAMPLE_TOKENS
    samples = []
    model.eval()
    with parallel.unsharded(model, rt):
        batch = Batch(model, tokenizer, min(BATCH_SIZE, len(prompts)), longest)
        for prompt, text in zip(prompts, write_in_order(batch, texts)):
            samples.append(Sample(step, prompt.text, text.written))
            lines = [f"  > {line}" for line in prompt.text.splitlines()]
            lines += [f"  | {line}" for line in text.written.splitlines()]
            print("\n".join(lines))
    model.train()
    return samples
