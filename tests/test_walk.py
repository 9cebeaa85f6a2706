"""docs/walk names functions that exist, in pages of which none is forgotten."""

import ast
import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
WALK = REPO / "docs" / "walk"
PAGES = sorted(path.name for path in WALK.glob("*.md"))
NAMED = re.compile(r"`([\w/]+\.py)::([\w.]+)`")


def names_in(path: Path) -> set[str]:
    """Functions, classes and constants of a file; those of a class as Class.name."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        found |= names_of(node)
        if isinstance(node, ast.ClassDef):
            inner = set().union(*map(names_of, node.body))
            found |= {f"{node.name}.{name}" for name in inner}
    return found


def names_of(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("page", PAGES)
def test_every_function_that_a_page_names_exists(page):
    named = NAMED.findall((WALK / page).read_text(encoding="utf-8"))
    assert named, "a page of the walk points to the code"
    for file, name in named:
        assert name in names_in(REPO / file), f"{file}::{name}"


def test_a_function_that_does_not_exist_would_be_found():
    names = names_in(REPO / "model.py")
    assert {"GPT", "GPT.forward", "EPSILON", "GPTConfig.n_layer"} <= names
    assert not {"forward", "GPT.backward"} & names


def test_the_walk_lists_its_pages_and_has_its_pictures():
    text = (WALK / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\((\d-\w+\.md)\)", text)
    assert listed == [page for page in PAGES if page != "README.md"]
    pictures = {path.name for path in WALK.glob("*.png")}
    shown = set()
    for page in PAGES:
        shown |= set(re.findall(r"!\[[^]]+\]\((\w+\.png)\)", (WALK / page).read_text("utf-8")))
    assert shown == pictures
    assert max((WALK / name).stat().st_size for name in pictures) < 60_000
