"""Which ids sampling may draw, and with what probability."""

import pytest
import torch
from test_model import tiny, tokens

from configurator import UserError
from plaingpt import generation
from plaingpt.sampling import Sampling
from plaingpt.text.tokenizer import Tokenizer

LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "filters, allowed",
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 1e-46}, {0}),  # too small for a float32
        ({"top_p": 0.1}, {0}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"min_p": 0.4}, {0, 1}),
        ({"min_p": 1.0}, {0}),
        ({"top_k": 3, "top_p": 0.6}, {0, 1}),
        ({"temperature": 0}, {0}),
    ],
)
def test_sampling_draws_what_the_filters_allow(filters, allowed):
    sampling = Sampling(**{"temperature": 1.0, "top_p": None, **filters})
    drawn = generation.draw(LOGITS.expand(2000, 4), sampling, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == allowed


def test_sampling_follows_the_probabilities():
    sampling = Sampling(temperature=1.0, top_p=None)
    drawn = generation.draw(LOGITS.expand(20_000, 4), sampling, torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(shares, LOGITS.exp(), atol=0.015, rtol=0)


def test_padding_of_the_vocabulary_is_never_drawn():
    padded = tiny(vocab_size=320)
    with torch.no_grad():
        padded.transformer.wte.weight[257:] *= 50  # the padded ids would win almost always
    idx, sampling = tokens(8, 4), Sampling(temperature=1.0, seed=1)
    free = padded.generate(idx, 12, lambda logits: generation.draw(logits, sampling))
    assert torch.stack(list(free)).max() >= 257
    limited = padded.generate(idx, 12, generation.picker(sampling, Tokenizer.bytes(), CPU))
    assert torch.stack(list(limited)).max() < 257


def test_samples_of_a_batch_differ_and_a_seed_repeats_them():
    model, tokenizer = tiny(vocab_size=257), Tokenizer.bytes()

    def draw(seed: int | None) -> list[list[int]]:
        pick = generation.picker(Sampling(temperature=1.0, seed=seed), tokenizer, CPU)
        drawn = generation.continuations(model, tokenizer, [1, 2, 3], 12, pick, count=4)
        return torch.stack(list(drawn), dim=1).tolist()

    assert draw(1) == draw(1) != draw(2)
    assert draw(None) != draw(None)
    assert len({tuple(row) for row in draw(1)}) == 4


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(temperature, number):
    """Weights of 1e38 are finite themselves."""
    logits = torch.tensor([[0.0, number, 1.0]])
    with pytest.raises(UserError, match="logits are not finite"):
        generation.draw(logits, Sampling(temperature=temperature))
