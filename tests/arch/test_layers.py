"""The shape of the package: who may import whom, how long a file may be, and what an import may do."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT

PACKAGE = ROOT / "src" / "tunesmith"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 500

# DESIGN.md, "The tree": a file imports only lower numbers and its own folder.
LAYERS = {
    "core": 0, "ops": 1, "data": 1, "engine": 2, "memory": 3, "models": 3, "adapters": 4, "export": 5, "serving": 5,
    "training": 6, "evaluation": 6, "api": 7, "compat": 8, "cli": 8, "web": 8, "chat_templates": 9, "trainer": 9,
    "__init__": 9, "__main__": 9,
}  # fmt: skip


def part_of(file: Path) -> str:
    """Return the layer of a source file: its first folder, or its own name at the top."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(file: Path) -> dict[str, int]:
    """Return the layers that a file imports anywhere, in functions and type-checking blocks too, with the line."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "tunesmith" else [module]
        for name in names:
            first, _, rest = name.partition(".")
            if first == "tunesmith" and rest:
                found.setdefault(rest.partition(".")[0], node.lineno)
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down(file: Path) -> None:
    own = part_of(file)
    assert own in LAYERS, f"{own} has no layer: add it to DESIGN.md and here"
    for part, line in imported_parts(file).items():
        if part == "__version__" or (own == "__init__" and part not in LAYERS):
            continue
        assert part == own or LAYERS[part] < LAYERS[own], f"{file}:{line}: {own} imports {part}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_stay_readable(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST
    assert ast.get_docstring(ast.parse(text)), "a module docstring says what a file is"


def fresh(code: str) -> str:
    """Run code in an interpreter of its own and return what it prints."""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout


def test_import_is_fast() -> None:
    code = "import time; began = time.perf_counter(); import tunesmith; print(time.perf_counter() - began)"
    assert min(float(fresh(code)) for _ in range(3)) < 0.3


@pytest.mark.parametrize(
    "module", ["tunesmith", "tunesmith.core.settings", "tunesmith.core.device", "tunesmith.core.files"]
)
def test_import_is_light_and_changes_nothing(module: str) -> None:
    code = f"""
import json, os, sys, warnings
before = dict(os.environ)
import {module}
heavy = [name for name in ("torch", "transformers", "peft", "datasets", "numpy", "matplotlib") if name in sys.modules]
print(json.dumps([heavy, before == dict(os.environ), len(warnings.filters)]))
"""
    heavy, same, filters = json.loads(fresh(code))
    assert heavy == []
    assert same
    assert filters == json.loads(fresh("import json, warnings; print(len(warnings.filters))"))


def test_every_public_name_can_be_reached() -> None:
    code = """
import tunesmith
for name in tunesmith.__all__:
    assert getattr(tunesmith, name) is not None, name
assert set(dir(tunesmith)) >= set(tunesmith.__all__)
try:
    tunesmith.nothing
except AttributeError as error:
    print(error)
"""
    assert fresh(code).strip() == "module 'tunesmith' has no attribute 'nothing'"


def test_folders_of_the_package_have_tests() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    tested = {path.name for path in (ROOT / "tests").iterdir() if any(path.rglob("test_*.py"))}
    # What export holds so far, the model card, is tested where it is written.
    assert folders - tested <= {"export"}
