"""Models that were not trained for a scheme of torchao, quantized by it when they are exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.export.support import adapt, disturb, loaded

from tunesmith.core.errors import ExportError, ModelError, OutputError, SettingsError
from tunesmith.export import torchao
from tunesmith.export.methods import METHODS, export_model

pytestmark = pytest.mark.usefixtures("exports_load_here")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model whose widths every scheme fits."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    tiny.tiny_model("llama", hidden_size=128, intermediate_size=128, initializer_range=0.1).save_pretrained(folder)
    tiny.tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model(wide: Path) -> tuple[Any, Any]:
    base, tokenizer = loaded(wide)
    return disturb(adapt(base)), tokenizer


def test_a_method_names_the_scheme(model: tuple[Any, Any], tmp_path: Path) -> None:
    report = model[0].save_pretrained_merged(tmp_path / "out", model[1], save_method="torchao_int8")
    assert (report.method, report.dtype, report.route) == ("torchao-int8", "int8", "base")
    assert 0 < report.comparison.kl < 0.01 < report.moved
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "torchao"
    assert (tmp_path / "out" / "README.md").is_file() and (tmp_path / "out" / "export_report.json").is_file()
    with pytest.raises(OutputError, match="out is there already"):
        model[0].save_pretrained_torchao(tmp_path / "out", None, "int8")


def test_a_config_of_torchao_is_a_scheme_too(model: tuple[Any, Any], tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    report = model[0].save_pretrained_torchao(tmp_path / "out", model[1], torchao_config=Int8WeightOnlyConfig())
    assert report.method == "torchao-Int8WeightOnlyConfig" and 0 < report.comparison.kl < 0.01


def test_it_is_quantized_and_compared_where_the_model_is(
    model: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a device transformers loads to the CPU, where a GPU's scheme cannot run and others round differently."""
    import transformers

    places: list[Any] = []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def recorded(*args: Any, **kwargs: Any) -> Any:
        places.append(kwargs.get("device_map"))
        return load(*args, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", recorded)
    model[0].save_pretrained_torchao(tmp_path / "out", model[1], "int8")
    assert places[:2] == [{"": str(model[0].device)}] * 2


def test_what_this_machine_cannot_convert_is_said_before_anything_is_written(
    model: tuple[Any, Any], tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert {"torchao-int8", "torchao-int8-int4", "torchao-int4", "torchao-fp8-fp8"} <= set(METHODS)
    with pytest.raises(
        ModelError, match=r"it needs a GPU with the package mslk .* Save the model as it is and convert"
    ):
        export_model(model[0], tmp_path / "out", method="torchao-int4")
    with pytest.raises(SettingsError, match=r"adapters is for merged_16bit, .* not for save_method='torchao-int8'"):
        export_model(model[0], tmp_path / "out", method="torchao-int8", adapters={"default": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_lost_too_much_is_kept_under_another_name(
    model: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchao, "UNTRAINED_BAR", 1e-9)
    with pytest.raises(ExportError, match=r"the torchao-int8 export answers otherwise than the model: KL divergence"):
        model[0].save_pretrained_torchao(tmp_path / "out", model[1], "int8")
    assert [path.name for path in tmp_path.iterdir()] == ["out-failed"]
