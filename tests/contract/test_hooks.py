"""The places where we lean on other libraries. When one of these fails, an upgrade changed a hook, not our code."""

from __future__ import annotations

import inspect

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tunesmith.engine.lora import FusedLoraLinear, fused_lora


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_peft_builds_our_layer_and_keeps_it_out_of_the_saved_config(tmp_path):
    model = get_peft_model(small_llama(), fused_lora(LoraConfig(target_modules="all-linear", r=4)))
    layers = [module for module in model.modules() if isinstance(module, FusedLoraLinear)]
    assert len(layers) == 14
    model.save_pretrained(tmp_path)
    assert "Fused" not in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize("case", ["plain", "rslora", "bias", "dropout", "dora"])
def test_our_layer_equals_pefts(case):
    options = {"use_rslora": case == "rslora", "lora_bias": case == "bias", "use_dora": case == "dora"}
    config = LoraConfig(
        target_modules="all-linear", r=4, lora_alpha=7, lora_dropout=0.3 if case == "dropout" else 0.0,
        init_lora_weights=case == "dora", **options,
    )  # fmt: skip
    ids = torch.arange(20)[None]
    results = []
    for prepared in (config, fused_lora(LoraConfig(**config.to_dict()))):
        torch.manual_seed(1)
        model = get_peft_model(small_llama(), prepared).train()
        torch.manual_seed(2)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (their_loss, theirs), (our_loss, ours) = results
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=0)
    assert set(theirs) == set(ours) != set()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_merging_switching_off_and_a_second_adapter_are_pefts():
    model = get_peft_model(small_llama(), fused_lora(LoraConfig(target_modules="all-linear", init_lora_weights=False)))
    ids = torch.arange(20)[None]
    adapted = model(ids).logits
    with model.disable_adapter():
        base = model(ids).logits
    assert not torch.allclose(adapted, base, atol=1e-3)
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("second")
    torch.testing.assert_close(model(ids).logits, base)
    model.set_adapter("default")
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("get_batch_samples", ["epoch_iterator", "num_batches", "device"]),
        ("compute_loss", ["model", "inputs", "return_outputs", "num_items_in_batch"]),
        ("training_step", ["model", "inputs", "num_items_in_batch"]),
        ("log", ["logs", "start_time"]),
        ("evaluate", ["eval_dataset", "ignore_keys", "metric_key_prefix"]),
        ("_save_checkpoint", ["model", "trial"]),
        ("_save_optimizer_and_scheduler", ["output_dir"]),
    ],
)
def test_the_trainer_methods_that_we_override_or_call_still_take_what_we_give(method, parameters):
    assert list(inspect.signature(getattr(Trainer, method)).parameters)[1:] == parameters


def test_warmup_steps_is_still_a_share_below_one():
    assert TrainingArguments(warmup_steps=0.25).get_warmup_steps(100) == 25


def test_attention_can_be_registered_beside_the_others():
    before = dict(AttentionInterface._global_mapping)
    from tunesmith.engine.attention import ATTENTION, use_document_attention

    assert use_document_attention(small_llama()) is None
    after = dict(AttentionInterface._global_mapping)
    assert set(after) - {ATTENTION} == set(before) - {ATTENTION}
    assert all(after[name] is before[name] for name in before if name != ATTENTION)


def test_the_settings_know_every_optimizer_and_schedule_of_transformers():
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    from tunesmith.training.aliases import KNOWN

    assert {entry.value for entry in OptimizerNames} <= set(KNOWN["optim"])
    assert {entry.value for entry in SchedulerType} <= set(KNOWN["lr_scheduler_type"])
