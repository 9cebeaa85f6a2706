"""
Let a trained model write.

    python sample.py --start "def main("
    python sample.py --checkpoint=out/shakespeare --start="ROMEO:" --num_samples=3 --top_p=0.9
    python sample.py --checkpoint=out/stdlib/step_000500 --start=FILE:prompt.txt --temperature=0

Text goes to stdout as it is drawn, everything else to stderr.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch

import checkpoint
import configurator
import runtime
from tokenizer import Tokenizer


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
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: runtime.DType = "auto"  # of the weights; auto: bfloat16 where the hardware has it


def sample(cfg: SampleConfig) -> list[str]:
    """Print and return the samples, each with its prompt.

    Raises ValueError for settings out of range, or a checkpoint that cannot be opened.
    """
    check_settings(cfg)
    rt = runtime.start(cfg.device, cfg.dtype)
    folder = checkpoint.find(cfg.checkpoint)
    tokenizer = Tokenizer.load(folder)
    prompt = prompt_of(cfg.start)
    model = checkpoint.load_model(folder).to(rt.device, rt.dtype).eval()
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} ids, the model only "
            f"{model.config.vocab_size:,}"
        )
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    tokens = model.generate(
        torch.tensor([ids] * cfg.num_samples, device=rt.device),
        cfg.max_new_tokens,
        temperature=cfg.temperature,
        top_k=cfg.top_k,
        top_p=cfg.top_p,
        min_p=cfg.min_p,
        stop_id=tokenizer.eot_id,
        vocab_size=tokenizer.vocab_size,
        generator=torch.Generator(rt.device).manual_seed(cfg.seed),
    )
    if cfg.num_samples == 1:
        text = print_stream(prompt, (int(token) for token in tokens), tokenizer, cfg.stream)
        return [text]
    drawn = torch.stack(list(tokens), dim=1).tolist()  # (num_samples, tokens)
    texts = [prompt + tokenizer.decode(until(row, tokenizer.eot_id)) for row in drawn]
    for number, text in enumerate(texts, start=1):
        print(f"--- sample {number} of {len(texts)}\n{text}")
    return texts


def check_settings(cfg: SampleConfig) -> None:
    """Raises ValueError that lists all settings out of range."""
    problems = []
    for name in ("num_samples", "max_new_tokens", "top_k"):
        value = getattr(cfg, name)
        if value is not None and value < 1:
            problems.append(f"{name} must be at least 1, not {value}")
    if cfg.temperature != 0 and not 1e-3 <= cfg.temperature < math.inf:
        problems.append(f"temperature must be 0, or from 0.001 on, not {cfg.temperature}")
    for name in ("top_p", "min_p"):
        value = getattr(cfg, name)
        if value is not None and not 0 < value <= 1:
            problems.append(f"{name} must be above 0 and at most 1, not {value}")
    if not 0 <= cfg.seed < 2**63:
        problems.append(f"seed must be from 0 to 2**63 - 1, not {cfg.seed}")
    if not cfg.checkpoint:
        problems.append("checkpoint is empty")
    if problems:
        raise ValueError("; ".join(problems))


def prompt_of(start: str) -> str:
    if not start.startswith("FILE:"):
        try:
            start.encode()
        except UnicodeEncodeError:
            raise ValueError("start is not UTF-8") from None
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start:,})") from None


def print_stream(prompt: str, ids: Iterator[int], tokenizer: Tokenizer, stream: bool) -> str:
    """Print the prompt and what follows, piece by piece or at once; return all of it."""
    pieces = [prompt]
    if stream:
        print(prompt, end="", flush=True)
    for piece in tokenizer.decode_stream(until(ids, tokenizer.eot_id)):
        pieces.append(piece)
        if stream:
            print(piece, end="", flush=True)
    print("" if stream else "".join(pieces))
    return "".join(pieces)


def until(ids: Iterable[int], stop_id: int) -> Iterator[int]:
    """The ids before the first `stop_id`."""
    return takewhile(lambda token: token != stop_id, ids)


def main(argv: list[str] | None = None) -> int:
    return configurator.command(SampleConfig, sample, argv)


if __name__ == "__main__":
    sys.exit(main())
