"""
Text ↔ token ids: one byte-level BPE, whether GPT-2's own, trained here, or plain bytes.

Encoding runs on tiktoken; a folder holds Hugging Face's `tokenizer.json` and
`tokenizer_config.json`, which `AutoTokenizer.from_pretrained(folder)` opens with the same ids
(except for runs of thousands of characters without a border, which are cut here: see cutting.py).
Ids are 0–255 for single bytes, then the merges in the order they were learned, then
`<|endoftext|>`, which separates documents. Text never encodes to that id: where a document spells
out `<|endoftext|>`, it gets the ids of the letters.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken

from configurator import UserError
from plaingpt.text import cutting
from plaingpt.text.bpe import merges_of, single_bytes, train_ranks
from plaingpt.text.cutting import cut_runs
from plaingpt.text.network import require_answer
from plaingpt.text.tokenizer_json import (
    END_OF_TEXT,
    MAX_VOCAB_SIZE,
    ChatTemplate,
    Vocabulary,
    read_vocabulary,
    write_vocabulary,
)

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
# GPT-2's: contractions, letters, numbers, other signs, each with a leading space; white space.
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The same after a split at each digit, as in StarCoder and SmolLM.
DIGITS_PATTERN = (
    r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N})|\s++$|\s+(?!\S)|\s"
)


class Tokenizer:
    """A byte-level BPE with GPT-2's split pattern.

    `ranks` maps the bytes of every token to its id; ids are in the order of the merges. `special`
    maps names to the ids that no text encodes to, among them that of `eot`, which ends a document.
    With `digits` every digit is a token of its own.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        special: dict[str, int] | None = None,
        eot: str = END_OF_TEXT,
        digits: bool = False,
    ) -> None:
        self.ranks, self.eot, self.digits = ranks, eot, digits
        self.merges: Sequence[tuple[bytes, bytes]] | None = None  # as the file lists them
        self.chat_template: ChatTemplate | None = None  # Jinja, for models of conversations
        self.special = special or {END_OF_TEXT: len(ranks)}
        self.eot_id = self.special[eot]
        self.vocab_size = max(*ranks.values(), *self.special.values()) + 1
        self.encoding = tiktoken.Encoding(
            "plaingpt",
            pat_str=DIGITS_PATTERN if digits else SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special,
        )

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """No merges: a token is a byte, 257 ids."""
        return cls(single_bytes())

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """OpenAI's vocabulary of 50,257 ids, which tiktoken downloads once and caches.

        Raises UserError if it is not cached and cannot be downloaded.
        """
        try:
            if not is_cached(GPT2_URL):
                require_answer(GPT2_URL)  # tiktoken itself would wait for it forever
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
        except Exception as error:  # requests' errors, or whatever a proxy makes of them
            raise UserError(
                "the gpt2 tokenizer needs OpenAI's vocabulary files, which are not cached and "
                f"could not be downloaded ({error}). Run once with a network, or "
                "point TIKTOKEN_CACHE_DIR at a folder that has them, or choose --tokenizer=bpe "
                "or bytes"
            ) from error
        return cls(ranks)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn `vocab_size` - 257 merges from `texts`, or fewer if the texts have no more.

        Raises UserError for a size outside 257 … 65,536.
        """
        if not 257 <= vocab_size <= MAX_VOCAB_SIZE:
            raise UserError(f"vocab_size must be from 257 to {MAX_VOCAB_SIZE}, not {vocab_size}")
        return cls(train_ranks(texts, vocab_size - 1))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, which is cut within very long runs: see cutting.py."""
        pieces = cut_runs(text)
        return [token for piece in pieces for token in self.encoding.encode_ordinary(piece)]

    def encode_joined(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts, uint16, with `eot_id` after each, and the place after each `eot_id`.

        One call to tiktoken, which releases Python's lock.
        """
        pieces, may_be_cut = texts, max(map(len, texts), default=0) > cutting.LONGEST_RUN
        if may_be_cut:
            cut = [cut_runs(text) for text in texts]
            pieces = [piece for each in cut for piece in each]
        joined = self.eot.join([*pieces, ""])
        if joined.count(self.eot) > len(pieces):  # a text spells it out
            encoded = [[*self.encode(text), self.eot_id] for text in texts]
            ids = np.array([token for each in encoded for token in each], dtype=np.uint16)
            return ids, np.cumsum([len(each) for each in encoded])
        ids = self.encoding.encode_to_numpy(
            joined, allowed_special={self.eot}, disallowed_special=()
        ).astype(np.uint16)
        ends = np.flatnonzero(ids == self.eot_id)
        if len(pieces) > len(texts):
            inner = np.delete(ends, np.cumsum([len(each) for each in cut]) - 1)
            ids = np.delete(ids, inner)
            ends = np.flatnonzero(ids == self.eot_id)
        return ids, ends + 1

    def count_bytes(self, ids: np.ndarray) -> int:
        """Bytes of text that `ids` stand for; special ids have none."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        lengths[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return int(lengths[ids].sum())

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, special ids their names."""
        return self.encoding.decode(list(ids), errors="replace")

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly if they give the same ids for every text."""
        digest = hashlib.sha256(f"{self.eot_id} {self.digits}".encode())
        for token, rank in self.ranks.items():
            digest.update(f" {rank} {len(token)} ".encode() + token)
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into an existing folder."""
        merges = list(merges_of(self.ranks)) if self.merges is None else self.merges
        vocabulary = Vocabulary(
            self.ranks, self.special, self.eot, self.digits, merges, self.chat_template
        )
        write_vocabulary(folder, vocabulary)

    @classmethod
    def load(cls, folder: Path | str) -> "Tokenizer":
        """Open a tokenizer.json, or the one in a folder: any byte-level BPE that splits text as
        GPT-2 does (or StarCoder and SmolLM, with single digits), whatever its special tokens.

        Raises UserError if there is none, or one that would not give the same ids here.
        """
        found = read_vocabulary(Path(folder))
        loaded = cls(found.ranks, found.special, found.eot, found.digits)
        loaded.merges, loaded.chat_template = found.merges, found.chat_template
        return loaded


def is_cached(url: str) -> bool:
    """Whether tiktoken has a file, in memory or on disk, and need not download it."""
    names = ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")
    default = Path(tempfile.gettempdir()) / "data-gym-cache"
    folder = next((os.environ[name] for name in names if name in os.environ), default)
    name = hashlib.sha1(url.encode()).hexdigest()
    return "gpt2" in tiktoken.registry.ENCODINGS or (Path(folder) / name).exists()
