"""Writing texts with a model: several side by side, each as if it were alone."""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, repeat
from random import Random
from typing import Any

import torch
from torch import Tensor

from configurator import UserError
from model import GPT, KVCache
from plaingpt import drawing, graphs, runtime
from plaingpt.sampling import Sampling
from plaingpt.text import templates
from plaingpt.text.spelling import Speller
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training.parallel import is_sharded
from plaingpt.wording import quantity

AHEAD = 16  # tokens that a GPU draws before the host looks at them
STRIDE = 128  # a GPU attends to a multiple of so many entries of the cache
NOT_FINITE = "the model's logits are not finite: its weights are too large, or damaged"


@dataclass(frozen=True)
class Drawn:
    """A token that was drawn. Probabilities are the model's own, before temperature and filters,
    as natural logarithms."""

    id: int
    piece: str  # the text that it completes
    log_probability: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()  # the likeliest ids, with log probabilities


class Text:
    """A text that is being written. It has its own random numbers, so that a seed draws the same
    text whatever is written beside it."""

    def __init__(self, prompt: list[int], sampling: Sampling, tokenizer: Tokenizer) -> None:
        self.ids = list(prompt)  # the prompt, then what has been drawn
        self.tokens: list[Drawn] = []
        self.sampling, self.drawing = sampling, sampling.for_drawing()
        self.stop_ids = frozenset({tokenizer.eot_id, *sampling.stop_tokens})
        self.speller = Speller(tokenizer, sampling.stop, self.stop_ids)
        self.stopped = False  # by a stop token or a stop string
        self.random = Random(sampling.seed)

    @property
    def ended(self) -> bool:
        return self.stopped or len(self.tokens) == self.sampling.max_new_tokens

    @property
    def written(self) -> str:
        """What has been written after the prompt."""
        return "".join(drawn.piece for drawn in self.tokens)

    def append(self, token: int, *probabilities: Any) -> None:
        """Add a token; `probabilities` are the last fields of its `Drawn`, if they are known."""
        self.ids.append(token)
        self.stopped = token in self.stop_ids
        final = self.stopped or len(self.tokens) + 1 == self.sampling.max_new_tokens
        piece = self.speller.text(token, final)
        self.stopped = self.stopped or self.speller.stopped
        self.tokens.append(Drawn(token, piece, *probabilities))


