"""The command that lets a model write."""

import itertools
import json
import re
import sys
from dataclasses import replace

import jinja2
import pytest
import torch
from conftest import save_checkpoint
from transformers import AutoTokenizer

import sample
from model import GPT, GPTConfig
from plaingpt import generation
from plaingpt.checkpoint import store
from plaingpt.text.templates import CHAT_TEMPLATES, segments
from plaingpt.text.tokenizer import Tokenizer

SHAPE = GPTConfig(vocab_size=320, block_size=16, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a padded vocabulary (320 ids for 257) that draws every byte."""
    model = GPT(SHAPE).init_weights(1)
    with torch.no_grad():
        model.transformer.wte.weight[257:] += 1.0
    return save_checkpoint(tmp_path_factory.mktemp("out"), model)


def run(folder, *arguments) -> int:
    return sample.main([f"--checkpoint={folder}", "--device=cpu", *arguments])


def test_the_text_goes_to_stdout_and_nothing_else(folder, capsys):
    assert run(folder, "--start", "def main(", "--max_new_tokens=40") == 0
    out, err = capsys.readouterr()
    assert out.startswith("def main(") and len(out) > 20
    assert "max_new_tokens = 40" in err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_streamed_and_whole_are_the_same_text(folder, capsys, dtype):
    outs = []
    for flag in ("--stream", "--no-stream"):
        assert run(folder, "--start=é", flag, "--max_new_tokens=60", f"--dtype={dtype}") == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]
    assert outs[0].startswith("é")


def test_samples_are_one_batch_that_a_seed_repeats(folder, capsys):
    many = ["--num_samples=3", "--max_new_tokens=30"]
    outs = []
    for seed in (1, 1, 2):
        assert run(folder, *many, f"--seed={seed}") == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]
    assert outs[0].count("--- sample ") == 3


def test_many_samples_are_drawn_and_printed_batch_by_batch(folder, capsys, monkeypatch):
    """So that a hundred million of them start at once, in little memory."""
    really, sizes = generation.Batch.step, []

    def noted(self):
        sizes.append(len(self.texts))
        return really(self)

    monkeypatch.setattr(generation.Batch, "step", noted)
    cfg = sample.SampleConfig(
        checkpoint=str(folder), device="cpu", num_samples=10**8, max_new_tokens=3
    )
    texts = itertools.islice(sample.samples(cfg), 16)
    assert len(set(texts)) > 8 and sizes == [8] * 6
    printed = capsys.readouterr()
    assert "--- sample 16 of 100,000,000\n" in printed.out
    assert "8 texts with keys and values of 4 tokens each take 0.0 MiB" in printed.err
    assert run(folder, "--num_samples=5", "--max_new_tokens=1", "--batch_size=4") == 0
    assert sizes[6:] == [4, 1]


def test_each_sample_is_that_of_its_own_seed(folder, capsys):
    assert run(folder, "--start=a", "--num_samples=3", "--seed=5", "--dtype=float32") == 0
    texts = re.split("--- sample . of 3\n", capsys.readouterr().out)[1:]
    for seed, text in enumerate(texts, start=5):
        assert run(folder, "--start=a", f"--seed={seed}", "--dtype=float32") == 0
        assert capsys.readouterr().out == text


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_a_file_of_prompts_becomes_json_lines_of_completions(folder, tmp_path, capsys, name):
    prompts = ["Once", "é", "", "Once upon a time there was"]
    as_line = json.dumps if name.endswith("l") else str
    lines = [as_line({"prompt": each} if name.endswith("l") else each) for each in prompts]
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    settings = ["--num_samples=2", "--max_new_tokens=9", "--seed=3", "--dtype=float32"]
    assert run(folder, f"--prompts={path}", "--batch_size=3", *settings) == 0
    out, err = capsys.readouterr()
    assert "1 prompt of up to 26 tokens: the model sees the last 16" in err
    found = [json.loads(line) for line in out.splitlines()]
    expected = [each for each in prompts if each or name.endswith("l")]
    assert [each["prompt"] for each in found] == [p for p in expected for _ in range(2)]
    assert [each["seed"] for each in found] == list(range(3, 3 + len(found)))
    for each in found:
        assert len(each["tokens"]) == len(each["log_probabilities"]) <= 9
        assert all(log <= 0 for log in each["log_probabilities"])
        assert (each["end"] == "stop") == (len(each["tokens"]) < 9 or each["tokens"][-1] == 256)
        start = f"--start={each['prompt']}"
        assert run(folder, start, *settings[1:2], f"--seed={each['seed']}", settings[3]) == 0
        assert capsys.readouterr().out == each["prompt"] + each["completion"] + "\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"prompt": 7}\n',
            "line 2: prompt: expected a string",
        ),
        ("p.jsonl", b'{"prompt": "a"}\n{"promt": "b"}\n', "p.jsonl, line 2: "),
        ("p.jsonl", b'\n{"prompt": \n', "p.jsonl, line 2 is damaged"),
        ("p.txt", b"\n \n", "there are no prompts in "),
        ("p.txt", b"a\xff", "p.txt is not UTF-8 (byte 1)"),
        ("q.txt", None, "has no q.txt"),
    ],
)
def test_a_broken_file_of_prompts_is_one_line(folder, tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run(folder, f"--prompts={tmp_path / name}") == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err


def test_stop_strings_end_a_sample(folder, capsys):
    assert run(folder, "--start=ab", "--dtype=float32") == 0
    whole = capsys.readouterr().out
    stop = whole[10:13]
    assert run(folder, "--start=ab", "--dtype=float32", f"--stop=[{stop!r}]") == 0
    assert capsys.readouterr().out == whole.partition(stop)[0] + "\n"


def test_a_sample_ends_at_the_end_of_text(folder, tmp_path, capsys):
    model = store.load_model(folder)
    with torch.no_grad():  # every logit but that of <|endoftext|> is about 0
        model.transformer.ln_f.bias.copy_(model.transformer.wte.weight[256] * 1e4)
    ends = save_checkpoint(tmp_path, model)
    assert run(ends, "--start=The end.") == 0
    assert run(ends, "--start=The end.", "--num_samples=2") == 0
    expected = "The end.\n--- sample 1 of 2\nThe end.\n--- sample 2 of 2\nThe end.\n"
    assert capsys.readouterr().out == expected


def test_the_prompt_can_come_from_a_file(folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompt.txt").write_text("Über alles", encoding="utf-8-sig")
    assert run(folder, f"--start=FILE:{tmp_path}/prompt.txt", "--max_new_tokens=1") == 0
    assert capsys.readouterr().out.startswith("Über alles")
    (tmp_path / "prompt.txt").write_bytes(b"\xff\xfe")
    assert run(folder, f"--start=FILE:{tmp_path}/prompt.txt") == 2
    assert run(folder, "--start=FILE:nowhere.txt") == 2
    assert run(folder, "--start=FILE:/dev/zero") == 2  # which never ends
    assert "nowhere.txt" in capsys.readouterr().err
    assert run(folder, "--start=FILE:") == 2
    assert "lacks a file name: write --start=FILE:prompt.txt" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompt.txt").write_text("At home")
    assert run(folder, "--start=FILE:~/prompt.txt", "--max_new_tokens=1") == 0
    assert capsys.readouterr().out.startswith("At home")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--temperature=-1", "--top_k=0"], "temperature must be"),
        (["--top_p=0"], "top_p must be above 0"),
        (["--min_p=1.5"], "min_p must be above 0"),
        (["--num_samples=0"], "num_samples must be at least 1"),
        (["--tempreture=1"], "did you mean 'temperature'"),
        (["--device=tpu"], "device 'tpu' is not on this machine"),
        (["--device=cpu:1"], "device 'cpu:1': this machine has 1 CPU device"),
        (["hello"], "neither a config file (*.py) nor --key=value; write --start=hello"),
        (["--stop=['']"], "stop must be non-empty, not ''"),
        (["--repetition_penalty=0"], "repetition_penalty must be a number above 0"),
        (["--start=a", "--prompts=b.txt"], "start cannot be combined with prompts"),
        (["--chat", "--prompts=b.txt"], "chat cannot be combined with start, prompts or"),
        (["--batch_size=100000000", "--num_samples=100000000"], "write fewer side by side"),
        ([f"--checkpoint={__file__}"], f"{__file__} is a file, but a checkpoint is a folder"),
    ],
)
def test_bad_settings_are_one_line_and_status_2(folder, capsys, arguments, message):
    assert run(folder, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err


def test_a_missing_or_foreign_checkpoint_is_one_line(folder, tmp_path, capsys):
    assert run(tmp_path / "nowhere") == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    Tokenizer.bytes().save(tmp_path / "llama")
    assert run(tmp_path / "llama") == 2
    assert "model_type is 'llama'" in capsys.readouterr().err


# --- conversations


@pytest.fixture(scope="module", params=["chat", "alpaca"])
def talker(request, tmp_path_factory):
    """A checkpoint that answers with letters, and ends half of its answers soon."""
    model = GPT(replace(SHAPE, vocab_size=257, block_size=256)).init_weights(1)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.transformer.wte.weight[ord("a") : ord("z")] += 0.5
        model.transformer.wte.weight[256] += 0.55
    tokenizer = Tokenizer.bytes()
    tokenizer.chat_template = CHAT_TEMPLATES[request.param]
    return save_checkpoint(tmp_path_factory.mktemp(request.param), model, tokenizer)


def talk(monkeypatch, folder, *lines, **changes) -> list[str]:
    """The answers to what is typed; a line that is an exception is raised instead."""
    said = iter([*lines, EOFError()])

    def typed(asking):
        line = next(said)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)
    settings = {"checkpoint": str(folder), "chat": True, "device": "cpu", "max_new_tokens": 30}
    return list(sample.samples(sample.SampleConfig(**settings | changes)))


def test_a_conversation_streams_each_answer_and_ends_at_ctrl_d(talker, monkeypatch, capsys):
    answers = talk(monkeypatch, talker, "Hello!", "", "And then?")
    assert len(answers) == 2 and all(answers)
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers) + "\n"
    assert talk(monkeypatch, talker, "Hello!", "And then?", KeyboardInterrupt()) == answers
    for end in ("/exit", "/quit", "exit", "Quit"):
        assert talk(monkeypatch, talker, "Hello!", end, "And then?") == answers[:1]
    monkeypatch.setattr(sys, "stdin", None)  # as after `sample.py <&-`
    assert talk(monkeypatch, talker, "Hello!") == []


def test_what_was_said_counts_until_it_is_reset(talker, monkeypatch, capsys):
    prompts = []
    really = generation.continuation

    def noted(model, tokenizer, prompt, sampling):
        prompts.append(tokenizer.decode(prompt))
        return really(model, tokenizer, prompt, sampling)

    monkeypatch.setattr(generation, "continuation", noted)
    lines = ["/system Be brief.", "One?", "Two?", "/reset", "Three?", "/nothing", "/system x"]
    first, *_ = talk(monkeypatch, talker, *lines)
    err = capsys.readouterr().err
    if "chat" in str(talker):
        assert prompts[0] == "### System:\nBe brief.\n\n### User:\nOne?\n\n### Assistant:\n"
        assert prompts[1] == (
            prompts[0] + first + "<|endoftext|>### User:\nTwo?\n\n### Assistant:\n"
        )
        assert prompts[2] == "### User:\nThree?\n\n### Assistant:\n"
    else:
        assert err.count("trained without system messages") == 2
        assert [p.split("### Instruction:\n")[1] for p in prompts] == [
            f"{word}?\n\n### Response:\n" for word in ("One", "Two", "Three")
        ]
    assert "unknown command /nothing" in err


def test_commands_change_how_tokens_are_drawn(talker, monkeypatch, capsys):
    settings = []
    really = generation.continuation

    def noted(model, tokenizer, prompt, sampling):
        settings.append(sampling)
        return really(model, tokenizer, prompt, sampling)

    monkeypatch.setattr(generation, "continuation", noted)
    lines = ["/temperature 0", "One?", "/temperature 0.5", "/top_k none", "/max_new_tokens 3"]
    lines += ["/seed 7", "/reset", "Two?", "/seed 7", "/reset", "/help", "Two?", "/exit", "Three?"]
    answers = talk(monkeypatch, talker, *lines)
    assert len(answers) == 3 and answers[1] == answers[2] and len(answers[1].encode()) <= 9
    assert (settings[0].temperature, settings[0].max_new_tokens) == (0.0, 30)
    last = settings[-1]
    assert (last.temperature, last.max_new_tokens, last.seed) == (0.5, 3, 7)
    err = capsys.readouterr().err
    assert "temperature = 0.5\n" in err and "/NAME VALUE " in err
    assert ("/system TEXT " in err) == ("chat" in str(talker))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/temperature", "/temperature expects float, not ''"),
        ("/temperature hot", "/temperature expects float, not 'hot'"),
        ("/temperature -1", "temperature must be 0, or at least 0.001 and finite, not -1.0"),
        ("/top_p 1.5", "top_p must be above 0 and at most 1, not 1.5"),
        ("/checkpoint out", "unknown command /checkpoint: /help lists all commands"),
        ("/", "unknown command /: /help lists all commands"),
    ],
)
def test_a_wrong_command_changes_nothing(talker, monkeypatch, capsys, line, said):
    assert talk(monkeypatch, talker, line, "One?") == talk(monkeypatch, talker, "One?")
    assert said in capsys.readouterr().err.splitlines()


def test_a_system_message_needs_a_text(talker, monkeypatch, capsys):
    talk(monkeypatch, talker, "/system", "/system ")
    remembers = "chat" in str(talker)
    said = "/system needs a text" if remembers else "trained without system messages"
    assert capsys.readouterr().err.count(said) == 2


def test_a_full_context_forgets_its_oldest_turns(talker, monkeypatch, capsys):
    answers = talk(monkeypatch, talker, "/system Short.", *(f"Question {n}?" * 2 for n in range(9)))
    assert len(answers) == 9
    err = capsys.readouterr().err
    assert ("the oldest turns are dropped" in err) == ("chat" in str(talker))
    assert talk(monkeypatch, talker, "long " * 100, "Short?", "/reset", "x" * 300) != []
    assert capsys.readouterr().err.count("tokens where 226 fit") == 2


def test_ctrl_c_ends_an_answer_and_keeps_what_there_is(talker, monkeypatch, capsys):
    really = generation.continuation

    def interrupted(*args):
        yield next(really(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "continuation", interrupted)
    answers = talk(monkeypatch, talker, "Hello!", "Go on.")
    assert [len(answer) for answer in answers] == [1, 1]


def test_apply_chat_template_gives_our_ids(talker):
    """To ask with, and as prepare.py writes a whole conversation."""
    theirs, ours = AutoTokenizer.from_pretrained(talker), Tokenizer.load(talker)
    template = "chat" if "chat" in str(talker) else "alpaca"
    turns = [("system", "Be brief. é"), ("user", " Say <b>\n\nit</b>!\n"), ("assistant", "\nIt. ")]
    messages = [{"role": role, "content": content} for role, content in turns]
    if template == "chat":
        record = {"messages": [*messages, *messages[1:]]}
    else:
        record = {"instruction": messages[1]["content"], "output": messages[2]["content"]}
        messages = messages[1:]
    whole = [*messages, *messages[1:]] if template == "chat" else messages
    wanted = []
    for part in segments(record, template, ""):
        wanted += ours.encode(part.text) + [ours.eot_id] * part.ended
    assert theirs.apply_chat_template(whole)["input_ids"] == wanted
    for said in (messages[:-1], [*messages, messages[-2]]):
        asked = theirs.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
        assert asked == generation.prompt_ids(said, ours, 10_000, 10)[0]
        assert theirs.decode(asked) == ours.decode(asked)


def test_apply_chat_template_refuses_what_we_refuse(talker):
    """All lists of up to three of these messages: the same ids, or an error from both."""
    theirs, ours = AutoTokenizer.from_pretrained(talker), Tokenizer.load(talker)
    roles = ("system", "user", "assistant", "tool")
    each = [{"role": role, "content": text} for role in roles for text in ("Yes.", "", " ", None)]
    agreed = refused = 0
    for count in (1, 2, 3):
        for said in itertools.product(each, repeat=count):
            if count == 3 and sum(message["content"] != "Yes." for message in said) > 1:
                continue
            try:
                wanted = generation.prompt_ids(list(said), ours, 10_000, 10)[0]
            except ValueError:
                wanted = None
            try:
                asked = theirs.apply_chat_template(list(said), add_generation_prompt=True)
                found = asked["input_ids"]
            except jinja2.TemplateError:
                found = None
            assert found == wanted, said
            agreed, refused = agreed + (wanted is not None), refused + (wanted is None)
    assert agreed >= 3 and refused > 200


def test_a_model_without_conversations_does_not_chat(folder, capsys):
    assert run(folder, "--chat") == 2
    assert "--chat needs a model that was trained on conversations" in capsys.readouterr().err
    assert run(folder, "--chat", "--start=Hi", "--num_samples=2") == 2
    assert "chat cannot be combined with start, prompts or num_samples" in capsys.readouterr().err


def test_a_stop_token_beyond_the_vocabulary_is_refused(folder, capsys):
    assert run(folder, "--stop_tokens=1,999999") == 2
    assert "stop_tokens: 999,999 is beyond the 257 ids" in capsys.readouterr().err
