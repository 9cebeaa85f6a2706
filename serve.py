"""
A page on this machine to talk to a model, and to see what it considered at each token.

    pip install -r requirements-serve.txt
    python serve.py                                  # http://127.0.0.1:8000, Ctrl-C ends
    python serve.py --checkpoint=out/instruct --port=8080 --temperature=0.5

The page (page.html) asks with POST /answer and JSON, {"messages": [{"role": …, "content": …}, …]},
or {"text": …} to continue, and reads a line of JSON for each token. Other programs are better off
with `transformers serve` (README).
"""

import asyncio
import json
import socket
import sys
import typing
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import configurator
import generation
import runtime
import templates
from model import GPT
from tokenizer import Tokenizer

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, JSONResponse, StreamingResponse
    from starlette.routing import Route
except ModuleNotFoundError as error:
    print(f"error: no {error.name} here: pip install -r requirements-serve.txt", file=sys.stderr)
    sys.exit(2)

PAGE = Path(__file__).with_name("page.html")
ALTERNATIVES = 10  # of each token that are shown
MAX_BODY = 1 << 16  # bytes of a request
MAX_CONNECTIONS = 64
LOOPBACK = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Sampling:
    """What a request may set."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None


@dataclass(frozen=True)
class ServeConfig:
    checkpoint: str = "out/stdlib"  # a run folder (its newest step), a step, gpt2, hf:OWNER/NAME
    host: str = "127.0.0.1"  # this machine only; 0.0.0.0: whoever reaches it, without a password
    port: int = 8000  # 0: one that is free
    max_requests: int = 2  # answers at the same time; who comes then is told to wait
    max_new_tokens: int = 200  # tokens of an answer at most
    temperature: float = 0.8  # where a request does not say: as in sample.py
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float | None = 0.95  # … from the likeliest that together have this probability
    min_p: float | None = None  # … from those at least this times as likely as the likeliest
    seed: int | None = None  # the same for all answers; None: each its own
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: runtime.DType = "auto"  # of the weights; auto: bfloat16 where the hardware has it


def serve(cfg: ServeConfig) -> None:
    """Answer requests until Ctrl-C or SIGTERM.

    Raises ValueError for settings out of range or a checkpoint that cannot be opened, OSError where
    the port is taken.
    """
    sampling = Sampling(**{field.name: getattr(cfg, field.name) for field in fields(Sampling)})
    problems = out_of_range(sampling)
    if cfg.max_requests < 1:
        problems.append(f"max_requests must be at least 1, not {cfg.max_requests}")
    if not 0 <= cfg.port < 2**16:
        problems.append(f"port must be from 0 to 65535, not {cfg.port}")
    if problems:
        raise ValueError("; ".join(problems))
    model, tokenizer = generation.open_model(cfg.checkpoint, runtime.start(cfg.device, cfg.dtype))
    try:
        listening = socket.create_server((cfg.host, cfg.port))
    except OSError as error:
        raise OSError(f"cannot listen on {cfg.host}:{cfg.port} ({error.strerror})") from None
    hosts = list(LOOPBACK) if cfg.host in LOOPBACK else ["*"]
    app = build_app(model, tokenizer, sampling, cfg.max_requests, cfg.checkpoint, hosts)
    settings = uvicorn.Config(
        app, log_level="warning", timeout_graceful_shutdown=1, limit_concurrency=MAX_CONNECTIONS
    )
    print(f"http://{cfg.host}:{listening.getsockname()[1]}  (Ctrl-C ends)")
    try:
        uvicorn.Server(settings).run(sockets=[listening])
    except KeyboardInterrupt:
        print("ended")


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
        """Ids to go on from, and how many messages, or tokens of a text, did not fit."""
        if chat:
            messages = templates.messages_of(asked)
            room = block_size - min(max_new_tokens, block_size // 2)
            ids, kept = generation.prompt_ids(messages, tokenizer, room)
            return ids, len(messages) - len(kept)
        ids = tokenizer.encode(templates.field(asked, "text")) or [tokenizer.eot_id]
        return ids[-block_size:], max(len(ids) - block_size, 0)

    async def about(request: Request) -> JSONResponse:
        shape = {"parameters": model.num_params(), "block_size": block_size}
        kind = {"chat": chat, "remembers": tokenizer.chat_template == templates.CHAT}
        return JSONResponse({"name": name, **kind, **shape, "defaults": asdict(defaults)})

    async def answer(request: Request) -> StreamingResponse:
        asked = await read_json(request)
        if slots.locked():
            raise HTTPException(503, "busy with other answers: try again in a moment")
        await slots.acquire()
        try:
            sampling = sampling_of(asked, defaults)
            ids, forgotten = await run_in_threadpool(prompt_of, asked, sampling.max_new_tokens)
            start = {"prompt_tokens": len(ids), "forgotten": forgotten}
            return Answer(start, considered(model, tokenizer, ids, sampling), slots)
        except BaseException as error:
            slots.release()
            if isinstance(error, ValueError):
                raise HTTPException(400, str(error)) from None
            raise

    async def page(request: Request) -> FileResponse:
        return FileResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    async def failed(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code)

    return Starlette(
        routes=[
            Route("/", page),
            Route("/model", about),
            Route("/answer", answer, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={HTTPException: failed},
    )


POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'"
)


class Answer(StreamingResponse):
    """Lines of JSON, computed one by one while the visitor is there; gives its slot back."""

    def __init__(
        self, start: dict[str, int], tokens: Iterator[dict[str, Any]], slots: asyncio.Semaphore
    ) -> None:
        self.slots = slots
        super().__init__(self.lines(start, tokens), media_type="application/x-ndjson")

    async def lines(self, start: dict[str, int], tokens: Iterator[dict[str, Any]]) -> Any:
        yield json.dumps(start) + "\n"
        while token := await run_in_threadpool(next, tokens, None):
            yield json.dumps(token) + "\n"

    async def __call__(self, *arguments: Any) -> None:
        try:
            await super().__call__(*arguments)
        finally:
            self.slots.release()


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
                raise HTTPException(413, f"a request may have {MAX_BODY:,} bytes")
        asked = json.loads(body)
    except ClientDisconnect:
        raise HTTPException(400, "the request was cut off") from None
    except (ValueError, RecursionError):
        raise HTTPException(400, "the request is no JSON") from None
    if not isinstance(asked, dict):
        raise HTTPException(400, "the request is no JSON object")
    return asked


def sampling_of(asked: dict[str, Any], defaults: Sampling) -> Sampling:
    """The settings of a request. Raises ValueError for unknown names, wrong types, and values out
    of range."""
    hints, given, problems = typing.get_type_hints(Sampling), {}, []
    for name in asked.keys() - {"messages", "text"}:
        if name not in hints:
            problems.append(configurator.unknown(name, hints))
            continue
        given[name] = configurator.check(asked[name], hints[name])
        if given[name] is configurator.INVALID:
            wanted = configurator.describe(hints[name])
            raise ValueError(f"{name} expects {wanted}, not {asked[name]!r}")
    sampling = replace(defaults, **given)
    problems += out_of_range(sampling)
    if sampling.max_new_tokens > defaults.max_new_tokens:
        problems.append(f"max_new_tokens may be {defaults.max_new_tokens:,}")
    if problems:
        raise ValueError("; ".join(problems))
    return sampling


def out_of_range(sampling: Sampling) -> list[str]:
    values = asdict(sampling)
    seed = values.pop("seed")
    wrong = seed is not None and not 0 <= seed < 2**63
    problems = [f"seed must be from 0 to 2**63 - 1, not {seed}"] if wrong else []
    return problems + generation.out_of_range(**values)


def considered(
    model: GPT, tokenizer: Tokenizer, ids: list[int], sampling: Sampling
) -> Iterator[dict[str, Any]]:
    """Of each token drawn after `ids`: the text that it completes, itself, its probability, and the
    likeliest ones in its place. The last has an "end": "stop" if that token ended the text, which
    adds none, or "length".

    Probabilities are the model's own, before temperature and filters.
    """
    device = model.lm_head.weight.device
    generator = torch.Generator(device)
    generator.seed() if sampling.seed is None else generator.manual_seed(sampling.seed)
    logits: deque[Tensor] = deque(maxlen=1)  # that the latest token was drawn from
    settings = {name: value for name, value in asdict(sampling).items() if name != "seed"}
    drawn = model.generate(
        torch.tensor([ids], device=device),
        **settings,
        stop_id=tokenizer.eot_id,
        vocab_size=tokenizer.vocab_size,
        generator=generator,
        watch=logits.append,
    )
    current: dict[str, Any] = {}

    def until_the_end() -> Iterator[int]:
        for token in map(int, drawn):
            probabilities = logits[0][0].softmax(dim=-1)
            top = probabilities.topk(min(ALTERNATIVES, len(probabilities)))
            current["token"] = tokenizer.decode([token])
            current["probability"] = round(probabilities[token].item(), 6)
            current["alternatives"] = [
                [tokenizer.decode([other]), round(probability, 6)]
                for probability, other in zip(top.values.tolist(), top.indices.tolist())
            ]
            if token == tokenizer.eot_id:
                current["end"] = "stop"
                return
            yield token
        current.clear()
        current["end"] = "length"

    for piece in tokenizer.decode_stream(until_the_end()):
        yield {"text": piece, **current}


def main(argv: list[str] | None = None) -> int:
    return configurator.command(ServeConfig, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
