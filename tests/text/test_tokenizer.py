"""Ids against transformers and tiktoken, folders that round-trip, and what is refused."""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from configurator import UserError
from plaingpt.text import bpe as bpe_module
from plaingpt.text.tokenizer import END_OF_TEXT, Tokenizer

# The names under which tiktoken keeps vocab.bpe and encoder.json: the sha1 of their addresses.
GPT2_FILES = [
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
]
CACHE = os.environ.get("TIKTOKEN_CACHE_DIR")
HAS_GPT2 = CACHE is not None and all((Path(CACHE) / name).is_file() for name in GPT2_FILES)
needs_gpt2 = pytest.mark.skipif(
    not HAS_GPT2, reason="TIKTOKEN_CACHE_DIR does not hold GPT-2's vocabulary files"
)

ODD = [
    "",
    " ",
    "plain text, it's we'll I'VE don't",
    "a  b   c    d",
    "x" + " " * 3000 + "y" + "\n" * 3000,
    "\t\t\n\r\n \x0b\x0c\x1c\x1f\x85\xa0\u2003\u2028\u3000\u180e\u200b\ufeffx",
    "\x00\x01\x02 \x7f \x80",
    "naïve Straße ½ x² ٣ Ⅷ 日本語。 привет",
    "e\u0301 \u0308 a\u0300\u0301\u0302",
    "😀 👩‍👩‍👧 🏳️‍🌈 \U0001f9d1\U0001f3fd",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|><|endoftext|> <|im_start|>",
    "\U0010ffff \ue000 \ufffd",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # ok\n",
]


def fuzz(count, seed=0) -> list[str]:
    """Strings of runs of white space, words, numbers, emoji, contractions, and any characters."""
    rng = random.Random(seed)

    def any_char():
        while unicodedata.category(char := chr(rng.randrange(0x110000))) == "Cs":
            pass
        return char

    pieces = [
        lambda: " " * rng.randint(1, 9),
        lambda: "".join(rng.choices(" \t\n\r\x0b\x85\xa0\u2003", k=rng.randint(1, 5))),
        lambda: "".join(rng.choices("abcdeéßжあ", k=rng.randint(1, 8))),
        lambda: str(rng.randrange(10**6)),
        lambda: rng.choice(["'s", "'ll", "'T", "'re", "don't", END_OF_TEXT, "<|", "|>"]),
        lambda: rng.choice(["😀", "👩‍👩‍👧", "🇩🇪", "e\u0301", "٣", "Ⅷ"]),
        lambda: "".join(rng.choices("!?.,;:-_#\"'()[]{}", k=rng.randint(1, 4))),
        lambda: chr(rng.randrange(128)),
        lambda: chr(rng.randrange(0x80, 0x3000)),
        any_char,
    ]
    return ["".join(rng.choice(pieces)() for _ in range(rng.randint(1, 12))) for _ in range(count)]


TEXTS = ODD + fuzz(400)


@pytest.fixture(scope="module")
def bpe(tiny_text) -> Tokenizer:
    """Trained on text, and on the strings that it is then tried on, so that merges meet them."""
    return Tokenizer.train([tiny_text, *TEXTS], 1000)


@pytest.fixture(params=["bytes", "bpe", pytest.param("gpt2", marks=needs_gpt2)])
def tokenizer(request, bpe) -> Tokenizer:
    return bpe if request.param == "bpe" else getattr(Tokenizer, request.param)()


@pytest.fixture
def folder(tokenizer, tmp_path) -> Path:
    tokenizer.save(tmp_path)
    return tmp_path


# --- ids


