"""
What tools.serve sends to a browser: page.html, and what the page asks for as JSON.

GET /model describes the model. POST /answer takes {"messages": [{"role": …, "content": …}, …]} for
a model that holds conversations, {"text": …} for one that continues texts, or for any model
{"ids": […]}, a context that a "text" may extend; and any settings of `Sampling`. The reply is JSON
lines: first the "prompt" as [id, text] of each token, how much of it the model cannot see
("forgotten" messages, or tokens of a text) and the "seed", then one line per token.

POST /score takes {"ids": […]} and returns {"tokens": […]}: the probability of each, and its
alternatives. POST /attention takes the same and returns the {"weights": …} of the last token by
layer, head and token. Errors are {"error": …}, as the last line if an answer has begun.
"""

import asyncio
import contextlib
import json
import random
import typing
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import configurator
from configurator import UserError
from model import GPT
from plaingpt import generation, values
from plaingpt.advice import unknown
from plaingpt.generation import Text
from plaingpt.sampling import Sampling
from plaingpt.text import templates
from plaingpt.text.spelling import Speller
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.wording import quantity
from tools import insight
from tools.writer import Writer

PAGE = Path(__file__).with_name("page.html")
MAX_BODY = 1 << 16  # bytes of a request
MAX_SECONDS = 600  # of an answer, even if nobody reads it
PATIENCE = 0.25  # seconds to wait for an earlier answer: perhaps its visitor has just left
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class Served:
    """The model that the page serves."""

    model: GPT
    tokenizer: Tokenizer
    name: str
    examples: list[str]  # prompts to start with


def build_app(served: Served, defaults: Sampling, max_requests: int, hosts: list[str]) -> Starlette:
    """The application: it answers `max_requests` requests at a time, addressed to one of the
    `hosts`."""
    model, tokenizer = served.model, served.tokenizer
    block_size = model.config.block_size
    writer = Writer(model, tokenizer, max_requests)
    slots = asyncio.Semaphore(max_requests)
    about = description(served, defaults)

    async def describe(request: Request) -> JSONResponse:
        return JSONResponse(about)

    async def answer(request: Request) -> Callable[..., Awaitable[None]]:
        asked = await read_json(request)
        sampling = sampling_of(asked, defaults)

        async def respond(*arguments: Any) -> None:
            """Send the answer; a visitor who leaves cancels it, which ends the writing."""
            async with slot(slots):
                count = sampling.max_new_tokens
                ids, forgotten = await run_in_threadpool(
                    prompt_of, asked, tokenizer, block_size, count
                )
                text, speller = Text(ids, sampling, tokenizer), Speller(tokenizer)
                prompt = [[token, speller.text(token)] for token in ids]
                text.speller.decoder = speller.decoder  # a character may begin in the prompt
                first = {"prompt": prompt, "forgotten": forgotten, "seed": sampling.seed}
                with writer.writing(text) as tokens, contextlib.suppress(asyncio.TimeoutError):
                    lines = json_lines(first, tokens, request.app.state.stopping)
                    response = StreamingResponse(lines, media_type="application/x-ndjson")
                    await asyncio.wait_for(response(*arguments), MAX_SECONDS)

        return respond

    async def score(request: Request) -> JSONResponse:
        ids = window_of(await read_json(request), tokenizer, block_size)
        async with slot(slots):
            tokens = await writer.run(insight.scored, model, tokenizer, ids)
        return JSONResponse({"tokens": tokens})

    async def attention(request: Request) -> JSONResponse:
        ids = window_of(await read_json(request), tokenizer, block_size)
        async with slot(slots):
            weights = await writer.run(insight.attention, model, ids)
        rows = [[[round(w, 5) for w in head] for head in layer] for layer in weights.tolist()]
        return JSONResponse({"weights": rows})

    app = Starlette(
        routes=[
            Route("/", send_page),
            Route("/model", describe),
            Route("/answer", answer, methods=["POST"]),
            Route("/score", score, methods=["POST"]),
            Route("/attention", attention, methods=["POST"]),
        ],
        middleware=[Middleware(OwnPage, hosts=hosts, version=about["version"])],
        exception_handlers={HTTPException: send_error, UserError: send_error},
    )
    app.state.stopping = lambda: False  # whoever runs the server replaces it
    return app


@contextlib.asynccontextmanager
async def slot(slots: asyncio.Semaphore) -> AsyncIterator[None]:
    """Take one of the `slots` for a while. Raises HTTPException if none becomes free."""
    try:
        await asyncio.wait_for(slots.acquire(), PATIENCE)
    except asyncio.TimeoutError:
        raise HTTPException(503, "busy with other answers: try again in a moment") from None
    try:
        yield
    finally:
        slots.release()


