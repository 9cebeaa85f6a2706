"""Items of a source: a text file in parts, a record whole, and what is bad."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from plaingpt.text import cutting, documents
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
    monkeypatch.setattr(cutting, "BLOCK", 5000)
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
    assert len(texts[1].encode()) > cutting.BLOCK
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


def test_a_long_record_is_shared_by_the_threads(tmp_path, tiny_text, monkeypatch):
    """Its ids and mask are those of the whole; so is its place among other records."""
    monkeypatch.setattr(cutting, "BLOCK", 1000)
    monkeypatch.setattr(documents, "CHUNK", 1000)
    tokenizer = Tokenizer.train([tiny_text], 400)
    asked = [{"instruction": "Go on.", "output": text} for text in ("one", tiny_text, "", "two")]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in asked))
    reading = replace(READING, template="alpaca")
    sizes = []
    with ThreadPoolExecutor(2) as pool:
        submit = pool.submit

        def watched(encode, share, *rest):
            sizes.append(sum(len(part.text) for part in share))
            return submit(encode, share, *rest)

        pool.submit = watched
        found = list(documents.encoded(stream_of(path), reading, tokenizer, pool, 2))
    assert len(sizes) > 20 and max(sizes) < 3000
    assert [type(item) for item, _, _ in found] == [Record, Record, Bad, Record]
    for (item, ids, mask), record in zip(found, asked):
        if isinstance(item, Record):
            answer = [*tokenizer.encode(record["output"].strip()), tokenizer.eot_id]
            assert ids[mask == 1].tolist() == answer
            assert tokenizer.decode(ids[mask == 0]).endswith("### Response:\n")


def test_a_sample_ends_within_a_long_record(tmp_path, tiny_text, monkeypatch):
    monkeypatch.setattr(cutting, "BLOCK", 1000)
    path = write_jsonl(tmp_path / "a.jsonl", [tiny_text, tiny_text])
    sample = "".join(documents.sample_texts([stream_of(path)], READING, 5000))
    assert 5000 <= len(sample.encode()) < 8000 and tiny_text.startswith(sample)
