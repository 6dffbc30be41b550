"""Windows longer than a model's own: every scheme has its effect, and all that reads the model sees the same one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny

from tunesmith import FastLanguageModel
from tunesmith.core.errors import AdapterError, ModelError, SettingsError
from tunesmith.engine.install import engine_of
from tunesmith.models.load import facts_of
from tunesmith.models.rope import AUTOMATIC, SCHEMES, Stretch, stretch
from tunesmith.training.settings import load_run_settings

from ..training.support import trainer

WINDOW = 2 * tiny.WINDOW


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain model and one whose layers differ in their rotary embedding."""
    made: dict[str, Path] = {}
    for family in ("llama", "gemma3"):
        made[family] = tmp_path_factory.mktemp("rope") / family
        tiny.save_model(made[family], family)
    return made


def load(folder: Path, scaling: Any, window: int | None = WINDOW, **arguments: Any) -> Any:
    given = {"dtype": "float32", "rope_scaling": scaling, **arguments}
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=window, **given)[0]


def frequencies(model: Any) -> torch.Tensor:
    return model.get_decoder().rotary_emb.inv_freq


def logits(model: Any, count: int = 40) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(
            input_ids=torch.arange(count, device=model.device)[None] * 7 % 300, use_cache=False
        ).logits.cpu()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme_changes_the_frequencies_and_the_window(scheme: str, folders: dict[str, Path]) -> None:
    model, plain = load(folders["llama"], scheme), load(folders["llama"], None, tiny.WINDOW)
    own, before = frequencies(model), frequencies(plain)
    assert facts_of(model).window == WINDOW == model.config.max_position_embeddings
    # The slowest turns half as far a position: twice the positions fall into what was seen.
    assert float(own[-1] / before[-1]) == pytest.approx(0.5, abs=0.01)
    if scheme == "linear":
        torch.testing.assert_close(own, before / 2)
    else:
        assert float(own[0] / before[0]) > 0.9, "the fastest keeps telling neighbours apart"
    assert torch.isfinite(logits(model, WINDOW)).all()