def description(served: Served, defaults: Sampling) -> dict[str, Any]:
    tokenizer = served.tokenizer
    with torch.device("meta"):  # compiled blocks have no parameters
        parameters = GPT(served.model.config).num_params()
    about = {
        "name": served.name,
        "chat": generation.holds_conversations(tokenizer),
        "remembers": tokenizer.chat_template == templates.CHAT,
        "parameters": parameters,
        "block_size": served.model.config.block_size,
        "tokenizer": tokenizer.fingerprint,
        "eot_id": tokenizer.eot_id,
        "examples": served.examples,
        "defaults": {each.name: getattr(defaults, each.name) for each in fields(Sampling)},
    }
    return about | {"version": f"{zlib.crc32(json.dumps(about).encode()):08x}"}


class OwnPage:
    """Middleware that answers only the server's own page, and only for the model that it shows.

    A page of another site could ask directly, which its Origin header reveals, or point a name of
    its own at this machine, which the Host header reveals. A page that is still open from another
    model, to which the same ids mean another text, names its version.
    """

    def __init__(self, app: ASGIApp, hosts: list[str], version: str) -> None:
        self.app, self.hosts, self.version = app, hosts, version

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self.app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = headers.get("host", "").lower(), headers.get("origin")
            if "*" not in self.hosts and host.partition(":")[0] not in self.hosts:
                app = JSONResponse({"error": f"{host!r} is not a name of this server"}, 400)
            elif origin is not None and origin.partition("://")[2] != host:
                app = JSONResponse({"error": "requests from other sites are refused"}, 403)
            elif headers.get("page-version", self.version) != self.version:
                error = "the server now has another model or other settings: reload the page"
                app = JSONResponse({"error": error}, 409)
        await app(scope, receive, send)


async def send_page(request: Request) -> FileResponse:
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
    return FileResponse(PAGE, headers=headers)


async def send_error(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return JSONResponse({"error": str(error)}, 400)


async def json_lines(
    first: dict[str, Any], tokens: AsyncIterator[dict[str, Any]], stopping: Callable[[], bool]
) -> AsyncIterator[str]:
    yield json.dumps(first) + "\n"
    try:
        while not stopping() and (token := await anext(tokens, None)):
            yield json.dumps(token) + "\n"
    except UserError as error:  # too late for another status
        yield json.dumps({"error": str(error)}) + "\n"


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
    """The settings of a request, on top of `defaults`; without a seed a random one, so that the
    answer can be repeated.

    Raises a UserError that lists unknown names, wrong types, and values out of range.
    """
    hints, given, problems = typing.get_type_hints(Sampling), {}, []
    for name in sorted(asked.keys() - {"messages", "text", "ids"}):
        if name not in hints:
            problems.append(unknown(name, hints))
            continue
        value = values.check(asked[name], hints[name])
        if value is values.INVALID:
            problems.append(values.misfit(name, asked[name], hints[name]))
        else:
            given[name] = value
    sampling = replace(defaults, **given)
    if sampling.max_new_tokens > defaults.max_new_tokens:
        problems.append(f"max_new_tokens must be at most {defaults.max_new_tokens:,}")
    configurator.validate(sampling, problems)
    seed = random.getrandbits(32) if sampling.seed is None else sampling.seed
    return replace(sampling, seed=seed)


def prompt_of(
    asked: dict[str, Any], tokenizer: Tokenizer, block_size: int, max_new_tokens: int
) -> tuple[list[int], int]:
    """The ids of the prompt, and how many messages (or tokens of a text) the model does not see.

    Raises UserError for messages that are not a conversation, a text that is missing, and ids that
    are not the tokenizer's.
    """
    if "ids" not in asked and generation.holds_conversations(tokenizer):
        messages = templates.messages_of(asked)
        ids, kept = generation.prompt_ids(messages, tokenizer, block_size, max_new_tokens)
        return ids, len(messages) - len(kept)
    ids = ids_of(asked, tokenizer) if "ids" in asked else []
    if "text" in asked or "ids" not in asked:
        ids = ids + tokenizer.encode(templates.field(asked, "text"))
    ids = ids or [tokenizer.eot_id]
    return ids, max(len(ids) - block_size, 0)


def window_of(asked: dict[str, Any], tokenizer: Tokenizer, block_size: int) -> list[int]:
    """The ids of a request that has nothing else. Raises UserError if they do not fit the model."""
    problems = [unknown(name, ["ids"]) for name in sorted(asked.keys() - {"ids"})]
    if problems:
        raise UserError("; ".join(problems))
    ids = ids_of(asked, tokenizer)
    if not 1 <= len(ids) <= block_size:
        raise UserError(
            f"ids must have from 1 to {quantity(block_size, 'token')}, not {len(ids):,}"
        )
    return ids


def ids_of(asked: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """Raises UserError for anything but a list of the tokenizer's ids."""
    ids = asked.get("ids")
    if not isinstance(ids, list) or not all(type(each) is int for each in ids):
        raise UserError("ids is not a list of integers")
    known = {*tokenizer.ranks.values(), *tokenizer.special.values()}
    if strange := [each for each in ids if each not in known]:
        raise UserError(f"the tokenizer has no id {str(strange[0])[:20]}")
    return ids
