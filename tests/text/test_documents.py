"""Items of a source: a text file in parts, a record whole, and what is bad."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from configurator import UserError
from plaingpt.text import documents, text_files
from plaingpt.text.documents import Bad, End, Part, Reading, Record
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.text.validation import Validation

READING = Reading("text", "text", "skip", Validation(0.0, 0, math.inf, math.inf))


def stream_of(path):
    [stream] = documents.open_streams((str(path),), (), READING)
    return stream


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_a_text_file_is_parts_and_an_end(tmp_path, tiny_text, monkeypatch):
    monkeypatch.setattr(text_files, "BLOCK", 5000)
    (tmp_path / "a.txt").write_text(tiny_text, encoding="utf-8")
    stream = stream_of(tmp_path / "a.txt")
    *parts, end = documents.read_items(stream, READING)
    assert len(parts) > 3 and all(isinstance(part, Part) for part in parts)
    assert "".join(part.text for part in parts) == tiny_text
    assert sum(part.bytes for part in parts) == len(tiny_text.encode())
    assert isinstance(end, End) and end.after.items == 1 and end.after.characters == 0
    for number, part in enumerate(parts):  # reading resumes behind any of them
        stream.position = part.after
        assert list(documents.read_items(stream, READING)) == [*parts[number + 1 :], end]


def test_a_record_is_one_item_whatever_its_length(tmp_path, tiny_text):
    texts = ["short", tiny_text * 40]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    assert len(texts[1].encode()) > text_files.BLOCK
    tokenizer = Tokenizer.bytes()
    with ThreadPoolExecutor(1) as pool:
        found = list(documents.encoded(stream_of(path), READING, tokenizer, pool, 2))
    assert all(isinstance(item, Record) for item, _, _ in found)
    for (item, ids, mask), text in zip(found, texts):
        assert item.bytes == len(text.encode()) and mask is None
        assert np.array_equal(ids, [*text.encode(), tokenizer.eot_id])


def test_a_digest_tells_texts_apart_not_kinds_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    *_, end = documents.read_items(stream_of(tmp_path / "a.txt"), READING)
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    one, two = documents.read_items(stream_of(path), READING)
    assert end.digest == one.digest != two.digest


def test_a_text_that_cannot_be_encoded_is_a_bad_record_or_a_bad_file(tmp_path, monkeypatch):
    really_encode = Tokenizer.encode_joined

    def encode_joined(tokenizer, texts):
        if any("bad" in text for text in texts):
            raise UserError("too odd")
        return really_encode(tokenizer, texts)

    monkeypatch.setattr(Tokenizer, "encode_joined", encode_joined)
    path = write_jsonl(tmp_path / "a.jsonl", ["good", "bad", "fine"])
    (tmp_path / "b.txt").write_text("bad")
    with ThreadPoolExecutor(1) as pool:

        def items(path):
            return list(documents.encoded(stream_of(path), READING, Tokenizer.bytes(), pool, 2))

        kinds = [(type(item), len(ids)) for item, ids, _ in items(path)]
        assert kinds == [(Record, 5), (Bad, 0), (Record, 5)]
        with pytest.raises(UserError, match=r"b\.txt: too odd"):
            items(tmp_path / "b.txt")
