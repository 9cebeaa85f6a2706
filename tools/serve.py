"""
A page on this machine to talk to a model, and to see what it considered at each token.

    pip install -r requirements-serve.txt
    python -m tools.serve                                  # http://127.0.0.1:8000, Ctrl-C ends
    python -m tools.serve --checkpoint=out/instruct --port=8080 --temperature=0.5

For other programs there is `transformers serve` (README).
"""

import os
import socket
import sys
from dataclasses import dataclass

import configurator
from configurator import DType, PositiveInt, UserError
from plaingpt import runtime
from plaingpt.checkpoint import store
from plaingpt.sampling import Sampling

LOOPBACK = ("127.0.0.1", "localhost")
MAX_CONNECTIONS = 64


@dataclass(frozen=True)
class ServeConfig(Sampling):
    checkpoint: str = "out/stdlib"  # a run folder (its newest step), a step, gpt2, hf:OWNER/NAME
    host: str = "127.0.0.1"  # this machine only; 0.0.0.0: whoever reaches it, without a password
    port: int = 8000  # 0: any free port
    max_requests: PositiveInt = 2  # answers at a time; further requests get status 503
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: DType = "auto"  # of the weights; auto: bfloat16 where the hardware has it


def serve(cfg: ServeConfig) -> None:
    """Answer requests until Ctrl-C.

    Raises UserError for settings out of range, a checkpoint that cannot be opened and missing
    packages, OSError where the port is taken.
    """
    try:
        import uvicorn

        from tools import page
    except ModuleNotFoundError as error:
        raise UserError(f"no {error.name} here: pip install -r requirements-serve.txt") from None
    problems = []
    if not cfg.host:
        problems.append("host is empty")
    if not 0 <= cfg.port < 2**16:
        problems.append(f"port must be from 0 to 65535, not {cfg.port}")
    configurator.validate(cfg, problems)
    rt = runtime.start(cfg.device, cfg.dtype)
    model, tokenizer = store.load(cfg.checkpoint)
    rt.place(model, rt.dtype).eval()
    try:
        listening = socket.create_server((cfg.host, cfg.port))
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise OSError(f"cannot listen on {cfg.host}:{cfg.port} ({reason})") from None
    hosts = ["*"] if cfg.host in ("0.0.0.0", "::") else [*LOOPBACK, cfg.host]
    app = page.build_app(model, tokenizer, cfg, cfg.max_requests, cfg.checkpoint, hosts)
    settings = uvicorn.Config(app, log_level="warning", limit_concurrency=MAX_CONNECTIONS)
    server = uvicorn.Server(settings)
    app.state.stopping = lambda: server.should_exit  # answers end then, too
    try:
        print(f"http://{cfg.host}:{listening.getsockname()[1]}  (Ctrl-C ends)")
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        print("ended")


def main(argv: list[str] | None = None) -> int:
    return configurator.command(ServeConfig, serve, argv)


if __name__ == "__main__":
    sys.exit(main())
