"""All weights train: the same gradients as transformers', nothing lost to rounding, and a whole model at the end."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny

from tunesmith import FastLanguageModel
from tunesmith.core.errors import AdapterError, ModelError, SettingsError
from tunesmith.engine.install import engine_of
from tunesmith.models.load import facts_of
from tunesmith.training.optimizer import StochasticAdamW, round_stochastically
from tunesmith.training.settings import FULL_RATE, load_run_settings

from .support import trainer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models: untied, tied, and of a family that the engine does not know."""
    made: dict[str, Path] = {}
    for family in ("llama", "qwen3", "mixtral"):
        made[family] = tmp_path_factory.mktemp("full") / family
        tiny.save_model(made[family], family)
    return made


def load(folder: Path, **arguments: Any) -> Any:
    given = {"dtype": "float32", "full_finetuning": True, "use_gradient_checkpointing": False, **arguments}
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=256, **given)[0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_gradients_of_all_weights_are_those_of_transformers(family: str, folders: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = load(folders[family])
    assert all(p.requires_grad for p in model.parameters())
    theirs = AutoModelForCausalLM.from_pretrained(folders[family], attn_implementation="sdpa").train()
    ids = torch.arange(20).view(1, 20) * 7 % tiny.VOCABULARY
    for one in (model, theirs):
        one(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        grad = wanted[name].grad
        assert (parameter.grad - grad).norm() <= 1e-4 * grad.norm() + 1e-8, name
    assert engine_of(model).notes == []


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_training_moves_every_weight_and_lowers_the_loss(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders[family], use_gradient_checkpointing="unsloth")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(tmp_path, model=model, num_train_epochs=3, learning_rate=1e-2)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-6:]) < 0.8 * sum(losses[:6])  # the last epoch against the first
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    # An expert may see no token of so few.
    assert not [name for name in still if "expert" not in name]


def test_the_rate_is_a_tenth_of_that_of_adapters_unless_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    from tunesmith import SFTConfig, SFTTrainer

    def rate(**asked: Any) -> float:
        args = copy.deepcopy(SFTConfig(output_dir=str(tmp_path), eval_split=0, use_cpu=True, **asked))
        rows, model = tiny.chat_rows(8), load(folders["llama"])
        return SFTTrainer(model, args, train_dataset=rows, processing_class=tiny.tiny_tokenizer()).args.learning_rate

    assert rate() == FULL_RATE
    assert rate(learning_rate=2e-4) == 2e-4
    run = {"model": "m", "data": "d", "full_finetuning": True}
    assert load_run_settings(None, run)[0].learning_rate == FULL_RATE
    assert load_run_settings(None, {**run, "learning_rate": 2e-4})[0].learning_rate == 2e-4
    assert load_run_settings(None, {**run, "full_finetuning": False})[0].learning_rate == 2e-4


def test_get_peft_model_only_sets_checkpointing_and_says_so(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(folders["llama"])
    assert FastLanguageModel.get_peft_model(model, r=8, use_gradient_checkpointing=True) is model
    assert facts_of(model).checkpointing is True
    assert "all weights train, so get_peft_model adds no adapter" in caplog.text


def test_what_does_not_go_together_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter = FastLanguageModel.get_peft_model(load(folders["llama"], full_finetuning=False), r=2)
    adapter.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="full_finetuning=True trains the weights of a base, and this is an adapter"):
        load(tmp_path / "adapter")
    run = {"model": "m", "data": "d", "full_finetuning": True}
    with pytest.raises(SettingsError, match="no adapter: leave out lora_alpha, r"):
        load_run_settings(None, {**run, "r": 8, "lora_alpha": 3})


def test_a_base_without_an_adapter_does_not_train_by_accident(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the model has no adapter: call .*get_peft_model.* full_finetuning=True"):
        trainer(tmp_path, model=load(folders["llama"], full_finetuning=False))


# ---- 16 bits ----


def test_rounding_is_right_on_average() -> None:
    value = torch.full((200_000,), 1.0 + 2**-10)  # an eighth of the way from 1 to the next bfloat16
    rounded = round_stochastically(value)
    assert set(rounded.tolist()) == {1.0, 1.0078125}
    assert rounded.float().mean() == pytest.approx(1.0 + 2**-10, abs=5e-5)
    exact = torch.randn(1000).bfloat16().float()
    assert torch.equal(round_stochastically(exact).float(), exact)
    assert torch.equal(round_stochastically(-value[:9]).float().abs() >= 1, torch.ones(9, dtype=torch.bool))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_in_float32_it_is_adamw(decay: float) -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2))
    first = StochasticAdamW([ours], lr=0.01, weight_decay=decay)
    second = torch.optim.AdamW([theirs], lr=0.01, weight_decay=decay)
    for step in range(5):
        for parameter, optimizer in ((ours, first), (theirs, second)):
            parameter.grad = torch.sin(parameter.detach() * 3 + step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_small_steps_are_not_lost() -> None:
    steps, rate = 200, 2e-5
    weight = torch.nn.Parameter(torch.full((20_000,), 0.5, dtype=torch.bfloat16))
    lost = torch.nn.Parameter(weight.detach().clone())
    for parameter, optimizer in (
        (weight, StochasticAdamW([weight], lr=rate)),
        (lost, torch.optim.AdamW([lost], lr=rate, weight_decay=0.0)),
    ):
        for _ in range(steps):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    assert float(lost.float().mean()) == 0.5  # what plain AdamW makes of it
    assert float(weight.float().mean()) == pytest.approx(0.5 - steps * rate, abs=0.05 * steps * rate)


def test_16_bit_weights_get_the_optimizer_that_keeps_small_steps(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders["llama"], dtype="bfloat16")
    run = trainer(tmp_path, model=model, max_steps=4, learning_rate=3e-3)
    run.train()
    assert type(run.optimizer.optimizer) is StochasticAdamW
    assert {state["exp_avg"].dtype for state in run.optimizer.state.values()} == {torch.float32}
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    with pytest.raises(SettingsError, match="optim=adafactor on weights in 16 bits would lose most steps"):
        trainer(tmp_path / "other", model=load(folders["llama"], dtype="bfloat16"), optim="adafactor")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_has_the_bytes_of_one_without_a_break(
    dtype: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    def run(folder: Path, *, resume: bool = False) -> dict[str, torch.Tensor]:
        model = load(folders["llama"], dtype=dtype)
        trainer(folder, model=model, max_steps=4, save_steps=2).train(resume_from_checkpoint=resume or None)
        return {name: p.detach() for name, p in model.named_parameters()}

    whole = run(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = run(tmp_path, resume=True)
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


# ---- optimizers of 8 bits ----


def test_moments_in_8_bits_are_those_of_bitsandbytes() -> None:
    from bitsandbytes.optim import AdamW8bit

    torch.manual_seed(0)
    target, wave = torch.randn(64, 100), torch.arange(6400.0).view(64, 100)
    exact, ours, theirs = (torch.nn.Parameter(torch.zeros(64, 100)) for _ in range(3))
    optimizers = {
        exact: StochasticAdamW([exact], lr=0.02),
        ours: StochasticAdamW([ours], lr=0.02, in_8_bits=True),
        theirs: AdamW8bit([theirs], lr=0.02, weight_decay=0.0),
    }
    for step in range(60):
        for weight, optimizer in optimizers.items():
            weight.grad = weight.detach() - target + 0.1 * torch.sin(wave + step)
            optimizer.step()
    assert (ours - theirs).norm() < 0.01 * theirs.norm()
    assert 0.001 * exact.norm() < (ours - exact).norm() < 0.05 * exact.norm()
    state = optimizers[ours].state[ours]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.uint8 and state["exp_avg_scale"].shape == (25,)


def test_weights_in_16_bits_take_moments_in_8(folders: dict[str, Path], tmp_path: Path) -> None:
    def run(*, resume: bool = False) -> Any:
        model = load(folders["llama"], dtype="bfloat16")
        made = trainer(tmp_path, model=model, max_steps=4, save_steps=2, learning_rate=3e-3, optim="adamw_8bit")
        made.train(resume_from_checkpoint=resume or None)
        return made

    whole = run()
    kinds = {p.numel() >= 4096: state["exp_avg"].dtype for p, state in whole.optimizer.state.items()}
    assert kinds == {True: torch.uint8, False: torch.float32}
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = dict(run(resume=True).model.named_parameters())
    assert all(torch.equal(value, resumed[name]) for name, value in whole.model.named_parameters())


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_states_in_8_bits(optim: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = FastLanguageModel.get_peft_model(load(folders["llama"], full_finetuning=False), r=128)
    run = trainer(tmp_path, model=model, optim=optim, num_train_epochs=3, learning_rate=1e-2)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    kinds = {p.numel() >= 4096: state["state1"].dtype for p, state in run.optimizer.state.items()}
    # bitsandbytes keeps tensors below 4,096 entries (here those of k and v) in 32 bits.
    assert kinds == {True: torch.uint8, False: torch.float32}
    said = [note for note in facts_of(model).notes if "pages of optimizer state need a GPU" in note]
    assert bool(said) == optim.startswith("paged")


# ---- a run ----


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_run_leaves_a_whole_model(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tunesmith.training.run import run_training

    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in tiny.chat_rows(20)), encoding="utf-8")
    asked = {
        "model": str(folders[family]), "data": str(rows), "output_dir": str(tmp_path / "run"), "max_steps": 3,
        "dtype": "float32", "full_finetuning": True, "learning_rate": 1e-3,
    }  # fmt: skip
    result = run_training(load_run_settings(None, asked)[0])
    assert result.trained == tmp_path / "run" / "model"
    ids = torch.arange(9)[None]
    live = result.trainer.model.eval()
    again = AutoModelForCausalLM.from_pretrained(result.trained, dtype=torch.float32).eval()
    ours, _ = FastLanguageModel.from_pretrained(str(tmp_path / "run"), dtype="float32", max_seq_length=None)
    with torch.no_grad():
        for model in (again, ours.eval()):
            torch.testing.assert_close(model(ids).logits, live(ids).logits, rtol=1e-4, atol=1e-4)
    card = (result.trained / "README.md").read_text(encoding="utf-8")
    assert "all weights trained" in card and "lora_alpha" not in card and "library_name: transformers" in card
    # What the run wrote about itself is what continues it.
    settings, _ = load_run_settings(tmp_path / "run" / "settings.yaml", {})
    assert settings.full_finetuning and settings.learning_rate == 1e-3
