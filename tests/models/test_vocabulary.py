"""A vocabulary that grows: new rows, trained, saved with the adapter and there again when it is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests import tiny

from tunesmith import FastLanguageModel
from tunesmith.adapters.state import empty_source
from tunesmith.core.errors import AdapterError, ModelError
from tunesmith.models.load import facts_of
from tunesmith.training.settings import load_run_settings

from ..training.support import trainer

ROWS = tiny.VOCABULARY + 5
NEW = ["<one>", "<two>", "<three>"]
BOTH = ["embed_tokens", "lm_head"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An untied and a tied model."""
    made: dict[str, Path] = {}
    for name, family in (("untied", "llama"), ("tied", "qwen3")):
        made[name] = tmp_path_factory.mktemp("vocabulary") / name
        tiny.save_model(made[name], family)
    return made


def load(folder: Path, **arguments: Any) -> tuple[Any, Any]:
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=256, **{"dtype": "float32", **arguments})


def logits(model: Any) -> torch.Tensor:
    ids = torch.cat([torch.arange(30) * 7 % 300, torch.arange(tiny.VOCABULARY, ROWS)])
    with torch.no_grad():
        return model.eval()(input_ids=ids[None].to(model.device), use_cache=False).logits.cpu()


@pytest.mark.parametrize("arguments", [{}, {"dtype": "bfloat16"}, {"load_in_4bit": True}], ids=str)
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_new_rows_are_the_mean_of_the_old(name: str, arguments: dict[str, Any], folders: dict[str, Path]) -> None:
    model, _ = load(folders[name], resize_model_vocab=ROWS, **arguments)
    before, _ = load(folders[name], **arguments)
    for get in ("get_input_embeddings", "get_output_embeddings"):
        weight, old = getattr(model, get)().weight.cpu(), getattr(before, get)().weight.cpu()
        assert torch.equal(weight[: len(old)], old)
        mean = old.float().mean(0).to(old.dtype)
        assert len(weight) == ROWS and all(torch.equal(row, mean) for row in weight[len(old) :])
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == (name == "tied")
    assert model.config.get_text_config().vocab_size == ROWS
    ids = torch.arange(30)[None]
    with torch.no_grad():
        old, new = (m.eval()(input_ids=ids, use_cache=False).logits for m in (before, model))
    torch.testing.assert_close(new[..., : old.shape[-1]], old, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "tying"), [("untied", False), ("tied", False), ("tied", True)])
def test_added_tokens_are_trained_saved_and_loaded_again(
    name: str, tying: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    model, tokenizer = load(folders[name], resize_model_vocab=ROWS)
    # The tokenizer is smaller than the model: ids below its rows are filled first.
    tokenizer.add_tokens([f"<fill{number}>" for number in range(tiny.VOCABULARY - len(tokenizer))])
    tokenizer.add_tokens(NEW)
    assert tiny.VOCABULARY < len(tokenizer) <= ROWS
    model = FastLanguageModel.get_peft_model(model, r=4, modules_to_save=BOTH, ensure_weight_tying=tying)
    rows = [{"text": f"the cat {' '.join(NEW)} sat on a mat"} for _ in range(8)]
    before = model.get_base_model().get_input_embeddings().weight.detach().clone()
    from tunesmith import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir=str(tmp_path / "run"), max_steps=3, learning_rate=1e-2, eval_split=0, use_cpu=True,
                     disable_tqdm=True)  # fmt: skip
    SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer).train()
    after = model.get_base_model().get_input_embeddings().weight
    ids = tokenizer.convert_tokens_to_ids(NEW)
    assert min(ids) == tiny.VOCABULARY
    assert all(not torch.equal(after[i], before[i]) for i in ids)
    live = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "base.json").read_text(encoding="utf-8"))["vocabulary"] == ROWS
    again, its_tokenizer = load(tmp_path / "adapter")
    torch.testing.assert_close(logits(again), live, rtol=0, atol=1e-4)
    assert its_tokenizer.convert_tokens_to_ids(NEW) == ids
    # Saved once more it still says so; and through transformers and PEFT alone, on a base that was made as large.
    again.save_pretrained(tmp_path / "second")
    torch.testing.assert_close(logits(load(tmp_path / "second")[0]), live, rtol=0, atol=1e-4)
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    base.resize_token_embeddings(ROWS)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), live, rtol=0, atol=1e-4)


