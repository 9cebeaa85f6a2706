"""
Let a trained model write, or talk to one.

    python sample.py --start "def main("
    python sample.py --checkpoint=out/shakespeare --start="ROMEO:" --num_samples=3 --top_p=0.9
    python sample.py --checkpoint=out/stdlib/step_000500 --start=FILE:prompt.txt --temperature=0
    python sample.py --checkpoint=out/chat --chat

Text goes to stdout as it is drawn, everything else to stderr.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import configurator
from configurator import DType, NonEmpty, NonNegativeInt, PositiveInt, UserError
from plaingpt import threads
from plaingpt.sampling import Sampling


@dataclass(frozen=True)
class SampleConfig(Sampling):
    checkpoint: NonEmpty = "out/stdlib"  # a run (its newest step), a step, gpt2, hf:OWNER/NAME
    start: str = ""  # the prompt, or FILE:path to read it from; empty: a new document
    num_samples: PositiveInt = 1  # how many texts to write, drawn together as one batch
    seed: NonNegativeInt = 1337  # the same seed draws the same text
    stream: bool = True  # print a single sample as it is drawn
    chat: bool = False  # hold a conversation with a model that was trained for it
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: DType = "auto"  # of the weights; auto: bfloat16 where the hardware has it


if __name__ == "__main__":
    configurator.answer_help(SampleConfig)  # before torch is imported, which takes a second
    threads.wait_briefly()

import torch
from torch import Tensor

from model import GPT
from plaingpt import generation, runtime
from plaingpt.checkpoint import store
from plaingpt.generation import Pick
from plaingpt.text import templates
from plaingpt.text.tokenizer import Tokenizer


def sample(cfg: SampleConfig) -> list[str]:
    """Print and return the samples, each with its prompt; with `chat` the answers.

    Raises UserError for settings out of range, or a checkpoint that cannot be opened.
    """
    check_settings(cfg)
    prompt = read_prompt(cfg.start)
    rt = runtime.start(cfg.device, cfg.dtype)
    model, tokenizer = store.load(cfg.checkpoint)
    rt.place(model, rt.dtype).eval()
    pick = generation.picker(cfg, tokenizer, rt.device)
    if cfg.chat:
        return converse(model, tokenizer, pick, cfg.max_new_tokens)

    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    tokens = generation.continuations(
        model, tokenizer, ids, cfg.max_new_tokens, pick, cfg.num_samples
    )
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
    problems = []
    if cfg.chat and (cfg.start or cfg.num_samples > 1):
        problems.append("chat cannot be combined with start or num_samples")
    configurator.validate(cfg, problems)


def read_prompt(start: str) -> str:
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
    """Print a text as it is drawn, and append its pieces to `pieces`."""
    ids = (int(token) for token in tokens)
    for piece in tokenizer.decode_stream(until(ids, tokenizer.eot_id)):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()


def until(ids: Iterable[int], stop_id: int) -> Iterator[int]:
    """The ids before the first `stop_id`."""
    return takewhile(lambda token: token != stop_id, ids)


# --- conversations


def converse(model: GPT, tokenizer: Tokenizer, pick: Pick, max_new_tokens: int) -> list[str]:
    """Answer what is typed until Ctrl-D or Ctrl-C; return the answers.

    When the context is full, the oldest turns of the conversation are dropped.
    """
    if not generation.holds_conversations(tokenizer):
        raise UserError(
            "--chat needs a model that was trained on conversations (prepare.py --template=chat, "
            "alpaca or synth): this one's tokenizer has no such chat_template"
        )
    remembers = tokenizer.chat_template != templates.INSTRUCTION
    if remembers:
        print("/reset starts over, /system TEXT says how to answer, Ctrl-D ends", file=sys.stderr)
    else:
        print("each question is answered on its own; Ctrl-D ends", file=sys.stderr)
    messages: list[dict[str, str]] = []
    answers: list[str] = []
    for line in typed_lines():
        if line == "/reset":
            messages.clear()
        elif line.startswith("/system ") and not remembers:
            print(templates.NO_SYSTEM, file=sys.stderr)
        elif line.startswith("/system "):
            messages[:] = [{"role": "system", "content": line.removeprefix("/system ")}]
        elif line.startswith("/"):
            print(f"no command {line.split()[0]}: /reset or /system TEXT", file=sys.stderr)
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                ids, messages = generation.prompt_ids(
                    asked, tokenizer, model.config.block_size, max_new_tokens
                )
            except UserError as error:
                print(error, file=sys.stderr)
                continue
            if messages != asked:
                print("(the context is full: the oldest turns are dropped)", file=sys.stderr)
            tokens = generation.continuations(model, tokenizer, ids, max_new_tokens, pick)
            answers.append(print_answer(tokens, tokenizer))
            messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def typed_lines() -> Iterator[str]:
    """The lines typed, stripped, until Ctrl-D or Ctrl-C."""
    asking = "> " if sys.stdin.isatty() else ""
    try:
        while True:
            yield input(asking).encode(errors="replace").decode().strip()
    except (EOFError, KeyboardInterrupt):
        print()


def print_answer(tokens: Iterator[Tensor], tokenizer: Tokenizer) -> str:
    """Print an answer as it is drawn; Ctrl-C ends it, and what was drawn is kept."""
    pieces: list[str] = []
    try:
        print_stream(tokens, tokenizer, pieces)
    except KeyboardInterrupt:
        print()
    return "".join(pieces).strip() or "…"


def main(argv: list[str] | None = None) -> int:
    return configurator.command(SampleConfig, sample, argv)


if __name__ == "__main__":
    sys.exit(main())
