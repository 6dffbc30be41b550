"""An installed engine is invisible but for its speed: whatever people do to a model works, and gives what it gave."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny
from tests.engine.support import (
    FAMILIES,
    PHI3,
    POLICIES,
    adapted,
    assert_close,
    assert_identical,
    base_of,
    batch,
    counted,
    draw,
    fused,
    layers_of,
    plain,
    step,
)
from transformers import AutoModelForCausalLM

from tunesmith.engine.attention import use_document_attention
from tunesmith.engine.install import engine_of, install, plan
from tunesmith.engine.policies import Policy

LORA: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]}


def pair(family: str = "llama", adapter: Any = LORA, **changes: Any) -> tuple[Any, Any]:
    return fused(family, adapter=adapter, **changes), plain(family, adapter=adapter, **changes)


def same_step(ours: Any, theirs: Any, *, is_fused: bool = True, given: Any = None) -> None:
    """Assert that a training step of the installed model gives what it gives without the engine."""
    assert_close(step(ours, given, fused=is_fused), step(theirs, given))


def storages(model: Any) -> dict[int, int]:
    """Return the bytes of every distinct storage that parameters lie in."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return found


def notes(model: Any) -> list[str]:
    engine = engine_of(model)
    assert engine is not None
    return engine.notes


# ---- in and out ----


@pytest.mark.parametrize("family", FAMILIES)
def test_install_and_revert_leave_nothing(family: str) -> None:
    model = tiny.tiny_model(family)
    use_document_attention(model)
    before, keys, classes = step(model), list(model.state_dict()), [type(m) for m in model.modules()]
    layers = list(layers_of(model))
    engine = install(model)
    assert_close(step(model, fused=True), before)
    assert list(model.state_dict()) == keys
    assert [isinstance(new, old) for new, old in zip(model.modules(), classes, strict=True)] == [True] * len(classes)
    assert [m.__class__.__name__ for m in model.modules()] == [c.__name__ for c in classes]

    engine.revert()
    assert engine_of(model) is None
    assert all(new is old for new, old in zip(layers_of(model), layers, strict=True))
    assert [type(m) for m in model.modules()] == classes
    assert_identical(step(model, fused=False), before)
    for name, parameter in model.named_parameters():
        assert parameter.is_contiguous(), name
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.itemsize, name


def test_a_second_install_returns_the_first_engine() -> None:
    model = fused(adapter=LORA)
    assert install(model) is engine_of(model) is engine_of(base_of(model))


def test_revert_keeps_what_happened_meanwhile() -> None:
    """An adapter that was added, the mode, and trained weights stay."""
    model, twin = pair()
    model.eval()
    engine_of(model).revert()
    assert not layers_of(model)[0].training
    same_step(model.train(), twin, is_fused=False)


def test_models_in_one_process_do_not_touch_each_other() -> None:
    first, second, other = fused(adapter=LORA), fused(adapter=LORA), fused("gemma3")
    alone, own = step(first), step(other)
    engine_of(second).set_policy(Policy.FULL)
    step(second, batch(3, 14))
    assert engine_of(first).policies == [Policy.NONE, Policy.NONE]
    assert_identical(step(first), alone)
    assert_identical(step(other), own)
    engine_of(second).revert()
    assert_identical(step(first, fused=True), alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_not_held_twice(family: str) -> None:
    model = tiny.tiny_model(family)
    use_document_attention(model)
    before = sum(storages(model).values())
    install(model)
    step(model)
    assert sum(storages(model).values()) <= 1.02 * before
    kept = sum(t.untyped_storage().nbytes() for layer in layers_of(model) for t in layer._stacked
               if t is not None and t.untyped_storage().data_ptr() not in storages(model))  # fmt: skip
    assert kept == 0


# ---- what people do to a model ----


def test_evaluation_and_generation_between_steps_change_nothing() -> None:
    model, twin = pair(adapter={**LORA, "lora_dropout": 0.0})
    before = step(model, fused=True)
    model.eval()
    ids = torch.arange(9)[None]
    wanted = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=ids, **wanted), twin.eval().generate(input_ids=ids, **wanted))
    with torch.no_grad():
        model(ids)
    with torch.inference_mode():
        model(ids, use_cache=False)
    model.train()
    assert_identical(step(model, fused=True), before)
    assert notes(model) == []


