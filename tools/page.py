"""
What tools.serve sends to a browser: page.html, and the answers that the page asks for.

POST /answer takes JSON: {"messages": [{"role": …, "content": …}, …]} for a model that holds
conversations, {"text": …} for one that continues texts, and any settings of `Sampling`. The reply
is JSON lines: how long the prompt is and how much of the input did not fit (messages, or tokens of
a text), then one line per token.
"""

import asyncio
import codecs
import contextlib
import json
import typing
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.routing import Route
from torch import Tensor

import configurator
from configurator import UserError
from model import GPT
from plaingpt import generation
from plaingpt.sampling import Sampling
from plaingpt.text import templates
from plaingpt.text.tokenizer import Tokenizer

PAGE = Path(__file__).with_name("page.html")
ALTERNATIVES = 10  # shown for each token
MAX_BODY = 1 << 16  # bytes of a request
MAX_SECONDS = 600  # of an answer, even if nobody reads it
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


def build_app(
    model: GPT,
    tokenizer: Tokenizer,
    defaults: Sampling,
    max_requests: int,
    name: str,
    hosts: list[str],
) -> Starlette:
    """The application that answers `max_requests` at a time with `model`, which it calls `name`.

    It answers only requests for `hosts`: a foreign page could get in by pointing a name of its own
    at this machine.
    """
    slots = asyncio.Semaphore(max_requests)
    block_size = model.config.block_size
    description = {
        "name": name,
        "chat": generation.holds_conversations(tokenizer),
        "remembers": tokenizer.chat_template == templates.CHAT,
        "parameters": model.num_params(),
        "block_size": block_size,
        "defaults": {each.name: getattr(defaults, each.name) for each in fields(Sampling)},
    }

    async def describe(request: Request) -> JSONResponse:
        return JSONResponse(description)

    async def answer(request: Request) -> Callable[..., Awaitable[None]]:
        asked = await read_json(request)
        if slots.locked():  # perhaps by an answer that has just been sent
            await asyncio.sleep(0.1)
        if slots.locked():
            raise HTTPException(503, "busy with other answers: try again in a moment")
        await slots.acquire()
        try:
            sampling = sampling_of(asked, defaults)
            count = sampling.max_new_tokens
            prompt = await run_in_threadpool(prompt_of, asked, tokenizer, block_size, count)
        except BaseException as error:
            slots.release()
            if isinstance(error, UserError):
                raise HTTPException(400, str(error)) from None
            raise
        ids, forgotten = prompt
        first = {"prompt_tokens": len(ids), "forgotten": forgotten}
        tokens = with_alternatives(model, tokenizer, ids, sampling)
        lines = json_lines(first, tokens, request.app.state.stopping)
        response = StreamingResponse(lines, media_type="application/x-ndjson")

        async def respond(*arguments: Any) -> None:
            """Send the response; a visitor who leaves cancels it, which stops the drawing."""
            try:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(response(*arguments), MAX_SECONDS)
            finally:
                slots.release()

        return respond

    app = Starlette(
        routes=[
            Route("/", send_page),
            Route("/model", describe),
            Route("/answer", answer, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={HTTPException: send_error},
    )
    app.state.stopping = lambda: False  # whoever runs the server replaces it
    return app


async def send_page(request: Request) -> FileResponse:
    return FileResponse(PAGE, headers={"Content-Security-Policy": POLICY})


async def send_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code)


async def json_lines(
    first: dict[str, int], tokens: Iterator[dict[str, Any]], stopping: Callable[[], bool]
) -> AsyncIterator[str]:
    yield json.dumps(first) + "\n"
    while not stopping() and (token := await run_in_threadpool(next, tokens, None)):
        yield json.dumps(token) + "\n"


# --- what a request asks for


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object of a request. Raises HTTPException if it is something else, or too large."""
    # Another site's page can make a browser send a form here, but not JSON.
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "Content-Type must be application/json")
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise HTTPException(413, f"a request may have at most {MAX_BODY:,} bytes")
        asked = json.loads(body)
    except ClientDisconnect:
        raise HTTPException(400, "the request was cut off") from None
    except (ValueError, RecursionError):
        raise HTTPException(400, "the request is not JSON") from None
    if not isinstance(asked, dict):
        raise HTTPException(400, "the request is not a JSON object")
    return asked


def sampling_of(asked: dict[str, Any], defaults: Sampling) -> Sampling:
    """The settings of a request, on top of `defaults`.

    Raises a UserError that lists unknown names, wrong types, and values out of range.
    """
    hints, given, problems = typing.get_type_hints(Sampling), {}, []
    for name in sorted(asked.keys() - {"messages", "text"}):
        if name not in hints:
            problems.append(configurator.unknown(name, hints))
            continue
        value = configurator.check(asked[name], hints[name])
        if value is configurator.INVALID:
            wanted = configurator.describe(hints[name])
            problems.append(f"{name} expects {wanted}, not {str(asked[name])[:50]!r}")
        else:
            given[name] = value
    sampling = replace(defaults, **given)
    if sampling.max_new_tokens > defaults.max_new_tokens:
        problems.append(f"max_new_tokens must be at most {defaults.max_new_tokens:,}")
    configurator.validate(sampling, problems)
    return sampling


def prompt_of(
    asked: dict[str, Any], tokenizer: Tokenizer, block_size: int, max_new_tokens: int
) -> tuple[list[int], int]:
    """The ids of the prompt, and how many messages, or tokens of a text, did not fit.

    Raises UserError for messages that are not a conversation, or a text that is missing.
    """
    if generation.holds_conversations(tokenizer):
        messages = templates.messages_of(asked)
        ids, kept = generation.prompt_ids(messages, tokenizer, block_size, max_new_tokens)
        return ids, len(messages) - len(kept)
    ids = tokenizer.encode(templates.field(asked, "text")) or [tokenizer.eot_id]
    return ids[-block_size:], max(len(ids) - block_size, 0)


# --- the answer


def with_alternatives(
    model: GPT, tokenizer: Tokenizer, ids: list[int], sampling: Sampling
) -> Iterator[dict[str, Any]]:
    """Draw the tokens that follow `ids`, and yield what the page shows of each.

    That is the "text" it completes (none within a character of several bytes), its "id", its own
    text as "token", its "probability", and [id, text, probability] of the likeliest "alternatives".
    The last has an "end": "stop" if it is <|endoftext|>, "length" otherwise. Probabilities are the
    model's own, before temperature and filters.
    """
    pick = generation.picker(sampling, tokenizer, model.lm_head.weight.device)
    seen: list[Tensor] = []

    def pick_and_keep(logits: Tensor) -> Tensor:
        seen.append(logits[:, : tokenizer.vocab_size])
        return pick(logits)

    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    drawn = generation.continuations(model, tokenizer, ids, sampling.max_new_tokens, pick_and_keep)
    for number, token in enumerate(map(int, drawn), start=1):
        probabilities = seen.pop()[0].softmax(dim=-1)
        top = probabilities.topk(min(ALTERNATIVES, len(probabilities)))
        stopped = token == tokenizer.eot_id
        last = stopped or number == sampling.max_new_tokens
        content = b"" if stopped else tokenizer.encoding.decode_single_token_bytes(token)
        found = {
            "text": decoder.decode(content, final=last),
            "id": token,
            "token": tokenizer.decode([token]),
            "probability": round(probabilities[token].item(), 6),
            "alternatives": [
                [other, tokenizer.decode([other]), round(probability, 6)]
                for probability, other in zip(top.values.tolist(), top.indices.tolist())
            ],
        }
        yield found | ({"end": "stop" if stopped else "length"} if last else {})
