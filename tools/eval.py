"""
Measure what a model is worth: perplexity, multiple choice, cloze, answers to instructions.

    python -m tools.eval                                            # out/stdlib on its data
    python -m tools.eval --checkpoint=gpt2 --tasks=hellaswag,lambada_openai --json=gpt2.json
    python -m tools.eval --checkpoint=gpt2 --text=wiki.test.raw --stride=512
    python -m tools.eval --checkpoint=out/instruct --data_dir=data/mine --tasks=perplexity,answers
    torchrun --standalone --nproc_per_node=8 -m tools.eval --checkpoint=gpt2 --tasks=hellaswag

perplexity: the loss that train.py reports, over windows that are as long as the model's context and
do not overlap; its exponential; and bits per byte, which compares models with different tokenizers.
If the data has a mask, only the answers count.

hellaswag, lambada_openai, arc_easy, arc_challenge, piqa, winogrande: the figures of
lm-evaluation-harness; hellaswag_completion: those of llm.c. Items come from the hub, or from files
in task_dir.

core: CORE of DCLM as nanochat measures it, with its files (eval_bundle) in task_dir.

A .jsonl or .parquet file: your own items, {"context", "choices", "answer"} (the number of the right
choice, from 0) or {"context", "continuation"}. A .txt or .raw file: the perplexity of that text.

answers: the likeliest answer to each question of the split (alone, without the turns before it),
compared with the reference answer: the share of exact matches, and the mean F1 of their words, both
ignoring case, punctuation and articles, as for SQuAD (arXiv 1606.05250); BLEU and chrF. A question
that is longer than the context loses its beginning. For the first three, this prints the question
(---), the model's answer (>) and the reference answer (=). A file keeps them all, and another model
can judge them; tools.pairs lets people compare those of two models.

docs/evaluation.md has the protocols, the file formats and the figures of OpenAI's models.
"""

import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # for python tools/eval.py

import configurator
from configurator import (
    DType,
    Folder,
    NonEmpty,
    NonNegativeInt,
    PathName,
    PositiveInt,
    Range,
    UserError,
)
from plaingpt import environment


def is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # from an impossible port
        return False
    return bool(known) and not parts.username and re.fullmatch("[!-~]+", text) is not None


Address = Annotated[str, Range("an address like http://127.0.0.1:8000/v1", is_address)]


@dataclass(frozen=True)
class EvalConfig:
    checkpoint: PathName = "out/stdlib"  # a run (last step), RUN/best, a step, gpt2, hf:OWNER/NAME
    data_dir: Folder | None = None  # what prepare.py wrote; None: what the run was trained on
    tasks: tuple[PathName, ...] = ("perplexity",)  # also hellaswag, …: see above
    text: PathName | None = None  # a file for perplexity to read, instead of data_dir
    stride: PositiveInt | None = None  # between windows of perplexity; None: they do not overlap
    task_dir: Folder | None = None  # with the items of hellaswag, …; None: the hub
    shots: NonNegativeInt = 0  # solved examples before each item
    limit: PositiveInt | None = None  # at most this many windows or items per task; None: all
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: DType = "auto"  # of matrix products; auto: 16 bits where they are faster
    quantize: Literal["int8"] | None = None  # weights in 8 bits, on a CPU, whatever dtype is
    answers: PathName | None = None  # a .jsonl file for all questions and answers
    judge: Address | None = None  # of a server that grades these answers; key: OPENAI_API_KEY
    judge_model: NonEmpty | None = None  # the name of the model there
    json: PathName | None = None  # a file for all figures, how each was measured, and every item


if __name__ == "__main__":
    configurator.answer_help(EvalConfig)  # before torch is imported, which takes a second
    environment.wait_briefly()
    environment.use_huge_pages()

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from model import GPT
from plaingpt import packing, runtime
from plaingpt.checkpoint import folders, store
from plaingpt.evaluation import choices, core, items, judge, perplexity, questions
from plaingpt.evaluation.answers import read_answers
from plaingpt.evaluation.judge import Judge
from plaingpt.evaluation.results import Result, table, write_results
from plaingpt.text import dataset
from plaingpt.text.questions import Question
from plaingpt.text.tokenizer import Tokenizer