def test_another_dtype() -> None:
    model, twin = pair()
    step(model)
    model.to(torch.bfloat16)
    twin.to(torch.bfloat16)
    ours, exact = step(model, fused=True), step(twin)
    assert ours["logits"].dtype == torch.bfloat16
    torch.testing.assert_close(ours["loss"], exact["loss"], rtol=2e-2, atol=0)
    assert sum(storages(model).values()) == sum(storages(twin).values())
    same_step(model.float(), twin.float())


def test_loaded_weights_are_used() -> None:
    model, twin = fused(), plain(seed=5)
    step(model)
    model.load_state_dict(twin.state_dict())
    same_step(model, twin)
    model.load_state_dict(plain(seed=6).state_dict(), assign=True)
    same_step(model, plain(seed=6))


def test_weights_changed_in_place_are_used() -> None:
    """What an optimizer does in full fine-tuning, and merging by hand."""
    model, twin = fused(), plain()
    for each in (model, twin):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        for _ in range(3):
            step(each)
            optimizer.step()
        assert all(p in optimizer.state for p in each.parameters())
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4, msg=name)
    drawn = torch.randn(32, 32)
    for each in (model, twin):
        each.load_state_dict(twin.state_dict())
        layers_of(each)[0].self_attn.k_proj.weight.data.copy_(drawn[:16])
        layers_of(each)[0].self_attn.q_proj.weight.data = drawn.clone()
    same_step(model, twin)


def test_merging_and_unmerging() -> None:
    model, twin = pair()
    before = step(model)
    for each in (model, twin):
        each.merge_adapter()
        each.eval()
    with torch.no_grad(), counted() as calls:
        ours, theirs = (each(**batch(9)).logits for each in (model, twin))
    assert len(calls) == 2
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for each in (model, twin):
        each.unmerge_adapter()
        each.train()
    same_step(model, twin)
    assert_close(step(model), before)
    for each in (model, twin):
        each.merge_adapter()
    # PEFT takes a merged adapter out of the weights when it is disabled.
    with model.disable_adapter(), twin.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(**batch(9)).logits, twin(**batch(9)).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(**batch(9)).logits, plain()(**batch(9)).logits, rtol=1e-4, atol=1e-4)


def test_merge_and_unload() -> None:
    model, twin = pair()
    step(model)
    ours, theirs = model.merge_and_unload(), twin.merge_and_unload()
    for each in (ours, theirs):
        each.requires_grad_(True)
    same_step(ours, theirs)


def test_adapters_are_added_switched_disabled_and_deleted() -> None:
    model, twin = pair()
    other = {"r": 2, "target_modules": ["k_proj", "up_proj", "down_proj"], "seed": 4, "name": "other"}
    for each in (model, twin):
        adapted(each, **other)
    same_step(model, twin)
    for each in (model, twin):
        each.set_adapter("other")
    same_step(model, twin)
    with model.disable_adapter(), twin.disable_adapter(), torch.no_grad(), counted() as calls:
        torch.testing.assert_close(model(**batch(9)).logits, twin(**batch(9)).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(**batch(9)).logits, plain()(**batch(9)).logits, rtol=1e-4, atol=1e-4)
    assert len(calls) == 4
    same_step(model, twin)
    for each in (model, twin):
        each.set_adapter("default")
        each.delete_adapter("other")
    same_step(model, twin)
    assert notes(model) == []


@pytest.mark.parametrize("trained", [False, True], ids=["adapter", "full"])
def test_a_saved_model_loads_equal(trained: bool, tmp_path: Path) -> None:
    model = fused(adapter=None if trained else LORA)
    step(model)
    base_of(model).save_pretrained(tmp_path / "base") if trained else model.save_pretrained(tmp_path / "adapter")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    if trained:
        saved = load_file(tmp_path / "base" / "model.safetensors")
        assert saved.keys() == tiny.tiny_model().state_dict().keys()
        assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
        twin = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    else:
        from peft import PeftModel

        twin = PeftModel.from_pretrained(plain(), tmp_path / "adapter", is_trainable=True)
    same_step(model, twin.train())


