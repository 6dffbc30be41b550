"""The card of an export says what it is of and how near it is, and nothing that is secret or not known."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import peft
import yaml
from tests import tiny_tasks

from tunesmith import FastLanguageModel
from tunesmith.export.card import About, export_card, model_card
from tunesmith.export.report import ExportReport
from tunesmith.export.verify import Comparison

FOUND = Comparison(kl=0.012, largest_kl=0.3, difference=0.5, top1=0.97, kept=0.98, perplexity=8.1, live_perplexity=8.0,
                   tokens=320, texts=3, equal_texts=2, text_gap=0.01, tokenizer="equal",
                   runtime="transformers")  # fmt: skip
REPORT = ExportReport(Path("/home/ada/out"), "merged_16bit", "original", 10, "bfloat16", 1.0, {"original": FOUND}, 0.8)


def head(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---")[1])


def test_a_base_on_the_hub_is_named_for_the_hub() -> None:
    card = export_card(REPORT, "owner/base", About(tags=("cats",), datasets=("owner/rows",)))
    assert head(card) == {"base_model": "owner/base", "library_name": "transformers", "tags": ["tunesmith", "cats"],
                          "datasets": ["owner/rows"]}  # fmt: skip
    assert "# Fine-tuned from owner/base" in card
    assert "the adapter merged in float32 into the weights that its base was quantized from" in card
    assert "| KL divergence from the trained model, nats a token | 0.012 |" in card
    assert "| equal greedy texts | 2 of 3 |" in card and "| KL divergence of the untuned base | 0.8 |" in card
    assert "| share of what the training changed that is there | 98.0% |" in card


def test_no_licence_and_no_path_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    card = export_card(replace(REPORT, method="lora", route="adapter", comparisons={"adapter": FOUND}, moved=None),
                       str(tmp_path), About())  # fmt: skip
    assert head(card) == {"library_name": "peft", "tags": ["lora", "tunesmith"]}
    assert f"# LoRA adapter for {tmp_path.name}" in card and str(tmp_path) not in card
    assert "icense" not in card and "untuned" not in card


def test_an_adapter_with_labels_says_how_its_base_gets_them(tmp_path: Path) -> None:
    labels = ("cold", "it's", "warm")
    settings = {"task_type": "SEQ_CLS", "id2label": dict(enumerate(labels)), "dtype": "float32"}
    model, _ = FastLanguageModel.from_pretrained(str(tiny_tasks.save_base(tmp_path / "base")), **settings)
    FastLanguageModel.get_peft_model(model, r=2).save_pretrained(tmp_path / "adapter")
    about = {"base": "b", "task": "SEQ_CLS", "settings": {}, "ledger": {}, "result": {}, "versions": {}}
    (code,) = re.findall(r"or with PEFT:\n\n```python\n(.*?)```", model_card(labels=labels, **about), re.DOTALL)
    scope = {"peft": peft, "folder": str(tmp_path / "adapter")}
    exec(code, scope)
    assert scope["model"].config.id2label == dict(enumerate(labels))
    whole = model_card(labels=labels, is_adapter=False, **about)
    assert "`transformers.AutoModelForSequenceClassification.from_pretrained(folder)`." in whole


def test_what_is_known_of_the_training_is_told(tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("r: 16\nlearning_rate: 0.0002\ndata: /home/ada/rows\ntoken: hf_secret\n")
    (tmp_path / "result.json").write_text(json.dumps({"steps": 40, "last_loss": 1.25, "best_step": 7}))
    (tmp_path / "ledger.json").write_text(json.dumps({"train": {"rows_kept": 300, "dropped": {"x": 1}}}))
    for place in (tmp_path, tmp_path / "adapter"):
        card = export_card(REPORT, "owner/base", About(run=place))
        assert "| steps | 40 |" in card and "| last_loss | 1.25 |" in card
        assert "| rows_kept | 300 |" in card and "| r | 16 |" in card
        assert "/home" not in card and "secret" not in card
    (tmp_path / "result.json").write_text("{")
    assert "Training" not in export_card(REPORT, "owner/base", About(run=tmp_path))
    assert "Training" not in export_card(REPORT, "owner/base", About(run=tmp_path / "a" / "b"))
