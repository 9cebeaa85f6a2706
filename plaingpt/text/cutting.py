"""
Where a text may be cut: at borders, where a cut never changes its ids, and within very long runs.

Long texts are read, sampled and encoded in pieces. Ordinary text has a border every few characters.
A million blanks, equal letters or zeros have none: they are a single word, for which BPE takes
minutes or fails. So a run of more than LONGEST_RUN characters between two borders is cut at every
multiple of LONGEST_RUN, both in training and in encoding: the ids depend on the text alone.
"""

import re
from collections.abc import Iterable, Iterator

BLOCK = 1 << 20  # bytes per read, and roughly the characters of a piece
LONGEST_RUN = 4096  # characters
# GPT-2's pattern, with or without single digits, ends a token before white space that follows
# something else, between letters or digits and punctuation, and between ASCII letters and digits.
# Punctuation: ASCII, general (‐ … ‧), Arabic, Devanagari, East Asian, fullwidth; and U+200B.
BORDER = re.compile(
    r"(?<=\S)(?=[ \t\r\n\u3000])"
    r"|(?<=[^\W_])(?=[!-/:-@\[-`{-~\u200b\u2010-\u2027\u060c\u061f\u06d4\u0964\u0965"
    r"\u3001-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff20])"
    r"|(?<=[0-9])(?=[A-Za-z])|(?<=[A-Za-z])(?=[0-9])"
)


def in_pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Regroup a text that comes in blocks into pieces of about BLOCK characters, the last one
    shorter. Joined, the ids of the pieces are those of the whole text."""
    rest = ""
    for block in blocks:
        rest += block
        if len(rest) >= BLOCK and (cut := last_cut(rest)):
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def blocks_of(text: str) -> Iterator[str]:
    """A text in blocks of BLOCK characters, cut anywhere."""
    return (text[at : at + BLOCK] for at in range(0, len(text), BLOCK))


def last_cut(text: str) -> int:
    """The last place in a text where it may be cut, whatever follows it; 0 without one."""
    start = 0
    for length in (100, LONGEST_RUN, len(text)):
        for border in BORDER.finditer(text, max(1, len(text) - length)):
            start = border.start()
        if start:
            break
    return start + (len(text) - start) // LONGEST_RUN * LONGEST_RUN


def cut_runs(text: str) -> list[str]:
    """The text, cut within its runs of more than LONGEST_RUN characters; usually one piece."""
    pieces, done, start = [], 0, 0  # one run, or several short ones, begin at `start`
    half = LONGEST_RUN // 2
    while len(text) - start > LONGEST_RUN:
        stop = start + LONGEST_RUN
        if border := BORDER.search(text, start + half + 1, stop + 1):
            start = border.start()
            continue
        borders = [border.start() for border in BORDER.finditer(text, start + 1, start + half + 1)]
        if borders:
            start = borders[-1]
            continue
        border = BORDER.search(text, stop + 1)
        end = border.start() if border else len(text)
        for cut in range(stop, end, LONGEST_RUN):
            pieces.append(text[done:cut])
            done = cut
        start = end
    return [*pieces, text[done:]]
