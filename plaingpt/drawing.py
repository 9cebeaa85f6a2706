"""Drawing the next id of each text from the model's logits."""

import torch
from torch import Tensor
from torch.nn import functional as F

from plaingpt.sampling import Sampling

CANDIDATES = 1024  # sorted first on a CPU, where all 50,257 of GPT-2 take 30 times as long


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """An id (B,) for each row of `logits` (B, V), chosen by a number of `uniform` (B,) in [0, 1);
    temperature 0 takes the likeliest.

    The filters apply in this order, each to what the previous one left: the k likeliest, the fewest
    whose probability reaches top_p (arXiv 1904.09751), those at least min_p times as likely as the
    likeliest (arXiv 2407.01082).
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = F.softmax(logits / sampling.temperature, dim=-1)
    if (sampling.top_k, sampling.top_p, sampling.min_p) == (None, None, None):
        return place(probabilities, uniform)
    kept, ids = filtered(probabilities, sampling)
    return ids.gather(1, place(kept, uniform)[:, None])[:, 0]


def place(weights: Tensor, uniform: Tensor) -> Tensor:
    """Where in each row of `weights` (B, N) its running sum exceeds the share `uniform` (B,) of the
    whole: an index (B,) with a probability in proportion to its weight."""
    heights = weights.cumsum(dim=-1, dtype=torch.float64)
    found = torch.searchsorted(heights, uniform[:, None] * heights[:, -1:], right=True)
    return found[:, 0].clamp(max=weights.size(-1) - 1)


def filtered(probabilities: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The likeliest of `probabilities` (B, V) in falling order, with 0 for those that the filters
    drop, and their ids; each (B, N)."""
    most = min(sampling.top_k or probabilities.size(-1), probabilities.size(-1))
    on_cpu = probabilities.device.type == "cpu"
    all_at_once = not on_cpu or sampling.top_k or most <= CANDIDATES
    counts = [most] if all_at_once else [CANDIDATES, most]
    for count in counts:
        top, ids = probabilities.topk(count)
        kept = top >= (sampling.min_p or 0.0) * top[:, :1]
        if sampling.top_p is not None:
            whole = top.sum(-1, keepdim=True) if sampling.top_k else 1.0
            kept &= top.cumsum(-1) - top < sampling.top_p * whole  # the mass of the likelier ones
        kept[:, 0] = True  # even where top_p is below the resolution of a float
        if count == most or not kept[:, -1].any():
            break
    return top * kept, ids


def penalized(
    logits: Tensor, texts: list[list[int]], newest: Tensor | None, sampling: Sampling
) -> Tensor:
    """`logits` (B, V) with those of the ids that each text already holds, and of its `newest`
    (B, N), made smaller: divided by the repetition penalty where positive, otherwise multiplied by
    it (arXiv 1909.05858)."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, ids in enumerate(texts):
        seen[row, ids] = True
    if newest is not None:
        seen.scatter_(1, newest, True)
    penalty = sampling.repetition_penalty
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
