"""
Let a trained model write, or talk to one.

    python sample.py --start "def main("
    python sample.py --checkpoint=out/shakespeare --start="ROMEO:" --num_samples=3 --top_p=0.9
    python sample.py --checkpoint=out/stdlib/step_000500 --start=FILE:prompt.txt --temperature=0
    python sample.py --checkpoint=out/chat --chat
    python sample.py --prompts=prompts.txt --max_new_tokens=50 > completions.jsonl

Text goes to stdout as it is drawn, everything else to stderr. A file of prompts holds one per line,
as {"prompt": "…"} if its name ends in .jsonl; its completions are JSON lines in the same order.
"""

import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import count
from typing import Literal, get_type_hints

import configurator
from configurator import DType, NonNegativeInt, PathName, PositiveInt, UserError
from plaingpt import environment
from plaingpt.sampling import Sampling


@dataclass(frozen=True)
class SampleConfig(Sampling):
    checkpoint: PathName = "out/stdlib"  # a run (last step), RUN/best, a step, gpt2, hf:OWNER/NAME
    start: str = ""  # the prompt, or FILE:path to read it from; empty: a new document
    prompts: PathName | None = None  # a file of prompts, to complete them all
    num_samples: PositiveInt = 1  # how many texts to write for each prompt
    batch_size: PositiveInt = 8  # texts that are written side by side
    seed: NonNegativeInt = 1337  # of the first text; each further text adds 1
    stream: bool = True  # print a single sample as it is drawn
    chat: bool = False  # hold a conversation with a model that was trained for it
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: DType = "auto"  # of the weights; auto: 16 bits where they are faster
    quantize: Literal["int8"] | None = None  # weights in 8 bits, on a CPU


if __name__ == "__main__":
    configurator.answer_help(SampleConfig)  # before torch is imported, which takes a second
    environment.wait_briefly()
    environment.use_huge_pages()

from model import GPT
from plaingpt import generation, packing, runtime, values
from plaingpt.checkpoint import store
from plaingpt.generation import Batch, Drawn, Text, cache_sentence, write, write_in_order
from plaingpt.prompts import read_prompt, read_prompts
from plaingpt.text import templates
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.wording import quantity

SETTINGS = [field.name for field in fields(Sampling)]  # that a conversation may change
MEMORY_COMMANDS = """\
/reset            starts over
/system TEXT      starts over, with TEXT as instructions
"""
COMMANDS = f"""\
/NAME VALUE       changes a setting: {", ".join(SETTINGS)}
/exit             ends the conversation, as Ctrl-D does; Ctrl-C ends an answer"""


def samples(cfg: SampleConfig) -> Iterator[str]:
    """Print and yield the samples, each with its prompt; with `chat` the answers, with `prompts`
    the completions as JSON.

    Raises UserError for settings out of range, or a checkpoint that cannot be opened.
    """
    check_settings(cfg)
    given = read_prompts(cfg.prompts) if cfg.prompts else [read_prompt(cfg.start)]
    rt = runtime.start(cfg.device, cfg.dtype)
    model, tokenizer = store.load(cfg.checkpoint)
    for token in cfg.stop_tokens:
        if token >= tokenizer.vocab_size:
            raise UserError(f"stop_tokens: {token:,} is beyond the {tokenizer.vocab_size:,} ids")
    packing.place(model, rt, cfg.dtype, cfg.quantize)
    if cfg.chat:
        yield from converse(model, tokenizer, cfg)
        return
    ids = [tokenizer.encode(prompt) or [tokenizer.eot_id] for prompt in given]
    longest, block_size = max(map(len, ids)), model.config.block_size
    if cut := sum(len(each) > block_size for each in ids):
        said = f"{quantity(cut, 'prompt')} of up to {quantity(longest, 'token')}"
        print(f"{said}: the model sees the last {block_size:,}", file=sys.stderr)
    size = min(cfg.batch_size, len(ids) * cfg.num_samples)
    alternatives = 0 if cfg.prompts else None
    capacity = min(longest + cfg.max_new_tokens, block_size)
    if size > 1:
        print(cache_sentence(model, size, capacity), file=sys.stderr)
    batch = Batch(model, tokenizer, size, capacity, alternatives)
    texts = new_texts(ids, tokenizer, cfg)
    if cfg.stream and cfg.num_samples == 1 and not cfg.prompts:
        print(given[0], end="", flush=True)
        pieces = print_stream(token for _, tokens in write(batch, texts) for token in tokens)
        written = "".join(pieces)
        if not written:
            print("the text ended at its first token: try another --seed", file=sys.stderr)
        yield given[0] + written
        return
    for number, text in enumerate(write_in_order(batch, texts)):
        prompt = given[number // cfg.num_samples]
        line = as_json(prompt, text) if cfg.prompts else prompt + text.written
        if cfg.num_samples > 1 and not cfg.prompts:
            print(f"--- sample {number + 1:,} of {cfg.num_samples:,}")
        print(line, flush=True)
        yield line


def check_settings(cfg: SampleConfig) -> None:
    problems = []
    if cfg.chat and (cfg.start or cfg.prompts or cfg.num_samples > 1):
        problems.append("chat cannot be combined with start, prompts or num_samples")
    if cfg.start and cfg.prompts:
        problems.append("start cannot be combined with prompts")
    configurator.validate(cfg, problems)


def new_texts(prompts: list[list[int]], tokenizer: Tokenizer, cfg: SampleConfig) -> Iterator[Text]:
    """The texts that continue the ids of each prompt, with one seed after another."""
    seeds = count(cfg.seed)
    for ids in prompts:
        for _ in range(cfg.num_samples):
            yield Text(ids, replace(cfg, seed=next(seeds)), tokenizer)


def as_json(prompt: str, text: Text) -> str:
    record = {
        "prompt": prompt,
        "completion": text.written,
        "end": "stop" if text.stopped else "length",
        "seed": text.sampling.seed,
        "tokens": [token.id for token in text.tokens],
        "log_probabilities": [token.log_probability for token in text.tokens],
    }
    return json.dumps(record)  # in ASCII, whatever the encoding of stdout is


def print_stream(tokens: Iterable[Drawn]) -> Iterator[str]:
    """Print a text as it is drawn, and yield its pieces."""
    for token in tokens:
        print(token.piece, end="", flush=True)
        yield token.piece
    print()


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
    block_size = model.config.block_size
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
                continue
            asked = [*messages, {"role": "user", "content": line}]
            max_new_tokens = sampling.max_new_tokens
            ids, messages = generation.prompt_ids(asked, tokenizer, block_size, max_new_tokens)
        except UserError as error:
            print(error, file=sys.stderr)
            continue
        if messages != asked:
            print("(the context is full: the oldest turns are dropped)", file=sys.stderr)
        answer = print_answer(generation.continuation(model, tokenizer, ids, sampling))
        if not answer:
            print("(the answer ended at its first token)", file=sys.stderr)
        if sampling.seed is not None:
            # A repeated question should not get the same answer.
            sampling = replace(sampling, seed=sampling.seed + 1)
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


def print_answer(tokens: Iterable[Drawn]) -> str:
    """Print an answer as it is drawn; Ctrl-C ends it, and what was drawn is kept."""
    pieces: list[str] = []
    try:
        for piece in print_stream(tokens):
            pieces.append(piece)
    except KeyboardInterrupt:
        print()
    return "".join(pieces).strip() or "…"


def main(argv: list[str] | None = None) -> int:
    return configurator.command(SampleConfig, lambda cfg: deque(samples(cfg), maxlen=0), argv)


if __name__ == "__main__":
    sys.exit(main())
