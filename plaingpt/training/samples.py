"""The texts that a run writes at its evaluations: continuations of the same prompts each time."""

from dataclasses import dataclass

import msgspec
import numpy as np

from model import GPT
from plaingpt import generation
from plaingpt.files import Count
from plaingpt.prompts import read_prompts
from plaingpt.sampling import Sampling
from plaingpt.text.dataset import Dataset
from plaingpt.text.shards import Split
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training import parallel

SAMPLE_TOKENS = 100  # at most, in each text
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
    """The prompts of a file; without one, held-out questions, or where there are none, the empty
    prompt of a new document.

    Raises UserError for a file that holds no prompts, and for a damaged split.
    """
    tokenizer = dataset.tokenizer
    if path is None:
        questions = held_out_questions(dataset.split("val"), tokenizer)
        return questions or [Prompt("", [tokenizer.eot_id])]
    texts = read_prompts(path)
    return [Prompt(text, tokenizer.encode(text) or [tokenizer.eot_id]) for text in texts]


def held_out_questions(split: Split, tokenizer: Tokenizer) -> list[Prompt]:
    """The first few questions of a split, as its template words them: the tokens before an answer,
    which do not count in the loss. Each is asked alone, without earlier turns."""
    end = min(SEARCHED, len(split))
    mask = split.mask(0, end)
    if mask is None:
        return []
    counts = mask > 0
    before = np.append(True, counts[:-1])
    starts, ends = np.flatnonzero(before & ~counts), np.flatnonzero(~before & counts)
    found = [split[start:end].tolist() for start, end in zip(starts[:QUESTIONS], ends)]
    return [Prompt(tokenizer.decode(ids), ids) for ids in found]


def print_samples(
    model: GPT, tokenizer: Tokenizer, prompts: list[Prompt], seed: int, step: int
) -> list[Sample]:
    """Print (> prompt, | continuation) and return what the model writes after each prompt, with
    the same draws each time."""
    samples = []
    model.eval()
    with parallel.unsharded(model):  # a sharded model needs all processes
        for number, prompt in enumerate(prompts):
            sampling = Sampling(seed=seed + number, max_new_tokens=SAMPLE_TOKENS)
            drawn = generation.continuation(model, tokenizer, prompt.ids, sampling)
            text = "".join(each.piece for each in drawn)
            samples.append(Sample(step, prompt.text, text))
            lines = [f"  > {line}" for line in prompt.text.splitlines()]
            lines += [f"  | {line}" for line in text.splitlines()]
            print("\n".join(lines))
    model.train()
    return samples
