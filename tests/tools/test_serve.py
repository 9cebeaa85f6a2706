"""The local page: what it answers and refuses, and how it looks and works in a real browser.

The browser is chromium (`apt install chromium`), or the one that PLAINGPT_TEST_BROWSER names.
"""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import uvicorn
from conftest import save_checkpoint

import sample
from model import GPT, GPTConfig
from plaingpt.checkpoint import store
from plaingpt.sampling import Sampling
from plaingpt.text.templates import CHAT_TEMPLATES
from plaingpt.text.tokenizer import Tokenizer
from tools import page as webpage
from tools import serve

REPO = Path(__file__).parents[2]

SHAPE = GPTConfig(vocab_size=257, block_size=256, n_layer=2, n_head=2, n_embd=32)
SAMPLING = Sampling(max_new_tokens=30, temperature=0.0, top_p=None)
JSON = {"Content-Type": "application/json"}


class Site:
    """A server in a thread of this process."""

    def __init__(self, folder: Path, **changes):
        model = store.load_model(folder).eval()
        sampling = replace(SAMPLING, **changes)
        hosts = list(serve.LOOPBACK)
        app = webpage.build_app(model, Tokenizer.load(folder), sampling, 2, "tiny", hosts)
        self.socket = socket.create_server(("127.0.0.1", 0))
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that continues texts."""
    return write(tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module", params=["chat", "alpaca"])
def talker(request, tmp_path_factory):
    """One that holds conversations."""
    return write(tmp_path_factory.mktemp(request.param), CHAT_TEMPLATES[request.param])


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


@pytest.fixture(scope="module")
def site(folder):
    with closing(Site(folder)) as found:
        yield found


@pytest.fixture(scope="module")
def chat(talker):
    with closing(Site(talker, temperature=1.0, seed=1)) as found:
        yield found


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("talk"), CHAT_TEMPLATES["chat"])
    with closing(Site(folder, temperature=1.0, seed=1)) as found:
        yield found


@pytest.fixture
def slow(monkeypatch):
    """Tokens take 20 ms; returns the list of all that were drawn."""
    drawn = []
    really = GPT.generate

    def slowly(self, *args, **kwargs):
        for token in really(self, *args, **kwargs):
            time.sleep(0.02)
            drawn.append(token)
            yield token

    monkeypatch.setattr(GPT, "generate", slowly)
    return drawn


def ended(drawn: list) -> int:
    """How many tokens were drawn, once the drawing has ended."""
    while True:
        before = len(drawn)
        time.sleep(0.3)
        if len(drawn) == before:
            return before


# --- answers


def test_a_text_goes_on_as_in_sample(site, folder):
    status, [start, *tokens] = site.ask({"text": "Once", "max_new_tokens": 20})
    assert status == 200 and start == {"prompt_tokens": 4, "forgotten": 0}
    settings = {"temperature": 0.0, "max_new_tokens": 20, "stream": False, "dtype": "float32"}
    [text] = sample.sample(
        sample.SampleConfig(checkpoint=str(folder), start="Once", device="cpu", **settings)
    )
    assert "Once" + "".join(token["text"] for token in tokens) == text
    assert tokens[-1]["end"] in ("stop", "length")


def test_each_token_has_its_probability_and_alternatives(site, folder):
    _, [_, *tokens] = site.ask({"text": "ab", "max_new_tokens": 5})
    model = store.load_model(folder).eval()
    ids = list(b"ab")
    for token in tokens[:5]:
        probabilities = model(torch.tensor([ids]))[0, -1].softmax(-1)
        top = probabilities.topk(webpage.ALTERNATIVES)
        id_ = top.indices[0].item()  # the likeliest: the temperature is 0
        assert token["id"] == id_ == token["alternatives"][0][0]
        assert token["token"] == Tokenizer.bytes().decode([id_]) == token["alternatives"][0][1]
        assert token["probability"] == pytest.approx(probabilities[id_].item(), abs=1e-4)
        theirs = [probability for _, _, probability in token["alternatives"]]
        assert theirs == pytest.approx(top.values.tolist(), abs=1e-4)
        ids.append(id_)


def test_a_text_that_ends_says_so(tmp_path):
    model = GPT(SHAPE).init_weights(1)
    with torch.no_grad():  # it draws only <|endoftext|>
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[256] * 1e4)
    ends = save_checkpoint(tmp_path, model)
    with closing(Site(ends)) as site:
        _, [_, *tokens] = site.ask({"text": "x"})
    assert [(token["text"], token["id"], token["end"]) for token in tokens] == [("", 256, "stop")]


def test_characters_come_out_once_their_bytes_are_in(folder, tmp_path, monkeypatch):
    ids = [*"aé€".encode(), 0xE2]

    def drawn(self, idx, max_new_tokens, pick, stop_id):
        for token in ids:
            pick(torch.zeros(1, 257))
            yield torch.tensor([token])

    monkeypatch.setattr(GPT, "generate", drawn)
    with closing(Site(folder)) as site:
        _, [_, *tokens] = site.ask({"text": "x", "max_new_tokens": len(ids)})
    assert [token["text"] for token in tokens] == ["a", "", "é", "", "", "€", "�"]
    assert tokens[-1]["end"] == "length"
    assert tokens[0]["probability"] == pytest.approx(1 / 257, 1e-3)


def test_any_text_that_json_can_carry_is_answered(site):
    status, [start, *tokens] = site.ask({"text": "\ud800 \0", "max_new_tokens": 2})
    assert status == 200 and start["prompt_tokens"] == 5 and tokens


def test_a_seed_repeats_an_answer_and_none_does_not(site):
    def text(**settings) -> str:
        _, lines = site.ask({"text": "x", "temperature": 1.5, **settings})
        return "".join(line.get("text", "") for line in lines)

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text() != text()


def test_a_conversation(chat, talker):
    status, about = chat.ask("", "/model", "GET")
    assert status == 200 and about[0]["chat"] and about[0]["block_size"] == 256
    messages = [{"role": "user", "content": "Hello?"}]
    _, [start, *tokens] = chat.ask({"messages": messages})
    answer = "".join(token["text"] for token in tokens)
    assert start["forgotten"] == 0 and answer
    many = ([*messages, {"role": "assistant", "content": "Yes."}]) * 200 + messages
    status, [start, *_] = chat.ask({"messages": many})
    if "chat" in str(talker):
        assert status == 200 and 300 < start["forgotten"] < 400
    else:  # instructions stand for themselves
        assert status == 200 and start["forgotten"] == 0


@pytest.mark.parametrize(
    "body, status, message",
    [
        ({"text": "x", "temprature": 1}, 400, "unknown setting 'temprature'; did you mean"),
        ({"text": "x", "temperature": "hot"}, 400, "temperature expects float, not 'hot'"),
        ({"text": "x", "temperature": 10**400}, 400, "temperature expects float"),
        ({"text": "x", "temperature": -1}, 400, "temperature must be 0, or at least 0.001"),
        ({"text": "x", "top_p": 2}, 400, "top_p must be above 0"),
        ({"text": "x", "seed": -1}, 400, "seed must be at least 0"),
        ({"text": "x", "max_new_tokens": 31}, 400, "max_new_tokens must be at most 30"),
        ({"text": 5}, 400, "text is not a string"),
        ({"messages": []}, 400, "no field 'text'"),
        ([1], 400, "the request is not a JSON object"),
        ("{", 400, "the request is not JSON"),
        (b"\xff", 400, "the request is not JSON"),
        ("[" * 60_000, 400, "the request is not JSON"),
        ({"text": "x" * 70_000}, 413, "a request may have at most 65,536 bytes"),
    ],
)
def test_a_bad_request_gets_one_line(site, body, status, message):
    got, [line] = site.ask(body)
    assert got == status and message in line["error"]
    assert site.ask({"text": "x"})[0] == 200


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "no messages"),
        ("hi", "messages are not JSON"),
        ([{"role": "user", "content": ""}], "empty message"),
        ([{"role": "tool", "content": "x"}], "unknown role 'tool'"),
        ([{"role": "assistant", "content": "x"}], "message 1 is out of turn"),
        ([{"role": "user", "content": "x"}] * 2, "message 2 is out of turn"),
        ([{"role": "user", "content": "y " * 2000}], "too long: "),
        ([{"content": "x"}], "unknown role None"),
    ],
)
def test_a_bad_conversation_gets_one_line(chat, messages, message):
    status, [line] = chat.ask({"messages": messages})
    assert status == 400 and message in line["error"]


def test_other_sites_cannot_ask(site):
    """Neither a form on another page, nor a name that someone pointed at this machine."""
    assert site.ask({"text": "x"}, headers={"Content-Type": "text/plain"})[0] == 415
    assert site.ask({"text": "x"}, headers={**JSON, "Host": "evil.example"})[0] == 400
    assert site.ask("", "/", "GET", headers={"Host": f"localhost:{site.port}"})[0] == 200
    assert site.ask("", "/../serve.py", "GET")[0] == 404
    with closing(http.client.HTTPConnection("127.0.0.1", site.port)) as connection:
        connection.request("GET", "/")
        policy = connection.getresponse().headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy


def test_requests_beyond_the_limit_are_told_to_wait(site, slow):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(site.ask({"text": "x", "temperature": 1})))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(slow) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    status, [line] = site.ask({"text": "x"})
    assert status == 503 and "busy with other answers" in line["error"]
    for thread in threads:
        thread.join()
    assert [status for status, _ in found] == [200, 200]
    for _ in range(3):  # a bad request gives its slot back
        assert site.ask({"text": 5})[0] == 400
    assert site.ask({"text": "x", "max_new_tokens": 1})[0] == 200


def test_a_visitor_who_leaves_stops_the_work(site, slow):
    for _ in range(3):  # more often than there are slots
        before = len(slow)
        connection = http.client.HTTPConnection("127.0.0.1", site.port)
        connection.request("POST", "/answer", json.dumps({"text": "x", "seed": 3}), JSON)
        connection.getresponse().readline()
        connection.close()
        assert ended(slow) < before + 25


# --- the command


def test_the_command_serves_until_ctrl_c(folder, tmp_path):
    command = [sys.executable, "-m", "tools.serve", f"--checkpoint={folder}"]
    command += ["--max_new_tokens=100000", "--port=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, cwd=REPO) as run:
        url = run.stdout.readline().split()[0]
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.request("GET", "/model")
        assert json.loads(connection.getresponse().read())["parameters"] > 0
        taken = url.rpartition(":")[2]
        again = subprocess.run([*command[:-1], f"--port={taken}"], capture_output=True, text=True)
        assert again.returncode == 2
        assert "error: cannot listen on 127.0.0.1:" in again.stderr.splitlines()[-1]
        connection.request("POST", "/answer", '{"text": "x", "seed": 1}', JSON)
        connection.getresponse().readline()
        run.send_signal(signal.SIGINT)  # while it answers
        out, err = run.communicate(timeout=30)
    assert run.returncode == 0 and "Traceback" not in err and out == "ended\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--port=70000", "--temperature=-1"], "port must be from 0 to 65535"),
        (["--host="], "host must be non-empty"),
        (["--max_requests=0"], "max_requests must be at least 1"),
        (["--checkpoint=nowhere"], "nowhere does not exist"),
        (["--host=203.0.113.9"], "cannot listen on 203.0.113.9:8000"),
    ],
)
def test_bad_settings_are_one_line(folder, capsys, arguments, message):
    assert serve.main([f"--checkpoint={folder}", "--device=cpu", *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


# --- the page, in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    named = os.environ.get("PLAINGPT_TEST_BROWSER")
    path = shutil.which(named or "chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("chromium is not installed")
    # It reaches only this machine.
    options = ["--no-proxy-server", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"]
    with playwright.sync_playwright() as started:
        sandbox = os.geteuid() != 0
        try:
            opened = started.chromium.launch(
                executable_path=path, args=options, chromium_sandbox=sandbox
            )
        except playwright.Error as error:
            if named:
                raise
            pytest.skip(f"{path} does not start: {str(error).splitlines()[0]}")
        yield opened


@pytest.fixture
def open_page(browser):
    """Open a site in a page of its own; an error on its console fails the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    contexts, problems = [], []

    def opened(site, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if line.type == "error" else 0)
        page.goto(site.url)
        playwright.expect(page.locator("#send")).to_be_enabled()
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [line for line in problems if "status of 4" not in line] == []


