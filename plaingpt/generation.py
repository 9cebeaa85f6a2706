"""What sampling, serving and training share: choosing the next id, and prompts of conversations."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from configurator import UserError
from model import GPT
from plaingpt.sampling import Sampling
from plaingpt.text import templates
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.wording import quantity

Pick = Callable[[Tensor], Tensor]  # logits (B, V) → ids (B,)


def picker(sampling: Sampling, tokenizer: Tokenizer, device: torch.device) -> Pick:
    """The `pick` function for `GPT.generate`. It has its own random generator and never draws an id
    beyond the tokenizer's (the padding of a vocabulary)."""
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return lambda logits: draw(logits[:, : tokenizer.vocab_size], sampling, generator)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None = None) -> Tensor:
    """Draw an id (B,) from each row of `logits` (B, V); temperature 0 takes the likeliest.

    The filters apply in this order, each to what the previous one left: the k likeliest, the fewest
    whose probability reaches top_p (arXiv 1904.09751), those at least min_p times as likely as the
    likeliest (arXiv 2407.01082).

    Raises UserError for logits that are not finite.
    """
    logits = logits / (sampling.temperature or 1.0)
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite: its weights are too large, or damaged")
    top_k, top_p, min_p = sampling.top_k, sampling.top_p, sampling.min_p
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probs = F.softmax(logits, dim=-1)
    if top_k is not None:
        kth = probs.topk(min(top_k, probs.size(-1))).values[:, -1:]
        probs = probs.masked_fill(probs < kth, 0.0)
    if top_p is not None:
        ordered, ids = (probs / probs.sum(-1, keepdim=True)).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= top_p  # mass of the likelier ones
        beyond[:, 0] = False  # even where top_p is below the resolution of a float
        probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, ids, beyond), 0.0)
    if min_p is not None:
        probs = probs.masked_fill(probs < min_p * probs.max(-1, keepdim=True).values, 0.0)
    return torch.multinomial(probs, 1, generator=generator)[:, 0]


def continuations(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: list[int],
    max_new_tokens: int,
    pick: Pick,
    count: int = 1,
) -> Iterator[Tensor]:
    """The ids (count,) after the ids of `prompt`, token by token, until every text has ended."""
    idx = torch.tensor([prompt] * count, device=model.lm_head.weight.device)
    return model.generate(idx, max_new_tokens, pick, stop_id=tokenizer.eot_id)


# --- conversations


def holds_conversations(tokenizer: Tokenizer) -> bool:
    return tokenizer.chat_template in templates.CHAT_TEMPLATES.values()


def prompt_ids(
    messages: list[dict[str, Any]], tokenizer: Tokenizer, block_size: int, max_new_tokens: int
) -> tuple[list[int], list[dict[str, Any]]]:
    """The ids that prompt for an answer to the last of `messages`, and the messages that they hold:
    the system's, and as many of the newest turns as leave room for the answer (at most half of the
    context).

    Raises UserError for messages that are not a conversation, and if even the last does not fit.
    """
    room = block_size - min(max_new_tokens, block_size // 2)
    first = int(bool(messages) and messages[0]["role"] == "system")

    def without(oldest: int) -> tuple[list[int], list[dict[str, Any]]]:
        kept = messages[:first] + messages[first + oldest :]
        ids = []
        for part in templates.prompt(kept, str(tokenizer.chat_template)):
            ids += tokenizer.encode(part.text) + [tokenizer.eot_id] * part.ended
        return ids, kept

    ids, kept = without(oldest=0)
    if len(ids) > room:
        fewer = range(0, len(messages) - first, 2)  # questions with their answers
        at = bisect_left(fewer, True, key=lambda oldest: len(without(oldest)[0]) <= room)
        ids, kept = without(fewer[min(at, len(fewer) - 1)])
    if len(ids) > room:
        raise UserError(f"too long: {quantity(len(ids), 'token')} where {room:,} fit")
    return ids, kept
