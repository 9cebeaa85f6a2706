"""The one thread that runs the model of the page: it writes the answers of all visitors side by
side, and computes whatever else they ask for between two tokens."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from model import GPT
from plaingpt.generation import Batch, Text
from plaingpt.text.tokenizer import Tokenizer
from tools import insight

Result = TypeVar("Result")
Turn = asyncio.Future[dict[Text, list[dict[str, Any]]]]  # the next tokens of each text, described


class Writer:
    """Only `take_turn` runs in the thread; everything else belongs to the event loop, so that no
    text comes or goes while tokens are drawn."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, size: int) -> None:
        """For at most `size` texts at a time. Raises UserError if they would not fit the memory."""
        self.tokenizer = tokenizer
        self.batch = Batch(model, tokenizer, size, alternatives=insight.ALTERNATIVES)
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.turns: dict[Text, asyncio.Queue[Turn]] = {}  # of the texts that are being written
        self.driver: asyncio.Task[None] | None = None

    def run(self, function: Callable[..., Result], *arguments: Any) -> asyncio.Future[Result]:
        """Call a function in the thread, after what it does now."""
        return asyncio.get_running_loop().run_in_executor(self.thread, function, *arguments)

    @contextlib.contextmanager
    def writing(self, text: Text) -> Iterator[AsyncIterator[dict[str, Any]]]:
        """Write a text until it ends or the context is left. Gives its tokens, as
        `insight.newest` describes them; what goes wrong in the thread is raised by all of the texts
        that are being written."""
        turns: asyncio.Queue[Turn] = asyncio.Queue()

        async def tokens() -> AsyncIterator[dict[str, Any]]:
            token: dict[str, Any] = {}
            while "end" not in token:
                for token in (await turns.get()).result()[text]:
                    yield token

        self.turns[text] = turns
        if self.driver is None or self.driver.done():
            self.driver = asyncio.create_task(self.drive())
        try:
            yield tokens()
        finally:
            self.turns.pop(text, None)

    async def drive(self) -> None:
        """Take turns until no text is left."""
        while texts := list(self.turns):
            turn = self.run(self.take_turn, texts)
            await asyncio.wait([turn])
            if turn.exception():
                self.batch.clear()
            for text in texts:
                if text in self.turns:
                    self.turns[text].put_nowait(turn)
                    if turn.exception() or text.ended:
                        del self.turns[text]

    def take_turn(self, texts: list[Text]) -> dict[Text, list[dict[str, Any]]]:
        """Draw the next tokens of each text, whether or not the batch has it yet."""
        batch = self.batch
        for text in [each for each in batch.texts if each not in texts]:
            batch.remove(text)
        for text in texts:
            if text not in batch.texts:
                batch.add(text)
        drawn = batch.step().items()
        return {text: insight.newest(text, tokens, self.tokenizer) for text, tokens in drawn}