def send(page, text: str) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")


def test_a_conversation_streams_into_the_page(talk, slow, open_page):
    page = open_page(talk)
    send(page, "Hello?")
    page.wait_for_selector(".answer .token")
    assert page.locator("#stop").is_visible()  # there is more to come
    page.wait_for_selector("#send:visible")
    first = page.inner_text(".answer")
    assert len(first) > 3 and page.inner_text(".asked") == "Hello?"
    send(page, "And then?")
    page.wait_for_selector("#send:visible")
    assert page.locator(".asked").count() == page.locator(".answer").count() == 2
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json))
    send(page, "And?")
    page.wait_for_selector("#send:visible")
    roles = [message["role"] for message in sent[0]["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    assert sent[0]["messages"][1]["content"] == first.removesuffix(" ∎")
    page.click("#reset")
    assert page.inner_text("#log") == ""


def test_reset_forgets_the_answer_that_is_being_drawn(talk, slow, open_page):
    page = open_page(talk)
    send(page, "Secret?")
    page.wait_for_selector(".answer .token")
    page.click("#reset")
    page.wait_for_selector("#send:visible")
    with page.expect_request("**/answer") as asked:
        send(page, "Hello?")
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "Hello?"}]
    assert "Secret" not in page.inner_text("#log")


def test_defaults_of_any_size_can_be_sent(folder, open_page):
    with closing(Site(folder, temperature=0.75, top_p=0.955)) as site:
        page = open_page(site)
        send(page, "Once")
        page.wait_for_selector(".token")
        page.click("summary")
        page.fill("#temperature", "-1")
        page.wait_for_selector("#send:visible")
        send(page, "upon")
        page.wait_for_selector(".error")
        assert "temperature must be 0, or at least 0.001" in page.inner_text(".error")


