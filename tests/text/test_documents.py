"""Items of a source: a text file in parts, a record whole, and what is bad."""

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from plaingpt.text import cutting, documents, encoding
from plaingpt.text.documents import BAD, END, PART, RECORD, Reading
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.text.validation import Validation

READING = Reading("text", "text", "skip", Validation(0.0, 0, math.inf, math.inf))


def stream_of(path):
    [stream] = documents.open_streams((str(path),), (), READING)
    return stream


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def hashed_items(stream, reading=READING):
    items = list(documents.read_items(stream, reading))
    for each in items:
        documents.hash_items(each, reading.validation.seed)
    return items


def kinds_of(items):
    return [kind for each in items for kind in each.table["kind"].tolist()]


def test_a_text_file_is_parts_and_an_end(tmp_path, tiny_text, monkeypatch):
    monkeypatch.setattr(cutting, "BLOCK", 5000)
    (tmp_path / "a.txt").write_text(tiny_text, encoding="utf-8")
    stream = stream_of(tmp_path / "a.txt")
    *parts, end = hashed_items(stream)
    assert len(parts) > 3 and kinds_of([*parts, end]) == [PART] * len(parts) + [END]
    assert "".join(part.texts[0] for part in parts) == tiny_text
    assert sum(part.table["bytes"][0] for part in parts) == len(tiny_text.encode())
    assert end.after.items == 1 and end.after.characters == 0
    for number, part in enumerate(parts):  # reading resumes behind any of them
        stream.position = part.after
        rest = [(each.table.tobytes(), each.texts) for each in hashed_items(stream)]
        assert rest == [(each.table.tobytes(), each.texts) for each in [*parts[number + 1 :], end]]


def encoded_items(path, reading, tokenizer, threads=1):
    """Each item of a file: its row of the table, its ids and mask."""
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as hasher:
        for chunk in encoding.encoded(stream_of(path), reading, tokenizer, pool, hasher, 2):
            for row, start, stop in zip(chunk.table, chunk.stops, chunk.stops[1:]):
                yield row, chunk.ids[start:stop], chunk.mask is not None and chunk.mask[start:stop]


def test_a_record_is_one_item_whatever_its_length(tmp_path, tiny_text):
    texts = ["short", tiny_text * 40]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    assert len(texts[1].encode()) > cutting.BLOCK
    tokenizer = Tokenizer.bytes()
    found = list(encoded_items(path, READING, tokenizer))
    assert len(found) == 2
    for (row, ids, mask), text in zip(found, texts):
        assert row["kind"] == RECORD and mask is False
        assert row["bytes"] == len(text.encode()) and row["tokens"] == len(ids)
        assert np.array_equal(ids, [*text.encode(), tokenizer.eot_id])


def test_a_digest_tells_texts_apart_not_kinds_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    *_, end = hashed_items(stream_of(tmp_path / "a.txt"))
    path = write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    (records,) = hashed_items(stream_of(path))
    one, two = records.table["digest"]
    assert end.table["digest"][0] == one != two


@pytest.mark.parametrize("texts", [["a"], ["a", "b\0", ""]])
def test_the_digest_is_that_of_all_texts(texts, tmp_path):
    """By hashlib alone: validation splits of today have to stay as they are."""
    talk = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    (tmp_path / "a.jsonl").write_text(
        "oops\n" + json.dumps({"messages": talk}) + "\n" + json.dumps({"messages": []}) + "\n"
    )
    reading = replace(READING, template="chat")
    (items,) = documents.read_items(stream_of(tmp_path / "a.jsonl"), reading)
    documents.hash_items(items, 7)
    joined = b"\0".join(text.encode() for text in items.texts)
    digest = hashlib.blake2b(joined, digest_size=8, key=b"7").digest()
    assert items.table["digest"].tolist() == [0, int.from_bytes(digest, "little"), 0]
    assert items.table["kind"].tolist() == [BAD, RECORD, BAD] and len(items.texts) == 4
    assert items.table["bytes"][1] == len(joined) - 3


def test_a_long_record_is_shared_by_the_threads(tmp_path, tiny_text, monkeypatch):
    """Its ids and mask are those of the whole; so is its place among other records."""
    monkeypatch.setattr(cutting, "BLOCK", 1000)
    monkeypatch.setattr(encoding, "CHUNK", 1000)
    tokenizer = Tokenizer.train([tiny_text], 400)
    asked = [{"instruction": "Go on.", "output": text} for text in ("one", tiny_text, "", "two")]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in asked))
    reading = replace(READING, template="alpaca")
    sizes = []
    really_encode = encoding.encode

    def watched(share, *rest):
        sizes.append(sum(map(len, share.texts)))
        return really_encode(share, *rest)

    monkeypatch.setattr(encoding, "encode", watched)
    found = list(encoded_items(path, reading, tokenizer, threads=2))
    assert len(sizes) > 20 and max(sizes) < 3000
    assert [row["kind"] for row, *_ in found] == [RECORD, RECORD, BAD, RECORD]
    for (row, ids, mask), record in zip(found, asked):
        if row["kind"] == RECORD:
            answer = [*tokenizer.encode(record["output"].strip()), tokenizer.eot_id]
            assert ids[mask == 1].tolist() == answer
            assert tokenizer.decode(ids[mask == 0]).endswith("### Response:\n")


def test_a_sample_ends_within_a_long_record(tmp_path, tiny_text, monkeypatch):
    monkeypatch.setattr(cutting, "BLOCK", 1000)
    path = write_jsonl(tmp_path / "a.jsonl", [tiny_text, tiny_text])
    sample = "".join(documents.sample_texts([stream_of(path)], READING, 5000))
    assert 5000 <= len(sample.encode()) < 8000 and tiny_text.startswith(sample)