def test_a_copy_trains_on_its_own() -> None:
    model = fused(adapter=LORA)
    engine_of(model).set_policy(Policy.OFFLOAD)
    before = step(model)
    twin = copy.deepcopy(model)
    assert engine_of(twin) is not engine_of(model)
    assert engine_of(twin).model is base_of(twin)
    assert layers_of(twin)[0]._engine is engine_of(twin)
    assert_identical(step(twin, fused=True), before)
    places = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not places & {p.untyped_storage().data_ptr() for p in twin.parameters()}
    draw(twin, seed=9)
    assert not torch.equal(step(twin)["loss"], before["loss"])
    assert_identical(step(model), before)
    engine_of(twin).revert()
    assert_identical(step(model, fused=True), before)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_all_hidden_states_come_out(family: str) -> None:
    model, twin = pair(family)
    given = {**batch(9), "output_hidden_states": True}
    before = step(model, fused=True)
    with counted() as calls:
        ours, theirs = model(**given), twin(**given)
    assert len(calls) == 2
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    for mine, exact in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-3)
    # transformers leaves hooks behind, also on the attention: they do not slow the next step down.
    assert_identical(step(model, fused=True), before)
    assert notes(model) == []


def test_checkpointing_of_transformers_changes_nothing() -> None:
    model, twin = pair()
    before = step(model)
    for each in (model, twin):
        each.enable_input_require_grads()
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_identical(step(model, fused=True), before)
    model.gradient_checkpointing_disable()
    assert_identical(step(model, fused=True), before)
    twin.gradient_checkpointing_disable()
    same_step(model, twin)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches(family: str, side: str) -> None:
    model, twin = pair(family, {"target_modules": PHI3 if family == "phi3" else LORA["target_modules"]})
    ids = torch.randint(tiny.VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if side != "right":
        mask[0, :7], mask[1, :2] = 0, 0
    if side != "left":
        mask[0, 9:], mask[2, 4:] = 0, 0
    # The first real token is not predicted: what stands before it is padding.
    first = torch.nn.functional.pad(mask[:, :-1], (1, 0)) == 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0) | first, -100),
             "use_cache": False}  # fmt: skip
    ours, exact = step(model, given, fused=True), step(twin, given)
    for found in (ours, exact):
        found["logits"] = found["logits"][mask.bool()]
    assert_close(ours, exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_of_several_rows(family: str) -> None:
    model, twin = pair(family, {"target_modules": PHI3 if family == "phi3" else LORA["target_modules"]})
    ids = torch.arange(33).view(3, 11) * 7 % tiny.VOCABULARY
    same_step(model, twin, given={"input_ids": ids, "labels": ids, "use_cache": False})


def test_positions_changed_in_place_are_read_again() -> None:
    """A trainer may keep one tensor and fill it anew for every batch."""
    model, twin = pair()
    given = batch(8, 9)
    same_step(model, twin, given=given)
    given["position_ids"].copy_(batch(3, 14)["position_ids"])
    same_step(model, twin, given=given)


@pytest.fixture
def alone() -> Iterator[Any]:
    """A process group of one, and its mesh."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "adapter"])
def test_sharded_weights_are_not_moved(adapter: Any, alone: Any) -> None:
    """FSDP fills the memory behind a Parameter anew for every forward: stacked elsewhere it would never change."""
    from torch.distributed.fsdp import fully_shard

    losses = []
    for made in (fused, plain):
        model = made(adapter=adapter)
        if made is fused:
            for layer in layers_of(model):
                fully_shard(layer, mesh=alone)
            fully_shard(model, mesh=alone)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(**batch(9, 4)).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- what is not fused ----


def dora(model: Any) -> Any:
    return adapted(model, use_dora=True)


def bias_of_b(model: Any) -> Any:
    return adapted(model, lora_bias=True)


def two_at_once(model: Any) -> Any:
    model = adapted(adapted(model), seed=5, name="other")
    model.base_model.set_adapter(["default", "other"])
    return model


def trained_norms(model: Any) -> Any:
    return adapted(model, **LORA, modules_to_save=["input_layernorm"])


def hooked(model: Any) -> Any:
    model = adapted(model)
    layers_of(model)[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return model


def hooked_adapter(model: Any) -> Any:
    model = adapted(model)
    layers_of(model)[0].self_attn.v_proj.lora_A["default"].register_forward_hook(lambda module, args, out: out * 2)
    return model


def wrapped(model: Any) -> Any:
    """As accelerate does for weights that live elsewhere."""
    model = adapted(model)
    block = layers_of(model)[0].mlp
    own = block.forward
    block.forward = lambda x: own(x) * 2
    return model


def replaced(model: Any) -> Any:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    old = layers_of(model)[0].mlp.down_proj
    made = Doubled(old.in_features, old.out_features, bias=False)
    made.weight = old.weight
    layers_of(model)[0].mlp.down_proj = made
    return model


@pytest.mark.parametrize(
    ("change", "reason", "count"),
    [
        (dora, "the adapter is a variant of LoRA (DoraLinearVariant)", 0),
        (bias_of_b, "lora_B has a bias", 0),
        (two_at_once, "2 adapters are active at once", 0),
        (trained_norms, "a block inside the layer was changed after it was loaded", 0),
        (hooked, "a Linear inside the layer has hooks", 1),
        (hooked_adapter, "a Linear inside the layer has hooks", 1),
        (wrapped, "a LlamaMLP inside the layer has hooks", 1),
        (replaced, "a layer is a Doubled", 1),
    ],
)
def test_what_is_more_than_plain_lora_runs_as_it_was_written(change: Any, reason: str, count: int) -> None:
    model, twin = change(fused()), change(plain())
    model.train()
    with counted() as calls:
        ours = step(model)
    assert len(calls) == count
    assert_close(ours, step(twin.train()))
    step(model)
    assert notes(model) == [reason]


def test_the_fused_path_comes_back() -> None:
    model, twin = two_at_once(fused()), two_at_once(plain())
    same_step(model, twin, is_fused=False)
    for each in (model, twin):
        each.set_adapter("other")
    same_step(model, twin)


def test_rows_with_adapters_of_their_own() -> None:
    """PEFT's ``adapter_names`` works through hooks."""
    model, twin = (adapted(adapted(each), seed=5, name="other").eval() for each in (fused(), plain()))
    given = {"input_ids": torch.arange(22).view(2, 11), "adapter_names": ["other", "default"], "use_cache": False}
    with torch.no_grad():
        torch.testing.assert_close(model(**given).logits, twin(**given).logits, rtol=1e-4, atol=1e-4)


def test_autocast_is_left_to_torch() -> None:
    model, twin = pair()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = step(model, fused=False), step(twin)
    torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-2, atol=0)
    assert notes(model) == ["autocast computes in torch.bfloat16, the hidden states are torch.float32"]
    same_step(model, twin)


