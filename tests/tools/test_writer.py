"""The thread that writes for all visitors, without a server."""

import asyncio
from contextlib import ExitStack

from test_model import tiny

from plaingpt.generation import Batch, Text
from plaingpt.sampling import Sampling
from plaingpt.text.tokenizer import Tokenizer
from tools.writer import Writer

BYTES = Tokenizer.bytes()


def text(seed: int) -> Text:
    return Text([seed, 2, 3], Sampling(max_new_tokens=5, seed=seed), BYTES)


def written(writer: Writer, *texts: Text) -> list:
    """The ids of each of `texts`, which begin in the same step, or what went wrong."""

    async def ids(tokens) -> list[int]:
        return [token["id"] async for token in tokens]

    async def all_of_them() -> list:
        with ExitStack() as stack:
            begun = [ids(stack.enter_context(writer.writing(each))) for each in texts]
            return await asyncio.gather(*begun, return_exceptions=True)

    return asyncio.run(all_of_them())


def test_a_prompt_that_cannot_be_read_ends_all_and_leaves_nothing_behind(monkeypatch):
    writer = Writer(tiny(vocab_size=257), BYTES, 3)
    [expected] = written(writer, text(1))
    really = Batch.read

    def fails(self, row, ids):
        really(self, row, ids)
        if ids[0] == 3:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Batch, "read", fails)
        assert [type(each) for each in written(writer, text(2), text(3))] == [MemoryError] * 2
    assert written(writer, text(1), text(2))[0] == expected
    assert writer.turns == {}


def test_a_text_that_left_makes_room_for_another():
    writer = Writer(tiny(vocab_size=257), BYTES, 1)

    async def leave() -> None:
        with writer.writing(text(1)) as tokens:
            await anext(tokens)

    asyncio.run(leave())
    [after] = written(writer, text(2))
    assert len(after) == 5
