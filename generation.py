"""What `sample.py` and `serve.py` share: a model that writes, its settings, and its prompts."""

import math
from bisect import bisect_left
from typing import Any

import checkpoint
import templates
from model import GPT
from runtime import Runtime
from tokenizer import Tokenizer


def open_model(where: str, rt: Runtime) -> tuple[GPT, Tokenizer]:
    """A checkpoint, ready to write in the runtime's dtype on its device.

    Raises ValueError for one that cannot be opened.
    """
    folder = checkpoint.find(where)
    tokenizer = Tokenizer.load(folder)
    model = checkpoint.load_model(folder).to(rt.device, rt.dtype).eval()
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} ids, the model only "
            f"{model.config.vocab_size:,}"
        )
    return model, tokenizer


def out_of_range(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
) -> list[str]:
    """What is wrong with the settings of `GPT.generate`, in words."""
    problems = []
    for name, count in {"max_new_tokens": max_new_tokens, "top_k": top_k}.items():
        if count is not None and count < 1:
            problems.append(f"{name} must be at least 1, not {count}")
    if temperature != 0 and not 1e-3 <= temperature < math.inf:
        problems.append(f"temperature must be 0, or from 0.001 on, not {temperature}")
    for name, share in {"top_p": top_p, "min_p": min_p}.items():
        if share is not None and not 0 < share <= 1:
            problems.append(f"{name} must be above 0 and at most 1, not {share}")
    return problems


def holds_conversations(tokenizer: Tokenizer) -> bool:
    return tokenizer.chat_template in templates.CHAT_TEMPLATES.values()


def prompt_ids(
    messages: list[dict[str, Any]], tokenizer: Tokenizer, room: int
) -> tuple[list[int], list[dict[str, Any]]]:
    """The ids of a prompt for an answer to the last of `messages`, at most `room`, and the messages
    that are in it: the system's, and as many of the newest turns as fit.

    Raises ValueError for messages that are no conversation, and where not even the last one fits.
    """
    first = int(bool(messages) and messages[0].get("role") == "system")

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
        raise ValueError(f"too long: {len(ids):,} tokens where {room:,} fit")
    return ids, kept