def test_autocast_to_the_models_own_dtype_changes_nothing() -> None:
    model = fused(adapter=LORA).to(torch.bfloat16)
    alone = step(model, fused=True)
    with torch.autocast("cpu", torch.bfloat16), counted() as calls:
        hidden = model(**batch(9), output_hidden_states=True).hidden_states
    assert len(calls) == 2
    assert not notes(model)
    expected = model(**batch(9), output_hidden_states=True).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(hidden[:-1], expected[:-1], strict=True))
    assert_identical(step(model, fused=True), alone)


def test_the_flag_of_transformers_counts_until_a_policy_is_chosen() -> None:
    model = fused(adapter=LORA)
    layer = layers_of(model)[0]
    assert layer._policy() is Policy.NONE
    base_of(model).gradient_checkpointing_enable()
    assert layer._policy() is Policy.FULL
    engine_of(model).set_policy(Policy.NONE)
    assert layer._policy() is Policy.NONE
    with torch.no_grad():
        assert layer._policy() is Policy.FULL


def test_attention_dropout_is_left_to_transformers() -> None:
    model = fused(attention_dropout=0.5, adapter=LORA)
    step(model, fused=False)
    assert notes(model) == ["attention_dropout is 0.5"]
    model.eval()
    with torch.no_grad(), counted() as calls:
        model(**batch(9))
    assert len(calls) == 2