ON_DATA = ("perplexity", "answers")  # tasks on prepared data


def score(cfg: EvalConfig) -> list[Result]:
    """Measure every task, and print a table of all figures.

    All tasks read and check what they need before the first is measured. One that fails all the
    same takes no figures away from those before it: they are printed and written. Raises UserError
    for settings out of range, a checkpoint that cannot be opened, data with another tokenizer,
    malformed items, and data that lacks what a task needs.
    """
    configurator.validate(cfg, problems_of(cfg))
    rt = runtime.start(cfg.device, cfg.dtype)
    if cfg.quantize:
        rt = replace(rt, dtype=torch.float32)  # no autocast: compiled blocks take float32
    data = None
    if needs_data(cfg):
        data = dataset.open_dataset(cfg.data_dir or trained_on(cfg.checkpoint, rt))
    model, tokenizer = store.load(cfg.checkpoint)
    if data and data.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{cfg.checkpoint} and {data.folder} have different tokenizers")
    if cfg.stride and cfg.stride > model.config.block_size:
        raise UserError(f"stride={cfg.stride} exceeds the context, {model.config.block_size:,}")
    names = sorted(cfg.tasks, key=lambda name: name == "answers")  # which packs the model
    tasks = [prepared(cfg, name, model, tokenizer, data, rt) for name in names]
    if cfg.judge and cfg.answers:
        judge.check(cfg.answers)
    if cfg.quantize:
        packing.place(model, rt, cfg.dtype, cfg.quantize)
    else:
        rt.place(model).eval()
    results: list[Result] = []
    try:
        for name, measure in zip(names, tasks):
            results.append(measure())
            if rt.is_main and (name in ON_DATA or items.is_text(name)):
                summary = questions.summary if name == "answers" else perplexity.summary
                of_text = f"{name}: " if items.is_text(name) else ""
                print(of_text + summary(results[-1]))
        if cfg.judge and cfg.judge_model and cfg.answers and rt.is_main:
            results.append(judge.judged(Judge(cfg.judge, cfg.judge_model), cfg.answers))
    finally:
        if results and rt.is_main:
            report(cfg, results)
    return results


def problems_of(cfg: EvalConfig) -> Iterator[str]:
    if not cfg.tasks:
        yield "tasks is empty"
    yield from items.unknown(cfg.tasks, [*ON_DATA, "core"])
    if cfg.text and not Path(cfg.text).is_file():
        yield f"{cfg.text} is not a file"
    texts = {task for task in cfg.tasks if items.is_text(task)}
    if (cfg.text or (cfg.stride and not texts)) and "perplexity" not in cfg.tasks:
        yield "text and stride are for --tasks=perplexity"
    asking = {*cfg.tasks} - {*ON_DATA} - texts
    if "core" in asking and not cfg.task_dir:
        yield "--tasks=core needs --task_dir: the folder of DCLM's eval_bundle"
    if (cfg.shots and asking <= {"core"}) or (cfg.task_dir and not asking):
        yield "shots and task_dir are for tasks that have items, such as --tasks=hellaswag"
    if cfg.answers and "answers" not in cfg.tasks:
        yield "--answers needs --tasks=answers"
    if cfg.answers and not cfg.answers.endswith(".jsonl"):
        yield f"answers must end with .jsonl, not {cfg.answers!r}"
    judging = (cfg.judge, cfg.judge_model)
    if any(judging) and not all((*judging, cfg.answers)):
        yield "judging needs --judge, --judge_model and --answers=FILE"
    inputs = [Path(name) for name in (cfg.text, *cfg.tasks) if name and Path(name).exists()]
    kept = cfg.answers and cfg.judge and judge.kept_beside(cfg.answers)
    for path in (Path(name) for name in (cfg.json, cfg.answers, kept) if name):
        if not path.absolute().parent.is_dir():
            yield f"the folder of {path} does not exist"
        elif path.is_dir():
            yield f"{path} is a folder, where a file is to be written"
        elif not os.access(path.absolute().parent, os.W_OK):
            yield f"{path} cannot be written: its folder is read-only"
        elif path.exists() and not os.access(path, os.W_OK):
            yield f"{path} cannot be written: it is read-only"
        elif path.exists() and any(path.samefile(other) for other in inputs):
            yield f"{path} is read as well: choose another file to write"
    if cfg.answers and Path(cfg.answers).is_file():
        try:
            read_answers(cfg.answers)
        except UserError as problem:
            yield f"answers={cfg.answers} exists and holds something else ({problem})"


