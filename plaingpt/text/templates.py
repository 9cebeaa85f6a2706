"""
Records → text, and which of it counts in the loss.

- `text`: one field, all of which counts.
- `alpaca`: `instruction`, `input` (may be missing or empty), `output`, in Stanford Alpaca's words.
- `chat`: `messages` (or `conversations`), a list or its JSON, of {role, content} or ShareGPT's
  {from, value}.
- `synth`: PleIAs/SYNTH's `query`, `synthetic_reasoning` and `synthetic_answer`, as a chat whose
  answer begins with <think>…</think>.

Except with `text`, only answers count, each with the `<|endoftext|>` that ends it, and all fields
are stripped of surrounding white space: a question encodes to the same ids with and without its
answer.
"""

import json
from collections.abc import Collection, Sequence
from typing import Any, Literal, NamedTuple

from configurator import UserError

TemplateName = Literal["text", "alpaca", "chat", "synth"]
ALPACA = (
    "Below is an instruction that describes a task{paired}. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}"
)
PAIRED = ", paired with an input that provides further context"
HEADINGS = {"system": "### System:\n", "user": "### User:\n", "assistant": "### Assistant:\n"}
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant"}
ROLES |= {"gpt": "assistant", "bot": "assistant", "model": "assistant"}


# The same in Jinja, for apply_chat_template. Saved models are recognized by these exact strings:
# after any change, the models of today would no longer count as chat models.
NO_SYSTEM = "this model was trained without system messages"
CHECKED = (
    "{% set next = namespace(role='user') %}{% for message in messages %}"
    "{% if message['role'] == 'system' and loop.first and message['content'] == '' %}"
    "{% elif not (message['content'] or '') | trim %}{{ raise_exception('empty message') }}"
    "{% elif message['role'] == 'system' and loop.first %}"
    "{% elif message['role'] != next.role %}"
    "{{ raise_exception('after a system message, users and assistants take turns') }}"
    "{% else %}{% set next.role = 'assistant' if next.role == 'user' else 'user' %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt and next.role == 'user' %}"
    "{{ raise_exception('the last message is no question') }}{% endif %}"
)
CHAT = CHECKED + (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '### Assistant:\n' + message['content'] | trim + eos_token }}"
    "{% elif message['content'] != '' %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] | trim + '\n\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
QUESTION = ALPACA.format(paired="", instruction="' + message['content'] | trim + '")
INSTRUCTION = (
    CHECKED
    + (  # each instruction stands alone: earlier messages are left out
        "{% if messages[0]['role'] == 'system' and messages[0]['content'] != '' %}"
        "{{ raise_exception('" + NO_SYSTEM + "') }}{% endif %}"
        "{% for message in (messages[-1:] if add_generation_prompt else messages[-2:]) %}"
        "{% if message['role'] == 'assistant' %}{{ message['content'] | trim + eos_token }}"
        "{% elif message['role'] == 'user' %}"
        "{{ '" + QUESTION.replace("\n", "\\n") + "\\n\\n### Response:\\n' }}{% endif %}{% endfor %}"
    )
)
CHAT_TEMPLATES = {"chat": CHAT, "synth": CHAT, "alpaca": INSTRUCTION}

FIELDS: dict[TemplateName, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output"),
    "chat": ("messages", "conversations"),
    "synth": ("query", "synthetic_reasoning", "synthetic_answer"),
}


def fits(template: TemplateName, names: Collection[str], text_field: str = "text") -> bool:
    """Whether a record with fields of these names has those that a template needs."""
    if template == "text":
        return text_field in names
    if template == "chat":
        return any(name in names for name in FIELDS["chat"])
    return all(name in names for name in FIELDS[template] if name != "input")


class Segment(NamedTuple):
    """Part of a document."""

    text: str
    counted: bool = True  # in the loss
    ended: bool = True  # by <|endoftext|>, which counts if the text does


def plain_texts(records: Sequence[Any], text_field: str) -> list[str] | None:
    """The texts of records for the template `text`, or None if one of them has to be looked at by
    itself, in `segments`, which takes longer."""
    try:
        texts = [record[text_field] for record in records]
    except (KeyError, TypeError):
        texts = list(records)
    is_plain = set(map(type, texts)) == {str} and all(map(str.strip, texts))
    return texts if is_plain else None


