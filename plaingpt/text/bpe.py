"""Byte pair encoding: learning merges from text, and recovering them from the tokens."""

import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, wait
from itertools import pairwise

from plaingpt.text.cutting import cut_runs
from plaingpt.text.tokenizer_json import unspell
from plaingpt.wording import byte_size, quantity

LOG_SECONDS = 3.0  # between lines while merges are learned


def single_bytes() -> dict[bytes, int]:
    return {bytes([byte]): byte for byte in range(256)}


def train_ranks(texts: Iterable[str], size: int) -> dict[bytes, int]:
    """The 256 bytes, then the tokens that BPE merges in `texts`: at most `size` in all.

    50 MB take up to a minute. Meanwhile a line every LOG_SECONDS says how far it is: the library's
    own bars stand still while text is read.
    """
    import tokenizers  # not at the top: only this function needs its 50 ms

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    read, phase, began, stopping = 0, "reading", time.monotonic(), False
    training: Future[None] = Future()

    def pieces() -> Iterator[str]:
        nonlocal read, phase
        for text in texts:
            if stopping:
                return
            read += len(text.encode())
            yield from cut_runs(text)
        phase = f"merging up to {quantity(size, 'token')}"

    def train() -> None:
        try:
            backend.train_from_iterator(pieces(), trainer)
            training.set_result(None)
        except BaseException as error:  # raised below
            training.set_exception(error)

    # A daemon, for which Python does not wait at its end: nothing stops the merging.
    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    try:
        while wait([training], timeout=LOG_SECONDS).not_done:
            seconds = time.monotonic() - began
            print(f"BPE: {phase}, {byte_size(read)} of text, {seconds:.0f} s", file=sys.stderr)
    except BaseException:  # Ctrl-C
        stopping = True
        thread.join(timeout=1)
        raise
    training.result()
    ranks = single_bytes()
    for a, b in json.loads(backend.to_str())["model"]["merges"]:
        ranks.setdefault(unspell(a) + unspell(b), len(ranks))
    return ranks


def merges_of(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The pair that each token longer than a byte was merged from, in order."""
    for token, rank in ranks.items():
        if len(token) > 1:
            halves = [(token[:at], token[at:]) for at in range(1, len(token))]
            pairs = [
                (a, b) for a, b in halves if ranks.get(a, rank) < rank and ranks.get(b, rank) < rank
            ]
            assert pairs, f"token {rank} is not a merge of earlier tokens"
            yield pairs[0] if len(pairs) == 1 else last_merge(token, ranks)


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The last two parts of a token, when merges are applied in order, one kind at a time."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        first = min(ranks.get(a + b, ranks[token]) for a, b in pairwise(parts))
        assert first < ranks[token], f"token {ranks[token]} is not a merge of earlier tokens"
        joined = parts[:1]
        for part in parts[1:]:
            if ranks.get(joined[-1] + part) == first:
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined
    return parts[0], parts[1]