def test_a_click_shows_what_was_considered(talk, open_page):
    page = open_page(talk)
    send(page, "Hello?")
    page.wait_for_selector("#send:visible")
    token = page.locator(".answer .token").first
    token.click()
    rows = page.locator("#considered tr")
    assert rows.count() >= webpage.ALTERNATIVES
    assert page.inner_text("#considered tr.chosen td:first-child").strip() == token.inner_text()
    assert page.inner_text("#considered tr:first-child td:last-child").endswith("%")
    page.keyboard.press("ArrowRight")
    second = page.locator(".answer .token").nth(1)
    assert second.get_attribute("aria-current") == "true"
    assert page.inner_text("#considered tr.chosen td:first-child").strip() == second.inner_text()


def test_a_text_is_continued_and_stopped(site, slow, open_page):
    page = open_page(site)
    page.click("summary")
    page.fill("#temperature", "1.5")
    send(page, "Once upon")
    page.wait_for_selector(".token")
    page.click("#stop")
    page.wait_for_selector("#send:visible")
    assert 0 < page.locator(".token").count() < 30
    assert ended(slow) < 30
    before = page.inner_text(".continued")
    send(page, "")
    page.wait_for_selector("#send:visible")
    assert page.inner_text(".continued").startswith(before)


def test_leaving_the_page_stops_the_work(site, slow, open_page):
    page = open_page(site)
    page.click("summary")
    page.fill("#temperature", "1.5")
    send(page, "Once")
    page.wait_for_selector(".token")
    page.close()
    assert ended(slow) < 30


