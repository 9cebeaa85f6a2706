"""The rules of the house: who may import whom, and how many parameters a function may have."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
DOOR = {"model", "train", "prepare", "sample", "configurator"}
TOOLS = ("eval", "export", "serve", "bench", "compare", "experiment", "pairs", "figures")
COMMANDS = {"train", "prepare", "sample"} | {f"tools.{name}" for name in TOOLS}
MAX_PARAMETERS = 6
LEAVES = {  # what the files at the root of all imports may import of ours
    "model": set(),
    "configurator": {"plaingpt.advice", "plaingpt.values", "plaingpt.wording"},
    "plaingpt.advice": {"plaingpt.wording"},
    "plaingpt.values": {"plaingpt.wording"},
    "plaingpt.wording": set(),
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


FILES = {
    module_of(path): path
    for folder in (".", "plaingpt", "tools")
    for path in sorted((REPO / folder).glob("*.py" if folder == "." else "**/*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports_of(module: str) -> set[str]:
    """Everything a file imports, including in functions and for type checking.

    `from a import b` counts as a.b if that is a file of ours, else as a.
    """
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module} imports relative to itself"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in FILES else node.module)
    return found


IMPORTS = {module: imports_of(module) for module in FILES}
OURS = {module: names & FILES.keys() for module, names in IMPORTS.items()}


def reached_from(modules: set[str]) -> set[str]:
    """The modules, and all of ours that they import, directly or indirectly."""
    reached: set[str] = set()
    while new := modules - reached:
        reached |= new
        modules = set().union(*(OURS[module] for module in new))
    return reached


# --- who may import whom


def test_the_top_level_holds_five_files():
    assert FILES.keys() >= COMMANDS | DOOR
    assert {module for module in FILES if "." not in module} - {"plaingpt", "tools"} == DOOR


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_inwards(module):
    names = OURS[module]
    assert not names & COMMANDS, "a command is imported"
    if module.startswith("plaingpt"):
        outside = {name for name in names if not name.startswith("plaingpt")}
        assert outside <= {"model", "configurator"}
    assert names <= LEAVES.get(module, set(FILES))


def test_no_imports_go_in_circles():
    try:
        TopologicalSorter(OURS).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(reversed(error.args[1])))


def test_the_model_needs_torch_only():
    roots = {name.partition(".")[0] for name in IMPORTS["model"]}
    assert roots - sys.stdlib_module_names == {"torch"}


def test_preparing_text_does_not_import_torch():
    text = {module for module in FILES if module.startswith("plaingpt.text")}
    for module in reached_from({"prepare"} | text):
        assert not {name for name in IMPORTS[module] if "torch" in name.split(".")}, module


def test_durations_are_not_measured_by_a_clock_that_may_be_set():
    used = {
        module
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "datetime.now")
    }
    assert used == set()


def test_functions_take_few_parameters():
    def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        return len([each for each in given if each.arg not in ("self", "cls")])

    counts = {
        f"{module}.{node.name}": parameters(node)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    assert {name: n for name, n in counts.items() if n > MAX_PARAMETERS} == {}
