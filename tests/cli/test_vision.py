"""``tunesmith train`` on a vision-language model: rows of a file, images by path."""

from __future__ import annotations

import json

import pytest
from tests import tiny_vision

from tunesmith import FastVisionModel


@pytest.fixture
def base(tmp_path):
    tiny_vision.save_vision_model(tmp_path / "base", "gemma3")
    return tmp_path / "base"


@pytest.fixture
def rows(tmp_path):
    lines = []
    for index, row in enumerate(tiny_vision.colour_rows(24)):
        part = row["messages"][0]["content"][0]
        file = tmp_path / f"{index}.png"
        part["image"].save(file)
        part["image"] = str(file)
        lines.append(json.dumps(row) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    return tmp_path / "rows.jsonl"


FLAGS = ("--dtype", "float32", "--r", 4, "--max-steps", 2, "--no-packing")


def test_a_run_on_images_leaves_an_adapter_with_its_processor(run, base, rows, tmp_path):
    folder = tmp_path / "run"
    outcome = run("train", "--model", base, "--data", rows, "--output-dir", folder, *FLAGS,
                  "--no-finetune-vision-layers")  # fmt: skip
    assert outcome.code == 0, outcome.err
    shown = " ".join(outcome.out.split())
    for words in ("24 in, 24 kept", "what images need is not predicted yet", "images need attention masks",
                  r"on model\.language_model\."):  # fmt: skip
        assert words in shown, words
    model, processor = FastVisionModel.from_pretrained(str(folder), dtype="float32")
    assert hasattr(processor, "image_processor")
    assert not any("vision_tower" in name for name, p in model.named_parameters() if p.requires_grad)
    assert json.loads((folder / "result.json").read_text())["predicted_peak_bytes"] is None


def test_rows_are_inspected_as_they_are_trained_on(run, base, rows, tmp_path):
    outcome = run("inspect", rows, "--model", base, "--json", "--rows", 1)
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["inference_agreement"] == {"conversations": 24, "differences": []}
    (row,) = report["rows"]
    assert any("<image_soft_token>" in piece["text"] for piece in row["pieces"])
    assert run("train", "--model", base, "--data", rows, "--output-dir", tmp_path / "run", *FLAGS,
               "--eval-split", 0).code == 0  # fmt: skip
    assert report["ledger"] == json.loads((tmp_path / "run" / "ledger.json").read_text())["train"]
    # The adapter has the processor that it was trained with.
    assert run("inspect", rows, "--model", tmp_path / "run", "--rows", 0).code == 0


def test_rows_with_images_need_a_model_that_sees(run, model_folder, rows, tmp_path):
    outcome = run("train", "--model", model_folder, "--data", rows, "--output-dir", tmp_path / "run", *FLAGS)
    assert outcome.code == 2
    assert "content is not text" in outcome.err


def test_an_image_that_is_gone_is_named(run, base, rows, tmp_path):
    (tmp_path / "3.png").unlink()
    outcome = run("train", "--model", base, "--data", rows, "--output-dir", tmp_path / "run", *FLAGS)
    assert outcome.code == 2
    said = " ".join(outcome.err.split())
    assert "rows.jsonl:4: an image cannot be read" in said
    assert "Traceback" not in outcome.err


def test_its_memory_is_not_planned(run, base, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "the cat sat"}\n' * 30)
    outcome = run("plan", "--model", base, "--data", text, *FLAGS)
    assert outcome.code == 2
    assert "its memory cannot be predicted yet" in " ".join(outcome.err.split())