def test_every_text_comes_back(tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_are_below_the_vocabulary_and_text_never_ends_it(tokenizer):
    assert tokenizer.eot_id == tokenizer.vocab_size - 1
    for text in TEXTS:
        assert all(0 <= i < tokenizer.eot_id for i in tokenizer.encode(text))


def test_bytes_are_their_own_ids():
    tokenizer = Tokenizer.bytes()
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (257, 256)
    for text in TEXTS:
        assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode([104, 105, 256, 0]) == "hi<|endoftext|>\x00"


def test_invalid_utf8_becomes_replacement_characters():
    assert Tokenizer.bytes().decode([0xF0, 0x9F, 97, 0xFF]) == "\ufffda\ufffd"


@pytest.mark.parametrize("texts", [TEXTS, [text for text in TEXTS if "<|end" not in text], [""]])
def test_many_texts_at_once_are_each_alone(tokenizer, texts):
    alone = [[*tokenizer.encode(text), tokenizer.eot_id] for text in texts]
    ids, ends = tokenizer.encode_joined(texts)
    assert ids.dtype == np.uint16
    assert [part.tolist() for part in np.split(ids, ends)] == [*alone, []]


def test_transformers_gives_the_same_ids(tokenizer, folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids) == text
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot_id


def test_merges_shorten_text(bpe, tiny_text):
    assert bpe.vocab_size == 1000
    assert len(bpe.encode(tiny_text)) < 0.5 * len(tiny_text.encode())


@needs_gpt2
def test_gpt2_is_openais():
    theirs = tiktoken.get_encoding("gpt2")
    ours = Tokenizer.gpt2()
    assert (ours.vocab_size, ours.eot_id) == (50257, 50256)
    assert ours.encode("Hello world") == [15496, 995]
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode_ordinary(text)


# --- training


@pytest.mark.parametrize("vocab_size", [257, 258, 300])
def test_a_vocabulary_has_the_size_that_was_asked_for(tiny_text, vocab_size):
    assert Tokenizer.train([tiny_text], vocab_size).vocab_size == vocab_size


def test_little_text_gives_a_smaller_vocabulary():
    tokenizer = Tokenizer.train(["abab"], 1000)
    assert 257 < tokenizer.vocab_size < 270
    assert tokenizer.encode("abab") == [tokenizer.eot_id - 1]
    assert tokenizer.encode("ba") == [98, 97]
    assert Tokenizer.train([], 1000).vocab_size == 257


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_show_how_far_training_is(tiny_text, monkeypatch, capsys, terminal):
    def texts():
        yield tiny_text
        time.sleep(0.1)

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(bpe_module, "LOG_SECONDS", 0.01)
    Tokenizer.train(texts(), 5000)
    err = capsys.readouterr().err
    size = len(tiny_text.encode()) / 1000
    assert f"BPE: reading, {size:.3g} kB of text, 0 s\n" in err
    assert f"BPE: merging up to 4,999 tokens, {size:.3g} kB of text, " in err


def test_an_error_in_the_text_stops_training():
    def texts():
        yield "some text"
        raise UserError("the text has gone")

    with pytest.raises(UserError, match="the text has gone"):
        Tokenizer.train(texts(), 300)


@pytest.mark.parametrize("vocab_size", [256, 0, -1, 65537])
def test_a_vocabulary_that_does_not_fit_is_refused(vocab_size):
    with pytest.raises(ValueError, match=f"from 257 to 65536, not {vocab_size}"):
        Tokenizer.train(["text"], vocab_size)


def test_training_is_the_same_each_time(tiny_text):
    one, other = (Tokenizer.train([tiny_text], 400) for _ in range(2))
    assert one.ranks == other.ranks


def test_text_cannot_train_the_end_of_text(tmp_path):
    tokenizer = Tokenizer.train([END_OF_TEXT * 100], 1000)
    assert END_OF_TEXT.encode() not in tokenizer.ranks
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


# --- folders


def test_a_saved_tokenizer_loads_as_itself(tokenizer, folder):
    loaded = Tokenizer.load(folder)
    assert loaded.ranks == tokenizer.ranks
    assert loaded.fingerprint == tokenizer.fingerprint
    assert Tokenizer.load(str(folder)).vocab_size == tokenizer.vocab_size
    assert sorted(path.name for path in folder.iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_different_tokenizers_have_different_fingerprints(bpe, tiny_text):
    more = Tokenizer.train([tiny_text], 400)
    fewer = Tokenizer.train([tiny_text], 399)
    swapped = dict(more.ranks)
    first, second = list(swapped)[300:302]
    swapped[first], swapped[second] = swapped[second], swapped[first]
    swapped = dict(sorted(swapped.items(), key=lambda item: item[1]))
    made = [Tokenizer.bytes(), bpe, more, fewer, Tokenizer(swapped)]
    assert len({tokenizer.fingerprint for tokenizer in made}) == 5
    assert Tokenizer.bytes().fingerprint == Tokenizer.bytes().fingerprint


def test_gpt2s_own_kind_of_file_loads(bpe, tmp_path):
    """Bytes in GPT-2's order, merges as "a b", as transformers writes and the hub keeps them."""
    by_spelling = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.save(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    merges = model["merges"]
    words = [*sorted(by_spelling), *(a + b for a, b in merges), END_OF_TEXT]
    theirs = GPT2TokenizerFast(
        vocab={word: number for number, word in enumerate(words)},
        merges=[tuple(pair) for pair in merges],
    )
    theirs.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "tokenizer.json"
    for old_merges in (False, True):
        content = json.loads(path.read_text())
        if old_merges:
            content["model"]["merges"] = [" ".join(pair) for pair in merges]
        path.write_text(json.dumps(content))
        ours = Tokenizer.load(tmp_path / "theirs")
        for text in TEXTS:
            if END_OF_TEXT not in text:
                assert ours.encode(text) == theirs(text)["input_ids"]
    assert ours.fingerprint != bpe.fingerprint


@pytest.fixture
def refusal(bpe, tmp_path):
    """Save a tokenizer, change its tokenizer.json, and return why it is refused."""

    def change(edit) -> str:
        bpe.save(tmp_path)
        path = tmp_path / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        edit(content)
        path.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(ValueError) as caught:
            Tokenizer.load(tmp_path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    return change


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="has no tokenizer.json"):
            Tokenizer.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"3", b"{}", b'{"model": {}}'])
def test_garbage_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json.*; expected a byte-level BPE"):
        Tokenizer.load(tmp_path)


def test_a_word_piece_tokenizer_is_refused(tmp_path):
    words = {"[UNK]": 0, "a": 1, "##b": 2}
    theirs = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    theirs.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="expected a byte-level BPE"):
        Tokenizer.load(tmp_path)


