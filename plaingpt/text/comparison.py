"""A text as tokens: the borders and ids that tokenizers give it, and how many each needs."""

import shutil
from collections.abc import Iterator
from unicodedata import east_asian_width

from configurator import UserError
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.wording import quantity

SHOWN = 300  # tokens
MARKS = {" ": "·", "\n": "↵", "\t": "→"}  # what white space looks like


def compare(text: str, tokenizers: dict[str, Tokenizer]) -> None:
    """Print the tokens of a text between │ and their ids below, for each tokenizer by its name.

    Raises UserError for an empty text.
    """
    size = len(text.encode())
    if not size:
        raise UserError("there is no text to show as tokens")
    for number, (name, tokenizer) in enumerate(tokenizers.items()):
        ids = tokenizer.encode(text)
        counts = f"{quantity(len(ids), 'token')}, {size / len(ids):.2f} bytes per token"
        print("\n" * (number > 0) + f"{name}, {tokenizer.vocab_size:,} ids: {counts}")
        print("\n".join(lines_of(ids[:SHOWN], tokenizer)))
        if len(ids) > SHOWN:
            print(f"… and {quantity(len(ids) - SHOWN, 'more token')}")


def lines_of(ids: list[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Pairs of lines that fit the terminal: tokens, and their ids below."""
    room = shutil.get_terminal_size((100, 24)).columns
    above = below = "│"
    used = 1
    for token in ids:
        piece, number = visible(tokenizer.encoding.decode_single_token_bytes(token)), str(token)
        width = max(columns(piece), len(number))
        if used > 1 and used + width + 1 > room:
            yield from (above, below)
            above, below, used = "│", "│", 1
        above += piece + " " * (width - columns(piece)) + "│"
        below += number.rjust(width) + "│"
        used += width + 1
    yield from (above, below)


def visible(token: bytes) -> str:
    """The text of a token, with marks for white space and escapes for other bytes and for
    characters that cannot be seen."""
    text = token.decode(errors="backslashreplace")
    return "".join(
        MARKS.get(each) or (each if each.isprintable() else escape(each)) for each in text
    )


def escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def columns(text: str) -> int:
    """How many columns of a terminal a text takes: East Asian characters take two."""
    return sum(2 if east_asian_width(each) in "WF" else 1 for each in text)
