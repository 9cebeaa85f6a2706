"""pyproject.toml says what the requirements files and the folders say."""

from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings tomli there
    import tomli as tomllib

REPO = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))
FILES = {
    "requirements.txt": PROJECT["project"]["dependencies"],
    **{
        f"requirements-{extra}.txt": wanted
        for extra, wanted in PROJECT["project"]["optional-dependencies"].items()
    },
}


def pins_of(name: str) -> list[Requirement]:
    """The requirements that a file states itself, without those of files that it includes."""
    lines = (REPO / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and line[0] not in "#-"]


def included(name: str) -> set[str]:
    lines = (REPO / name).read_text(encoding="utf-8").splitlines()
    return {line.removeprefix("-r ") for line in lines if line.startswith("-r ")}


@pytest.mark.parametrize("name", FILES)
def test_requirements_are_those_of_pyproject_with_pins_that_its_bounds_admit(name):
    wanted = [Requirement(line) for line in FILES[name]]
    bounds = {(r.name, *sorted(r.extras)): r.specifier for r in wanted if r.name != "plaingpt"}
    pins = pins_of(name)
    assert {(pin.name, *sorted(pin.extras)) for pin in pins} == bounds.keys()
    for pin in pins:
        bound = bounds[(pin.name, *sorted(pin.extras))]
        assert {each.operator for each in bound} <= {">="}
        if pin.extras:  # pinned in a file that this one includes
            assert not pin.specifier
            continue
        [each] = pin.specifier
        assert each.operator == "==" and bound and bound.contains(each.version), f"{pin}, {bound}"


def test_an_extra_includes_what_its_file_includes():
    for extra, wanted in PROJECT["project"]["optional-dependencies"].items():
        others = [Requirement(line) for line in wanted]
        others = {other for r in others if r.name == "plaingpt" for other in r.extras}
        files = included(f"requirements-{extra}.txt") - {"requirements.txt"}
        assert files == {f"requirements-{other}.txt" for other in others}
    assert {path.name for path in REPO.glob("requirements*.txt")} == FILES.keys()


def test_every_module_is_packaged_and_what_the_page_needs():
    setuptools = PROJECT["tool"]["setuptools"]
    assert set(setuptools["py-modules"]) == {path.stem for path in REPO.glob("*.py")}
    patterns = setuptools["packages"]["find"]["include"]
    for wing in ("plaingpt", "tools"):
        for module in (REPO / wing).rglob("*.py"):
            package = module.parent.relative_to(REPO).as_posix().replace("/", ".")
            assert any(fnmatch(package, pattern) for pattern in patterns)
            assert (module.parent / "__init__.py").exists()
    assert not any(fnmatch(name, p) for name in ("tests", "config", "examples") for p in patterns)
    pages = {path.name for path in (REPO / "tools").iterdir() if path.suffix not in ("", ".py")}
    assert pages == set(setuptools["package-data"]["tools"])
