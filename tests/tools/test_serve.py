"""What the server of the local page answers and refuses."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint
from pages import JSON, SHAPE, Answer, Site, ended, slow_down, write

import sample
from model import GPT
from plaingpt.checkpoint import store
from plaingpt.generation import NOT_FINITE, Batch
from plaingpt.text.templates import CHAT_TEMPLATES
from plaingpt.text.tokenizer import Tokenizer
from tools import insight, page, serve

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that continues texts."""
    return write(tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module", params=["chat", "alpaca"])
def talker(request, tmp_path_factory):
    """One that holds conversations."""
    return write(tmp_path_factory.mktemp(request.param), CHAT_TEMPLATES[request.param])


@pytest.fixture(scope="module")
def site(folder):
    with closing(Site(folder)) as found:
        yield found


@pytest.fixture(scope="module")
def chat(talker):
    with closing(Site(talker, temperature=1.0, seed=1)) as found:
        yield found


@pytest.fixture
def slow(monkeypatch):
    return slow_down(monkeypatch)


# --- answers


def test_a_text_goes_on_as_in_sample(site, folder):
    status, [start, *tokens] = site.ask({"text": "Once", "max_new_tokens": 20})
    assert status == 200 and start["forgotten"] == 0
    assert start["prompt"] == [[ord(letter), letter] for letter in "Once"]
    settings = {"temperature": 0.0, "max_new_tokens": 20, "stream": False, "dtype": "float32"}
    [text] = sample.samples(
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
        top = probabilities.topk(insight.ALTERNATIVES)
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


def choose(monkeypatch, *ids: int) -> None:
    """Have the tokens `ids` drawn, one after another."""
    chosen = iter(ids)
    monkeypatch.setattr(Batch, "choose", lambda *_: torch.tensor([next(chosen)]))


def test_characters_come_out_once_their_bytes_are_in(site, monkeypatch):
    ids = [*"aé€".encode(), 0xE2]
    choose(monkeypatch, *ids)
    _, [_, *tokens] = site.ask({"text": "x", "max_new_tokens": len(ids)})
    assert [token["text"] for token in tokens] == ["a", "", "é", "", "", "€", "�"]
    assert tokens[-1]["end"] == "length"


def test_an_answer_ends_where_it_is_asked_to(site):
    _, [_, *whole] = site.ask({"text": "Once", "temperature": 1, "seed": 5})
    pieces = [token["text"] for token in whole]
    asked = {"text": "Once", "temperature": 1, "seed": 5}
    _, [_, *tokens] = site.ask(asked | {"stop": ["no such words", "".join(pieces[7:9])]})
    assert "".join(token["text"] for token in tokens) == "".join(pieces[:7])
    assert len(tokens) == 9 and tokens[-1]["end"] == "stop"
    _, [_, *tokens] = site.ask(asked | {"stop_tokens": [whole[7]["id"]]})
    assert [token["id"] for token in tokens] == [token["id"] for token in whole[:8]]
    assert tokens[-1]["end"] == "stop" and tokens[-1]["text"] == ""


def test_an_answer_that_fails_ends_with_the_reason(folder, capfd):
    with closing(Site(folder)) as site:
        site.model.transformer.ln_f.bias.data.fill_(float("nan"))
        status, [start, *lines] = site.ask({"text": "Once"})
        again, _ = site.ask({"ids": [1]}, "/attention")  # its slot is free
    assert status == again == 200 and start["prompt"] and len(lines) == 1
    assert "the model's logits are not finite" in lines[0]["error"]
    assert "Traceback" not in capfd.readouterr().err


def test_any_text_that_json_can_carry_is_answered(site):
    status, [start, *tokens] = site.ask({"text": "\ud800 \0", "max_new_tokens": 2})
    assert status == 200 and len(start["prompt"]) == 5 and tokens


def test_a_seed_repeats_an_answer_and_none_does_not(site):
    def text(**settings) -> str:
        _, lines = site.ask({"text": "x", "temperature": 1.5, **settings})
        return "".join(line.get("text", "") for line in lines)

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text() != text()
    _, [start, *tokens] = site.ask({"text": "x", "temperature": 1.5})  # it says which it drew
    assert text(seed=start["seed"]) == "".join(token["text"] for token in tokens)


def test_a_context_is_continued_exactly(site, chat):
    """From any token: the ids of a context, which a text would not give, and a text after them."""
    _, [start, *tokens] = site.ask({"text": "Once", "temperature": 1.5, "seed": 1})
    ids = [id_ for id_, _ in start["prompt"]] + [token["id"] for token in tokens[:5]]
    _, [again, *_] = site.ask({"ids": ids, "max_new_tokens": 1})
    assert [id_ for id_, _ in again["prompt"]] == ids
    greedy = site.ask({"ids": ids})[1][1:]
    assert greedy == site.ask({"ids": ids[:2], "text": bytes(ids[2:]).decode()})[1][1:]
    _, [start, *_] = site.ask({"ids": [], "text": ""})
    assert start["prompt"] == [[256, ""]]  # a new text
    _, [start, *_] = site.ask({"ids": list(b"x") * 300, "max_new_tokens": 1})
    assert start["forgotten"] == 44 and len(start["prompt"]) == 300
    status, [start, *_] = chat.ask({"ids": list(b"### User:\nHi")})
    assert status == 200 and len(start["prompt"]) == 12


def test_a_context_may_end_within_a_character(site, monkeypatch):
    choose(monkeypatch, 0xAC)
    _, [start, token] = site.ask({"ids": [0x61, 0xE2, 0x82], "max_new_tokens": 1})
    assert [text for _, text in start["prompt"]] == ["a", "", ""] and token["text"] == "€"


def test_a_stop_string_in_the_prompt_ends_nothing(site, monkeypatch):
    choose(monkeypatch, *b"bcdefg")
    asked = {"text": "a\nb\n", "stop": ["\n", "de"], "max_new_tokens": 6}
    _, [start, *tokens] = site.ask(asked)
    assert "".join(text for _, text in start["prompt"]) == "a\nb\n"
    assert "".join(token["text"] for token in tokens) == "bc" and tokens[-1]["end"] == "stop"


def test_the_tokens_of_a_prompt_are_scored(site, folder):
    ids = list(b"Once upon a time")
    status, [found] = site.ask({"ids": ids}, "/score")
    assert status == 200
    tokens = found["tokens"]
    assert [token["id"] for token in tokens] == ids and tokens[1]["token"] == "n"
    assert tokens[0]["probability"] is None and tokens[0]["alternatives"] == []
    probabilities = store.load_model(folder)(torch.tensor([ids]))[0].softmax(-1)
    for place, token in enumerate(tokens[1:]):
        row = probabilities[place]
        assert token["probability"] == pytest.approx(row[ids[place + 1]].item(), rel=1e-3)
        top = row.topk(insight.ALTERNATIVES)
        assert [id_ for id_, _, _ in token["alternatives"]] == top.indices.tolist()
    _, [found] = site.ask({"ids": ids[:1]}, "/score")
    assert found["tokens"] == tokens[:1]
    _, [_, drawn] = site.ask({"ids": ids[:4], "max_new_tokens": 1})  # the same as when drawing
    _, [found] = site.ask({"ids": [*ids[:4], drawn["id"]]}, "/score")
    assert found["tokens"][-1]["probability"] == pytest.approx(drawn["probability"], rel=1e-3)
    assert found["tokens"][-1]["alternatives"][0][0] == drawn["id"]


def test_attention_is_that_of_transformers(site, folder):
    transformers = pytest.importorskip("transformers")
    ids = list(b"def main(arguments):")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
    layers = theirs.eval()(torch.tensor([ids]), output_attentions=True).attentions
    exact = torch.stack([layer[0, :, -1] for layer in layers])  # (layers, H, T)
    ours = insight.attention(store.load_model(folder).eval(), ids)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-6)
    _, [found] = site.ask({"ids": ids}, "/attention")
    torch.testing.assert_close(torch.tensor(found["weights"]), exact, rtol=0, atol=1e-5)
    assert ours.sum(-1).sub(1).abs().max() < 1e-6


def test_a_conversation(chat, talker):
    status, about = chat.ask("", "/model", "GET")
    assert status == 200 and about[0]["chat"] and about[0]["block_size"] == 256
    assert about[0]["eot_id"] == 256 and len(about[0]["examples"]) == 4
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
        ('{"text": "x", "temperature": NaN}', 400, "temperature must be 0, or at least 0.001"),
        ({"text": ["x"]}, 400, "text is not a string"),
        ({"text": "x", "top_k": 1.5}, 400, "top_k expects int or None, not 1.5"),
        ({"text": "x", "top_k": True}, 400, "top_k expects int or None"),
        ({"text": "x", "stop": "y"}, 400, "stop expects str,… or [\"str\", …], not 'y'"),
        ({"text": "x", "stop": ["y", ""]}, 400, "stop must be non-empty, not ''"),
        ({"text": "x", "stop_tokens": [1.0]}, 400, "stop_tokens expects int,…"),
        ({"text": "x", "stop_tokens": [-1]}, 400, "stop_tokens must be at least 0, not -1"),
        ({"ids": "x"}, 400, "ids is not a list of integers"),
        ({"ids": [True]}, 400, "ids is not a list of integers"),
        ({"ids": [1.0]}, 400, "ids is not a list of integers"),
        ({"ids": [0, 257]}, 400, "the tokenizer has no id 257"),
        ({"ids": [-1]}, 400, "the tokenizer has no id -1"),
        ({"ids": [10**50]}, 400, "the tokenizer has no id 1000"),
        ({"ids": [1], "text": None, "min_p": 0}, 400, "min_p must be above 0"),
    ],
)
def test_a_bad_request_gets_one_line(site, capfd, body, status, message):
    got, [line] = site.ask(body)
    assert got == status and message in line["error"]
    assert site.ask({"text": "x", "max_new_tokens": 1})[0] == 200
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("path", ["/score", "/attention"])
def test_a_bad_window_gets_one_line(site, path):
    for body, message in [
        ({}, "ids is not a list of integers"),
        ({"ids": []}, "ids must have from 1 to 256 tokens, not 0"),
        ({"ids": [1] * 257}, "ids must have from 1 to 256 tokens, not 257"),
        ({"ids": [300]}, "the tokenizer has no id 300"),
        ({"ids": [1], "seed": 1}, "unknown setting 'seed'"),
        ([], "the request is not a JSON object"),
    ]:
        status, [line] = site.ask(body, path)
        assert status == 400 and message in line["error"]
    assert site.ask({"ids": [1] * 256}, path)[0] == 200
    assert site.ask({"ids": [1]}, path)[0] == 200