class Batch:
    """The texts that a model writes side by side. They come and go between steps.

    Positions are learned, so a full context cannot slide. When block_size tokens are in it, the
    last block_size // 2 (at least one) are read again from position 0.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        size: int = 1,
        capacity: int | None = None,
        alternatives: int | None = None,
    ) -> None:
        """For at most `size` texts of at most `capacity` tokens (None: block_size). `alternatives`
        says how many come with each token; None leaves out its probability, too.

        Raises UserError if the keys and values would not fit the memory.
        """
        config, device = model.config, model.transformer.wpe.weight.device
        self.model, self.tokenizer, self.size = model, tokenizer, size
        self.capacity = min(capacity or config.block_size, config.block_size)
        self.alternatives = alternatives
        check_memory(model, size, self.capacity)
        recorded = device.type == "cuda" and not is_sharded(model)  # not with FSDP's hooks
        self.ahead, stride = (AHEAD, STRIDE) if recorded else (1, 1)
        self.cache = KVCache(model, size, self.capacity, stride)
        self.recorded = None
        if self.ahead > 1:
            self.recorded = graphs.Recorded(self.cache, tokenizer.vocab_size)
        self.prompt_cache = KVCache(model, 1, self.capacity) if size > 1 else self.cache
        self.device = device
        self.drawing_device = torch.device("cpu") if device.type == "mps" else device  # for float64
        self.forget()

    def clear(self) -> None:
        """Forget all texts, and keys and values that are not finite."""
        for cache in (self.cache, self.prompt_cache):
            cache.entries.zero_()
        self.forget()

    def forget(self) -> None:
        self.prompt: list[int] = []  # what the prompt cache holds
        self.texts: list[Text] = []  # by row of the cache; those without unread ids are the last
        self.lengths: list[int] = []  # tokens of each that are in the cache
        self.logits = torch.empty(0, self.tokenizer.vocab_size, device=self.device)  # of prompts

    @torch.inference_mode()
    def add(self, text: Text) -> None:
        """Read the prompt of a text, at most its last `capacity` tokens."""
        assert len(self.texts) < self.size
        self.texts.append(text)
        self.lengths.append(0)
        self.read(len(self.texts) - 1, text.ids[-self.capacity :])
        self.logits = torch.cat((self.logits, self.prompt_logits))

    def read(self, row: int, ids: list[int]) -> None:
        """Put `ids` into a row of the cache, at position 0."""
        cache, length = self.prompt_cache, len(ids)
        if ids and (cache is self.cache or ids != self.prompt):
            cache.lengths.zero_()
            cache.end = 0
            idx = torch.tensor([ids], device=self.device)
            self.prompt_logits = self.head(self.model.transformer(idx, cache)[:, -1])
            self.prompt = ids
        if cache is not self.cache:
            self.cache.entries[:, row, :, :, :length] = cache.entries[:, 0, :, :, :length]
        self.lengths[row] = length

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (B, V) of the tokenizer's ids; the padding of a vocabulary is never drawn."""
        return self.model.lm_head(hidden)[:, : self.tokenizer.vocab_size].float()

    @torch.inference_mode()
    def step(self) -> dict[Text, list[Drawn]]:
        """Draw the next token of each text, on a GPU the next few. Raises UserError for logits that
        are not finite."""
        logits = self.first_logits()
        count = self.tokens_ahead()
        random = [[text.random.random() for text in self.texts] for _ in range(count)]
        uniform = torch.tensor(random, dtype=torch.float64, device=self.drawing_device)
        drawn: list[Tensor] = []
        finite: list[Tensor] = []
        known: list[tuple[Tensor, ...]] = []
        for turn in range(count):
            if turn == 1:
                self.cache.lengths[: len(self.texts)] = torch.tensor(self.lengths)
            if turn:
                logits = self.next_logits(drawn[-1][:, None].to(self.device))
            ids = self.choose(logits.to(self.drawing_device), uniform[turn], drawn)
            known.append(self.probabilities(logits, ids))
            finite.append(logits.sum(dim=-1).isfinite().to(ids.device))
            drawn.append(ids)
        # All is asked for at once, because each question makes a GPU wait.
        tokens = torch.where(torch.stack(finite), torch.stack(drawn), -1).tolist()
        before = [len(text.tokens) for text in self.texts]
        for row, probabilities in zip(tokens, known):
            for text, token, each in zip(self.texts, row, listed(probabilities)):
                if text.ended:  # and what was drawn beyond its end is dropped
                    continue
                if token == -1:
                    raise UserError(NOT_FINITE)
                text.append(token, *each)
        return {text: text.tokens[start:] for text, start in zip(self.texts, before)}

    def first_logits(self) -> Tensor:
        """The logits of all texts: of those with an unread id, after it, and of new prompts."""
        unread = len(self.texts) - len(self.logits)
        for row in range(unread):
            if self.lengths[row] == self.capacity:
                self.read(row, self.texts[row].ids[-max(self.capacity // 2, 1) : -1])
        parts = [self.logits] if len(self.logits) else []
        if unread:
            self.cache.lengths[:unread] = torch.tensor(self.lengths[:unread])
            idx = torch.tensor([text.ids[-1:] for text in self.texts[:unread]], device=self.device)
            parts = [self.next_logits(idx), *parts]
        self.logits = self.logits[:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def tokens_ahead(self) -> int:
        """How many tokens can be drawn before the host must see them: one if a text is new, so that
        it begins at once."""
        if not all(text.tokens for text in self.texts):
            return 1
        room = self.capacity - max(self.lengths) + 1
        left = max(text.sampling.max_new_tokens - len(text.tokens) for text in self.texts)
        return min(self.ahead, room, left)

    def next_logits(self, idx: Tensor) -> Tensor:
        """Read the next ids (B, 1) of the first texts; return the logits (B, V) after them."""
        self.cache.end = max(self.lengths[: len(idx)])
        logits = self.recorded(self.forward, idx) if self.recorded else self.forward(idx)
        for row in range(len(idx)):
            self.lengths[row] += 1
        return logits

    def forward(self, idx: Tensor) -> Tensor:
        return self.head(self.model.transformer(idx, self.cache)[:, -1])

    def choose(self, logits: Tensor, uniform: Tensor, drawn: list[Tensor]) -> Tensor:
        """An id (B,) for each text, given the logits (B, V) of all, a number in [0, 1) for each,
        and the ids that were drawn after those in the texts."""
        chosen, row = [], 0
        for sampling, group in groupby(self.texts, lambda text: text.drawing):
            texts = list(group)
            rows = slice(row, row + len(texts))
            part = logits[rows]
            if sampling.repetition_penalty != 1:
                newest = torch.stack([ids[rows] for ids in drawn], dim=1) if drawn else None
                part = drawing.penalized(part, [text.ids for text in texts], newest, sampling)
            chosen.append(drawing.draw(part, sampling, uniform[rows]))
            row += len(texts)
        return torch.cat(chosen)

    def probabilities(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        """The log probability of the id of each text, (B,), and the ids and log probabilities of
        its alternatives, each (B, N)."""
        if self.alternatives is None:
            return ()
        known = logits.log_softmax(dim=-1)
        top = known.topk(min(self.alternatives, known.size(-1)))
        return known.gather(1, ids.to(known.device)[:, None])[:, 0], top.indices, top.values

    def remove(self, text: Text) -> None:
        """Forget a text, before any are added for the next step. Its row goes to the last text."""
        row, last = self.texts.index(text), len(self.texts) - 1
        if row < last:
            length = self.lengths[last]
            entries = self.cache.entries[..., :length, :]
            entries[:, row] = entries[:, last]
            self.texts[row], self.lengths[row] = self.texts[last], length
        self.texts.pop()
        self.lengths.pop()


def listed(probabilities: tuple[Tensor, ...]) -> Iterable[tuple[Any, ...]]:
    """For each text the last fields of its `Drawn`."""
    if not probabilities:
        return repeat(())
    own, ids, logs = (each.tolist() for each in probabilities)
    return zip(own, (tuple(zip(*each)) for each in zip(ids, logs)))


def check_memory(model: GPT, size: int, capacity: int) -> None:
    """Raises UserError if the keys and values of `size` texts would not fit the memory."""
    memory = runtime.device_memory_gib(model.transformer.wpe.weight.device)
    if memory is not None and cache_gib(model, size, capacity) > memory:
        has = f"{1024 * memory:,.0f} MiB"
        raise UserError(
            f"{cache_sentence(model, size, capacity)}, and the device has {has}: write "
            "fewer side by side (--batch_size of sample.py, --max_requests of tools.serve)"
        )


def cache_gib(model: GPT, size: int, capacity: int) -> float:
    config, weight = model.config, model.transformer.wpe.weight
    each = 2 * config.n_layer * capacity * config.n_embd * weight.element_size() / 2**30
    return each * (size + (size > 1))  # and a prompt that is being read


def cache_sentence(model: GPT, size: int, capacity: int) -> str:
    """What the keys and values of `size` texts take, with those of a prompt that is being read."""
    needed = f"{1024 * cache_gib(model, size, capacity):,.1f} MiB"
    tokens = quantity(capacity, "token")
    return f"{quantity(size, 'text')} with keys and values of {tokens} each take {needed}"


def write(batch: Batch, texts: Iterable[Text]) -> Iterator[tuple[Text, list[Drawn]]]:
    """Write `texts`, as many at a time as fit the batch; yield each with its new tokens."""
    waiting = iter(texts)
    while True:
        while len(batch.texts) < batch.size and (text := next(waiting, None)):
            batch.add(text)
        if not batch.texts:
            return
        for text, tokens in batch.step().items():
            yield text, tokens
            if text.ended:
                batch.remove(text)


def write_in_order(batch: Batch, texts: Iterable[Text]) -> Iterator[Text]:
    """Write `texts`; yield each in its turn, once it has ended."""
    begun: deque[Text] = deque()

    def noted() -> Iterator[Text]:
        for text in texts:
            begun.append(text)
            yield text

    for _ in write(batch, noted()):
        while begun and begun[0].ended:
            yield begun.popleft()


def continuation(
    model: GPT, tokenizer: Tokenizer, prompt: list[int], sampling: Sampling
) -> Iterator[Drawn]:
    """The tokens after those of `prompt`, one by one; <|endoftext|> is the last if it is drawn."""
    capacity = len(prompt) + sampling.max_new_tokens
    batch = Batch(model, tokenizer, capacity=capacity)
    text = Text(prompt, sampling, tokenizer)
    return (token for _, tokens in write(batch, [text]) for token in tokens)


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
