"""What `sample.py` and `serve.py` share: how tokens are drawn, and the prompts of conversations."""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from configurator import UserError
from model import GPT
from plaingpt.text import templates
from plaingpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: settings of `GPT.generate`, and the seed of its generator."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None

    def problems(self) -> list[str]:
        """What is out of range, in words."""
        found = []
        for name in ("max_new_tokens", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"{name} must be at least 1, not {value}")
        if self.temperature != 0 and not 1e-3 <= self.temperature < math.inf:
            found.append(f"temperature must be 0, or from 0.001 on, not {self.temperature}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                found.append(f"{name} must be above 0 and at most 1, not {value}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            found.append(f"seed must be from 0 to 2**63 - 1, not {self.seed}")
        return found

    def generator(self, device: torch.device) -> torch.Generator:
        generator = torch.Generator(device)
        if self.seed is None:
            generator.seed()
            return generator
        return generator.manual_seed(self.seed)


def sampling_of(settings: Any) -> Sampling:
    """Those of a command's settings that are Sampling's."""
    return Sampling(**{field.name: getattr(settings, field.name) for field in fields(Sampling)})


def draw(
    model: GPT,
    tokenizer: Tokenizer,
    ids: list[int],
    sampling: Sampling,
    generator: torch.Generator,
    count: int = 1,
    watch: Callable[[Tensor], Any] | None = None,
) -> Iterator[Tensor]:
    """The ids (count,) that follow `ids`, one token after the other, until all texts have ended."""
    return model.generate(
        torch.tensor([ids] * count, device=model.lm_head.weight.device),
        sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        stop_id=tokenizer.eot_id,
        vocab_size=tokenizer.vocab_size,
        generator=generator,
        watch=watch,
    )


def holds_conversations(tokenizer: Tokenizer) -> bool:
    return tokenizer.chat_template in templates.CHAT_TEMPLATES.values()


def prompt_ids(
    messages: list[dict[str, Any]], tokenizer: Tokenizer, block_size: int, max_new_tokens: int
) -> tuple[list[int], list[dict[str, Any]]]:
    """The ids of a prompt for an answer to the last of `messages`, and the messages that are in it:
    the system's, and as many of the newest turns as leave room for the answer (half of the context
    at most).

    Raises UserError for messages that are no conversation, and where not even the last one fits.
    """
    room = block_size - min(max_new_tokens, block_size // 2)
    first = int(bool(messages) and messages[0]["role"] == "system")

    def without(oldest: int) -> tuple[list[int], list[dict[str, Any]]]:
        kept = messages[:first] + messages[first + oldest :]
        ids = []
        for part in templates.prompt(kept, tokenizer.chat_template or ""):
            ids += tokenizer.encode(part.text) + [tokenizer.eot_id] * part.ended
        return ids, kept

    ids, kept = without(oldest=0)
    if len(ids) > room:
        fewer = range(0, len(messages) - first, 2)  # questions and their answers
        at = bisect_left(fewer, True, key=lambda oldest: len(without(oldest)[0]) <= room)
        ids, kept = without(fewer[min(at, len(fewer) - 1)])
    if len(ids) > room:
        raise UserError(f"too long: {len(ids):,} tokens where {room:,} fit")
    return ids, kept
