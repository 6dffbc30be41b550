"""What users call to export: methods of the model, and ``tunesmith export``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny, tiny_tasks
from tests.export.support import adapt, disturb, loaded, logits
from transformers import AutoModelForCausalLM

from tunesmith.core.errors import AdapterError, ExportError, ModelError, OutputError, SettingsError
from tunesmith.export.adapter import export_adapter
from tunesmith.export.verify import _rounding
from tunesmith.training.probes import probes_of_run
from tunesmith.training.run import run_training
from tunesmith.training.settings import RunSettings


@pytest.fixture(scope="module")
def run_folder(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("runs")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny.chat_rows(12)), encoding="utf-8")
    settings: dict[str, Any] = {"model": str(saved), "data": str(rows), "max_steps": 2, "r": 4, "dtype": "float32",
                                "learning_rate": 0.05, "eval_split": 0, "output_dir": str(folder / "run")}  # fmt: skip
    return run_training(RunSettings(**settings)).folder


@pytest.mark.usefixtures("exports_load_here")
def test_the_method_writes_a_merged_model(saved: Path, tmp_path: Path) -> None:
    base, tokenizer = loaded(saved)
    model = disturb(adapt(base))
    report = model.save_pretrained_merged(str(tmp_path / "out"), tokenizer, save_method="Merged_32bit")
    assert (report.method, report.route) == ("merged_32bit", "base")
    torch.testing.assert_close(logits(loaded(tmp_path / "out")[0]), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("exports_load_here")
def test_a_loaded_adapter_and_a_whole_model_have_the_method_too(run_folder: Path, saved: Path, tmp_path: Path) -> None:
    adapted, _ = loaded(run_folder)
    assert callable(adapted.save_pretrained_merged)
    merged = adapted.merge_and_unload()
    assert merged.save_pretrained_merged.__self__ is merged and callable(merged.for_inference)
    model, _ = loaded(saved, full_finetuning=True)
    model.save_pretrained_merged(tmp_path / "out", save_method="merged_32bit")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokenizer": "lora"}, "tokenizer='lora' is a text: the tokenizer comes second"),
        ({"prompts": "the cat"}, "prompts='the cat': a list of texts"),
        ({"prompts": [""]}, "none of them empty"),
        ({"adapters": ["default"]}, r"adapters=\['default'\]: give the share of each"),
        ({"adapters": {}}, "give the share of each"),
        ({"adapters": {"default": float("nan")}}, "give the share of each"),
        ({"adapters": {"default": "0.5"}}, "give the share of each"),
    ],
    ids=str,
)
def test_arguments_of_the_wrong_kind_are_refused_before_anything_is_written(
    given: dict[str, Any], message: str, saved: Path, tmp_path: Path
) -> None:
    base, tokenizer = loaded(saved)
    model = disturb(adapt(base))
    for write in (model.save_pretrained_merged, model.save_pretrained_gguf):
        with pytest.raises(SettingsError, match=message):
            write(tmp_path / "out", **{"tokenizer": tokenizer, **given})
    if "adapters" not in given:
        with pytest.raises(SettingsError, match=message):
            model.save_pretrained_torchao(tmp_path / "out", **{"tokenizer": tokenizer, **given})
    assert not list(tmp_path.iterdir())


def test_adapters_that_are_switched_off_are_not_exported(saved: Path, tmp_path: Path) -> None:
    base, tokenizer = loaded(saved)
    model = disturb(adapt(base))
    with model.disable_adapter(), pytest.raises(ModelError, match="are switched off, so that it answers as its base"):
        model.save_pretrained_merged(tmp_path / "out", tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("has_adapter", [True, False])
def test_a_model_for_another_task_is_refused_with_what_saves_it(tmp_path: Path, has_adapter: bool) -> None:
    base = tiny_tasks.save_base(tmp_path / "base")
    model, tokenizer = loaded(base, task_type="SEQ_CLS", num_labels=2, full_finetuning=not has_adapter)
    model = adapt(model) if has_adapter else model
    merged = r"model\.merge_and_unload\(\)" if has_adapter else "model"
    message = rf"base is a model for SEQ_CLS, .* Save it with {merged}\.save_pretrained\(folder\)"
    for write in (model.save_pretrained_merged, model.save_pretrained_torchao, model.save_pretrained_gguf):
        with pytest.raises(ModelError, match=message):
            write(str(tmp_path / "out"), tokenizer)
    assert not (tmp_path / "out").exists()
    (model.merge_and_unload() if has_adapter else model).save_pretrained(tmp_path / "out")
    assert loaded(tmp_path / "out")[0].config.num_labels == 2


@pytest.mark.usefixtures("exports_load_here")
@pytest.mark.parametrize(("width", "runtime"), [(None, "peft"), ("load_in_4bit", "tunesmith")])
def test_an_adapter_is_compared_as_it_will_be_loaded(
    width: str | None, runtime: str, saved: Path, tmp_path: Path
) -> None:
    base, tokenizer = loaded(saved, **({} if width is None else {width: True}))
    model = disturb(adapt(base))
    report = model.save_pretrained_merged(tmp_path / "out", tokenizer, "lora")
    assert report.comparison.runtime == runtime and report.comparison.kl <= 1e-6
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    with pytest.raises(OutputError, match="is there already"):
        export_adapter(model, tmp_path / "out")


@pytest.mark.usefixtures("exports_load_here")
def test_the_adapter_that_is_active_is_saved(saved: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    base, tokenizer = loaded(saved)
    model = disturb(adapt(base))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    for name in ("other", "default"):
        model.set_adapter(name)
        report = model.save_pretrained_merged(tmp_path / name, tokenizer, "lora")
        assert report.comparison.kl <= 1e-6
        torch.testing.assert_close(logits(loaded(tmp_path / name)[0]), logits(model))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(AdapterError, match="saves one adapter, and 2 are active"):
        model.save_pretrained_merged(tmp_path / "both", tokenizer, "lora")


@pytest.mark.usefixtures("exports_load_here")
def test_a_model_in_16_bits_may_round_otherwise_where_it_is_loaded(saved: Path, tmp_path: Path) -> None:
    base, _ = loaded(saved, dtype="bfloat16")
    report = disturb(adapt(base)).save_pretrained_merged(tmp_path / "out", save_method="lora")
    assert 1e-6 < report.comparison.kl < 5e-3 < report.moved
    assert _rounding(tiny.tiny_model("llama")) == 0
    assert _rounding(tiny.tiny_model("mixtral").bfloat16()) > _rounding(base) > 0


@pytest.mark.usefixtures("exports_load_here")
def test_an_adapter_that_lost_what_it_learned_is_caught(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tokenizer = loaded(saved)
    model = disturb(adapt(base))
    whole = type(model).save_pretrained

    def forgetful(self: Any, folder: Path, **rest: Any) -> None:
        from safetensors.torch import load_file, save_file

        whole(self, folder, **rest)
        file = Path(folder) / "adapter_model.safetensors"
        kept = {name: value * 0 if "lora_B" in name else value for name, value in load_file(file).items()}
        save_file(kept, file, metadata={"format": "pt"})

    monkeypatch.setattr(type(model), "save_pretrained", forgetful)
    with pytest.raises(ExportError, match="the lora export answers otherwise than the model"):
        export_adapter(model, tmp_path / "out", tokenizer)
    assert (tmp_path / "out-failed" / "adapter_model.safetensors").is_file()


def test_a_model_without_adapter_has_none_to_save(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"this model carries none. Use 'merged_16bit'"):
        export_adapter(tiny.tiny_model("llama"), tmp_path / "out")


def test_probes_come_from_the_rows_of_the_run(run_folder: Path, saved: Path, tmp_path: Path) -> None:
    _, tokenizer = loaded(saved)
    probes = probes_of_run(run_folder, tokenizer)
    assert len(probes) == 4
    first = tokenizer.apply_chat_template(tiny.chat_rows(12)[0]["messages"], tokenize=False)
    assert tokenizer.decode(probes[0]).strip() == first.strip()
    assert np.array_equal(probes_of_run(run_folder / "adapter", tokenizer)[0], probes[0])
    assert probes_of_run(tmp_path, tokenizer) == []
