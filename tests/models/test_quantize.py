"""A base in 4 or 8 bits or float8: loaded as asked for, trained with the right gradients, protected from its layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from tests import tiny
from tests.training.support import trainer
from transformers import TrainerCallback

from tunesmith import FastLanguageModel
from tunesmith.adapters.inject import trainable_share
from tunesmith.core.errors import AdapterError, ModelError, SettingsError
from tunesmith.engine import install
from tunesmith.engine.install import engine_of
from tunesmith.engine.policies import Policy
from tunesmith.engine.read import is_quantized, read_projection
from tunesmith.export.merge import _routes
from tunesmith.export.weights import merged_weights
from tunesmith.memory import PartShape, Setting, shape_of
from tunesmith.memory import estimate as estimates
from tunesmith.memory.estimate import estimate
from tunesmith.models import settings
from tunesmith.models.aliases import find_model
from tunesmith.models.load import empty_causal_lm, facts_of
from tunesmith.models.quantize import is_misread, protect_gradients
from tunesmith.ops.float8 import products
from tunesmith.ops.float8 import reference as float8_reference
from tunesmith.ops.quantized import reference

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "phi3")
WIDTHS = ("4bit", "8bit")
FLOAT8 = ("fp8", "fp8-block")


@pytest.fixture(autouse=True)
def a_gpu_with_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU converts float8 as well: what a GPU of compute capability 8.9 is asked for is how fast it multiplies."""
    monkeypatch.setattr(settings, "computes_float8", lambda device: True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of a tiny model for each family, by name; not to be changed."""
    made: dict[str, Path] = {}
    for family in (*FAMILIES, "mixtral"):
        made[family] = tmp_path_factory.mktemp("quantize") / family
        tiny.save_model(made[family], family)
    return made


def load(folder: Path, width: str | None, **arguments: Any) -> Any:
    asked: dict[str, Any] = {} if width is None else {f"load_in_{width}": True}
    if width in FLOAT8:
        asked = {"load_in_fp8": "block" if width == "fp8-block" else "row"}
    return FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=256, **{"dtype": "float32", **asked, **arguments}
    )[0]


def adapted(model: Any, **arguments: Any) -> Any:
    """Put an adapter on ``model`` whose B is not zero."""
    model = FastLanguageModel.get_peft_model(model, **{"r": 4, "target_modules": "all-linear", **arguments})
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def dense_twin(model: Any, folder: Path, *, loading: Any = None, **arguments: Any) -> Any:
    """Return transformers' and PEFT's own model in float32, with the numbers that the quantized weights stand for."""
    attention = {"attn_implementation": "eager" if folder.name == "gemma2" else "sdpa"}
    twin = adapted(load(folder, None, **(attention if loading is None else loading)), **arguments)
    modules = dict(twin.named_modules())
    own = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(own[name])  # DoRA starts from norms of the base
    for name, module in model.named_modules():
        if is_quantized(module):
            found = read_projection(module, training=True)
            assert not isinstance(found, str)
            modules[name].weight.data.copy_(reference.dequantize(found.quantized))
    return twin


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    ids = ids.to(model.device)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone().cpu() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= 1e-4 * grad.norm(), name


IDS = torch.arange(24).view(1, 24) * 7 % tiny.VOCABULARY


CASES = [*((family, width) for family in FAMILIES for width in WIDTHS), ("gemma2", "fp8"), ("qwen2", "fp8-block")]


@pytest.mark.parametrize(("family", "width"), CASES)
def test_gradients_are_those_of_the_numbers_that_the_weights_stand_for(
    family: str, width: str, folders: dict[str, Path]
) -> None:
    model = adapted(load(folders[family], width))
    assert engine_of(model).plan.unknown == {}
    wanted = gradients(dense_twin(model, folders[family]), IDS)
    assert_same(gradients(model, IDS), wanted)
    # Evaluating and generating in between must change nothing (on AVX512-BF16 bitsandbytes alone gets them wrong).
    model.eval()
    with torch.no_grad():
        model(IDS)
    model.generate(IDS[:, :5], max_new_tokens=3, do_sample=False)
    model.train()
    assert_same(gradients(model, IDS), wanted)
    assert engine_of(model).notes == []


@pytest.mark.parametrize("width", [*WIDTHS, "fp8"])
def test_generation_is_that_of_the_numbers_too(width: str, folders: dict[str, Path]) -> None:
    model = adapted(load(folders["llama"], width)).eval()
    twin = dense_twin(model, folders["llama"]).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, rtol=1e-4, atol=1e-4)
    ours, theirs = (m.generate(IDS[:, :6], max_new_tokens=8, do_sample=False) for m in (model, twin))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("policy", list(Policy))
def test_every_policy_gives_the_same_gradients(policy: Policy, folders: dict[str, Path]) -> None:
    model = adapted(load(folders["gemma2"], "4bit"), lora_dropout=0.0)
    engine = engine_of(model)
    engine.set_policy(Policy.NONE)
    wanted = gradients(model, IDS)
    engine.set_policy(policy)
    assert_same(gradients(model, IDS), wanted)


@pytest.mark.parametrize("width", [*WIDTHS, "fp8"])
def test_weights_that_stay_written_out_give_the_same_gradients(width: str, folders: dict[str, Path]) -> None:
    model = adapted(load(folders["qwen3"], width))
    engine = engine_of(model)
    wanted = gradients(model, IDS)
    before = engine.scratch.nbytes()
    engine.dense.count = 2
    with torch.no_grad():
        outputs = model(IDS).logits
    assert engine.dense.nbytes() == 0
    engine.scratch.clear()
    assert all(torch.equal(grad, wanted[name]) for name, grad in gradients(model, IDS).items())
    linear = [module for module in model.modules() if is_quantized(module)]
    assert engine.dense.nbytes() == 4 * sum(module.in_features * module.out_features for module in linear)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, outputs)
    assert engine.scratch.nbytes() < before
    twin = copy.deepcopy(model)
    assert engine_of(twin).dense.nbytes() == 0
    assert_same(gradients(twin, IDS), wanted)
    engine.dense.clear()
    assert engine.dense.nbytes() == 0
    engine.dense.count = 1
    assert all(torch.equal(grad, wanted[name]) for name, grad in gradients(model, IDS).items())


def test_a_run_keeps_what_its_plan_says_and_gives_it_back(folders: dict[str, Path], tmp_path: Path) -> None:
    seen: list[int] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(engine_of(made.model).dense.nbytes())

    model = adapted(load(folders["llama"], "4bit"), use_gradient_checkpointing=False)
    made = trainer(tmp_path, model=model, max_steps=2, callbacks=[Watch()])
    assert made.plan.dense == made.plan.record()["dense"] == 2
    made.train()
    assert min(seen) > 0 and max(seen) == made.plan.parts["dense"]
    assert engine_of(made.model).dense.nbytes() == 0


@pytest.mark.parametrize("width", WIDTHS)
def test_targets_that_leave_layers_without_an_adapter(width: str, folders: dict[str, Path]) -> None:
    some = {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "lora_dropout": 0.0}
    model = adapted(load(folders["llama"], width), **some)
    assert_same(gradients(model, IDS), gradients(dense_twin(model, folders["llama"], **some), IDS))


def test_layers_that_the_engine_does_not_know_train_in_four_bits(folders: dict[str, Path]) -> None:
    targets = ["q_proj", "v_proj"]
    model = adapted(load(folders["mixtral"], "4bit"), target_modules=targets)
    assert not engine_of(model).plan.known
    assert_same(gradients(model, IDS), gradients(dense_twin(model, folders["mixtral"], target_modules=targets), IDS))


def test_dora_runs_as_peft_wrote_it(folders: dict[str, Path]) -> None:
    base = load(folders["llama"], "4bit")
    if any(map(is_misread, filter(is_quantized, base.modules()))):
        with pytest.raises(AdapterError, match=r"bitsandbytes reads model\.layers\.0\.\S+ wrongly"):
            adapted(base, use_dora=True)
        return
    model = adapted(base, use_dora=True)
    assert_same(gradients(model, IDS), gradients(dense_twin(model, folders["llama"], use_dora=True), IDS))
    assert any("variant of LoRA" in note for note in engine_of(model).notes)


# ---- what is loaded ----


def test_linear_layers_of_the_decoder_are_quantized_and_nothing_else(folders: dict[str, Path]) -> None:
    model = load(folders["llama"], "4bit")
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if "_proj" in name or name == "lm_head"}
    assert {kind for name, kind in kinds.items() if "_proj" in name} == {"Linear4bit"}
    assert kinds["lm_head"] == "Linear"
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
    facts = facts_of(model)
    assert (facts.width, facts.dtype.name) == ("4bit", "float32")
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32


@pytest.mark.parametrize("width", [*WIDTHS, "fp8"])
def test_bfloat16_is_computed_in(width: str, folders: dict[str, Path]) -> None:
    model = adapted(load(folders["llama"], width, dtype="bfloat16"))
    # The same layers in bfloat16, their weights rounded to it once.
    twin = dense_twin(model, folders["llama"], loading={"dtype": "bfloat16"})
    assert_same(gradients(model, IDS), gradients(twin, IDS))
    assert engine_of(model).notes == engine_of(twin).notes == []


def test_two_widths_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(SettingsError, match="load_in_4bit=True and load_in_8bit=True: give one of them"):
        load(folders["llama"], "4bit", load_in_8bit=True)
    with pytest.raises(SettingsError, match="load_in_8bit=True and load_in_16bit=True: give one of them"):
        load(folders["llama"], "8bit", load_in_16bit=True)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_folder_that_is_quantized_already(width: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders["llama"], width)
    model.save_pretrained(tmp_path / "packed")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed", None)
    assert facts_of(again).width == width
    assert engine_of(again).plan.unknown == {}
    with torch.no_grad():
        assert torch.equal(again(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
    assert facts_of(load(tmp_path / "packed", width)).width == width
    with pytest.raises(ModelError, match=r"load_in_16bit=True, but the files of model .* are quantized"):
        load(tmp_path / "packed", None, dtype=None, load_in_16bit=True)
    with pytest.raises(AdapterError, match="full_finetuning=True needs a base in 16 or 32 bits"):
        load(tmp_path / "packed", None, full_finetuning=True)
    other = "8bit" if width == "4bit" else "4bit"
    with pytest.raises(ModelError, match=f"stored quantized already, and not as load_in_{other} would"):
        load(tmp_path / "packed", other)


@pytest.mark.parametrize("width", [*WIDTHS, *FLOAT8])
def test_an_adapter_comes_back_on_its_quantized_base(width: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(load(folders["llama"], width)).eval()
    model.save_pretrained(tmp_path / "adapter")
    for asked in (width, None):
        # Nothing asked for: as it was trained.
        again = load(tmp_path / "adapter", asked).eval()
        with torch.no_grad():
            assert torch.equal(again(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)
    whole = load(tmp_path / "adapter", None, dtype=None, load_in_16bit=True)
    assert facts_of(whole).width is None
    # Saved from the whole base, it belongs there.
    whole.save_pretrained(tmp_path / "adapter")
    assert facts_of(load(tmp_path / "adapter", None)).width is None


def test_the_base_of_an_adapter_is_said_and_a_damaged_record_refused(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapted(load(folders["llama"], "4bit")).save_pretrained(tmp_path)
    load(tmp_path, None)
    assert "the base is loaded in 4 bits, as the adapter" in caplog.text
    for content in ("{", '{"width": "3bit"}', "[]"):
        (tmp_path / "base.json").write_text(content, encoding="utf-8")
        with pytest.raises(AdapterError, match=r"base\.json"):
            load(tmp_path, None)


# ---- what would go wrong ----


@pytest.mark.parametrize("width", [*WIDTHS, "fp8"])
def test_merging_into_quantized_weights_is_refused(width: str, folders: dict[str, Path]) -> None:
    model = adapted(load(folders["llama"], width))
    before = gradients(model, IDS)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdapterError, match="merging into a quantized base would round the training away"):
            merge()
    assert_same(gradients(model, IDS), before)


def test_the_layout_for_generation_is_switched_off_where_the_processor_has_it(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    model = load(folders["llama"], "4bit")
    flags = [m.support_avx512bf16_for_cpu for m in model.modules() if is_quantized(m)]
    assert len(flags) == 14 and not any(flags)


def test_weights_that_have_the_layout_for_generation_are_refused(folders: dict[str, Path]) -> None:
    model = load(folders["llama"], "4bit")
    module = model.model.layers[0].mlp.up_proj
    module.weight.quant_state.packing_format_for_cpu = True
    assert "layout in which bitsandbytes generates" in str(read_projection(module, training=True))
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj has the layout that bitsandbytes makes"):
        protect_gradients(model)


def test_four_bits_whose_rows_end_within_a_block_are_read_right() -> None:
    """By bitsandbytes itself they are not, on processors with AVX512."""
    weight = 0.05 * torch.randn(100, 80, generator=torch.Generator().manual_seed(0))
    layer = bitsandbytes.nn.Linear4bit(80, 100, bias=False, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    protect_gradients(torch.nn.ModuleList([layer]))
    read = read_projection(layer, training=True)
    assert not isinstance(read, str)
    assert read.quantized is not None
    dense = reference.dequantize(read.quantized).float()
    assert (dense - weight).norm() < 0.12 * weight.norm()
    x = torch.randn(3, 80, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x.detach() @ dense.t())
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], dense.sum(0).expand(3, 80))


# ---- float8 ----


def test_what_eight_bits_store_is_stored_in_float8_and_stays_so(folders: dict[str, Path], tmp_path: Path) -> None:
    model, eight = load(folders["gemma2"], "fp8"), load(folders["gemma2"], "8bit")
    names = [{name for name, module in m.named_modules() if is_quantized(module)} for m in (model, eight)]
    assert names[0] == names[1] and len(names[0]) == 14
    assert any("float8 e4m3, a scale a row; products in float32" in note for note in facts_of(model).notes)
    layer = model.model.layers[0].mlp.up_proj
    before = layer.stored
    model.to(torch.bfloat16).float()  # whoever casts a model has its codes and scales as they were
    assert torch.equal(layer.stored.scales, before.scales)
    assert torch.equal(layer.weight, before.codes.view(torch.uint8))
    with pytest.raises(ModelError, match="a base in float8 is not saved"):
        model.save_pretrained(tmp_path / "base")


def test_a_float8_base_is_frozen_and_rounded_once(folders: dict[str, Path]) -> None:
    with pytest.raises(SettingsError, match="load_in_fp8='row' stores a base that does not train"):
        load(folders["llama"], "fp8", full_finetuning=True)
    with pytest.raises(SettingsError, match="load_in_8bit=True and load_in_fp8='row': give one of them"):
        load(folders["llama"], "fp8", load_in_8bit=True)
    with pytest.raises(SettingsError, match="load_in_fp8=True: vLLM would round"):
        load(folders["llama"], None, fast_inference=True, load_in_fp8=True)
    with pytest.raises(AdapterError, match=r"DoraLinearVariant reads the weights of the base.* load_in_8bit"):
        adapted(load(folders["llama"], "fp8"), use_dora=True)
    with pytest.raises(AdapterError, match="a quantized base would be rounded again"):
        adapted(load(folders["llama"], "fp8"), init_lora_weights="pissa")
    with pytest.raises(ModelError, match=r"rounded already \(load_in_fp8\)"):
        adapted(load(folders["llama"], "fp8-block"), qat_scheme="int8")


def test_a_run_on_a_float8_base_and_what_is_merged_of_it(folders: dict[str, Path], tmp_path: Path) -> None:
    model = adapted(load(folders["llama"], "fp8"), use_gradient_checkpointing=False)
    made = trainer(tmp_path, model=model, max_steps=2)
    made.train()
    assert all(m.weight.dtype == torch.uint8 for m in model.modules() if is_quantized(m))
    # The rule of the other widths: merged on the numbers of the base and, where the files are here, on its own weights.
    assert set(_routes(model, {"default": 1.0})) == {"dequantized", "original"}
    found = {weight.name: weight for weight in merged_weights(model, {"default": 1.0})}
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    wanted = reference.dequantize(layer.get_base_layer().stored) + layer.get_delta_weight("default")
    torch.testing.assert_close(found["model.layers.1.mlp.up_proj.weight"].make(), wanted)
    assert not any("scales" in name for name in found)


@pytest.fixture
def multiplied_in_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as a GPU makes them of float8 operands, in plain torch, for every dtype and size."""
    monkeypatch.setattr(install, "why_not", lambda *arguments, **settings: None)
    monkeypatch.setattr(products, "scaled_mm", float8_reference.scaled_mm)


@pytest.mark.usefixtures("multiplied_in_float8")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_products_in_float8_have_the_gradients_of_their_weights_under_every_policy(
    family: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unrounded(self: Any, x: torch.Tensor, factor: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(len(x))
        return x if factor is None else x * factor, x.new_ones(len(x), 1)

    seen: list[int] = []
    model = adapted(load(folders[family], "fp8"), lora_dropout=0.0)
    twin = dense_twin(model, folders[family])
    wanted, engine = gradients(twin, IDS), engine_of(model)
    engine.dense.count = 2
    rounded = gradients(model, IDS)
    with monkeypatch.context() as patch:
        patch.setattr(products.Float8Product, "_rows", unrounded)
        for policy in Policy:
            engine.set_policy(policy)
            assert_same(gradients(model, IDS), wanted)
    assert len(seen) >= len(Policy) * 2 * 8 - 1  # four groups a layer, forward and (but for the first input) backward
    # Rounded to three bits behind the leading one, two layers of random numbers make a good deal of it.
    ours, theirs = (torch.cat([grad.flatten() for grad in grads.values()]) for grads in (rounded, wanted))
    assert 0.01 < float((ours - theirs).norm() / theirs.norm()) < 0.5
    assert engine.notes == [] and engine.dense.nbytes() == 0
    # What is evaluated is computed as it will be exported.
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, twin(IDS).logits, rtol=1e-4, atol=1e-4)
    model.eval()
    torch.testing.assert_close(model(IDS).logits, twin.eval()(IDS).logits, rtol=1e-4, atol=1e-4)
    # Weights that move are stacked again.
    for layer in model.get_base_model().model.layers:
        layer.mlp.up_proj.base_layer.weight.data = layer.mlp.up_proj.base_layer.weight.data.clone()
    assert_same(gradients(model.train(), IDS), rounded)


def test_a_plan_for_float8_products_writes_nothing_out(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_model(str(folders["llama"]))
    shapes = []
    for is_possible in (False, True):
        monkeypatch.setattr(estimates, "why_no_products", lambda *a, here=is_possible, **k: None if here else "no")
        empty = adapted(empty_causal_lm(source, max_seq_length=256, dtype="bfloat16", width="fp8"))
        shapes.append(shape_of(empty, kind="cuda"))
    assert [shape.float8 for shape in shapes] == [False, True]
    assert shapes[0].quantized > 0 and shapes[1].quantized == 0
    part = PartShape((40,), 40)
    without, with_float8 = (estimate(s, part, Setting((Policy.NONE,) * s.count)).parts["scratch"] for s in shapes)
    assert with_float8 - without == 40 * 2 * 56 + 2 * 56 * 32  # the widest input, and a turned weight, a byte each


def test_the_note_says_in_what_products_are_computed(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "computes_float8", lambda device: True)
    notes = [facts_of(load(folders["llama"], width, dtype="bfloat16")).notes[-1] for width in FLOAT8]
    assert "products in bfloat16: a weight is 56 by 32, and float8 products take multiples of 16" in notes[0]
    assert "a scale a block of 128 by 128; products in bfloat16: a scale belongs to a block" in notes[1]
    monkeypatch.setattr(products, "_MULTIPLE", 8)
    model = load(folders["llama"], "fp8", dtype="bfloat16")
    assert "products of training steps in float8" in facts_of(model).notes[-1]


# ---- memory ----


@pytest.mark.parametrize("width", [*WIDTHS, *FLOAT8])
def test_shapes_without_values_take_the_same_bytes(width: str, folders: dict[str, Path]) -> None:
    source = find_model(str(folders["llama"]))
    empty = adapted(empty_causal_lm(source, max_seq_length=256, dtype="float32", width=width))
    model = adapted(load(folders["llama"], width))
    assert facts_of(empty).width == facts_of(model).width == width
    planned, there = shape_of(empty, kind=model.device.type), shape_of(model)
    assert planned == there
    assert there.base_bytes < shape_of(adapted(load(folders["llama"], None))).base_bytes
    assert there.written_out == 2 * 56 * 32
    assert trainable_share(model) == trainable_share(adapted(load(folders["llama"], None)))
    assert trainable_share(empty) == trainable_share(model)


@pytest.mark.parametrize("policy", [Policy.NONE, Policy.FULL])
def test_the_buffer_that_weights_are_written_to_is_counted(policy: Policy, folders: dict[str, Path]) -> None:
    model = adapted(load(folders["llama"], "4bit"))
    engine = engine_of(model)
    engine.set_policy(policy)
    engine.scratch.clear()
    with engine.batch((40,), torch.arange(40)):
        model(input_ids=torch.arange(40)[None], use_cache=False).logits.sum().backward()
    shape = shape_of(model)
    found = estimate(shape, PartShape((40,), 40), Setting((policy,) * shape.count))
    assert engine.scratch.nbytes() <= found.parts["scratch"] * 1.02
    assert found.parts["scratch"] <= engine.scratch.nbytes() * 1.25
