"""What a model answers to the questions of a split."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from configurator import UserError
from model import GPT
from plaingpt.evaluation.answers import Answer, corpus_figures
from plaingpt.evaluation.results import Result
from plaingpt.files import atomic_file
from plaingpt.generation import NOT_FINITE, Batch, Text, write_in_order
from plaingpt.runtime import Runtime
from plaingpt.sampling import Sampling
from plaingpt.text.dataset import Dataset
from plaingpt.text.questions import Question, questions
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.wording import quantity

EXTRA_TOKENS = 100  # by which an answer may exceed the reference answer
BATCH_SIZE = 8  # answers that are written side by side
EXAMPLES = 3  # answers to print


def read(data: Dataset, limit: int | None) -> list[Question]:
    """The first `limit` questions of the validation split (None: all). Raises UserError if it has
    none."""
    asked = list(islice(questions(data.split("val"), data.tokenizer), limit))
    if not asked:
        raise UserError(
            f"there are no questions in {data.folder}: prepare it with --template=alpaca, chat "
            "or synth"
        )
    return asked


def measure(
    model: GPT, data: Dataset, asked: list[Question], path: str | None, rt: Runtime
) -> Result:
    """Compare the answers to questions of the validation split with the reference answers, and
    write them all to the file `path`. The processes share the work.

    Raises UserError, in every process, for a model whose logits are not finite.
    """
    tokenizer = data.tokenizer
    mine = asked[rt.rank :: rt.world_size]
    written: list[Answer] = []
    problem = None
    with tqdm(total=len(mine), desc="answers", unit=" answers", disable=rt.hides_progress) as bar:
        try:
            for each in answer(model, tokenizer, mine):
                written.append(each)
                bar.update()
        except UserError as error:
            problem = error
    if rt.any(problem is not None):
        raise problem or UserError(NOT_FINITE)
    shares = rt.gather(written)
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
