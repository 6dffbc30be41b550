"""A LoRA in GGUF adds what the adapter adds, row for row where llama.cpp looks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tests import tiny
from tests.export.support import adapt, disturb, loaded
from tests.export.test_gguf import FAMILIES, expected, fields, stored

from tunesmith.core.errors import AdapterError, ExportError, OutputError
from tunesmith.export.gguf.save_lora import save_lora_gguf

pytestmark = pytest.mark.usefixtures("without_llama")


def whole(model: Any, family: str) -> dict[str, np.ndarray]:
    """Return the merged weights less those of the base, by llama.cpp's names."""
    merged, plain = expected(model, family), expected(model, family, shares={})
    return {name: value - plain[name] for name, value in merged.items() if not np.array_equal(value, plain[name])}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_product_is_what_the_adapter_adds(family: str, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"o_proj": 2}, "alpha_pattern": {"down_proj": 3.0}}
    model = disturb(adapt(tiny.tiny_model(family), use_rslora=family == "qwen2", **patterns))
    report = save_lora_gguf(model, tmp_path / "out", tiny.tiny_tokenizer())
    (file,) = report.files
    assert file.path == tmp_path / "out" / "out.LORA.F32.gguf" and file.trial.comparison is None
    said, found = fields(file.path), stored(file.path)
    assert (said["general.type"], said["adapter.type"]) == ("adapter", "lora")
    alpha, wanted = said["adapter.lora.alpha"], whole(model, family)
    assert found.keys() == {f"{name}.lora_{side}" for name in wanted for side in "ab"}
    for name, value in wanted.items():
        a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        np.testing.assert_allclose(alpha / a.shape[0] * (b @ a), value, atol=1e-5)
    assert json.loads((tmp_path / "out" / "export_report.json").read_text(encoding="utf-8"))["files"][0]["not_run"]


def test_an_adapter_is_stored_in_sixteen_bits_where_that_is_asked_for(saved: Path, tmp_path: Path) -> None:
    base, tokenizer = loaded(saved, load_in_4bit=True)
    model = disturb(adapt(base))
    report = model.save_pretrained_gguf(tmp_path / "out", tokenizer, "F16", save_method="LoRA")
    assert report.files[0].path.name == "out.LORA.F16.gguf" and report.files[0].stored.kinds == {"F16": 28}
    with pytest.raises(OutputError, match="is there already"):
        save_lora_gguf(model, tmp_path / "out", tokenizer)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["norm"]}, "modules that train whole"),
        ({"bias": "all"}, "biases"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "an adapted embedding"),
        ({"trainable_token_indices": [1, 2]}, "rows of the embedding"),
    ],
)
def test_what_a_lora_in_gguf_cannot_hold_is_refused(kind: dict[str, Any], what: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, **kind})
    model = get_peft_model(tiny.tiny_model("llama"), config)
    with pytest.raises(AdapterError, match=f"adapter 'default' has {what}, which a LoRA in GGUF cannot hold"):
        save_lora_gguf(model, tmp_path / "out", tiny.tiny_tokenizer())
    assert not list(tmp_path.iterdir())


def test_an_adapter_on_a_tied_head_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["lm_head"])
    model = get_peft_model(tiny.tiny_model("qwen2", tie_word_embeddings=True), config)
    with pytest.raises(AdapterError, match="changes the output head, and embedding and output head"):
        save_lora_gguf(model, tmp_path / "out", tiny.tiny_tokenizer())


def test_a_model_without_adapter_has_none_to_save(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="saves one adapter, and 0 are active"):
        save_lora_gguf(tiny.tiny_model("llama"), tmp_path / "out", tiny.tiny_tokenizer())


@pytest.mark.parametrize(
    ("method", "message"),
    [("add_float32", "another alpha"), ("add_tensor_info", "other weights"), ("quantize", "off by 1 of its size")],
)  # fmt: skip
def test_a_broken_adapter_is_caught(method: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if method == "quantize":  # zeros where lora_B was
        quantize = gguf.quants.quantize
        monkeypatch.setattr(gguf.quants, "quantize", lambda values, kind: quantize(values * 0, kind))
    elif method == "add_float32":
        write = gguf.GGUFWriter.add_float32
        monkeypatch.setattr(gguf.GGUFWriter, method, lambda self, key, value: write(self, key, value + 1))
    else:
        info = gguf.GGUFWriter.add_tensor_info
        monkeypatch.setattr(
            gguf.GGUFWriter,
            method,
            lambda self, name, *rest, **how: info(self, name.replace("blk.0", "blk.9"), *rest, **how),
        )
    with pytest.raises(ExportError, match=rf"{message}.* It is kept as .*out-failed"):
        save_lora_gguf(disturb(adapt(tiny.tiny_model("llama"))), tmp_path / "out", tiny.tiny_tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["out-failed"]
