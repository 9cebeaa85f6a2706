"""
Let a trained model write, or talk to one.

    python sample.py --start "def main("
    python sample.py --checkpoint=out/shakespeare --start="ROMEO:" --num_samples=3 --top_p=0.9
    python sample.py --checkpoint=out/stdlib/step_000500 --start=FILE:prompt.txt --temperature=0
    python sample.py --checkpoint=out/chat --chat

Text goes to stdout as it is drawn, everything else to stderr.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

import configurator
from configurator import DType, UserError
from plaingpt import generation, runtime
from plaingpt.checkpoint import store
from plaingpt.text import templates
from plaingpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class SampleConfig:
    checkpoint: str = "out/stdlib"  # a run folder (its newest step), a step, gpt2, hf:OWNER/NAME
    start: str = ""  # the prompt, or FILE:path to read it from; empty: a new document
    num_samples: int = 1  # how many, drawn together as one batch
    max_new_tokens: int = 200  # tokens in each, unless it ends before
    temperature: float = 0.8  # below 1: safer, above: wilder; 0: always the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float | None = 0.95  # … from the likeliest that together have this probability
    min_p: float | None = None  # … from those at least this times as likely as the likeliest
    seed: int = 1337  # the same seed draws the same text
    stream: bool = True  # print a single sample as it is drawn
    chat: bool = False  # hold a conversation with a model that was trained on some
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: DType = "auto"  # of the weights; auto: bfloat16 where the hardware has it


def sample(cfg: SampleConfig) -> list[str]:
    """Print and return the samples, each with its prompt.

    Raises UserError for settings out of range, or a checkpoint that cannot be opened.
    """
    check_settings(cfg)
    prompt = prompt_of(cfg.start)
    rt = runtime.start(cfg.device, cfg.dtype)
    model, tokenizer = store.load(cfg.checkpoint)
    model.to(rt.device, rt.dtype).eval()
    sampling = generation.sampling_of(cfg)
    generator = sampling.generator(rt.device)

    def draw(ids: list[int], count: int = 1) -> Iterator[Tensor]:
        return generation.draw(model, tokenizer, ids, sampling, generator, count)

    if cfg.chat:
        return converse(tokenizer, draw, model.config.block_size, cfg.max_new_tokens)
    tokens = draw(tokenizer.encode(prompt) or [tokenizer.eot_id], cfg.num_samples)
    if cfg.num_samples == 1 and cfg.stream:
        pieces = [prompt]
        print(prompt, end="", flush=True)
        print_stream(tokens, tokenizer, pieces)
        return ["".join(pieces)]
    drawn = torch.stack(list(tokens), dim=1).tolist()  # (num_samples, tokens)
    texts = [prompt + tokenizer.decode(until(row, tokenizer.eot_id)) for row in drawn]
    for number, text in enumerate(texts, start=1):
        if cfg.num_samples > 1:
            print(f"--- sample {number} of {len(texts)}")
        print(text)
    return texts


def check_settings(cfg: SampleConfig) -> None:
    """Raises UserError that lists all settings out of range."""
    problems = generation.sampling_of(cfg).problems()
    if cfg.num_samples < 1:
        problems.append(f"num_samples must be at least 1, not {cfg.num_samples}")
    if cfg.chat and (cfg.start or cfg.num_samples > 1):
        problems.append("chat goes with neither start nor num_samples")
    if not cfg.checkpoint:
        problems.append("checkpoint is empty")
    if problems:
        raise UserError("; ".join(problems))


def prompt_of(start: str) -> str:
    if not start.startswith("FILE:"):
        try:
            start.encode()
        except UnicodeEncodeError:
            raise UserError("start is not UTF-8") from None
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,})") from None


def print_stream(tokens: Iterable[Tensor], tokenizer: Tokenizer, pieces: list[str]) -> None:
    """Print a text up to its end as it is drawn, and collect its pieces."""
    ids = (int(token) for token in tokens)
    for piece in tokenizer.decode_stream(until(ids, tokenizer.eot_id)):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()


# --- conversations


def converse(
    tokenizer: Tokenizer,
    draw: Callable[[list[int]], Iterator[Tensor]],
    block_size: int,
    max_new_tokens: int,
) -> list[str]:
    """Answer what is typed until it ends (Ctrl-D, Ctrl-C); return the answers.

    Once the context is full, the oldest turns of the conversation are forgotten.
    """
    if not generation.holds_conversations(tokenizer):
        raise UserError(
            "--chat needs a model that was trained on conversations (prepare.py --template=chat, "
            "alpaca or synth): this one's tokenizer has no such chat_template"
        )
    if tokenizer.chat_template == templates.INSTRUCTION:
        print("each question stands for itself; Ctrl-D ends", file=sys.stderr)
    else:
        print("/reset begins anew, /system TEXT says how to answer, Ctrl-D ends", file=sys.stderr)
    messages: list[dict[str, str]] = []
    answers: list[str] = []
    for line in typed():
        if line == "/reset":
            messages.clear()
        elif line.startswith("/system ") and tokenizer.chat_template == templates.INSTRUCTION:
            print(templates.NO_SYSTEM, file=sys.stderr)
        elif line.startswith("/system "):
            messages[:] = [{"role": "system", "content": line.removeprefix("/system ")}]
        elif line.startswith("/"):
            print(f"no command {line.split()[0]}: /reset or /system TEXT", file=sys.stderr)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                ids, messages = generation.prompt_ids(asked, tokenizer, block_size, max_new_tokens)
            except ValueError as error:
                print(error, file=sys.stderr)
                continue
            if messages != asked:
                print("(the context is full: the oldest turns are forgotten)", file=sys.stderr)
            answers.append(print_answer(draw(ids), tokenizer))
            messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def typed() -> Iterator[str]:
    """The lines that are typed, stripped, until Ctrl-D or Ctrl-C."""
    asking = "> " if sys.stdin.isatty() else ""
    try:
        while True:
            yield input(asking).encode(errors="replace").decode().strip()
    except (EOFError, KeyboardInterrupt):
        print()


def print_answer(tokens: Iterator[Tensor], tokenizer: Tokenizer) -> str:
    """Print an answer as it is drawn; Ctrl-C ends it, and what there is of it stays."""
    pieces: list[str] = []
    try:
        print_stream(tokens, tokenizer, pieces)
    except KeyboardInterrupt:
        print()
    return "".join(pieces).strip() or "…"


def until(ids: Iterable[int], stop_id: int) -> Iterator[int]:
    """The ids before the first `stop_id`."""
    return takewhile(lambda token: token != stop_id, ids)


def main(argv: list[str] | None = None) -> int:
    return configurator.command(SampleConfig, sample, argv)


if __name__ == "__main__":
    sys.exit(main())
