"""Records → text: what counts in the loss, and which records are invalid."""

import json

import pytest

from plaingpt.text.templates import Segment, segments

ASK = {"role": "user", "content": " What? \n"}
ANSWER = {"role": "assistant", "content": "\nThat.\n"}
SYSTEM = {"role": "system", "content": "Be brief."}


def text_of(parts):
    """The document, `|` where <|endoftext|> is, what counts in brackets."""
    words = ((part.text, "|" * part.ended, part.counted) for part in parts)
    return "".join(f"[{text}{end}]" if counted else text + end for text, end, counted in words)


def test_plain_text_is_a_field_or_a_string():
    assert segments({"body": " as it is\n"}, "text", "body") == [Segment(" as it is\n")]
    assert segments("just this", "text", "text") == [Segment("just this")]


def test_alpaca_in_its_own_words():
    record = {"instruction": "Add {these}.", "input": "1, 2", "output": "3\n"}
    assert text_of(segments(record, "alpaca", "")) == (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {these}.\n\n### Input:\n1, 2\n\n### Response:\n[3|]"
    )
    for without in ({"input": ""}, {"input": None}, {"input": " \n"}):
        assert text_of(segments(record | without, "alpaca", "")) == (
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nAdd {these}.\n\n### Response:\n[3|]"
        )
    del record["input"]
    assert "### Input" not in text_of(segments(record, "alpaca", ""))


def test_every_answer_of_a_chat_counts_and_nothing_else():
    wanted = (
        "### System:\nBe brief.\n\n### User:\nWhat?\n\n### Assistant:\n[That.|]"
        "### User:\nWhat?\n\n### Assistant:\n[That.|]"
    )
    messages = [SYSTEM, ASK, ANSWER, ASK, ANSWER]
    assert text_of(segments({"messages": messages}, "chat", "")) == wanted
    assert text_of(segments({"messages": json.dumps(messages)}, "chat", "")) == wanted
    messages[0] = {"role": "system", "content": ""}
    assert (
        text_of(segments({"messages": messages}, "chat", ""))
        == wanted.partition("Be brief.\n\n")[2]
    )
    messages[0] = SYSTEM
    roles = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [{"from": roles[each["role"]], "value": each["content"]} for each in messages]
    assert text_of(segments({"conversations": shared}, "chat", "")) == wanted


def test_synth_thinks_before_it_answers():
    record = {"query": "Why?", "synthetic_reasoning": "Well …", "synthetic_answer": "So."}
    assert text_of(segments(record, "synth", "")) == (
        "### User:\nWhy?\n\n### Assistant:\n[<think>\nWell …\n</think>\n\nSo.|]"
    )
    record["synthetic_reasoning"] = None
    assert text_of(segments(record, "synth", "")) == "### User:\nWhy?\n\n### Assistant:\n[So.|]"


@pytest.mark.parametrize(
    ("template", "record", "said"),
    [
        ("text", {"text": ""}, "empty"),
        ("text", {"text": None}, "empty"),
        ("text", {"body": "x"}, "no field 'text'"),
        ("text", {"text": 5}, "text is not a string"),
        ("text", [1], "not an object"),
        ("text", None, "not an object"),
        ("alpaca", {"instruction": "x", "output": " \n"}, "empty output"),
        ("alpaca", {"instruction": "x", "input": 3, "output": "y"}, "input is not a string"),
        ("alpaca", {"output": "y"}, "no field 'instruction'"),
        ("alpaca", "x", "not an object"),
        ("synth", {"query": "x", "synthetic_answer": "y"}, "no field 'synthetic_reasoning'"),
        ("chat", {"messages": [ASK]}, "the last message is not an answer"),
        ("chat", {"messages": [ASK, ANSWER, ASK]}, "the last message is not an answer"),
        ("chat", {"messages": []}, "no messages"),
        ("chat", {"messages": [ASK, {"role": "assistant", "content": ""}]}, "empty message"),
        ("chat", {"messages": [SYSTEM]}, "the last message is not an answer"),
        ("chat", {"messages": [ANSWER]}, "message 1 is out of turn: 'assistant', not 'user'"),
        (
            "chat",
            {"messages": [SYSTEM, ANSWER]},
            "message 2 is out of turn: 'assistant', not 'user'",
        ),
        (
            "chat",
            {"messages": [ASK, ASK, ANSWER]},
            "message 2 is out of turn: 'user', not 'assistant'",
        ),
        ("chat", {"messages": [ASK, {"role": "system", "content": ""}, ANSWER]}, "empty message"),
        (
            "chat",
            {"messages": [ASK, SYSTEM, ANSWER]},
            "message 2 is out of turn: 'system', not 'assistant'",
        ),
        ("chat", {"messages": [ASK, {"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
        ("chat", {"messages": [{"role": ["user"], "content": "x"}]}, r"unknown role \['user'\]"),
        ("chat", {"messages": "[{"}, "messages are not JSON"),
        ("chat", {"messages": ["hello"]}, "no list of messages"),
        ("chat", {"text": "x"}, "no list of messages"),
        ("chat", 5, "not an object"),
    ],
)
def test_an_invalid_record_is_explained_in_a_few_words(template, record, said):
    with pytest.raises(ValueError, match=f"^{said}$"):
        segments(record, template, "text")
