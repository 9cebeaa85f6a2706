"""What the page shows of a model: probabilities of tokens, their alternatives, and attention."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from model import GPT, Block
from plaingpt.generation import Drawn, Text
from plaingpt.text.tokenizer import Tokenizer

ALTERNATIVES = 10  # shown for each token
ROWS = 64  # positions whose logits are in memory at once


def described(
    token: int, log: float, alternatives: Iterable[tuple[int, float]], tokenizer: Tokenizer
) -> dict[str, Any]:
    """What the page shows about a token, given the logarithms of its probability and of those of
    its alternatives: its "id", its own text as "token", its "probability", and [id, text,
    probability] of the likeliest "alternatives"."""
    return {
        "id": token,
        "token": tokenizer.decode([token]),
        "probability": rounded(math.exp(log)),
        "alternatives": [
            [other, tokenizer.decode([other]), rounded(math.exp(its_log))]
            for other, its_log in alternatives
        ],
    }


def rounded(probability: float) -> float:
    """To five significant digits, however small it is."""
    return float(f"{probability:.5g}")


def newest(text: Text, tokens: list[Drawn], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The newest tokens of a text as `described`, each with the "text" it completes. The last of
    all has an "end": "stop" if something ended the text, "length" otherwise."""
    found = []
    for token in tokens:
        assert token.log_probability is not None
        about = described(token.id, token.log_probability, token.alternatives, tokenizer)
        found.append(about | {"text": token.piece})
    if text.ended:
        found[-1]["end"] = "stop" if text.stopped else "length"
    return found


@torch.no_grad()
def scored(model: GPT, tokenizer: Tokenizer, ids: list[int]) -> list[dict[str, Any]]:
    """Each of `ids` as `described`, given those before it. The first, which nothing
    precedes, has the probability None and no alternatives."""
    idx = torch.tensor([ids], device=model.transformer.wpe.weight.device)
    hidden = model.transformer(idx)[0, :-1]  # (T - 1, C)
    first = {"id": ids[0], "token": tokenizer.decode(ids[:1])}
    found = [first | {"probability": None, "alternatives": []}]
    for start in range(0, len(hidden), ROWS):  # none for a single id
        logits = model.lm_head(hidden[start : start + ROWS])[:, : tokenizer.vocab_size].float()
        known = logits.log_softmax(dim=-1)
        top = known.topk(min(ALTERNATIVES, tokenizer.vocab_size))
        for row, others, logs in zip(known, top.indices.tolist(), top.values.tolist()):
            token = ids[len(found)]
            found.append(described(token, row[token].item(), zip(others, logs), tokenizer))
    return found


@torch.no_grad()
def attention(model: GPT, ids: list[int]) -> Tensor:
    """The weights with which the last of `ids` attends to each of them, (layers, H, T), float32.

    Flash attention does not return them, so they are computed again from queries and keys.
    """
    config, transformer = model.config, model.transformer
    shape = (3, config.n_head, config.n_embd // config.n_head)
    idx = torch.tensor([ids], device=model.transformer.wpe.weight.device)
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
