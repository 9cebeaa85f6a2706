"""config/data_*.py from start to end, on small folders of the layout and schema that their
repositories have on the hub: `datasets` opens such a folder with the calls that open the hub."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import prepare
from plaingpt.text import dataset

REPO = Path(__file__).parent.parent
RECIPES = sorted(path.name for path in (REPO / "config").glob("data_*.py"))


def web(number):
    """A row of FineWeb-Edu; FineWeb's and OpenWebText's columns are some of these."""
    return {
        "text": f"Page number {number}. " * 5,
        "id": f"<urn:uuid:{number}>",
        "dump": "CC-MAIN-2013-20",
        "url": f"http://example.com/{number}",
        "file_path": "s3://…",
        "language": "en",
        "language_score": 0.9,
        "token_count": 25,
        "score": 3.1,
        "int_score": 3,
    }


def only(row, *names):
    return {name: row[name] for name in names}


def story(number):
    return {"text": f"Once there was a cat number {number}." if number != 3 else ""}


def synth(number):
    known = {name: f"{name} {number}" for name in ("synth_id", "query", "script", "constraints")}
    reasoning = "" if number == 2 else f"Is {number} even?"
    answer = "" if number == 3 else f"It is {number}."
    return {
        **known,
        "language": "en",
        "exercise": "math",
        "query_seed_url": None,
        "synthetic_reasoning": reasoning,
        "synthetic_answer": answer,
        "words": number,
    }


def talk(number):
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": f"Say {number}."},
        {"role": "assistant", "content": f"{number}."},
    ]
    return {"messages": json.dumps(messages)}


def alpaca(number):
    given = f"{number}" if number % 2 else ""
    return {"instruction": "Count.", "input": given, "output": f"{number + 1}", "text": "…"}


def hub(folder: Path, card: str, files: dict) -> None:
    for name, rows in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    if card:
        (folder / "README.md").write_text(f"---\nconfigs:\n{card}---\n")


SAMPLE = """- config_name: default
  data_files: [{split: train, path: data/*/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
"""


def fineweb(folder):
    rows = [web(number) for number in range(40)]
    files = {f"sample/10BT/00{i}_00000.parquet": rows[20 * i : 20 * i + 20] for i in (0, 1)}
    hub(folder, SAMPLE, {**files, "data/CC-MAIN-2013-20/000.parquet": rows[:1]})
    return 40


def openwebtext(folder):
    rows = [only(web(number), "text") for number in range(3000)]
    card = (
        "- config_name: plain_text\n"
        "  data_files: [{split: train, path: plain_text/train-*}]\n  default: true\n"
    )
    files = {f"plain_text/train-0000{i}-of-00002.parquet": rows[i::2] for i in (0, 1)}
    hub(folder, card, files)
    return 3000


def tinystories(folder):
    rows = [story(number) for number in range(20)]
    files = {"data/train-00000-of-00001-a1.parquet": rows}
    files["data/validation-00000-of-00001-b2.parquet"] = [story(number) for number in (50, 51)]
    hub(folder, "", files)
    return 19 + 2


def many_synth(folder):
    card = "- config_name: default\n  data_files: [{split: train, path: '*parquet'}]\n"
    rows = [synth(number) for number in range(30)]
    hub(folder, card, {"synth_001.parquet": rows[:15], "synth_002.parquet": rows[15:]})
    return 29


def agentinstruct(folder):
    names = ["creative_content", "mcq", "code_"]
    lines = [f"  - {{split: {name}, path: data/{name}-*}}\n" for name in names]
    card = "- config_name: default\n  data_files:\n" + "".join(lines)
    files = {
        f"data/{name}-00000-of-00001.parquet": [talk(100 * i + number) for number in range(10)]
        for i, name in enumerate(names)
    }
    hub(folder, card, files)
    return 30


def many_alpaca(folder):
    rows = [alpaca(number) for number in range(20)]
    hub(folder, "", {"data/train-00000-of-00001-a09b.parquet": rows})
    return 20


LAYOUTS = {
    "data_fineweb.py": ("HuggingFaceFW/fineweb", fineweb, "Page number 7. "),
    "data_fineweb_edu.py": ("HuggingFaceFW/fineweb-edu", fineweb, "Page number 7. "),
    "data_openwebtext.py": ("Skylion007/openwebtext", openwebtext, "Page number 7. "),
    "data_tinystories.py": ("roneneldan/TinyStories", tinystories, "a cat number 51."),
    "data_synth.py": ("PleIAs/SYNTH", many_synth, "<think>\nIs 7 even?\n</think>\n\nIt is 7."),
    "data_agentinstruct.py": ("microsoft/orca-agentinstruct-1M-v1", agentinstruct, "Say 203."),
    "data_alpaca.py": ("tatsu-lab/alpaca", many_alpaca, "### Input:\n7\n\n### Response:\n8"),
    "data_shakespeare.py": (None, None, "ROMEO:\nLine 7."),
    "data_shakespeare_gpt2.py": (None, None, "ROMEO:\nLine 7."),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_prepares_its_dataset(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    repository, make, said = LAYOUTS[recipe]
    if repository:
        documents = make(tmp_path / repository)
    else:
        for name, lines in (("input", 50), ("train", 45), ("val", 9)):
            text = "".join(f"ROMEO:\nLine {i}.\n" for i in range(lines))
            (tmp_path / f"{name}.txt").write_text(text)
        documents = 2  # the two parts of the file, or two files
    assert prepare.main([str(REPO / "config" / recipe), "--tokenizer=bytes", "--workers=1"]) == 0
    [folder] = (tmp_path / "data").iterdir()
    data = dataset.open_dataset(folder)
    manifest = data.manifest
    splits = dict(manifest.splits.items())
    assert sum(split.documents for split in splits.values()) == documents
    assert splits["val"].documents >= 1
    text = ""
    for name in splits:
        split = data.split(name)
        tokens, mask = split[0 : len(split)], split.mask(0, len(split))
        text += data.tokenizer.decode(tokens.tolist())
        if manifest.template != "text":
            assert mask is not None and 0 < mask.mean() < 1
    assert said in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_what_it_costs(recipe):
    header = (REPO / "config" / recipe).read_text(encoding="utf-8").split('"""')[1]
    for word in ("Licence:", "Disk:", "Time:"):
        assert word in header
    assert "Download:" in header or ".txt" in header
