"""What the README tells a newcomer to type works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_example() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    return code


def test_the_example_is_short():
    assert len([line for line in python_example().splitlines() if line.strip()]) <= 15


# Three steps show that it learns; a step of the real model takes seconds.
@pytest.mark.parametrize("steps", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_the_example_runs_and_its_adapter_loads_in_plain_peft(smollm2, tmp_path, monkeypatch, steps):
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(tmp_path)
    code, scope = python_example(), dict[str, object]()
    assert "max_steps=10" in code
    exec(compile(code.replace("max_steps=10", f"max_steps={steps}"), "README.md", "exec"), scope)
    losses = [entry["loss"] for entry in scope["trainer"].state.log_history if "loss" in entry]  # type: ignore[attr-defined]
    assert len(losses) == steps
    assert losses[-1] < 0.5 * losses[0]
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "runs/sums/adapter")
    assert any(parameter.any() for name, parameter in loaded.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:src|tests|docs|benchmarks)[\w/.]*)`", README))))
def test_every_path_that_it_names_is_there(path):
    assert (ROOT / path).exists()


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).is_file(), target


def test_the_rows_that_it_shows_are_recognised():
    import json

    from tunesmith.data.files import read_rows
    from tunesmith.data.formats import to_example

    (rows,) = re.findall(r"```json\n(.*?)```", README, flags=re.DOTALL)
    examples = [to_example(row) for row in read_rows([json.loads(line) for line in rows.splitlines()])]
    assert [type(example).__name__ for example in examples] == [*["Conversation"] * 3, "Completion", "Text"]


def test_the_two_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE)) <= targets


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_extras_come_from_the_checkout_and_are_there(page):
    text = page.read_text(encoding="utf-8")
    assert "tunesmith[" not in text  # nothing is published
    known = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"'\.\[(\w+)\]'", text)) <= known


def test_the_commands_are_on_the_path_before_they_are_typed():
    assert README.index("source .venv/bin/activate") < README.index("tunesmith inspect")