@pytest.mark.parametrize(
    "path, method, status",
    [("/nothing", "GET", 404), ("/answer", "GET", 405), ("/model", "POST", 405)],
)
def test_an_unknown_address_is_an_error_in_json(site, path, method, status):
    got, [line] = site.ask("", path, method)
    assert got == status and line["error"]


def test_what_is_not_http_is_no_traceback(site, capfd):
    """A request that breaks off, in the headers or in the body, and bytes that are no request."""
    head = b"POST /answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for sent in (head, head + b"Content-Length: 100\r\n\r\n{", b"\x16\x03\x01\x00\xff" * 9):
        with socket.create_connection(("127.0.0.1", site.port)) as connection:
            connection.sendall(sent)
            time.sleep(0.05)
    assert site.ask({"text": "x", "max_new_tokens": 1})[0] == 200
    assert "Traceback" not in capfd.readouterr().err


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
    for host in ("evil.example:8000", "localhost.evil.example", ""):
        status, [line] = site.ask("", "/model", "GET", headers={"Host": host})
        assert status == 400 and "error" in line
    for origin in ("http://evil.example", "null", "http://localhost", "https://evil.example:80"):
        status, [line] = site.ask({"text": "x"}, headers={**JSON, "Origin": origin})
        assert status == 403 and line["error"] == "requests from other sites are refused"
    old = {**JSON, "Page-Version": "of an earlier server"}
    status, [line] = site.ask({"text": "x"}, headers=old)
    assert status == 409 and line["error"].endswith(": reload the page")
    ours = {**JSON, "Origin": site.url.rstrip("/")}
    assert site.ask({"text": "x", "max_new_tokens": 1}, headers=ours)[0] == 200
    assert site.ask("", "/", "GET", headers={"Host": f"LocalHost:{site.port}"})[0] == 200
    assert site.ask("", "/../serve.py", "GET")[0] == 404
    with closing(http.client.HTTPConnection("127.0.0.1", site.port)) as connection:
        connection.request("GET", "/")
        policy = connection.getresponse().headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy


def test_requests_beyond_the_limit_are_told_to_wait(site, slow, monkeypatch):
    monkeypatch.setattr(page, "PATIENCE", 0.05)
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
    assert site.ask({"text": "x", "top_k": 0})[0] == 400  # which needs no slot
    assert site.ask({"ids": [1]}, "/score")[0] == site.ask({"ids": [1]}, "/attention")[0] == 503
    for thread in threads:
        thread.join()
    assert [status for status, _ in found] == [200, 200]
    for _ in range(3):  # a bad request gives its slot back
        assert site.ask({"text": 5})[0] == 400
    assert site.ask({"text": "x", "max_new_tokens": 1})[0] == 200


def test_a_visitor_who_leaves_stops_the_work(site, slow, capfd):
    for _ in range(3):  # more often than there are slots
        before = len(slow)
        connection = http.client.HTTPConnection("127.0.0.1", site.port)
        connection.request("POST", "/answer", json.dumps({"text": "x", "seed": 3}), JSON)
        connection.getresponse().readline()
        connection.close()
        assert ended(slow) < before + 25
    assert "Traceback" not in capfd.readouterr().err


# --- several visitors


@pytest.fixture
def endless(folder):
    """A site whose answers have all of their 30 tokens."""
    with closing(Site(folder, max_requests=3, temperature=1.5)) as found:
        found.model.transformer.wte.weight.data[256] -= 1.0
        yield found


ASKED = [
    {"text": "First", "seed": 1},
    {"text": "Another", "seed": 2, "temperature": 0.7, "top_k": 9, "repetition_penalty": 1.2},
    {"text": "The third of all", "seed": 3, "top_p": 0.8, "max_new_tokens": 25},
]


def alone(site, asked: dict) -> list[int]:
    """The ids of an answer that is written while no other is."""
    return ids(site.ask(asked)[1][1:])


def ids(lines: list[dict]) -> list[int]:
    return [line["id"] for line in lines]


def test_visitors_at_the_same_time_get_what_each_gets_alone(endless, slow):
    """The second and the third join while others are being written."""
    expected = [alone(endless, asked) for asked in ASKED]
    slow.clear()
    answers, found = [], []
    for asked in ASKED:
        answers.append(Answer(endless, asked))
        found.append(answers[-1].lines(4))
    for lines, answer in zip(found, answers):
        lines += answer.lines()
    assert [ids(lines[1:]) for lines in found] == expected
    assert [lines[-1]["end"] for lines in found] == ["length"] * 3
    assert len(slow) < 60 and len(slow[20]) == 3  # side by side: alone they took 85 steps


def test_a_visitor_who_leaves_does_not_disturb_the_others(endless, slow):
    expected = [alone(endless, asked) for asked in ASKED]
    slow.clear()
    answers = [Answer(endless, asked) for asked in ASKED]
    answers[0].lines(4)
    answers[0].close()
    assert [ids(answer.lines()[1:]) for answer in answers[1:]] == expected[1:]
    assert len(slow[10]) == 2
    assert alone(endless, ASKED[0]) == expected[0]


def test_an_error_ends_all_answers_and_the_server_goes_on(endless, slow, capfd):
    expected = alone(endless, ASKED[0])
    bias = endless.model.transformer.ln_f.bias.data
    fine = bias.clone()
    answers = [Answer(endless, asked) for asked in ASKED]
    for answer in answers:
        answer.lines(4)
    bias.fill_(float("nan"))
    assert [answer.lines()[-1] for answer in answers] == [{"error": NOT_FINITE}] * 3
    bias.copy_(fine)
    assert alone(endless, ASKED[0]) == expected
    assert "Traceback" not in capfd.readouterr().err


def test_a_bug_keeps_its_traceback_and_the_server_goes_on(endless, slow, monkeypatch, caplog):
    expected = alone(endless, ASKED[0])
    answers = [Answer(endless, asked) for asked in ASKED[:2]]
    for answer in answers:
        answer.lines(4)
    with monkeypatch.context() as patch:
        patch.delattr(Batch, "choose")
        for answer in answers:
            with pytest.raises(http.client.IncompleteRead):
                answer.response.read()
    assert alone(endless, ASKED[0]) == expected
    assert [type(record.exc_info[1]) for record in caplog.records] == [AttributeError] * 2


def test_a_prompt_is_scored_between_two_steps(endless, slow, monkeypatch):
    really, threads = insight.scored, []
    step = Batch.step

    def noted(function):
        def wrapped(*arguments):
            threads.append((function, threading.get_ident()))
            return function(*arguments)

        return wrapped

    expected, window = alone(endless, ASKED[0]), {"ids": list(b"Once upon a time")}
    score = endless.ask(window, "/score")
    monkeypatch.setattr(insight, "scored", noted(really))
    monkeypatch.setattr(Batch, "step", noted(step))
    answer = Answer(endless, ASKED[0])
    begun = answer.lines(4)
    assert endless.ask(window, "/score") == score
    assert ids((begun + answer.lines())[1:]) == expected
    functions = [function for function, _ in threads]
    assert 0 < functions.index(really) < 15 and len({thread for _, thread in threads}) == 1


# --- the command


def test_the_command_serves_until_ctrl_c(folder, tmp_path):
    command = [sys.executable, "-m", "tools.serve", f"--checkpoint={folder}"]
    command += ["--max_new_tokens=100000", "--port=0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, cwd=REPO) as run:
        url = run.stdout.readline().split()[0]
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.request("GET", "/model")
        parameters = store.load_model(folder).num_params()
        assert json.loads(connection.getresponse().read())["parameters"] == parameters
        connection.close()  # the server closes it after five idle seconds
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
        (["--host=203.0.113.9"], "): try another --port or --host"),
    ],
)
def test_bad_settings_are_one_line(folder, capsys, arguments, message):
    assert serve.main([f"--checkpoint={folder}", "--device=cpu", *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
