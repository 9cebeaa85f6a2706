"""Blind pairs: what is written, what a rater sees in a real browser, and what choices say."""

import json

import pytest
from test_page import browser  # noqa: F401

from plaingpt.evaluation.pairs import Tally
from tools import pairs

NASTY = '</script><b>bold</b> & "quotes" \u2028 [/* pairs */]'


def write_lines(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def answers(model: str, count: int = 8) -> list[dict]:
    return [
        {"question": f"{n}? {NASTY}", "reference": "yes", "answer": f"{model} {n} {NASTY}", "f1": 0}
        for n in range(count)
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Answers of two models, the second in another order."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "one.jsonl", answers("one"))
    write_lines(tmp_path / "two.jsonl", reversed(answers("two")))
    return tmp_path


def make(*more: str) -> int:
    return pairs.main(["--a=one.jsonl", "--b=two.jsonl", *more])


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_key_alone_tells_whose_answers_are_whose(folder):
    assert make() == 0
    written, key = read(folder / "pairs.jsonl"), json.loads((folder / "pairs.key.json").read_text())
    assert [pair["question"] for pair in written] == [each["question"] for each in answers("one")]
    for pair in written:
        assert pair.keys() == {"pair", "question", "left", "right"}
        of_left = {"one": "a", "two": "b"}[pair["left"].split()[0]]
        assert key["left"][pair["pair"]] == of_left and pair["left"] != pair["right"]
    assert set(key["left"].values()) == {"a", "b"}
    assert (key["a"], key["b"]) == ("one.jsonl", "two.jsonl")
    page = (folder / "pairs.html").read_text()
    assert "one.jsonl" not in page and "<b>" not in page and "://" not in page
    assert make("--out=again.jsonl") == 0
    assert (folder / "again.jsonl").read_bytes() == (folder / "pairs.jsonl").read_bytes()
    assert make("--out=other.jsonl", "--seed=1") == 0
    other = json.loads((folder / "other.key.json").read_text())["left"]
    assert list(other.values()) != list(key["left"].values())


def test_choices_are_counted_with_the_key(folder, capsys):
    assert make() == 0
    key = json.loads((folder / "pairs.key.json").read_text())["left"]
    other = {"left": "right", "right": "left"}
    side_of_a = {pair: "left" if left == "a" else "right" for pair, left in key.items()}
    chosen = [
        {"pair": pair, "choice": side if n < 4 else other[side] if n < 5 else "tie"}
        for n, (pair, side) in enumerate(side_of_a.items())
        if n < 6  # two are not rated
    ]
    write_lines(folder / "choices.jsonl", chosen)
    capsys.readouterr()
    assert pairs.main(["--read=choices.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "one.jsonl against two.jsonl: 4 wins, 1 loss, 1 tie in 6 of 8 pairs" in out
    assert "win rate 75.0%, 95% interval " in out and "p = 0.375 (two-sided)" in out


@pytest.mark.parametrize(
    ("tally", "rate", "p"),
    [
        (Tally(8, 2, 0), 0.8, 2 * (1 + 10 + 45) / 2**10),
        (Tally(2, 8, 3), 3.5 / 13, 2 * (1 + 10 + 45) / 2**10),
        (Tally(15, 15, 10), 0.5, 1.0),
        (Tally(10, 0, 0), 1.0, 2 / 2**10),
        (Tally(0, 0, 4), 0.5, 1.0),
        (Tally(0, 3000, 0), 0.0, 0.0),
    ],
)
def test_statistics(tally, rate, p):
    assert tally.win_rate == rate and tally.p_value() == pytest.approx(p)
    low, high = tally.interval()
    assert 0 <= low <= rate + 1e-12 and rate - 1e-12 <= high <= 1
    for bound in (low, high):  # rates that are just 1.96 of their own standard errors away
        variance = bound * (1 - bound) / tally.rated
        assert (bound - rate) ** 2 == pytest.approx(1.959964**2 * variance, abs=1e-12)


def spoil(folder, name: str, change) -> None:
    lines = (folder / name).read_text().splitlines()
    change(lines)
    (folder / name).write_text("".join(f"{line}\n" for line in lines))


MORE = json.dumps({"question": "more?", "reference": "yes", "answer": "no"})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("one.jsonl", lambda lines: lines.append(MORE), "one.jsonl, line 9: two.jsonl lacks this"),
        ("two.jsonl", lambda lines: lines.append(MORE), "two.jsonl, line 9: one.jsonl lacks this"),
        (
            "two.jsonl",
            lambda lines: lines.append(lines[2]),
            "two.jsonl, line 9: the same question and reference as in two.jsonl, line 3",
        ),
        ("one.jsonl", lambda lines: lines.insert(1, "{"), "one.jsonl, line 2: not JSON"),
        (
            "one.jsonl",
            lambda lines: lines.insert(1, "[1]"),
            "one.jsonl, line 2: expected an object",
        ),
        (
            "one.jsonl",
            lambda lines: lines.insert(0, '{"question": "?", "answer": ""}'),
            "one.jsonl, line 1: missing field reference",
        ),
        ("two.jsonl", list.clear, "there are no answers in two.jsonl"),
    ],
)
def test_answers_that_do_not_fit_are_one_line(folder, capsys, name, change, message):
    spoil(folder, name, change)
    assert make() == 2
    [*_, line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not list(folder.glob("pairs.*"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"pair": "1-0", "choice": "left"}, "choices.jsonl, line 2: the key has no pair '1-0'"),
        ({"choice": "left"}, "choices.jsonl, line 2: missing field pair"),
        ({"pair": "FIRST", "choice": "both"}, "choices.jsonl, line 2: choice: "),
        ({"pair": "FIRST", "choice": "tie"}, " has a choice in choices.jsonl, line 1"),
    ],
)
def test_choices_that_do_not_fit_are_one_line(folder, capsys, line, message):
    assert make() == 0
    first = next(iter(json.loads((folder / "pairs.key.json").read_text())["left"]))
    if line.get("pair") == "FIRST":
        line = line | {"pair": first}
    write_lines(folder / "choices.jsonl", [{"pair": first, "choice": "left"}, line])
    assert pairs.main(["--read=choices.jsonl"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--a=one.jsonl"], "expected the answers of two models, --a and --b, or a rater's"),
        (["--a=one.jsonl", "--read=choices.jsonl"], "read cannot be combined with a or b"),
        (["--a=one.jsonl", "--b=two.jsonl", "--out=x.html"], "out must end with .jsonl"),
        (["--a=one.jsonl", "--b=two.jsonl", "--out=one.jsonl"], "one.jsonl already exists"),
        (["--a=one.jsonl", "--b=nowhere.jsonl"], "nowhere.jsonl"),
        (["--a=one.jsonl", "--b=./one.jsonl"], "a and b are the same file, one.jsonl"),
        (["--read=empty.jsonl"], "has no pairs.key.json"),
    ],
)
def test_bad_settings_are_one_line(folder, capsys, arguments, message):
    assert pairs.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_rater_sees_texts_and_keeps_choices(folder, browser):  # noqa: F811
    assert make() == 0
    written = read(folder / "pairs.jsonl")
    requests, problems = [], []
    context = browser.new_context()
    context.set_default_timeout(10_000)
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else 0)
    page.on("request", lambda request: requests.append(request.url))
    page.goto((folder / "pairs.html").as_uri())
    for part in ("question", "left", "right"):
        assert page.text_content(f"#{part}") == written[0][part]
    assert page.locator("b").count() == 0
    for key in ("ArrowRight", "2"):  # the first is left out
        page.keyboard.press(key)
    assert page.text_content("#place") == "3 of 8 · 1 rated"
    for key in ("ArrowLeft", "ArrowLeft", "1", "0"):
        page.keyboard.press(key)
    page.keyboard.press("Control+1")  # the browser's own
    page.reload()
    assert page.text_content("#place") == "4 of 8 · 3 rated"
    page.keyboard.press("ArrowLeft")
    assert page.get_attribute("#choose-tie", "aria-pressed") == "true"
    page.click("#choose-left")  # a change of mind
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "choices.jsonl"
    expected = [
        {"pair": pair["pair"], "choice": choice}
        for pair, choice in zip(written, ("left", "right", "left"))
    ]
    download.value.save_as(folder / "choices.jsonl")
    assert read(folder / "choices.jsonl") == expected
    assert pairs.main(["--read=choices.jsonl"]) == 0
    for _ in range(5):
        page.keyboard.press("2")
    assert page.text_content("#place") == "8 of 8 · 8 rated: download the choices"
    context.close()
    assert {url.partition(":")[0] for url in requests} <= {"file", "data", "blob"}
    assert problems == []