def test_masks_of_ones_own_are_left_to_transformers() -> None:
    model, twin = pair()
    mask = torch.zeros(1, 1, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), torch.finfo().min)
    mask[..., 5:, :3] = torch.finfo().min
    given = {**batch(9), "attention_mask": mask}
    same_step(model, twin, is_fused=False, given=given)
    assert notes(model) == ["the attention mask is more than documents side by side"]


def test_a_note_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = dora(fused())
    step(model)
    step(model)
    assert [record.message for record in caplog.records if record.name.startswith("tunesmith")] == [
        "decoder layers run as transformers wrote them, slower: the adapter is a variant of LoRA (DoraLinearVariant)"
    ]


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss", "lfm2", "qwen3-moe"])
def test_a_family_that_is_not_known_stays_as_it_is(family: str) -> None:
    model = tiny.tiny_model(family)
    use_document_attention(model)
    layers = list(layers_of(model))
    engine = install(model)
    assert all(new is old for new, old in zip(layers_of(model), layers, strict=True))
    (line,) = engine.plan.reasons
    assert line.startswith("2 decoder layers run as transformers wrote them, slower: ")
    assert str(engine.plan).startswith("0 of 2 decoder layers fused\n")
    step(model)
    engine.revert()


def test_attention_that_was_asked_for_by_name() -> None:
    model = tiny.tiny_model("llama", attn_implementation="eager")
    assert plan(model).reasons == [
        "2 decoder layers run as transformers wrote them, slower: the attention is 'eager', not the engine's own"
    ]


def changed_norm(layer: Any) -> None:
    class OtherRMSNorm(type(layer.input_layernorm)):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * 1.01

    layer.input_layernorm.__class__ = OtherRMSNorm


def changed_activation(layer: Any) -> None:
    layer.mlp.act_fn = torch.nn.GELU()


def test_a_layer_whose_forward_was_replaced_is_refused() -> None:
    model = tiny.tiny_model()
    use_document_attention(model)
    layer = layers_of(model)[1]
    layer.forward = lambda hidden_states, **kwargs: type(layer).forward(layer, hidden_states, **kwargs) * 2
    assert install(model).plan.reasons == [
        (
            "1 decoder layers run as transformers wrote them, slower: LlamaDecoderLayer has a forward of its own, from "
            "accelerate's hooks perhaps"
        )
    ]


@pytest.mark.parametrize("change", [changed_norm, changed_activation])
def test_a_layer_that_computes_something_else_is_refused(change: Any) -> None:
    model, twin = tiny.tiny_model(), tiny.tiny_model()
    use_document_attention(model)
    for each in (model, twin):
        for layer in layers_of(each):
            change(layer)
    engine = install(model)
    (line,) = engine.plan.reasons
    assert line.endswith("slower: LlamaDecoderLayer computes something else than the engine's layer")
    same_step(model, twin, is_fused=False)


def test_a_single_layer_that_differs_is_refused() -> None:
    model, twin = tiny.tiny_model(), tiny.tiny_model()
    use_document_attention(model)
    for each in (model, twin):
        changed_norm(layers_of(each)[1])
    engine = install(model)
    assert list(engine.plan.known) == [0]
    assert_close(step(model), step(twin))


@pytest.mark.parametrize("change", [{"hidden_act": "relu"}, {"hidden_act": "gelu"}])
def test_an_activation_that_is_not_known(change: dict[str, Any]) -> None:
    model = tiny.tiny_model("llama", **change)
    use_document_attention(model)
    assert "has the activation" in install(model).plan.reasons[0]
    step(model, fused=False)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_of_single_layers(policy: Policy) -> None:
    model = fused(adapter=LORA)
    before = step(model)
    engine_of(model).set_policy([policy, Policy.SEL_MIN])
    assert_identical(step(model, fused=True), before)
    with pytest.raises(ValueError, match="1 policies for 2 layers"):
        engine_of(model).set_policy([policy])
