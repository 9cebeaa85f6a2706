"""
Hugging Face's tokenizer.json and tokenizer_config.json: reading and writing a byte-level BPE.

A file spells each byte as a printable character, as GPT-2's encoder.py does.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec

from configurator import UserError
from plaingpt import files
from plaingpt.files import Count
from plaingpt.wording import quantity

END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB_SIZE = 65536  # ids are stored as uint16

ChatTemplate = str | tuple[dict[str, str], ...]  # Jinja: one template, or several by name


@dataclass(frozen=True)
class Vocabulary:
    """What the two files say; see `Tokenizer`."""

    ranks: dict[bytes, int]
    special: dict[str, int]
    eot: str
    digits: bool
    merges: Sequence[tuple[bytes, bytes]]
    chat_template: ChatTemplate | None = None


# --- the fields that decide the ids


class AddedToken(msgspec.Struct, frozen=True):
    id: Count
    # Beyond 100 characters, tiktoken is slow.
    content: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    special: bool = False


class PreTokenizer(msgspec.Struct, frozen=True):
    type: str
    use_regex: bool = True  # of ByteLevel
    add_prefix_space: bool = False
    individual_digits: bool = False  # of Digits
    pretokenizers: tuple["PreTokenizer", ...] = ()  # of Sequence


class Model(msgspec.Struct, frozen=True, kw_only=True):
    # It would give a text other ids each time.
    dropout: Annotated[float, msgspec.Meta(le=0)] | None = None
    vocab: dict[str, Count]
    merges: tuple[str | tuple[str, str], ...]  # older files write a pair as one string


class TokenizerFile(msgspec.Struct, frozen=True):
    model: Model
    pre_tokenizer: PreTokenizer
    added_tokens: tuple[AddedToken, ...] | None = None
    normalizer: dict[str, Any] | None = None


class TokenName(msgspec.Struct, frozen=True):
    content: str


class ConfigFile(msgspec.Struct, frozen=True):
    eos_token: str | TokenName | None = None
    chat_template: ChatTemplate | None = None


# --- reading


def read_vocabulary(where: Path) -> Vocabulary:
    """What a tokenizer.json, or the one in a folder, and its tokenizer_config.json say.

    Raises UserError if it is missing or damaged, and for anything but a byte-level BPE that splits
    text as GPT-2 does (or StarCoder and SmolLM, with single digits).
    """
    path = where / "tokenizer.json" if where.is_dir() or not where.exists() else where
    content = files.read_json(path, TokenizerFile, "expected a byte-level BPE")
    digits = splits_digits(content)
    if digits is None:
        raise UserError(f"{path}: it does not split text as GPT-2 does")
    vocab = content.model.vocab
    if len(vocab) > MAX_VOCAB_SIZE:
        tokens = quantity(len(vocab), "token")
        raise UserError(f"{path} has {tokens}; shards allow {MAX_VOCAB_SIZE:,}")
    special = {token.content: token.id for token in content.added_tokens or ()}
    special |= {name: id for name, id in vocab.items() if name == END_OF_TEXT}
    words = sorted(vocab.items(), key=lambda item: item[1])
    try:
        ranks = {unspell(word): rank for word, rank in words if word not in special}
        merges = [(unspell(a), unspell(b)) for a, b in pairs_of(content.model.merges)]
    except KeyError as error:  # a character that spells no byte
        raise UserError(f"{path} is not a byte-level BPE: it spells a byte as {error}") from None
    except ValueError:
        raise UserError(f"{path}: a merge does not consist of two tokens") from None
    check_ids(path, ranks, special)
    check_merges(path, ranks, merges)
    beside = path.with_name("tokenizer_config.json")
    config = files.read_json(beside, ConfigFile) if beside.exists() else ConfigFile()
    template = config.chat_template
    jinja = path.with_name("chat_template.jinja")  # where transformers writes it
    if jinja.exists():
        template = files.read_bytes(jinja).decode(errors="replace")
    for file, names in ((path, special), (beside, template)):
        if re.search(r"[\ud800-\udfff]", json.dumps(names, ensure_ascii=False)):
            raise UserError(f"{file}: a special token or the chat_template is not UTF-8")
    eot = end_of_text(path, config, special)
    return Vocabulary(ranks, special, eot, digits, merges, template)


def splits_digits(content: TokenizerFile) -> bool | None:
    """Whether a tokenizer.json makes every digit a token; None if it does not otherwise
    split text as GPT-2 does."""
    split = content.pre_tokenizer
    parts = split.pretokenizers or (split,)
    digits = [part for part in parts if part.type == "Digits"]
    rest = [part for part in parts if part.type != "Digits"]
    like_gpt2 = (
        [part.type for part in rest] == ["ByteLevel"]
        and rest[0] is parts[-1]
        and rest[0].use_regex
        and not rest[0].add_prefix_space
        and all(part.individual_digits for part in digits)
        and not content.normalizer
        and all(token.special for token in content.added_tokens or ())
    )
    return bool(digits) if like_gpt2 else None


def pairs_of(merges: Iterable[str | tuple[str, str]]) -> Iterator[Sequence[str]]:
    return (pair.split(" ") if isinstance(pair, str) else pair for pair in merges)


def check_ids(path: Path, ranks: dict[bytes, int], special: dict[str, int]) -> None:
    """Raises UserError unless every byte is a token, and every token has an id of its own, which
    shards can hold."""
    ids = [*ranks.values(), *special.values()]
    if max(ids, default=0) >= MAX_VOCAB_SIZE:
        raise UserError(
            f"{path} has ids beyond {MAX_VOCAB_SIZE:,}, which shards of uint16 cannot hold"
        )
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{path}: its vocabulary lacks the byte {missing[0]:#04x}")
    if twice := [id for id, following in pairwise(sorted(ids)) if id == following]:
        raise UserError(f"{path}: the id {twice[0]} belongs to more than one token")
    if unused := set(range(max(ids))) - set(ids):  # a model might draw one
        raise UserError(f"{path}: no token has the id {min(unused)}")


def check_merges(
    path: Path, ranks: dict[bytes, int], merges: Sequence[tuple[bytes, bytes]]
) -> None:
    """Raises UserError unless the merges, each of earlier tokens, make all longer tokens in the
    order of their ids, which is how tiktoken ranks them."""
    learned = [token for token in ranks if len(token) != 1]
    if learned != list(dict.fromkeys(a + b for a, b in merges)):
        raise UserError(f"{path}: its ids must be in the order of merges")
    for a, b in merges:
        for part in (a, b):
            if len(part) != 1 and ranks.get(part, MAX_VOCAB_SIZE) >= ranks[a + b]:
                name = repr(spell(part)[:40])
                raise UserError(f"{path}: a merge uses {name}, which is not an earlier token")


def end_of_text(path: Path, config: ConfigFile, special: dict[str, int]) -> str:
    """The special token that ends a document. Raises UserError if it cannot be told."""
    eos = config.eos_token
    eos = eos.content if isinstance(eos, TokenName) else eos
    if eos in special:
        return eos
    for name in (END_OF_TEXT, *special):
        if name in special and (name == END_OF_TEXT or len(special) == 1):
            return name
    names = ", ".join(special) or "none"
    raise UserError(
        f"{path} does not say which special token ends a text: it has {names[:100]}, "
        "but no eos_token"
    )


# --- writing


def write_vocabulary(folder: Path, vocabulary: Vocabulary) -> None:
    """Write both files into an existing folder."""
    special = vocabulary.special
    vocab = {spell(token): rank for token, rank in vocabulary.ranks.items()}
    vocab |= {name: number for name, number in special.items() if name not in vocab}
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    one_digit = {"type": "Digits", "individual_digits": True}
    both = {"type": "Sequence", "pretokenizers": [one_digit, byte_level]}
    no_flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": name, **no_flags, "special": True}
            for name, number in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": both if vocabulary.digits else byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [[spell(a), spell(b)] for a, b in vocabulary.merges],
        },
    }
    eot = vocabulary.eot
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eot,
        "eos_token": eot,
        "unk_token": eot,  # as in GPT-2's own; never used, but CTranslate2 wants one
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text never encodes to one, as here
    }
    if vocabulary.chat_template:  # in transformers it renders eos_token after answers as text
        config |= {"chat_template": vocabulary.chat_template, "split_special_tokens": False}
    for name, value in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        text = json.dumps(value, ensure_ascii=False, indent=1)
        (folder / name).write_text(text + "\n", encoding="utf-8")


# --- spelling


def byte_to_char() -> dict[int, str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {byte: chr(byte) for byte in printable}
    return chars | {byte: chr(256 + place) for place, byte in enumerate(others)}


BYTE_TO_CHAR = byte_to_char()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def spell(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def unspell(word: str) -> bytes:
    """Raises KeyError for a character that spells no byte."""
    return bytes(CHAR_TO_BYTE[char] for char in word)
