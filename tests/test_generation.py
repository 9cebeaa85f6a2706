"""Which ids sampling may draw, with what probability, and texts that are written side by side."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from test_model import huggingface, tiny, tokens
from transformers import RepetitionPenaltyLogitsProcessor

from configurator import UserError
from plaingpt import drawing, generation, graphs, packing, runtime
from plaingpt.generation import Batch, Text, write, write_in_order
from plaingpt.sampling import Sampling
from plaingpt.text.tokenizer import Tokenizer

LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
BYTES = Tokenizer.bytes()
GREEDY = Sampling(temperature=0, max_new_tokens=40)
PACKED = [("float32", None), ("auto", None), ("auto", "int8")]


def uniform(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def continued(model, prompt: list[int], sampling: Sampling) -> list[int]:
    return [each.id for each in generation.continuation(model, BYTES, prompt, sampling)]


# --- drawing


@pytest.mark.parametrize("candidates", [1, 2, 1024])
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
def test_sampling_draws_what_the_filters_allow(monkeypatch, filters, allowed, candidates):
    monkeypatch.setattr(drawing, "CANDIDATES", candidates)
    sampling = Sampling(**{"temperature": 1.0, "top_p": None, **filters})
    drawn = drawing.draw(LOGITS.expand(2000, 4), sampling, uniform(2000))
    assert set(drawn.tolist()) == allowed


@pytest.mark.parametrize("numbers", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_the_ends_of_the_interval_draw_ids_that_are_allowed(filters, numbers):
    logits = torch.tensor([[-torch.inf, 2.0, 1.0, 0.0, -torch.inf]])
    sampling = Sampling(**{"temperature": 1.0, "top_p": None, **filters})
    drawn = drawing.draw(logits, sampling, torch.tensor([numbers], dtype=torch.float64))
    assert drawn.item() in {1, 2, 3}


@pytest.mark.parametrize("filters", [{}, {"top_k": 100}, {"top_p": 0.9}, {"min_p": 0.05}])
def test_draws_follow_the_softmax(filters):
    """By Pearson's chi-squared, whose standard deviation is sqrt(2·freedom); draws at another
    temperature fail the same test."""
    count, logits = 200_000, 1.5 * torch.randn(300, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(**{"temperature": 0.8, "top_p": None, **filters})
    wanted = (logits / 0.8).softmax(-1)
    order = wanted.argsort(descending=True)
    before = wanted[order].cumsum(0) - wanted[order]
    kept = torch.zeros(300, dtype=torch.bool)
    kept[order] = (
        (torch.arange(300) < (sampling.top_k or 300))
        & (before < (sampling.top_p or 2))
        & (wanted[order] >= (sampling.min_p or 0) * wanted.max())
    )
    wanted = torch.where(kept, wanted, 0) / wanted[kept].sum()

    def surprise(temperature: float) -> float:
        """In standard deviations from its mean."""
        drawn = drawing.draw(
            logits.expand(count, -1), replace(sampling, temperature=temperature), uniform(count)
        )
        found = drawn.bincount(minlength=300).double()
        assert not found[~kept].any()
        freedom = int(kept.sum()) - 1
        expected = count * wanted[kept]
        squares = ((found[kept] - expected) ** 2 / expected).sum().item()
        return (squares - freedom) / math.sqrt(2 * freedom)

    assert abs(surprise(0.8)) < 4
    if not filters:
        assert surprise(0.85) > 20


def test_the_repetition_penalty_is_that_of_transformers():
    logits, seen = torch.randn(2, 61), [[1, 5, 5, 60], [7]]
    sampling = Sampling(repetition_penalty=1.3)
    found = drawing.penalized(logits, seen, None, sampling)
    for row, ids in enumerate(seen):
        theirs = RepetitionPenaltyLogitsProcessor(1.3)
        expected = theirs(torch.tensor([ids]), logits[row : row + 1].clone())[0]
        torch.testing.assert_close(found[row], expected)


# --- a single text


def test_padding_of_the_vocabulary_is_never_drawn():
    padded = tiny(vocab_size=320)
    with torch.no_grad():
        padded.transformer.wte.weight[257:] *= 50  # the padded ids would win almost always
    assert padded(tokens(8, 4))[:, -1].argmax(-1).max() >= 257
    drawn = continued(padded, [1, 2, 3], Sampling(temperature=1.0, seed=1))
    assert max(drawn) < 257


@pytest.mark.parametrize("prompt", [1, 10, 16, 40])
def test_a_text_equals_the_documented_rule_without_a_cache(prompt):
    model, ids = tiny(vocab_size=257), tokens(prompt).tolist()
    seen, expected = ids[-16:], []
    for _ in range(40):
        if len(seen) > 16:
            seen = seen[-8:]
        expected.append(model(torch.tensor([seen]))[0, -1].argmax().item())
        seen = [*seen, expected[-1]]
    assert continued(model, ids, GREEDY) == expected


def test_the_likeliest_text_is_that_of_transformers():
    model, ids = tiny(vocab_size=257, block_size=64), tokens(9).tolist()
    theirs = huggingface(model).generate(
        torch.tensor([ids]), max_new_tokens=40, do_sample=False, eos_token_id=256, pad_token_id=256
    )
    assert continued(model, ids, GREEDY) == theirs[0, 9:].tolist()


def test_a_context_of_one_token_works():
    assert len(continued(tiny(vocab_size=257, block_size=1), [1, 2, 3], GREEDY)) == 40


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(temperature, number):
    """Weights of 1e38 are finite themselves."""
    model = tiny(vocab_size=257)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = number
    with pytest.raises(UserError, match="logits are not finite"):
        continued(model, [1], Sampling(temperature=temperature))


def test_probabilities_are_the_models_own():
    model, prompt = tiny(vocab_size=257), [1, 2, 3]
    text = Text(prompt, Sampling(temperature=0.5, top_k=3, max_new_tokens=5, seed=1), BYTES)
    list(write(Batch(model, BYTES, alternatives=4), [text]))
    known = model(torch.tensor([text.ids]))[0].log_softmax(-1)
    for place, token in enumerate(text.tokens, start=2):
        assert token.log_probability == pytest.approx(known[place, token.id].item(), abs=1e-4)
        ids, logs = zip(*token.alternatives)
        top = known[place].topk(4)
        assert list(ids) == top.indices.tolist()
        assert list(logs) == pytest.approx(top.values.tolist(), abs=1e-4)


def test_stop_tokens_and_stop_strings_end_a_text():
    model = tiny(vocab_size=257)
    free = Text([1], Sampling(temperature=0, max_new_tokens=30), BYTES)
    list(write(Batch(model, BYTES), [free]))
    drawn = [token.id for token in free.tokens]
    assert not free.stopped and len(drawn) == 30
    by_token = Text([1], replace(free.sampling, stop_tokens=(drawn[7],)), BYTES)
    list(write(Batch(model, BYTES), [by_token]))
    end = drawn.index(drawn[7])
    assert by_token.stopped and [each.id for each in by_token.tokens] == drawn[: end + 1]
    assert by_token.written == BYTES.decode(drawn[:end])
    stop = free.written[5:7]
    by_string = Text([1], replace(free.sampling, stop=(stop,)), BYTES)
    list(write(Batch(model, BYTES), [by_string]))
    assert by_string.stopped and by_string.written == free.written.partition(stop)[0]
    assert len(by_string.tokens) < 30


# --- several texts


@pytest.mark.parametrize("dtype, quantize", PACKED)
@pytest.mark.parametrize("temperature", [0, 0.9])
def test_each_text_of_a_batch_is_as_if_it_were_alone(dtype, quantize, temperature):
    """Prompts and texts of different lengths, beyond block_size, more than fit at once."""
    model = packing.place(tiny(vocab_size=257), runtime.start("cpu", "float32"), dtype, quantize)

    def texts() -> list[Text]:
        return [
            Text(
                tokens(3 + 5 * n, seed=n).tolist(),
                Sampling(temperature=temperature, max_new_tokens=7 + 9 * (n % 3), seed=n),
                BYTES,
            )
            for n in range(7)
        ]

    together = texts()
    order = list(write_in_order(Batch(model, BYTES, size=3, alternatives=2), together))
    assert order == together
    for text, alone in zip(together, texts()):
        list(write(Batch(model, BYTES, alternatives=2), [alone]))
        assert text.ids == alone.ids and text.written == alone.written
        assert text.tokens == alone.tokens  # with their log probabilities, to the last bit
    assert len({tuple(text.ids) for text in together}) == 7


def test_a_prompt_is_read_once_for_all_of_its_texts(monkeypatch):
    model, read = tiny(vocab_size=257), []
    really = type(model.transformer).forward

    def noted(self, idx, cache):
        read.append(idx.shape)
        return really(self, idx, cache)

    monkeypatch.setattr(type(model.transformer), "forward", noted)
    texts = [Text([1, 2, 3], Sampling(max_new_tokens=2, seed=seed), BYTES) for seed in range(3)]
    list(write(Batch(model, BYTES, size=3), texts))
    assert read == [(1, 3), (3, 1)]


def varied_texts() -> list[Text]:
    """Of different lengths and settings, some beyond block_size, some that end early."""
    settings = [
        Sampling(temperature=0, max_new_tokens=40, seed=1),
        Sampling(temperature=0.9, max_new_tokens=23, repetition_penalty=1.3, seed=2),
        Sampling(temperature=1.5, max_new_tokens=60, stop_tokens=tuple(range(0, 250, 9)), seed=3),
        Sampling(temperature=0.7, top_k=9, max_new_tokens=5, repetition_penalty=1.1, seed=4),
    ]
    return [
        Text(tokens(4 * n + 1, seed=n).tolist(), each, BYTES) for n, each in enumerate(settings)
    ]


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("ahead, stride", [(2, 1), (16, 6), (100, 5)])
def test_drawing_ahead_changes_no_text(monkeypatch, ahead, stride, recording):
    """As a GPU does, here without one: a graph that is launched again is a function that is called
    again, and the arguments are those of the recording."""

    def record(self, function, example):
        function(example)
        return function

    monkeypatch.setattr(graphs.Recorded, "record", record)
    monkeypatch.setattr(graphs, "WORTH", 2)
    model, found = tiny(vocab_size=257), {}
    for drawn_ahead in (1, ahead):
        batch = Batch(model, BYTES, size=3, alternatives=2)
        if drawn_ahead > 1:
            batch.ahead, batch.cache.stride = ahead, stride
            batch.recorded = graphs.Recorded(batch.cache, BYTES.vocab_size) if recording else None
        found[drawn_ahead] = varied_texts()
        list(write(batch, found[drawn_ahead]))
    for one, other in zip(found[1], found[ahead]):
        assert one.ids == other.ids and one.written == other.written and other.ended
        logs, theirs = ([token.log_probability for token in each.tokens] for each in (one, other))
        assert logs == pytest.approx(theirs, abs=1e-5)
    assert not recording or batch.recorded.graphs


def test_a_graph_recorded_at_the_end_of_a_span_serves_its_beginning(monkeypatch):
    monkeypatch.setattr(graphs.Recorded, "record", lambda self, function, example: function)
    model, found = tiny(vocab_size=257), []
    for recorded in (False, True):
        batch = Batch(model, BYTES)
        if recorded:  # the 8th use of the span of 16 is its last
            batch.cache.stride = 16
            batch.recorded = graphs.Recorded(batch.cache, BYTES.vocab_size)
        texts = [Text(tokens(length).tolist(), GREEDY, BYTES) for length in (8, 3)]
        found.append([text.ids for text in write_in_order(batch, texts)])
    assert found[0] == found[1] and batch.recorded.graphs


def test_a_batch_is_freed_at_once():
    batch = Batch(tiny(vocab_size=257), BYTES)
    gone = weakref.ref(batch)
    del batch
    assert gone() is None


def test_the_first_token_of_a_text_does_not_wait_for_others():
    batch = Batch(tiny(vocab_size=257), BYTES, size=2)
    batch.ahead = 16
    first, second = (Text([1, n], Sampling(max_new_tokens=40, seed=n), BYTES) for n in (1, 2))
    batch.add(first)
    assert [len(batch.step()[first]) for _ in range(2)] == [1, 14]  # until the context is full
    batch.add(second)
    assert [len(new) for new in batch.step().values()] == [1, 1]


@pytest.mark.parametrize(
    "filters", [{}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.9, "repetition_penalty": 1.2}]
)
def test_a_gpu_draws_without_asking_the_host(monkeypatch, filters):
    """A meta tensor has no values: asking for one is an error."""
    monkeypatch.setattr(runtime, "device_memory_gib", lambda device: None)
    monkeypatch.setattr(drawing, "CANDIDATES", 9)
    batch = Batch(tiny(vocab_size=257).to("meta"), BYTES, size=2, alternatives=2)
    batch.texts = [Text([1], Sampling(**filters), BYTES) for _ in range(2)]
    batch.cache.end = 3
    drawn = [torch.zeros(2, dtype=torch.long, device="meta")]
    logits = batch.forward(drawn[0][:, None])
    ids = batch.choose(logits, torch.rand(2, dtype=torch.float64, device="meta"), drawn)
    own, others, logs = batch.probabilities(logits, ids)
    assert ids.shape == own.shape == (2,) and others.shape == logs.shape == (2, 2)
    with pytest.raises(RuntimeError):
        ids.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recorded_graphs_write_what_the_cpu_writes(monkeypatch):
    monkeypatch.setattr(graphs, "WORTH", 2)
    model, expected = tiny(vocab_size=257), varied_texts()
    list(write(Batch(model, BYTES, size=3, alternatives=2), expected))
    for _ in range(2):  # the second, after the graphs of the first are gone
        batch, texts = Batch(model.to("cuda"), BYTES, size=3, alternatives=2), varied_texts()
        list(write(batch, texts))
        assert batch.recorded.graphs
        assert [text.ids for text in texts] == [text.ids for text in expected]
        del batch


def test_samples_differ_and_a_seed_repeats_them():
    model = tiny(vocab_size=257)

    def draw(*seeds: int | None) -> list[list[int]]:
        texts = [Text([1, 2, 3], Sampling(temperature=1.0, seed=seed), BYTES) for seed in seeds]
        return [text.ids for text in write_in_order(Batch(model, BYTES, size=4), texts)]

    assert draw(1, 2, 3, 4) == draw(1, 2, 3, 4) == draw(1, 2) + draw(3, 4)
    assert len({tuple(ids) for ids in draw(1, 2, 3, None, None)}) == 5


def test_keys_and_values_that_do_not_fit_are_refused_before_they_are_taken(monkeypatch):
    monkeypatch.setattr(runtime, "device_memory_gib", lambda device: 0.001)
    with pytest.raises(
        UserError,
        match=r"500 texts with .* take [\d,.]+ MiB, .* has 1 MiB: write fewer side by side",
    ):
        Batch(tiny(vocab_size=257), BYTES, size=500)
