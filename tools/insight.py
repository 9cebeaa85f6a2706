"""What the page shows of a model: probabilities of tokens, their alternatives, and attention."""

import codecs
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from model import GPT, Block
from plaingpt import generation
from plaingpt.sampling import Sampling
from plaingpt.text.tokenizer import Tokenizer

ALTERNATIVES = 10  # shown for each token
ROWS = 64  # positions whose logits are in memory at once


class Speller:
    """Turns ids into text one by one, where a character may take several tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def text(self, token: int, final: bool = False) -> str:
        """The text that `token` completes: "" within a character, and for <|endoftext|>.

        After the `final` token an incomplete character comes out as U+FFFD.
        """
        ended = token == self.tokenizer.eot_id
        content = b"" if ended else self.tokenizer.encoding.decode_single_token_bytes(token)
        return self.decoder.decode(content, final)


def with_alternatives(probabilities: Tensor, token: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the page shows about a token, given the probabilities (V,) of all tokens in its place.

    That is its "id", its own text as "token", its "probability", and [id, text, probability] of the
    likeliest "alternatives".
    """
    top = probabilities.topk(min(ALTERNATIVES, len(probabilities)))
    return {
        "id": token,
        "token": tokenizer.decode([token]),
        "probability": rounded(probabilities[token].item()),
        "alternatives": [
            [other, tokenizer.decode([other]), rounded(probability)]
            for probability, other in zip(top.values.tolist(), top.indices.tolist())
        ],
    }


def rounded(probability: float) -> float:
    """To five significant digits, however small it is."""
    return float(f"{probability:.5g}")


def drawn(
    model: GPT, speller: Speller, ids: list[int], sampling: Sampling
) -> Iterator[dict[str, Any]]:
    """Draw the tokens that follow `ids`; yield each as `with_alternatives`, with the "text" it
    completes.

    The last has an "end": "stop" if it is <|endoftext|>, "length" otherwise. Probabilities are the
    model's own, before temperature and filters.
    """
    tokenizer = speller.tokenizer
    pick = generation.picker(sampling, tokenizer, model.lm_head.weight.device)
    seen: list[Tensor] = []

    def pick_and_keep(logits: Tensor) -> Tensor:
        seen.append(logits[:, : tokenizer.vocab_size])
        return pick(logits)

    count = sampling.max_new_tokens
    tokens = generation.continuations(model, tokenizer, ids, count, pick_and_keep)
    for number, token in enumerate(map(int, tokens), start=1):
        found = with_alternatives(seen.pop()[0].softmax(dim=-1), token, tokenizer)
        stopped = token == tokenizer.eot_id
        last = stopped or number == count
        found["text"] = speller.text(token, final=last)
        yield found | ({"end": "stop" if stopped else "length"} if last else {})


@torch.no_grad()
def scored(model: GPT, tokenizer: Tokenizer, ids: list[int]) -> list[dict[str, Any]]:
    """Each of `ids` as `with_alternatives`, given those before it. The first, which nothing
    precedes, has the probability None and no alternatives."""
    idx = torch.tensor([ids], device=model.lm_head.weight.device)
    hidden = model.transformer(idx)[0, :-1]  # (T - 1, C)
    first = {"id": ids[0], "token": tokenizer.decode(ids[:1])}
    found = [first | {"probability": None, "alternatives": []}]
    for rows in hidden.split(ROWS):
        logits = model.lm_head(rows)[:, : tokenizer.vocab_size].float()
        for probabilities in logits.softmax(dim=-1):
            found.append(with_alternatives(probabilities, ids[len(found)], tokenizer))
    return found


@torch.no_grad()
def attention(model: GPT, ids: list[int]) -> Tensor:
    """The weights with which the last of `ids` attends to each of them, (layers, H, T), float32.

    Flash attention does not return them, so they are computed again from queries and keys.
    """
    config, transformer = model.config, model.transformer
    shape = (3, config.n_head, config.n_embd // config.n_head)
    idx = torch.tensor([ids], device=model.lm_head.weight.device)
    x = transformer.wte(idx) + transformer.wpe.weight[: len(ids)]  # (1, T, C)
    weights = []
    for layer, block in enumerate(transformer.h):
        assert isinstance(block, Block)
        qkv = block.attn.c_attn(block.ln_1(x))[0].unflatten(-1, shape)
        q, k, _ = qkv.float().unbind(1)  # each (T, H, D)
        scores = torch.einsum("hd,thd->ht", q[-1], k) / math.sqrt(shape[-1])
        weights.append(scores.softmax(dim=-1))
        x = block(x, layer, None)
    return torch.stack(weights)
