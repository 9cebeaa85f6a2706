"""
Let a trained model write, or talk to one.

    python sample.py --start "def main("
    python sample.py --checkpoint=out/shakespeare --start="ROMEO:" --num_samples=3 --top_p=0.9
    python sample.py --checkpoint=out/stdlib/step_000500 --start=FILE:prompt.txt --temperature=0
    python sample.py --checkpoint=out/chat --chat

Text goes to stdout as it is drawn, everything else to stderr.
"""

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from pathlib import Path
from typing import get_type_hints

import configurator
from configurator import DType, NonNegativeInt, PathName, PositiveInt, UserError
from plaingpt import threads
from plaingpt.sampling import Sampling


@dataclass(frozen=True)
class SampleConfig(Sampling):
    checkpoint: PathName = "out/stdlib"  # a run (its newest step), a step, gpt2, hf:OWNER/NAME
    start: str = ""  # the prompt, or FILE:path to read it from; empty: a new document
    num_samples: PositiveInt = 1  # how many texts to write, drawn in batches
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
from plaingpt import generation, runtime, values
from plaingpt.checkpoint import store
from plaingpt.text import templates
from plaingpt.text.tokenizer import Tokenizer

MAX_PROMPT = 10_000_000  # characters
BATCH_SIZE = 32  # samples that are drawn together
SETTINGS = [field.name for field in fields(Sampling)]  # that a conversation may change
MEMORY_COMMANDS = """\
/reset            starts over
/system TEXT      starts over, with TEXT as instructions
"""
COMMANDS = f"""\
/NAME VALUE       changes a setting: {", ".join(SETTINGS)}
/exit             ends the conversation, as Ctrl-D does; Ctrl-C ends an answer"""


def samples(cfg: SampleConfig) -> Iterator[str]:
    """Print and yield the samples, each with its prompt; with `chat` the answers. However many are
    drawn, they take the memory of BATCH_SIZE samples.

    Raises UserError for settings out of range, or a checkpoint that cannot be opened.
    """
    check_settings(cfg)
    prompt = read_prompt(cfg.start)
    rt = runtime.start(cfg.device, cfg.dtype)
    model, tokenizer = store.load(cfg.checkpoint)
    rt.place(model, rt.dtype).eval()
    if cfg.chat:
        yield from converse(model, tokenizer, cfg)
        return

    pick = generation.picker(cfg, tokenizer, rt.device)
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    if cfg.num_samples == 1 and cfg.stream:
        pieces = [prompt]
        print(prompt, end="", flush=True)
        tokens = generation.continuations(model, tokenizer, ids, cfg.max_new_tokens, pick)
        print_stream(tokens, tokenizer, pieces)
        yield "".join(pieces)
        return
    for first in range(0, cfg.num_samples, BATCH_SIZE):
        count = min(BATCH_SIZE, cfg.num_samples - first)
        tokens = generation.continuations(model, tokenizer, ids, cfg.max_new_tokens, pick, count)
        drawn = torch.stack(list(tokens), dim=1).tolist()  # (count, tokens)
        for number, row in enumerate(drawn, start=first + 1):
            text = prompt + tokenizer.decode(until(row, tokenizer.eot_id))
            if cfg.num_samples > 1:
                print(f"--- sample {number:,} of {cfg.num_samples:,}")
            print(text)
            yield text


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
    path = Path(start.removeprefix("FILE:")).expanduser()
    if not path.name:
        raise UserError("start=FILE: lacks a file name: write --start=FILE:prompt.txt")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_PROMPT + 1)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,})") from None
    if len(text) > MAX_PROMPT:
        raise UserError(f"{path} has over {MAX_PROMPT:,} characters: too long for a prompt")
    return text


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


def converse(model: GPT, tokenizer: Tokenizer, sampling: Sampling) -> Iterator[str]:
    """Answer what is typed until /exit, Ctrl-D or Ctrl-C; yield the answers.

    When the context is full, the oldest turns of the conversation are dropped.
    """
    if not generation.holds_conversations(tokenizer):
        raise UserError(
            "--chat needs a model that was trained on conversations (prepare.py --template=chat, "
            "alpaca or synth): the tokenizer of this one has none of their chat templates"
        )
    if tokenizer.chat_template == templates.INSTRUCTION:
        print("each question is answered on its own", file=sys.stderr)
    print("/help lists the commands, Ctrl-D ends", file=sys.stderr)
    device, block_size = model.lm_head.weight.device, model.config.block_size
    pick = generation.picker(sampling, tokenizer, device)
    messages: list[dict[str, str]] = []
    for line in typed_lines():
        if line.lower().removeprefix("/") in ("exit", "quit"):
            return
        if not line:
            continue
        try:
            if line.startswith("/"):
                if changed := obey(line, messages, tokenizer, sampling):
                    sampling = changed
                    pick = generation.picker(sampling, tokenizer, device)
                continue
            asked = [*messages, {"role": "user", "content": line}]
            max_new_tokens = sampling.max_new_tokens
            ids, messages = generation.prompt_ids(asked, tokenizer, block_size, max_new_tokens)
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        if messages != asked:
            print("(the context is full: the oldest turns are dropped)", file=sys.stderr)
        tokens = generation.continuations(model, tokenizer, ids, max_new_tokens, pick)
        answer = print_answer(tokens, tokenizer)
        messages.append({"role": "assistant", "content": answer})
        yield answer


def obey(
    line: str, messages: list[dict[str, str]], tokenizer: Tokenizer, sampling: Sampling
) -> Sampling | None:
    """Carry out a command, on `messages` or by returning a changed `sampling`.

    Raises UserError for an unknown command or a wrong value.
    """
    name, _, text = line[1:].partition(" ")
    text, remembers = text.strip(), tokenizer.chat_template != templates.INSTRUCTION
    if name == "help":
        print(MEMORY_COMMANDS * remembers + COMMANDS, file=sys.stderr)
    elif name == "reset":
        messages.clear()
    elif name == "system" and not remembers:
        raise UserError(templates.NO_SYSTEM)
    elif name == "system" and not text:
        raise UserError("/system needs a text that says how to answer: /system TEXT")
    elif name == "system":
        messages[:] = [{"role": "system", "content": text}]
    elif name in SETTINGS:
        return changed_setting(sampling, name, text)
    else:
        raise UserError(f"unknown command /{name}: /help lists all commands")
    return None


def changed_setting(sampling: Sampling, name: str, text: str) -> Sampling:
    """Raises UserError for a value of another type or out of range."""
    hint = get_type_hints(Sampling)[name]
    value = values.check(values.parse(text, hint), hint)
    if value is values.INVALID:
        raise UserError(values.misfit(f"/{name}", text, hint))
    changed = replace(sampling, **{name: value})
    configurator.validate(changed)
    print(f"{name} = {value}", file=sys.stderr)
    return changed


def typed_lines() -> Iterator[str]:
    """The typed lines, stripped, until Ctrl-D or Ctrl-C."""
    asking = "> " if sys.stdin and sys.stdin.isatty() else ""
    try:
        while sys.stdin:  # None if it was closed
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
    return configurator.command(SampleConfig, lambda cfg: deque(samples(cfg), maxlen=0), argv)


if __name__ == "__main__":
    sys.exit(main())
