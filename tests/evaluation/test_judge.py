"""A judge's replies, good and bad, from a stand-in server."""

import json
import os
import re
import signal
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import free_port

import configurator
from plaingpt.evaluation import judge
from plaingpt.evaluation.answers import Answer
from plaingpt.evaluation.judge import Judge, judged, score_of

ANSWERS = [Answer(f"{n}?", "blue {}", f"answer {n}") for n in range(4)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(judge, "WAITS_S", (0.01, 0.01))
    monkeypatch.setattr(judge, "AT_ONCE", 1)  # the replies are those to one request after another
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(f"{json.dumps(each.scored())}\n" for each in ANSWERS))
    return path


@contextmanager
def server(*replies):
    """The address of a server, and the requests it got. It gives each of `replies` once, then the
    last for ever: the judge's words (or what returns them for a prompt), a status, a body, or
    seconds of silence before it hangs up."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = replies[min(len(requests), len(replies) - 1)]
            requests.append((self.path, dict(self.headers), body))
            if callable(reply):
                reply = reply(body["messages"][0]["content"])
            if isinstance(reply, float):
                time.sleep(reply)
                return
            self.send_response(reply if isinstance(reply, int) else 200)
            self.end_headers()
            content = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
            self.wfile.write(reply if isinstance(reply, bytes) else json.dumps(content).encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/v1", requests
        listening.shutdown()


def kept_at(path) -> Path:
    return path.with_suffix(".judged.jsonl")


def kept(path) -> list[dict]:
    lines = kept_at(path).read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_mean_of_all_scores_with_prompts_and_replies_kept(path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1\n")
    with server("100", "50", "0", "Score: 70/100.") as (address, requests):
        result = judged(Judge(address, "m"), str(path))
    assert result.figures == {"score": 55, "unusable": 0}
    assert result.standard_error("score") == pytest.approx((5300 / 3) ** 0.5 / 2)
    assert "m at http://127.0.0.1:" in result.protocol
    for (where, headers, body), line, answer in zip(requests, kept(path), ANSWERS):
        assert where == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-1"
        assert (body["model"], body["temperature"]) == ("m", 0)
        [message] = body["messages"]
        assert message == {"role": "user", "content": line["prompt"]}
        for text in (answer.question, answer.reference, answer.answer):
            assert f"]\n{text}\n\n[" in line["prompt"]
    assert [line["reply"] for line in kept(path)] == ["100", "50", "0", "Score: 70/100."]
    assert [item["score"] for item in result.items] == [100, 50, 0, 70]
    assert "sk-1" not in kept_at(path).read_text()


def test_a_second_call_goes_on_from_where_the_judge_broke_down(path):
    with server("80", "60", 500) as (address, requests):
        problem = f"answers.jsonl, line 3: no reply from m at {address} \\(status 500: "
        with pytest.raises(configurator.UserError, match=problem):
            judged(Judge(address, "m"), str(path))
        assert len(requests) == 2 + 3 and "Authorization" not in requests[0][1]
    with kept_at(path).open("a") as file:
        file.write('{"question": "2?", "refe')  # killed here
    with server("40") as (address, requests):
        assert judged(Judge(address, "m"), str(path)).figures["score"] == (80 + 60 + 40 + 40) / 4
        assert len(requests) == 2 == len(kept(path)) - 2
        assert judged(Judge(address, "m"), str(path)).figures["score"] == 55
        assert len(requests) == 2
        judged(Judge(address, "another"), str(path))
        assert len(requests) == 6


def test_each_judgement_is_kept_at_once(path):
    with server("80") as (address, _):
        asked = judge.judgements(Judge(address, "m"), judge.read_answers(str(path)), kept_at(path))
        for number, _ in enumerate(asked, 1):
            assert len(kept(path)) == number


@pytest.mark.parametrize("first", [429, 503, 0.0, 0.3])
def test_a_judge_that_recovers_costs_nothing(path, monkeypatch, first):
    monkeypatch.setattr(judge, "TIMEOUT_S", 0.1)
    with server(first, "90") as (address, requests):
        assert judged(Judge(address, "m"), str(path)).figures["score"] == 90
    assert len(requests) == 5


@pytest.mark.parametrize(
    ("reply", "tries", "message"),
    [
        (401, 1, "status 401: "),
        (429, 3, "status 429: "),
        (0.3, 3, "timed out"),
        (b"<html>", 1, "but got '<html>' (its JSON is damaged: "),
        (b" \n", 1, "but got nothing (its JSON is damaged: "),
        (b'{"choices": []}', 1, "choices: expected "),
        (b'{"error": "no such model"}', 1, "no such model\"}' (its JSON: missing field choices"),
        ("I like it", 4, "replied 'I like it', not with a number from 0 to 100 (4 of 4 replies)"),
        ("140", 4, "replied '140', not with a number"),
        (None, 4, "replied '', not with a number"),
    ],
)
def test_a_judge_that_is_no_use_is_one_line(path, monkeypatch, reply, tries, message):
    monkeypatch.setattr(judge, "TIMEOUT_S", 0.1)
    with server(reply) as (address, requests):
        with pytest.raises(configurator.UserError) as caught:
            judged(Judge(address, "m"), str(path))
        text = str(caught.value)
        assert text.startswith(f"{path}, line 1: ") and f"m at {address}" in text
        assert message in text and "\n" not in text and len(requests) == tries


def test_a_judge_that_is_down_is_one_line(path):
    address = f"http://127.0.0.1:{free_port()}/v1"
    with pytest.raises(configurator.UserError, match=r"line 1: no reply from m at .*refused"):
        judged(Judge(address, "m"), str(path))


@pytest.fixture
def slow():
    """A judge that takes 0.4 s for the first answer and 0.1 s for the others, and how many it was
    asked at once; its score is 10 times the number of the answer."""
    running, most = [], []

    def reply(prompt: str) -> str:
        running.append(prompt)
        most.append(len(running))
        number = int(re.search(r"answer (\d+)", prompt)[1])
        time.sleep(0.1 if number else 0.4)
        running.remove(prompt)
        return str(10 * number)

    with server(reply) as (address, _):
        yield Judge(address, "m"), most


def test_several_answers_are_judged_at_once_and_stay_in_order(path, slow, monkeypatch):
    monkeypatch.setattr(judge, "AT_ONCE", 3)
    asked, most = slow
    result = judged(asked, str(path))
    assert [item["score"] for item in result.items] == [0, 10, 20, 30]
    assert max(most) == 3 and len(most) == 4
    assert kept(path)[-1]["score"] == 0  # the slow one does not hold up the others


def test_equal_answers_are_judged_once(path, slow):
    path.write_text(path.read_text() * 2)
    asked, most = slow
    result = judged(asked, str(path))
    assert [item["score"] for item in result.items] == [0, 10, 20, 30] * 2 and len(most) == 4


def test_what_is_under_way_when_a_request_fails_is_kept(path, monkeypatch):
    monkeypatch.setattr(judge, "AT_ONCE", 3)

    def ask(judge, prompt, where):
        if "answer 0" in prompt:
            raise configurator.UserError(f"{where}: no reply")
        time.sleep(0.1)
        return "50"

    monkeypatch.setattr(judge, "ask", ask)
    with pytest.raises(configurator.UserError, match="line 1: no reply"):
        judged(Judge("", "m"), str(path))
    assert len(kept(path)) == 2


def test_an_interrupt_says_what_is_kept(path, capsys, monkeypatch):
    """Without waiting for the reply."""

    def ask(judge, prompt, where):
        if "answer 2" in prompt:
            os.kill(os.getpid(), signal.SIGINT)  # to the main thread, as Ctrl-C
            time.sleep(60)
        return "50"

    monkeypatch.setattr(judge, "ask", ask)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        judged(Judge("", "m"), str(path))
    assert time.monotonic() - began < 30
    said = f"2 of 4 answers judged, and kept in {kept_at(path)}; run the command again to continue"
    assert said in capsys.readouterr().err


def test_a_few_replies_without_a_score_are_left_out(path, capsys, monkeypatch):
    with server("90", "Sorry.", "70", "50") as (address, requests):
        result = judged(Judge(address, "m"), str(path))
        assert result.figures == {"score": 70, "unusable": 1}
        said = f"{path}, line 2: m at {address} replied 'Sorry.', not with a number from 0 to 100"
        assert said in capsys.readouterr().err and kept(path)[1]["score"] is None
        assert judged(Judge(address, "m"), str(path)).figures == {"score": 65, "unusable": 0}
        assert len(requests) == 5  # it was asked for that answer once more
    monkeypatch.setattr(judge, "MAX_UNUSABLE", 2)
    with (
        server("1", "no", "no", "1") as (address, requests),
        pytest.raises(configurator.UserError, match="2 of 3"),
    ):
        judged(Judge(address, "other"), str(path))
    assert len(requests) == 3


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("85", 85),
        (" 85.5\n", 85.5),
        ("**85**", 85),
        ("score 85", 85),
        ("<think>30? 40?</think>\n\n85 / 100", 85),
        ("0", 0),
        ("100", 100),
        ("100.5", None),
        ("-5", None),
        ("8 5", None),
        ("85 or 90", None),
        ("85%", None),
        ("", None),
        ("9" * 400, None),
    ],
)
def test_a_score_is_all_that_a_reply_may_hold(reply, score):
    assert score_of(reply) == score


def test_the_docs_have_the_prompt():
    docs = Path(__file__).parents[2] / "docs" / "evaluation.md"
    assert f"```text\n{judge.PROMPT}\n```" in docs.read_text(encoding="utf-8")


def test_a_key_that_cannot_be_sent_is_one_line(path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(configurator.UserError, match="OPENAI_API_KEY has characters that no key"):
        judged(Judge("http://127.0.0.1:9/v1", "m"), str(path))
