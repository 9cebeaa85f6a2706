"""
A local page to talk to a model, and to see what it considered and looked at for each token.

    pip install -r requirements-serve.txt
    python -m tools.serve                                  # http://127.0.0.1:8000, Ctrl-C ends
    python -m tools.serve --checkpoint=out/instruct --port=8080 --temperature=0.5

For other programs there is `transformers serve` (docs/elsewhere.md).
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # for python tools/serve.py

import configurator
from configurator import DType, NonEmpty, PathName, PositiveInt, Range, UserError
from plaingpt import environment
from plaingpt.sampling import Sampling

Port = Annotated[int, Range("from 0 to 65535", lambda value: 0 <= value < 2**16)]


@dataclass(frozen=True)
class ServeConfig(Sampling):
    checkpoint: PathName = "out/stdlib"  # a run (last step), RUN/best, a step, gpt2, hf:OWNER/NAME
    host: NonEmpty = "127.0.0.1"  # this machine; 0.0.0.0: open to the network, without password
    port: Port = 8000  # 0: any free port
    max_requests: PositiveInt = 8  # answers written side by side; others get status 503
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: DType = "auto"  # of the weights; auto: 16 bits where they are faster
    quantize: Literal["int8"] | None = None  # weights in 8 bits, on a CPU


if __name__ == "__main__":
    configurator.answer_help(ServeConfig)  # before torch is imported, which takes a second
    environment.wait_briefly()
    environment.use_huge_pages()

import os
import socket

from plaingpt import packing, runtime
from plaingpt.checkpoint import store
from plaingpt.generation import cache_sentence

LOOPBACK = ("127.0.0.1", "localhost")
MAX_CONNECTIONS = 64


def serve(cfg: ServeConfig) -> None:
    """Answer requests until Ctrl-C.

    Raises UserError for settings out of range, a checkpoint that cannot be opened and packages
    that are not installed, OSError if the port is taken.
    """
    try:
        import uvicorn

        from tools import openers, page
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed: pip install -r requirements-serve.txt"
        ) from None
    configurator.validate(cfg)
    rt = runtime.start(cfg.device, cfg.dtype)
    model, tokenizer = store.load(cfg.checkpoint)
    packing.place(model, rt, cfg.dtype, cfg.quantize)
    try:
        listening = socket.create_server((cfg.host, cfg.port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        problem = f"cannot listen on {cfg.host}:{cfg.port} ({reason})"
        raise OSError(f"{problem}: try another --port or --host") from None
    print(cache_sentence(model, cfg.max_requests, model.config.block_size), file=sys.stderr)
    hosts = ["*"] if cfg.host == "0.0.0.0" else [*LOOPBACK, cfg.host.lower()]
    examples = openers.examples(cfg.checkpoint, tokenizer)
    served = page.Served(model, tokenizer, cfg.checkpoint, examples)
    app = page.build_app(served, cfg, cfg.max_requests, hosts)
    settings = uvicorn.Config(app, log_level="warning", limit_concurrency=MAX_CONNECTIONS)
    server = uvicorn.Server(settings)
    app.state.stopping = lambda: server.should_exit  # ends the answers in progress
    try:
        print(f"http://{cfg.host}:{listening.getsockname()[1]}  (Ctrl-C ends)")
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        print("ended")


def main(argv: list[str] | None = None) -> int:
    return configurator.command(ServeConfig, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
