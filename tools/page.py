"""
What a browser gets from serve.py: page.html, and the answers that it asks for.

POST /answer with JSON, {"messages": [{"role": …, "content": …}, …]}, or {"text": …} to continue,
and settings of `Sampling`. The answer is a line of JSON for each token, behind one that says how
long the prompt is, and how much of what was asked did not fit: messages, or tokens of a text.
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

import torch
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
from model import GPT
from plaingpt import generation
from plaingpt.sampling import Sampling
from plaingpt.text import templates
from plaingpt.text.tokenizer import Tokenizer

PAGE = Path(__file__).with_name("page.html")
SETTINGS = [field.name for field in fields(Sampling)]  # that a request may give
ALTERNATIVES = 10  # of each token that are shown
MAX_BODY = 1 << 16  # bytes of a request
MAX_SECONDS = 600  # of an answer, also for those who do not read it
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
    """The pages of a server; only requests for `hosts` are answered, as a name that someone else
    has pointed here is how a foreign page would get in."""
    slots = asyncio.Semaphore(max_requests)
    chat = generation.holds_conversations(tokenizer)
    block_size = model.config.block_size

    def prompt_of(asked: dict[str, Any], max_new_tokens: int) -> tuple[list[int], int]:
        """The ids to go on from, and how many messages, or tokens of a text, are left out."""
        if chat:
            messages = templates.messages_of(asked)
            ids, kept = generation.prompt_ids(messages, tokenizer, block_size, max_new_tokens)
            return ids, len(messages) - len(kept)
        ids = tokenizer.encode(templates.field(asked, "text")) or [tokenizer.eot_id]
        return ids[-block_size:], max(len(ids) - block_size, 0)

    settings = {name: getattr(defaults, name) for name in SETTINGS}

    async def about(request: Request) -> JSONResponse:
        shape = {"parameters": model.num_params(), "block_size": block_size}
        kind = {"chat": chat, "remembers": tokenizer.chat_template == templates.CHAT}
        return JSONResponse({"name": name, **kind, **shape, "defaults": settings})

    async def answer(request: Request) -> Callable[..., Awaitable[None]]:
        asked = await read_json(request)
        if slots.locked():  # maybe by an answer whose end has just been sent
            await asyncio.sleep(0.1)
        if slots.locked():
            raise HTTPException(503, "busy with other answers: try again in a moment")
        await slots.acquire()
        try:
            sampling = sampling_of(asked, defaults)
            ids, forgotten = await run_in_threadpool(prompt_of, asked, sampling.max_new_tokens)
        except BaseException as error:
            slots.release()
            if isinstance(error, ValueError):
                raise HTTPException(400, str(error)) from None
            raise
        first = {"prompt_tokens": len(ids), "forgotten": forgotten}
        tokens = considered(model, tokenizer, ids, sampling)
        lines = json_lines(first, tokens, request.app.state.stopping)
        response = StreamingResponse(lines, media_type="application/x-ndjson")

        async def respond(*arguments: Any) -> None:
            """Ends, and so stops drawing, when the visitor leaves."""
            try:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(response(*arguments), MAX_SECONDS)
            finally:
                slots.release()

        return respond

    async def page(request: Request) -> FileResponse:
        return FileResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    async def failed(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code)

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/model", about),
            Route("/answer", answer, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={HTTPException: failed},
    )
    app.state.stopping = lambda: False  # who runs it knows better
    return app


async def json_lines(
    first: dict[str, int], tokens: Iterator[dict[str, Any]], stopping: Callable[[], bool]
) -> AsyncIterator[str]:
    yield json.dumps(first) + "\n"
    while not stopping() and (token := await run_in_threadpool(next, tokens, None)):
        yield json.dumps(token) + "\n"


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON of a request. Raises HTTPException for what is none, or too large."""
    # A page of another site can send a form here, but not JSON.
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "Content-Type has to be application/json")
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise HTTPException(413, f"a request may have {MAX_BODY:,} bytes at most")
        asked = json.loads(body)
    except ClientDisconnect:
        raise HTTPException(400, "the request was cut off") from None
    except (ValueError, RecursionError):
        raise HTTPException(400, "the request is no JSON") from None
    if not isinstance(asked, dict):
        raise HTTPException(400, "the request is no JSON object")
    return asked


def sampling_of(asked: dict[str, Any], defaults: Sampling) -> Sampling:
    """The settings of a request. Raises UserError that lists unknown names, wrong types, and
    values out of range."""
    given, problems = {}, []
    hints = typing.get_type_hints(Sampling)
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
        problems.append(f"max_new_tokens may be {defaults.max_new_tokens:,} at most")
    configurator.validate(sampling, problems)
    return sampling


def considered(
    model: GPT, tokenizer: Tokenizer, ids: list[int], sampling: Sampling
) -> Iterator[dict[str, Any]]:
    """Of each token drawn after `ids`: the text that it completes, its id, its own text, its
    probability, and id, text and probability of the likeliest ones in its place. The last has an
    "end": "stop" if it is the one that ends a text, or "length".

    Probabilities are the model's own, before temperature and filters.
    """
    pick = generation.picker(sampling, tokenizer, model.lm_head.weight.device)
    logits = torch.empty(0)

    def watched(given: Tensor) -> Tensor:
        nonlocal logits
        logits = given[:, : tokenizer.vocab_size]
        return pick(given)

    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    drawn = generation.continuations(model, tokenizer, ids, sampling.max_new_tokens, watched)
    for number, token in enumerate(map(int, drawn), start=1):
        probabilities = logits[0].softmax(dim=-1)
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
