"""The benchmark runs, and measures what it says."""

import json

import pytest

import bench


@pytest.mark.parametrize("documents", ["jsonl", "txt", "tiny"])
def test_prepare_is_measured_beside_tiktoken(tmp_path, capsys, documents):
    output = tmp_path / "out" / "bench.json"
    arguments = ["--corpus_mb=1", "--repeats=2", "--tokenizer=bytes", f"--output={output}"]
    arguments += [f"--documents={documents}", f"--folder={tmp_path}"]
    assert bench.main(["prepare", *arguments]) == 0
    result = json.loads(output.read_text())
    table = result["table"]
    assert len(table["ratio"]) == len(table["prepare.py, MB/s"]) == 2
    assert 0.05 < table["peak memory of prepare.py, GiB"][0] < 2
    assert "ratio" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_to_measure_must_be_said(capsys):
    assert bench.main([]) == bench.main(["nothing"]) == 2
    assert "python bench.py prepare" in capsys.readouterr().err
