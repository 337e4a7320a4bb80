"""What README.md and pyproject.toml say of the imports, held against the imports."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sd35flash_jax", "conversion", "benchmarks", "training")


def sources(*packages: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for package in packages for path in (ROOT / package).rglob("*.py"))


def architecture() -> dict[Path, int]:
    """The files of README's table and the row each is in; a folder stands for all in it."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| file | subject |")[1].split("\n\n")[0]
    rows: dict[Path, int] = {}
    for number, line in enumerate(table.splitlines()[2:]):
        first, *others = map(Path, re.findall(r"`([^`]+)`", line.split("|")[1]))
        rows |= dict.fromkeys([first, *(first.parent / other for other in others)], number)
    return rows


def row_of(path: Path, rows: dict[Path, int]) -> int | None:
    return next((rows[place] for place in (path, *path.parents) if place in rows), None)


def imported(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The dotted names of what import statements import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", [path for path in sources(*PACKAGES) if path.name != "__init__.py"], ids=str)
def test_a_file_knows_only_the_files_above_it_in_the_readme(path):
    rows = architecture()
    own = row_of(path, rows)
    assert own is not None, f"README.md's architecture does not list {path}"
    for name in imported(iter(ast.parse((ROOT / path).read_text(encoding="utf-8")).body)):
        other = Path(*name.split(".")).with_suffix(".py")
        if (ROOT / other).is_file():
            assert own >= (row_of(other, rows) or 0), f"{path} imports {other}, which README.md lists below it"


def test_every_package_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = chain(project["dependencies"], *project["optional-dependencies"].values())
    declared = {re.split(r"[\[<>=]", requirement)[0].lower().replace("_", "-") for requirement in requirements}
    distributions = packages_distributions()
    for path in sources(*PACKAGES, "tests"):
        for name in imported(ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in (*PACKAGES, "tests"):
                continue
            providers = {provider.lower().replace("_", "-") for provider in distributions.get(top, [top])}
            assert providers & declared, f"{path} imports {top}, which pyproject.toml does not declare"