def test_ids_out_of_order_are_refused(refusal):
    def swap(content):
        vocab = content["model"]["vocab"]
        first, second = list(vocab)[300:302]
        vocab[first], vocab[second] = vocab[second], vocab[first]

    assert "its ids must be in the order of merges" in refusal(swap)


def test_an_id_of_two_tokens_is_refused(refusal):
    def repeat(content):
        vocab = content["model"]["vocab"]
        vocab[next(word for word, number in vocab.items() if number == 300)] = 299

    assert "the id 299 belongs to more than one token" in refusal(repeat)


def test_an_id_left_out_is_refused(refusal):
    def remove(content):
        vocab = content["model"]["vocab"]
        del vocab[list(vocab)[400]]

    assert "no token has the id 400" in refusal(remove)


def test_a_merge_left_out_is_refused(refusal):
    assert "ids must be in the order" in refusal(lambda content: content["model"]["merges"].pop(9))


def test_a_merge_of_no_earlier_token_is_refused(refusal):
    def split_elsewhere(content):
        vocab, merges = content["model"]["vocab"], content["model"]["merges"]
        for place, (a, b) in enumerate(merges):
            if len(a) > 1 and a[1:] + b not in vocab:
                merges[place] = [a[:1], a[1:] + b]
                return

    assert "which is not an earlier token" in refusal(split_elsewhere)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content["model"]["merges"].append("a b c"),
            "does not consist of two tokens",
        ),
        (lambda content: content["model"]["merges"].append([1, 2]), "model.merges["),
        (lambda content: content["model"]["vocab"].update(a=64.5), "model.vocab[…]: expected a"),
        (lambda content: content["model"]["vocab"].update(a=-1), "vocab[…]: expected a whole"),
        (lambda content: content["model"]["vocab"].update(a=10**30), "vocab[…]: expected a whole"),
        (lambda content: content["added_tokens"][0].update(content=7), "added_tokens[0].content"),
        (lambda content: content["added_tokens"][0].update(content=""), "added_tokens[0].content"),
        (lambda content: content["added_tokens"].append({"id": 1}), "missing field content"),
        (lambda content: content["model"]["vocab"].update({" ": 500}), "spells a byte as ' '"),
    ],
)
def test_a_field_of_another_kind_is_named(refusal, change, message):
    assert message in refusal(change)


def test_a_name_that_is_not_utf8_is_refused(refusal):
    def append(content):
        next_id = len(content["model"]["vocab"])
        content["added_tokens"].append({"id": next_id, "content": "\udcff", "special": True})

    assert "is not UTF-8" in refusal(append)


