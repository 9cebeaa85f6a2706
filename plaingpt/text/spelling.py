"""Ids to text, one by one: characters come out whole, and a stop string ends the text before it."""

import codecs

from plaingpt.text.tokenizer import Tokenizer


class Speller:
    """Spells one text. A character may take several tokens, and so may a stop string."""

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), silent: frozenset[int] = frozenset()
    ) -> None:
        """Tokens that are `silent`, and <|endoftext|>, have no text."""
        self.tokenizer, self.stop = tokenizer, stop
        self.silent = silent | {tokenizer.eot_id}
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""  # text that may turn out to be the beginning of a stop string
        self.stopped = False  # by a stop string

    def text(self, token: int, final: bool = False) -> str:
        """The text that `token` completes: "" within a character, and after a stop string.

        With the `final` token comes what was held back; an incomplete character becomes U+FFFD.
        """
        silent = token in self.silent
        content = b"" if silent else self.tokenizer.encoding.decode_single_token_bytes(token)
        text = self.held + self.decoder.decode(content, final)
        ends = [at for at in (text.find(each) for each in self.stop) if at >= 0]
        if self.stopped or ends:
            self.stopped = True
            self.held = ""
            return text[: min(ends)] if ends else ""
        kept = 0 if final else max((beginning(each, text) for each in self.stop), default=0)
        self.held = text[len(text) - kept :]
        return text[: len(text) - kept]


def beginning(stop: str, text: str) -> int:
    """How many characters at the end of `text` could be the first ones of `stop`."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)