def test_an_error_is_shown_and_the_question_kept(talk, open_page):
    page = open_page(talk)
    page.fill("#text", "long " * 300)
    page.keyboard.press("Enter")
    page.wait_for_selector(".error")
    assert "too long: " in page.inner_text(".error")
    assert page.input_value("#text").startswith("long ")
    assert page.locator(".asked").count() == 0
    send(page, "short")
    page.wait_for_selector(".answer .token")


def test_what_the_model_writes_is_text_not_markup(folder, tmp_path, open_page):
    model = store.load_model(folder)
    with torch.no_grad():  # it writes only <
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[ord("<")] * 1e4)
    markup = save_checkpoint(tmp_path, model)
    with closing(Site(markup)) as site:
        page = open_page(site)
        send(page, "<img src=x onerror=alert(1)>")
        page.wait_for_selector("#send:visible")
        assert page.inner_text(".continued").startswith("<img src=x onerror=alert(1)><<<<")
        assert page.locator("img").count() == 0


@pytest.mark.parametrize("scheme, paper", [("light", "253, 253, 251"), ("dark", "22, 24, 26")])
@pytest.mark.parametrize("width, columns", [(375, 1), (1280, 2)])
def test_light_and_dark_narrow_and_wide(talk, open_page, tmp_path, scheme, paper, width, columns):
    page = open_page(talk, color_scheme=scheme, viewport={"width": width, "height": 700})
    send(page, "Hello?")
    page.wait_for_selector("#send:visible")
    page.locator(".answer .token").nth(2).click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == f"rgb({paper})"
    columns_there = page.evaluate("getComputedStyle(document.body).gridTemplateColumns").split()
    assert len(columns_there) == columns
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # fits
    for part in ("#text", "#considered", "#log", "#send"):
        box = page.locator(part).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width, part
        assert box["y"] >= 0 and box["y"] < 700, part
    shots = Path(os.environ.get("PLAINGPT_TEST_SHOTS", tmp_path))
    page.screenshot(path=shots / f"{scheme}_{width}.png")