def test_an_end_of_text_of_another_kind_is_refused(bpe, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": ["</s>"]}')
    with pytest.raises(UserError, match=r"tokenizer_config\.json: eos_token: expected a string or"):
        Tokenizer.load(tmp_path)


def test_tokens_of_many_thousand_bytes_load_and_save_at_once(tmp_path):
    """Deriving their merges again would take hours."""
    tokenizer = Tokenizer.bytes()
    doubled = [b"a" * 2**power for power in range(17)]
    merges = [(half, half) for half in doubled[:-1]]
    ranks = tokenizer.ranks | {token: 256 + n for n, token in enumerate(doubled[1:])}
    tokenizer = Tokenizer(ranks)
    tokenizer.merges = merges
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    (tmp_path / "again").mkdir()
    loaded.save(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.merges == merges


def test_more_ids_than_uint16_are_refused(refusal):
    def add(content):
        content["added_tokens"].append({"id": 65536, "content": "<x>", "special": True})

    assert "beyond 65,536" in refusal(add)


def test_an_unknown_end_of_text_is_refused(refusal):
    def rename(content):
        del content["model"]["vocab"][END_OF_TEXT]
        content["added_tokens"] = [
            {"id": id, "content": name, "special": True}
            for id, name in enumerate(("<s>", "</s>"), start=len(content["model"]["vocab"]))
        ]

    said = "does not say which special token ends a text: it has <s>, </s>, but no eos_token"
    assert said in refusal(rename)


@pytest.mark.parametrize("digits", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_the_tokenizer_of_others(tiny_text, tmp_path, digits, first):
    """Special tokens before or behind the others, more than one, an end of another name."""
    pre = tokenizers.pre_tokenizers
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = pre.ByteLevel(add_prefix_space=False)
    theirs.pre_tokenizer = pre.Sequence([pre.Digits(True), byte_level]) if digits else byte_level
    theirs.decoder = tokenizers.decoders.ByteLevel()
    names = ["<s>", "<pad>", "</s>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre.ByteLevel.alphabet(),
        special_tokens=names if first else [],
        show_progress=False,
    )
    theirs.train_from_iterator([tiny_text * 3], trainer)
    theirs.add_special_tokens(names)
    theirs = PreTrainedTokenizerFast(tokenizer_object=theirs, eos_token="</s>")
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert (ours.eot, ours.eot_id) == ("</s>", 2 if first else len(ours.ranks) + 2)
    assert ours.vocab_size == len(theirs)
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    rng = random.Random(0)
    signs = [" ", "  ", "\n", "1", "23", "²", "a", " b", "'s", "'", "!", "é", "…", "\t"]
    odd = "".join(rng.choices(signs, k=3000))
    for text in [*TEXTS, odd, tiny_text]:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == again(text)["input_ids"] == ids
        assert ours.decode(ids) == text
    assert ours.encode("<pad></s>") == again("<pad></s>")["input_ids"] != [1, 2]
    assert ours.decode([ours.eot_id]) == "</s>"
    assert Tokenizer.load(tmp_path / "again").fingerprint == ours.fingerprint
    assert ours.encode_joined(["a", "b</s>"])[0].tolist() == [
        *ours.encode("a"),
        ours.eot_id,
        *ours.encode("b</s>"),
        ours.eot_id,
    ]


def test_a_byte_left_out_is_refused(refusal):
    def replace(content):
        vocab = content["model"]["vocab"]
        content["model"]["vocab"] = {
            "ĀĀĀ" if number == 65 else word: number for word, number in vocab.items()
        }

    assert "its vocabulary lacks the byte 0x41" in refusal(replace)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {
            "pre_tokenizer": {
                "type": "ByteLevel",
                "add_prefix_space": True,
                "trim_offsets": True,
                "use_regex": True,
            }
        },
        {"added_tokens": [{"id": 999, "content": "def", "special": False}]},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
                ],
            }
        },
        {"model": {"dropout": 0.1}},
    ],
    ids=[
        "lower case",
        "other words",
        "a space before",
        "words of its own",
        "groups of digits",
        "random merges",
    ],
)
def test_a_tokenizer_that_would_give_other_ids_is_refused(refusal, change):
    def update(content):
        content.update(change | {"model": content["model"] | change.get("model", {})})

    refusal(update)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_does_not_wait_for_the_merges(monkeypatch):
    """Nothing stops the library, which may take minutes."""
    release = threading.Event()
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))

    def merge(self, texts, trainer):
        timer.start()
        release.wait(60)

    monkeypatch.setattr(tokenizers, "Tokenizer", type("Slow", (), {"train_from_iterator": merge}))
    monkeypatch.setattr(tokenizers.Tokenizer, "__init__", lambda *_: None)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Tokenizer.train(["text"], 300)
    assert time.monotonic() - began < 30
    release.set()


# --- without a network


def test_gpt2_without_its_files_says_what_to_do(no_gpt2_files):
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR.*--tokenizer=bpe or bytes"):
        Tokenizer.gpt2()
    assert list(no_gpt2_files.iterdir()) == []


@needs_gpt2
def test_gpt2_needs_no_network_with_its_files(no_gpt2_files):
    for name in GPT2_FILES:
        shutil.copy(Path(CACHE) / name, no_gpt2_files)
    assert Tokenizer.gpt2().vocab_size == 50257


def test_half_a_surrogate_pair_is_not_a_text():
    with pytest.raises(UnicodeEncodeError):
        Tokenizer.bytes().encode_joined(["\ud800x"])