def segments(record: Any, template: TemplateName, text_field: str) -> list[Segment]:
    """A record as a document. Raises UserError, in a few words, for an invalid record."""
    if template == "text":
        text = record if isinstance(record, str) else field(record, text_field)
        if not text.strip():
            raise UserError("empty")
        return [Segment(text)]
    if template == "chat":
        return chat(messages_of(record))
    if template == "synth":
        reasoning = field(record, "synthetic_reasoning").strip()
        answer = required_text(record, "synthetic_answer")
        if reasoning:
            answer = f"<think>\n{reasoning}\n</think>\n\n{answer}"
        question = {"role": "user", "content": required_text(record, "query")}
        return chat([question, {"role": "assistant", "content": answer}])
    return alpaca(record)


def alpaca(record: Any) -> list[Segment]:
    given = record.get("input") if isinstance(record, dict) else None
    given = "" if given is None else field(record, "input").strip()
    prompt = ALPACA.format(
        paired=PAIRED if given else "", instruction=required_text(record, "instruction")
    )
    if given:
        prompt += f"\n\n### Input:\n{given}"
    return [
        Segment(prompt + "\n\n### Response:\n", counted=False, ended=False),
        Segment(required_text(record, "output")),
    ]


def prompt(messages: list[dict[str, Any]], chat_template: str) -> list[Segment]:
    """The prompt for an answer to the last of `messages`, by one of CHAT_TEMPLATES.

    INSTRUCTION leaves out all earlier messages. Raises UserError for messages that do not form a
    conversation, and for a system message, which INSTRUCTION has no place for.
    """
    conversation = chat(messages, answered=False)
    if chat_template != INSTRUCTION:
        return conversation
    if messages[0]["role"] == "system" and messages[0]["content"]:
        raise UserError(NO_SYSTEM)
    return alpaca({"instruction": messages[-1]["content"], "output": "…"})[:1]


def chat(messages: list[dict[str, Any]], answered: bool = True) -> list[Segment]:
    """Messages (role and content) as text: a heading per turn, `<|endoftext|>` after each answer.
    If the last message is not `answered` yet, the text ends where its answer begins.

    Raises UserError for an unknown role, an empty message, roles out of turn (a system message may
    come first, then user and assistant take turns), and if the last message is not an answer (not
    a question, where it is not `answered`).
    """
    parts, unanswered, expected = [], "", "user"
    for place, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or role not in HEADINGS:
            raise UserError(f"unknown role {role!r}")
        if role == "system" and content == "" and place == 0:  # in every chat of some datasets
            continue
        if not isinstance(content, str) and content is not None:
            raise UserError("a message's content is not a string")
        if not content or not content.strip():
            raise UserError("empty message")
        if role == expected:
            expected = "assistant" if expected == "user" else "user"
        elif role != "system" or place > 0:
            raise UserError(f"message {place + 1} is out of turn: {role!r}, not {expected!r}")
        unanswered += HEADINGS[role]
        if role == "assistant":
            parts += [Segment(unanswered, counted=False, ended=False), Segment(content.strip())]
            unanswered = ""
        else:
            unanswered += content.strip() + "\n\n"
    if not messages:
        raise UserError("no messages")
    if answered != (expected == "user") or (answered and not parts):
        raise UserError("the last message is not " + ("an answer" if answered else "a question"))
    if not answered:
        parts.append(Segment(unanswered + HEADINGS["assistant"], counted=False, ended=False))
    return parts


def messages_of(record: Any) -> list[dict[str, Any]]:
    """The messages of a record: a list of objects, or that as JSON."""
    if not isinstance(record, dict):
        raise UserError("not an object")
    messages = record.get("messages", record.get("conversations"))
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError):
            raise UserError("messages are not JSON") from None
    if not isinstance(messages, list) or not all(isinstance(each, dict) for each in messages):
        raise UserError("no list of messages")
    return [normalized(message) for message in messages]


def normalized(message: dict[str, Any]) -> dict[str, Any]:
    """A message, or one of ShareGPT's kind, as role and content."""
    role = message.get("role", message.get("from"))
    role = ROLES.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": message.get("content", message.get("value"))}


def required_text(record: Any, name: str) -> str:
    text = field(record, name).strip()
    if not text:
        raise UserError(f"empty {name}")
    return text


def field(record: Any, name: str) -> str:
    """The text of a field, "" for None. Raises UserError for a missing field or another type."""
    if not isinstance(record, dict):
        raise UserError("not an object")
    if name not in record:
        raise UserError(f"no field {name!r}")
    if record[name] is None:
        return ""
    if not isinstance(record[name], str):
        raise UserError(f"{name} is not a string")
    return record[name]
