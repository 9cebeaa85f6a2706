"""The questions of a split, and what a model answers."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean

import numpy as np
from tqdm import tqdm

from configurator import UserError
from model import GPT
from plaingpt.evaluation.answers import Answer, corpus_figures
from plaingpt.evaluation.results import Result
from plaingpt.files import atomic_file
from plaingpt.generation import Batch, Text, write_in_order
from plaingpt.runtime import Runtime
from plaingpt.sampling import Sampling
from plaingpt.text.dataset import Dataset
from plaingpt.text.shards import Split
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.wording import quantity

EXTRA_TOKENS = 100  # by which an answer may exceed the reference answer
BATCH_SIZE = 8  # answers that are written side by side
EXAMPLES = 3  # answers to print
Question = tuple[list[int], list[int]]  # ids of a question and of its reference answer


def measure(model: GPT, data: Dataset, limit: int | None, path: str | None, rt: Runtime) -> Result:
    """Compare the answers to the first `limit` questions of the validation split with the reference
    answers, and write them all to the file `path`. The processes share the work.

    Raises UserError if the split has no questions.
    """
    tokenizer = data.tokenizer
    asked = list(islice(questions(data.split("val"), tokenizer), limit))
    mine = asked[rt.rank :: rt.world_size]
    bar = tqdm(
        answer(model, tokenizer, mine),
        "answers",
        len(mine),
        unit=" answers",
        disable=rt.hides_progress,
    )
    shares = rt.gather(list(bar))
    answers = [
        shares[number % rt.world_size][number // rt.world_size] for number in range(len(asked))
    ]
    items = [each.scored() for each in answers]
    if path and rt.is_main:
        with atomic_file(Path(path)) as partial:
            partial.write_text("".join(f"{json.dumps(item)}\n" for item in items), encoding="utf-8")
    figures, signatures = corpus_figures(answers)
    figures = {name: fmean(item[name] for item in items) for name in ("exact", "f1")} | figures
    protocol = (
        f"the likeliest answer to each question alone; exact and f1 as for SQuAD, {signatures}"
    )
    return Result("answers", protocol, figures, items, data.hashes("val"))


def summary(result: Result) -> str:
    """Some questions (---), with the model's answer (>) and the reference answer (=); then how many
    are equal."""
    lines = [
        f"--- {item['question']}\n> {item['answer']}\n= {item['reference']}"
        for item in result.items[:EXAMPLES]
    ]
    equal, asked = result.figures["exact"], quantity(len(result.items), "question")
    lines.append(f"answers: {equal:.1%} equal, F1 {result.figures['f1']:.3f} ({asked})")
    return "\n".join(lines)


def questions(split: Split, tokenizer: Tokenizer) -> Iterator[Question]:
    """The ids of each question of a split, and of its reference answer.

    A question is a run of tokens that do not count in the loss; its answer is the run that follows
    and does count, up to the end of the text. Raises UserError if the split has none.
    """
    counts = np.asarray(split.mask(0, len(split)), dtype=bool)
    edges = [0, *(np.flatnonzero(counts[1:] != counts[:-1]) + 1).tolist(), len(split)]
    found = False
    for start, middle, end in zip(edges, edges[1:], edges[2:]):
        if not counts[start]:
            answer = split[middle:end].tolist()
            if tokenizer.eot_id in answer:  # what follows may be a text that counts from its start
                answer = answer[: answer.index(tokenizer.eot_id)]
            found = True
            yield split[start:middle].tolist(), answer
    if not found:
        raise UserError("this data has no answer that counts in the loss")


def answer(model: GPT, tokenizer: Tokenizer, asked: list[Question]) -> Iterator[Answer]:
    """The likeliest answer to each question, in order; several are written side by side."""
    if not asked:  # the share of a process
        return
    texts = (
        Text(ids, Sampling(temperature=0, max_new_tokens=len(ref) + EXTRA_TOKENS), tokenizer)
        for ids, ref in asked
    )
    longest = max(len(ids) + len(ref) for ids, ref in asked) + EXTRA_TOKENS
    batch = Batch(model, tokenizer, min(BATCH_SIZE, len(asked)), longest)
    for (ids, ref), text in zip(asked, write_in_order(batch, texts)):
        parts = (tokenizer.decode(ids), tokenizer.decode(ref), text.written)
        yield Answer(*(part.strip() for part in parts))
