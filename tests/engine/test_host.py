"""An embedding that stays in host memory: shown with a model on the meta device, as no test needs a GPU."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny

from tunesmith import FastLanguageModel
from tunesmith.core.errors import AdapterError, ModelError, SettingsError
from tunesmith.engine.host import compute_device, is_on_host, keep_on_host
from tunesmith.memory import shape_of
from tunesmith.training.settings import load_run_settings

from ..training.support import trainable, trainer

META = torch.device("meta")


def offloaded(family: str = "llama") -> Any:
    model = tiny.tiny_model(family)
    keep_on_host(model, torch.device("cpu"))
    return model


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_it_answers_as_before(family: str) -> None:
    ids = torch.arange(30)[None]
    with torch.no_grad():
        wanted = tiny.tiny_model(family).eval()(input_ids=ids, use_cache=False).logits
        assert torch.equal(offloaded(family).eval()(input_ids=ids, use_cache=False).logits, wanted)


def test_the_matrix_stays_and_its_rows_go() -> None:
    model = offloaded()
    weight = model.get_input_embeddings().weight
    values = weight.detach().clone()
    model.to(META)
    assert [name for name, p in model.named_parameters() if not p.is_meta] == ["model.embed_tokens.weight"]
    assert model.get_input_embeddings().weight is weight and torch.equal(weight, values)
    assert compute_device(model) == META
    rows = model.get_input_embeddings()(torch.arange(7)[None])
    assert (rows.device, rows.shape) == (META, (1, 7, 32))
    # Another dtype reaches it, where it is.
    model.to(torch.bfloat16)
    assert (model.get_input_embeddings().weight.dtype, model.get_input_embeddings().weight.device.type) == (
        torch.bfloat16, "cpu",
    )  # fmt: skip


def test_names_and_saved_weights_are_what_they_were(tmp_path: Path) -> None:
    model, plain = offloaded(), tiny.tiny_model()
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    assert type(again.get_input_embeddings()) is torch.nn.Embedding
    assert is_on_host(copy.deepcopy(model).get_input_embeddings())


def test_it_trains_to_the_same_bytes(tmp_path: Path) -> None:
    def run(folder: str, base: Any) -> dict[str, torch.Tensor]:
        model = FastLanguageModel.get_peft_model(base, r=4)
        trainer(tmp_path / folder, model=model, max_steps=2).train()
        return trainable(model)

    wanted = run("plain", tiny.tiny_model())
    assert all(torch.equal(value, wanted[name]) for name, value in run("host", offloaded()).items())


def test_a_gpu_does_not_hold_it() -> None:
    model = offloaded().requires_grad_(False)
    size = model.get_input_embeddings().weight.nbytes
    assert shape_of(model, kind="cpu").base_bytes - shape_of(model, kind="cuda").base_bytes == size


def test_on_a_cpu_one_line_says_that_it_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.save_model(tmp_path)
    model, _ = FastLanguageModel.from_pretrained(str(tmp_path), dtype="float32", offload_embedding=True)
    if torch.cuda.is_available():
        assert is_on_host(model.get_input_embeddings())
    else:
        assert "its embedding is in host memory already" in caplog.text
        assert type(model.get_input_embeddings()) is torch.nn.Embedding


def test_what_cannot_lie_in_host_memory(tmp_path: Path) -> None:
    from tunesmith.adapters.state import empty_source

    tiny.save_model(tmp_path / "tied", "qwen3")
    for load in (FastLanguageModel.from_pretrained, empty_source):
        with pytest.raises(ModelError, match="embedding and output head of this model are one tensor"):
            load(str(tmp_path / "tied"), dtype="float32", offload_embedding=True)
    with pytest.raises(SettingsError, match="and full_finetuning=True trains it"):
        FastLanguageModel.from_pretrained(str(tmp_path / "tied"), full_finetuning=True, offload_embedding=True)
    with pytest.raises(SettingsError, match="and full_finetuning trains it"):
        load_run_settings(None, {"model": "m", "data": "d", "full_finetuning": True, "offload_embedding": True})
    with pytest.raises(AdapterError, match="offload_embedding keeps the embedding frozen in host memory"):
        FastLanguageModel.get_peft_model(offloaded(), modules_to_save=["embed_tokens"])


def test_a_run_says_so_to_its_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tunesmith.training.preview import preview
    from tunesmith.training.run import make_trainer

    tiny.save_model(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, tiny.chat_rows(12))), encoding="utf-8")
    asked = {"model": str(tmp_path / "model"), "data": str(rows), "max_seq_length": 256, "offload_embedding": True}
    settings, _ = load_run_settings(None, asked)
    assert preview(settings).plan.peak > 0
    model = make_trainer(settings, tmp_path / "run")[0].model
    assert is_on_host(model.get_input_embeddings()) or "in host memory already" in caplog.text