def test_an_adapter_that_trains_no_rows_still_finds_its_base(folders: dict[str, Path], tmp_path: Path) -> None:
    model = FastLanguageModel.get_peft_model(load(folders["untied"], resize_model_vocab=ROWS)[0], r=4)
    live = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load(tmp_path)[0]), live, rtol=0, atol=1e-5)
    with pytest.raises(AdapterError, match=f"resize_model_vocab={ROWS + 1}, but the adapter .* with {ROWS} rows"):
        load(tmp_path, resize_model_vocab=ROWS + 1)
    assert load(tmp_path, resize_model_vocab=ROWS)[0].config.vocab_size == ROWS


def test_a_resumed_run_has_the_bytes_of_one_without_a_break(folders: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    def run(*, resume: bool = False) -> dict[str, torch.Tensor]:
        base, _ = load(folders["tied"], resize_model_vocab=ROWS)
        model = FastLanguageModel.get_peft_model(base, r=4, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
        trainer(tmp_path, model=model, max_steps=4, save_steps=2).train(resume_from_checkpoint=resume or None)
        return {name: p.detach() for name, p in model.named_parameters()}

    whole = run()
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert all(torch.equal(value, whole[name]) for name, value in run(resume=True).items())


def test_all_weights_train_in_a_grown_model(folders: dict[str, Path], tmp_path: Path) -> None:
    model, _ = load(folders["tied"], resize_model_vocab=ROWS, full_finetuning=True)
    trainer(tmp_path / "run", model=model, max_steps=1, learning_rate=1e-3).train()
    live = logits(model)
    model.save_pretrained(tmp_path / "model")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model")[0]), live)


@pytest.mark.parametrize(
    ("size", "message"),
    [(300, "smaller than the tokenizer, which has 317 tokens"),
     (320, "smaller than the model's vocabulary of 331 rows"),
     (True, "must be a whole number")],
)  # fmt: skip
def test_a_vocabulary_only_grows(size: Any, message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=message):
        load(folders["untied"], resize_model_vocab=size)


def test_an_adapter_of_another_vocabulary_does_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    FastLanguageModel.get_peft_model(load(folders["untied"])[0], r=4).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="was trained with the own vocabulary of its base"):
        load(tmp_path, resize_model_vocab=ROWS)


def test_a_run_grows_its_model_and_plans_so(folders: dict[str, Path], tmp_path: Path) -> None:
    from tunesmith.training.preview import preview
    from tunesmith.training.run import run_training

    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, tiny.chat_rows(12))), encoding="utf-8")
    asked = {"model": str(folders["untied"]), "data": str(rows), "output_dir": str(tmp_path / "run"), "max_steps": 1,
             "dtype": "float32", "max_seq_length": 256, "r": 4, "eval_split": 0,
             "resize_model_vocab": str(ROWS)}  # fmt: skip
    settings, _ = load_run_settings(None, asked)
    assert preview(settings).shape.vocabulary == ROWS
    live = logits(run_training(settings).trainer.model)
    model, _ = load(tmp_path / "run")
    assert facts_of(model).vocabulary == ROWS
    torch.testing.assert_close(logits(model), live, rtol=0, atol=1e-5)
    empty, _ = empty_source(str(tmp_path / "run"), dtype="float32")
    assert empty.get_input_embeddings().weight.shape[0] == ROWS


@pytest.mark.usefixtures("exports_load_here")
def test_exported_it_is_compared_as_large_as_it_is(folders: dict[str, Path], tmp_path: Path) -> None:
    model = FastLanguageModel.get_peft_model(
        load(folders["tied"], resize_model_vocab=ROWS)[0], r=4, init_lora_weights=False
    )
    for method in ("lora", "merged_32bit"):
        assert model.save_pretrained_merged(tmp_path / method, save_method=method).comparison.kl < 1e-6
