"""A small server of the page in this process, for the tests of what it answers and how it looks."""

import http.client
import json
import socket
import threading
import time
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
import uvicorn
from conftest import save_checkpoint

from model import GPT, GPTConfig
from plaingpt.checkpoint import store
from plaingpt.generation import Batch
from plaingpt.sampling import Sampling
from plaingpt.text.tokenizer import Tokenizer
from tools import page, serve

SHAPE = GPTConfig(vocab_size=257, block_size=256, n_layer=2, n_head=2, n_embd=32)
SAMPLING = Sampling(max_new_tokens=30, temperature=0.0, top_p=None)
EXAMPLES = ["Once upon", "<b>bold</b>", "Two\nlines", "Why?"]
JSON = {"Content-Type": "application/json"}


class Site:
    """A server in a thread of this process."""

    def __init__(self, folder: Path, port: int = 0, max_requests: int = 2, **changes):
        self.model = store.load_model(folder).eval()
        served = page.Served(self.model, Tokenizer.load(folder), "tiny", EXAMPLES)
        sampling, hosts = replace(SAMPLING, **changes), list(serve.LOOPBACK)
        app = page.build_app(served, sampling, max_requests, hosts)
        self.socket = socket.create_server(("127.0.0.1", port))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, args=[[self.socket]])
        self.thread.start()

    def ask(self, body, path="/answer", method="POST", headers=JSON) -> tuple[int, list]:
        """Status, and the lines of JSON."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)) as connection:
            text = body if isinstance(body, (str, bytes)) else json.dumps(body)
            connection.request(method, path, text, headers)
            response = connection.getresponse()
            lines = response.read().decode().splitlines()
        return response.status, [json.loads(line) for line in lines if line.startswith("{")]

    def close(self):
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()


class Answer:
    """An answer that is read line by line."""

    def __init__(self, site: Site, body: dict):
        self.connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=30)
        self.connection.request("POST", "/answer", json.dumps(body), JSON)
        self.response = self.connection.getresponse()

    def lines(self, count: int | None = None) -> list[dict]:
        """The next `count` lines, or all that are left."""
        return [json.loads(line) for line in islice(self.response, count)]

    def close(self) -> None:
        self.response.close()
        self.connection.close()


def write(out_dir: Path, chat_template: str | None = None) -> Path:
    """A model that writes letters and, once in about 30, an end."""
    model = GPT(SHAPE).init_weights(1)
    tokenizer = Tokenizer.bytes()
    tokenizer.chat_template = chat_template
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[ord("a") : ord("z")] += 0.5
        model.transformer.wte.weight[256] += 0.3
    return save_checkpoint(out_dir, model, tokenizer)


def slow_down(monkeypatch) -> list:
    """Have each step take 20 ms; returns the list of all steps, each with the ids that it drew."""
    steps = []
    really = Batch.step

    def slowly(self):
        drawn = really(self)
        time.sleep(0.02)
        steps.append([text.ids[-1] for text in self.texts])
        return drawn

    monkeypatch.setattr(Batch, "step", slowly)
    return steps


def ended(steps: list) -> int:
    """How many steps were taken, once no more are."""
    while True:
        before = len(steps)
        time.sleep(0.3)
        if len(steps) == before:
            return before
