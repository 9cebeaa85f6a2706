"""
Score a checkpoint on the validation split of prepared data.

    python -m tools.eval                                            # out/stdlib on data/stdlib
    python -m tools.eval --checkpoint=gpt2 --data_dir=data/wikitext --limit=1000
    python -m tools.eval --checkpoint=out/instruct --data_dir=data/mine --tasks=perplexity,answers

perplexity: the loss that train.py reports, over windows that are as long as the model's context and
do not overlap; its exponential; and bits per byte, which compares models with different tokenizers.
If the data has a mask, only the answers count.

answers: the likeliest answer to each question of the split (alone, without the turns before it),
compared with the reference answer: the share of exact matches, and the mean F1 of their words, both
ignoring case, punctuation and articles, as for SQuAD (arXiv 1606.05250). A question that is longer
than the context loses its beginning. For the first three, this prints the question (---), the
model's answer (>) and the reference answer (=).
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # for python tools/eval.py

import configurator
from configurator import DType, Folder, NonEmpty, PathName, PositiveInt, UserError
from plaingpt import environment


@dataclass(frozen=True)
class EvalConfig:
    checkpoint: PathName = "out/stdlib"  # a run (its newest step), a step, gpt2, hf:OWNER/NAME
    data_dir: Folder = "data/stdlib"  # what prepare.py wrote
    tasks: tuple[NonEmpty, ...] = ("perplexity",)  # what to measure: perplexity, answers
    limit: PositiveInt | None = None  # at most this many windows or questions per task; None: all
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: DType = "auto"  # of matrix products; auto: 16 bits where they are faster
    quantize: Literal["int8"] | None = None  # weights in 8 bits, on a CPU, whatever dtype is
    json: PathName | None = None  # a file for all figures, how they came about, and every item


if __name__ == "__main__":
    configurator.answer_help(EvalConfig)  # before torch is imported, which takes a second
    environment.wait_briefly()
    environment.use_huge_pages()

import difflib
import re
import string
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch

from model import GPT
from plaingpt import generation, packing, runtime
from plaingpt.checkpoint import store
from plaingpt.evaluation import perplexity
from plaingpt.evaluation.results import Result, mean, table, write_results
from plaingpt.sampling import Sampling
from plaingpt.text import dataset, shards
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.wording import quantity

TASKS = ("perplexity", "answers")
EXTRA_TOKENS = 100  # by which an answer may exceed the reference answer
EXAMPLES = 3  # answers to print


def score(cfg: EvalConfig) -> list[Result]:
    """Measure every task; print its figures, and in the end a table of them all.

    A task that fails takes no figures away from those before it: they are printed and written
    all the same. Raises UserError for settings out of range, a checkpoint that cannot be opened,
    data with another tokenizer, and data that lacks what a task needs.
    """
    configurator.validate(cfg, problems_of(cfg))
    rt = runtime.start(cfg.device, cfg.dtype)
    data = dataset.open_dataset(cfg.data_dir)
    tokenizer = data.tokenizer
    split = data.split("val")
    if "answers" in cfg.tasks and not split.has_mask:
        raise UserError(
            f"there are no questions in {cfg.data_dir}: prepare it with --template=alpaca, chat "
            "or synth"
        )
    model, own_tokenizer = store.load(cfg.checkpoint)
    if own_tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{cfg.checkpoint} and {cfg.data_dir} have different tokenizers")
    if cfg.quantize:
        rt = replace(rt, dtype=torch.float32)  # no autocast: compiled blocks take float32
        packing.place(model, rt, cfg.dtype, cfg.quantize)
    else:
        rt.place(model).eval()
    results: list[Result] = []
    try:
        for task in sorted(cfg.tasks, key=lambda task: task == "answers"):  # it packs the model
            if task == "answers":
                if not cfg.quantize:
                    packing.place(model, rt, cfg.dtype)
                results.append(answers(cfg, model, split, tokenizer))
            else:
                results.append(perplexity.of_split(model, data, cfg.limit, rt))
                print(perplexity.summary(results[-1]))
    finally:
        if results and rt.is_main:
            report(cfg, results)
    return results


def problems_of(cfg: EvalConfig) -> Iterator[str]:
    if not cfg.tasks:
        yield "tasks is empty"
    for task in cfg.tasks:
        if task not in TASKS:
            close = difflib.get_close_matches(task, TASKS, n=1)
            yield f"unknown task {task!r}; " + (
                f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(TASKS)}"
            )


def report(cfg: EvalConfig, results: list[Result]) -> None:
    """Print the table, and write the JSON file if asked for."""
    print(table(results))
    if cfg.json:
        about: dict[str, Any] = {"checkpoint": cfg.checkpoint, "revision": runtime.revision()}
        about |= {"settings": asdict(cfg), "versions": runtime.versions()}
        write_results(Path(cfg.json), results, about)


# --- answers


def answers(cfg: EvalConfig, model: GPT, split: shards.Split, tokenizer: Tokenizer) -> Result:
    items: list[dict[str, Any]] = []
    pairs = islice(questions(split, tokenizer), cfg.limit)
    for number, (question, reference) in enumerate(pairs):
        sampling = Sampling(temperature=0, max_new_tokens=len(reference) + EXTRA_TOKENS)
        drawn = generation.continuation(model, tokenizer, question, sampling)
        given = "".join(each.piece for each in drawn)
        wanted = tokenizer.decode(reference).removesuffix(tokenizer.eot)
        items.append(
            {
                "question": tokenizer.decode(question),
                "reference": wanted,
                "answer": given,
                "exact": words(given) == words(wanted),
                "f1": f1(words(given), words(wanted)),
            }
        )
        if number < EXAMPLES:
            print(f"--- {tokenizer.decode(question).strip()}")
            print(f"> {given.strip()}\n= {wanted.strip()}")
    figures = {name: mean(item[name] for item in items) for name in ("exact", "f1")}
    asked = quantity(len(items), "question")
    print(f"answers: {figures['exact']:.1%} equal, F1 {figures['f1']:.3f} ({asked})")
    return Result("answers", "the likeliest answer to each question alone", figures, items)


def questions(split: shards.Split, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
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


def main(argv: list[str] | None = None) -> int:
    return configurator.command(EvalConfig, score, argv)


if __name__ == "__main__":
    sys.exit(main())
