import json
import shutil

import pytest

from tunesmith.cli import demo
from tunesmith.training.settings import RunSettings, load_run_settings


@pytest.fixture
def small(monkeypatch, model_folder, tmp_path_factory):
    """The demo in small: a tiny model with a window for its longest prompt, few rows, two steps."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("demo") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    tiny = {"model": str(folder), "max_steps": 2, "max_seq_length": 512, "r": 2, "dtype": "float32"}
    for name, value in tiny.items():
        monkeypatch.setitem(demo.DEMO_SETTINGS, name, value)
    for name, value in {"_TRAIN_ROWS": 30, "_EVAL_ROWS": 4, "_HELD_OUT_ROWS": 3, "_LONGEST_ANSWER": 4}.items():
        monkeypatch.setattr(demo, name, value)


def test_the_demo_trains_compares_and_leaves_rows_and_run(run, small, tmp_path):
    folder = tmp_path / "demo"
    outcome = run("demo", "--seed", 1, "--output-dir", folder)
    assert outcome.code == 0, outcome.err
    for words in ("30 in, ", "untouched model", "with schema and two examples", "tuned model", "exact match",
                  "tokens/s", "peak memory", f"tunesmith chat {folder / 'run'}"):  # fmt: skip
        assert words in outcome.out, words
    assert max(len(line.rstrip()) for line in outcome.out.splitlines() if str(tmp_path) not in line) <= 80
    rows = {file.stem: file.read_text().splitlines() for file in (folder / "data").iterdir()}
    assert {name: len(lines) for name, lines in rows.items()} == {"train": 30, "valid": 4, "test": 3}
    assert not set(rows["train"]) & set(rows["valid"])
    assert "30 to train on, 4 for evaluation" in " ".join(outcome.out.split())
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_demo_leaves_a_folder_that_holds_something(run, small, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    outcome = run("demo", "--output-dir", tmp_path)
    assert outcome.code == 2
    assert "is not empty" in outcome.err
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_the_settings_of_the_demo_are_settings():
    settings, aliases = load_run_settings(None, {**demo.DEMO_SETTINGS, "data": "rows"})
    assert aliases == []
    assert set(demo.DEMO_SETTINGS) <= set(RunSettings.model_fields)
    assert settings.model == "smollm2-135m"