def test_the_base_of_dynamic_is_that_of_the_whole_window(folders: dict[str, Path]) -> None:
    model, plain = load(folders["llama"], "dynamic", 4 * tiny.WINDOW), load(folders["llama"], None, tiny.WINDOW)
    size = 2 * len(frequencies(plain))
    theta = plain.config.rope_parameters["rope_theta"] * 4 ** (size / (size - 2))
    torch.testing.assert_close(frequencies(model).cpu(), theta ** (-torch.arange(0, size, 2) / size))
    before = frequencies(model).clone()
    logits(model, 1500)
    assert torch.equal(frequencies(model), before), "a long document changes nothing for the next"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_computes_what_transformers_would(scheme: str, folders: dict[str, Path]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = load(folders["llama"], scheme, full_finetuning=True, use_gradient_checkpointing=False)
    config = AutoConfig.from_pretrained(folders["llama"])
    stretch(config, Stretch(scheme, WINDOW))
    theirs = AutoModelForCausalLM.from_pretrained(
        folders["llama"], config=config, attn_implementation="sdpa", dtype=torch.float32
    )
    ids = (torch.arange(700) * 7 % tiny.VOCABULARY)[None]
    for one in (model, theirs.train()):
        one(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        grad = wanted[name].grad
        assert (parameter.grad - grad).norm() <= 1e-4 * grad.norm() + 1e-8, name
    assert engine_of(model).plan.unknown == {} and engine_of(model).notes == []


def test_only_layers_that_see_far_are_stretched(folders: dict[str, Path]) -> None:
    rope = load(folders["gemma3"], "yarn").config.rope_parameters
    assert rope["full_attention"]["rope_type"] == "yarn" and rope["full_attention"]["factor"] == 2
    assert rope["sliding_attention"]["rope_type"] == "default"


def test_parameters_of_transformers(folders: dict[str, Path]) -> None:
    given = {"rope_type": "yarn", "factor": 3.0, "beta_fast": 16}
    model = load(folders["llama"], given, None)
    assert facts_of(model).window == 3 * tiny.WINDOW
    assert model.config.rope_parameters["beta_fast"] == 16
    pretrained = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert facts_of(load(folders["llama"], pretrained, None)).window == 1024
    same = {"rope_type": "dynamic", "factor": 2.0}
    torch.testing.assert_close(
        frequencies(load(folders["llama"], same)), frequencies(load(folders["llama"], "dynamic"))
    )
    older = {"type": "linear", "factor": 2.0}
    torch.testing.assert_close(
        frequencies(load(folders["llama"], older)), frequencies(load(folders["llama"], "linear"))
    )


@pytest.mark.parametrize("scheme", [*SCHEMES, {"rope_type": "yarn", "factor": 2.0}], ids=str)
def test_an_adapter_comes_back_with_the_window_that_it_was_trained_on(
    scheme: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = FastLanguageModel.get_peft_model(load(folders["llama"], scheme), r=4, init_lora_weights=False)
    live = logits(model)
    model.save_pretrained(tmp_path)
    for window in (None, WINDOW, 300):
        again = FastLanguageModel.from_pretrained(str(tmp_path), max_seq_length=window, dtype="float32")[0]
        assert facts_of(again).window == (window or WINDOW)
        torch.testing.assert_close(logits(again), live)
    again = FastLanguageModel.from_pretrained(str(tmp_path), dtype="float32")[0]
    assert facts_of(again).window == WINDOW
    assert json.loads((tmp_path / "base.json").read_text())["stretch"] == {"scaling": scheme, "window": WINDOW}


def test_a_saved_model_keeps_its_scheme(folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load(folders["llama"], "yarn", full_finetuning=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    assert again.config.max_position_embeddings == WINDOW


def test_documents_beyond_the_own_window_are_trained_on(folders: dict[str, Path], tmp_path: Path) -> None:
    model = FastLanguageModel.get_peft_model(load(folders["llama"], "yarn"), r=4)
    rows = [{"text": "the cat sat on a mat " * 120}, {"text": "the red house"}]
    run = trainer(tmp_path, rows=rows, model=model, max_steps=1)
    assert max(len(document) for document in run.train_data.documents) > tiny.WINDOW
    run.train()
    assert run.head.reasons == []


@pytest.mark.parametrize(
    ("scaling", "window", "message"),
    [
        ("yran", WINDOW, "rope_scaling='yran': use linear, dynamic, yarn, llama3. Did you mean 'yarn'"),
        ("yarn", tiny.WINDOW, "stretches nothing: the model's own window of 512 holds max_seq_length=512"),
        ("yarn", None, "stretches nothing"),
        ({"rope_type": "yarnn", "factor": 2.0}, WINDOW, "rope_type is one of .*Did you mean 'yarn'"),
        ({"factor": 2.0}, WINDOW, "rope_type is one of"),
        ({"rope_type": "yarn"}, WINDOW, "above the 512 positions that rope_scaling"),
        (2.0, WINDOW, "rope_scaling=2.0: give one of"),
        ({"rope_type": "linear", "factor": "two"}, WINDOW, "factor is a number of at least 1"),
        ({"rope_type": "linear", "factor": 0.5}, WINDOW, "factor is a number of at least 1"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fsat": 3}, WINDOW, "unknown key 'beta_fsat'. Did you mean"),
        ({"rope_type": "longrope", "factor": 2.0}, WINDOW, "rope_type is one of"),
        ({"rope_type": "linear"}, None, "transformers refuses it .*factor"),
        ({"rope_type": "llama3", "factor": 2.0}, WINDOW, "transformers refuses it"),
        ({"rope_type": "linear", "factor": 1.5}, WINDOW, "above the 768 positions"),
    ],
)
def test_what_would_have_no_effect_or_the_wrong_one(
    scaling: Any, window: int | None, message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(SettingsError, match=message):
        load(folders["llama"], scaling, window)


@pytest.mark.parametrize("times", [2, 4])
def test_a_longer_window_is_stretched_unasked(
    times: int, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(folders["llama"], None, times * tiny.WINDOW)
    assert facts_of(model).stretch == Stretch(AUTOMATIC, times * tiny.WINDOW)
    assert f"stretched to {times * tiny.WINDOW} positions: rope_scaling={AUTOMATIC}" in caplog.text
    assert torch.equal(frequencies(model), frequencies(load(folders["llama"], AUTOMATIC, times * tiny.WINDOW)))


def test_beyond_four_times_its_own_window_a_scheme_must_be_asked_for(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"above 4 times this model's own window of 512 .* at most 2048, or say how"):
        load(folders["llama"], None, 2049)
    assert facts_of(load(folders["llama"], "linear", 4096)).window == 4096


@pytest.mark.parametrize("scheme", ["linear", "yarn", "llama3"])
def test_a_scheme_of_its_own_is_kept_and_widened(scheme: str, folders: dict[str, Path], tmp_path: Path) -> None:
    load(folders["llama"], scheme, full_finetuning=True).save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    wider = load(tmp_path, None, 2 * WINDOW)
    rope = wider.config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == (scheme, 4.0)
    torch.testing.assert_close(frequencies(wider), frequencies(load(folders["llama"], scheme, 2 * WINDOW)))
    adapted = FastLanguageModel.get_peft_model(wider, r=2, init_lora_weights=False)
    adapted.save_pretrained(tmp_path / "adapter")
    again = FastLanguageModel.from_pretrained(str(tmp_path / "adapter"), dtype="float32")[0]
    torch.testing.assert_close(logits(again), logits(adapted))


def test_a_factor_of_its_own_counts_from_its_own_window(tmp_path: Path) -> None:
    """Llama 3.1 has factor 8 over 8,192 and calls 131,072 its window: a wider one grows both alike."""
    own = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    tiny.tiny_model("llama", rope_parameters=own).save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    model = load(tmp_path, None, WINDOW)
    assert facts_of(model).window == WINDOW
    assert model.config.rope_parameters == {**own, "factor": 16.0}


def test_a_scheme_that_reaches_further_than_its_config_says_is_kept(tmp_path: Path) -> None:
    """As some models are published: a window for everyday use, and YaRN for four times what they were trained with."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
    tiny.tiny_model("qwen3", max_position_embeddings=80, rope_parameters=yarn).save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    own = {name: value for name, value in yarn.items() if name != "rope_theta"}
    for window, scaling in ((160, None), (256, None), (160, own)):
        model = load(tmp_path, scaling, window)
        assert model.config.rope_parameters["factor"] == 4.0 and facts_of(model).window == window
    assert load(tmp_path, None, 512).config.rope_parameters["factor"] == 8.0


def test_a_shorter_use_of_a_scheme_is_saved_with_its_reach(tmp_path: Path) -> None:
    tiny.tiny_model("llama", max_position_embeddings=64).save_pretrained(tmp_path / "base")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", {"rope_type": "linear", "factor": 4.0}, 128, full_finetuning=True)
    assert facts_of(model).window == 128 and model.config.max_position_embeddings == 256
    model.save_pretrained(tmp_path / "saved")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved", None, 256).config.rope_parameters["factor"] == 4.0


def test_an_adapter_is_not_used_beyond_its_window(folders: dict[str, Path], tmp_path: Path) -> None:
    FastLanguageModel.get_peft_model(load(folders["llama"], "yarn"), r=2).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=f"is above the window of {WINDOW} tokens that the adapter"):
        load(tmp_path, None, WINDOW + 1)


def test_a_model_without_rotary_embedding_keeps_its_window(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=331, n_embd=32, n_layer=1, n_head=2, n_positions=64)).save_pretrained(
        tmp_path
    )
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"above this model's own window of 64 positions, which we cannot stretch"):
        load(tmp_path, None, 65)


def test_a_model_with_a_scheme_of_its_own(folders: dict[str, Path], tmp_path: Path) -> None:
    load(folders["llama"], "yarn", full_finetuning=True).save_pretrained(tmp_path)
    tiny.tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match=r"this model has a scheme of its own \(yarn\)"):
        load(tmp_path, "linear", 2 * WINDOW)


def test_a_run_is_not_continued_with_another_scheme(folders: dict[str, Path], tmp_path: Path) -> None:
    from tunesmith.core.errors import CheckpointError

    def run(scheme: str) -> Any:
        model = FastLanguageModel.get_peft_model(load(folders["llama"], scheme), r=2)
        return trainer(tmp_path, model=model, max_steps=2, save_steps=1)

    run("yarn").train()
    with pytest.raises(CheckpointError, match="rope_scaling: yarn then, linear now"):
        run("linear").train(resume_from_checkpoint=True)


def test_settings_of_a_run(folders: dict[str, Path], tmp_path: Path) -> None:
    from tunesmith.training.preview import preview
    from tunesmith.training.run import run_training

    rows, texts = tmp_path / "rows.jsonl", ["the cat sat on a mat " * 100, "a dog"]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    asked = {"model": str(folders["llama"]), "data": str(rows), "max_seq_length": WINDOW, "rope_scaling": "yarn",
             "eval_split": 0, "max_steps": 1, "r": 2, "output_dir": str(tmp_path / "run")}  # fmt: skip
    settings, _ = load_run_settings(None, asked)
    assert preview(settings).tokens_an_epoch > tiny.WINDOW
    result = run_training(settings)
    again, _ = FastLanguageModel.from_pretrained(str(result.folder), dtype="float32")
    assert facts_of(again).window == WINDOW