def trained_on(checkpoint: str, rt: runtime.Runtime) -> str:
    """The data of the run that saved a checkpoint. Raises UserError for a model from elsewhere."""
    folder = folders.find(checkpoint)
    known = (folder / "state.json").exists() and folders.read_state(folder).settings.get("data_dir")
    if not known:
        raise UserError(
            f"{checkpoint} does not say what it was trained on: give --data_dir or --text"
        )
    if rt.is_main:
        print(f"data_dir = {known!r}, which {checkpoint} was trained on")
    return str(known)


def needs_data(cfg: EvalConfig) -> bool:
    return "answers" in cfg.tasks or ("perplexity" in cfg.tasks and not cfg.text)


def prepared(
    cfg: EvalConfig,
    task: str,
    model: GPT,
    tokenizer: Tokenizer,
    data: dataset.Dataset | None,
    rt: runtime.Runtime,
) -> Callable[[], Result]:
    """Read and check what a task needs; return what measures it. Raises UserError for items or data
    that cannot be measured."""
    if task == "answers":
        assert data
        return partial(answered, cfg, model, data, questions.read(data, cfg.limit), rt)
    if task == "core":
        bundle, block_size = Path(str(cfg.task_dir)), model.config.block_size
        read = core.read(bundle, cfg.limit, tokenizer, block_size)
        return partial(core.measure, read, model, rt)
    if task != "perplexity" and not items.is_text(task):
        asked = items.read(task, cfg.task_dir, cfg.shots, cfg.limit)
        if asked.warning and rt.is_main:
            print(asked.warning, file=sys.stderr)
        encoded = choices.encoded(asked, tokenizer, model.config.block_size)
        return partial(choices.measure, encoded, model, rt)
    if path := cfg.text if task == "perplexity" else task:
        text = perplexity.encoded(task, path, tokenizer)
        return partial(perplexity.of_text, model, text, cfg.stride, cfg.limit, rt)
    assert data
    return partial(perplexity.of_split, model, data, cfg.stride, cfg.limit, rt)


def answered(
    cfg: EvalConfig,
    model: GPT,
    data: dataset.Dataset,
    asked: list[Question],
    rt: runtime.Runtime,
) -> Result:
    if not cfg.quantize:
        packing.place(model, rt, cfg.dtype)
    return questions.measure(model, data, asked, cfg.answers, rt)


def report(cfg: EvalConfig, results: list[Result]) -> None:
    """Print the table, and write the JSON file if asked for."""
    print(table(results))
    if cfg.json:
        about: dict[str, Any] = {"checkpoint": cfg.checkpoint, "revision": runtime.revision()}
        about |= {"settings": asdict(cfg), "versions": runtime.versions()}
        write_results(Path(cfg.json), results, about)


def main(argv: list[str] | None = None) -> int:
    status = configurator.command(EvalConfig, score, argv)
    if status == 0:  # after an error the other processes may be gone already
        runtime.leave()
    return status


if __name__ == "__main__":
    sys.exit(main())
