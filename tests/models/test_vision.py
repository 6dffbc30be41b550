"""Vision-language models through the public loaders: model and processor, whole and in 4 bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import tiny, tiny_vision

from tunesmith import FastLanguageModel, FastModel, FastVisionModel, get_chat_template
from tunesmith.core.errors import ModelError, NotSupportedYetError
from tunesmith.models.aliases import find_model
from tunesmith.models.load import empty_causal_lm, facts_of
from tunesmith.models.processor import load_processor
from tunesmith.models.vision import NOT_FUSED, has_vision, towers


@pytest.fixture(scope="module", params=tiny_vision.FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_vision.save_vision_model(folder, request.param)
    return folder


@pytest.mark.parametrize("door", [FastVisionModel, FastModel])
def test_model_and_processor_of_a_folder(door: type[FastModel], saved: Path) -> None:
    model, processor = door.from_pretrained(str(saved), dtype="float32", use_gradient_checkpointing="unsloth")
    assert has_vision(model.config)
    assert hasattr(processor, "image_processor")
    assert facts_of(model).notes == [NOT_FUSED]
    assert model.model.is_gradient_checkpointing
    own = tiny_vision.vision_model(saved.name.rstrip("0123456789")).state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_for_text_the_tokenizer_comes_alone(saved: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(saved), dtype="float32")
    assert tokenizer.is_fast
    assert not hasattr(tokenizer, "image_processor")
    ids = torch.tensor([tokenizer("the cat")["input_ids"]])
    assert model(input_ids=ids).logits.shape[:2] == ids.shape


def test_a_language_model_comes_with_a_tokenizer_whoever_loads_it(tmp_path: Path) -> None:
    tiny.save_model(tmp_path)
    _, tokenizer = FastVisionModel.from_pretrained(str(tmp_path), dtype="float32")
    assert tokenizer.is_fast


def test_towers_are_found(saved: Path) -> None:
    found = towers(tiny_vision.vision_model(saved.name.rstrip("0123456789")))
    assert found == {"language": "model.language_model", "vision": found["vision"]}
    assert found["vision"] in ("model.visual", "model.vision_tower")
    assert not has_vision(tiny.tiny_model("llama").config)


def test_four_bits_leave_what_sees_as_it_is(saved: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model, _ = FastVisionModel.from_pretrained(str(saved), dtype="float32", load_in_4bit=True)
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if hasattr(module, "in_features")}
    assert {kind for name, kind in kinds.items() if ".language_model." in name} == {"Linear4bit"}
    assert {kind for name, kind in kinds.items() if ".language_model." not in name} == {"Linear"}


def test_a_folder_without_its_processor(saved: Path, tmp_path: Path) -> None:
    family = saved.name.rstrip("0123456789")
    tiny_vision.vision_model(family).save_pretrained(tmp_path)
    tiny_vision.vision_processor(family).tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot be loaded|holds a tokenizer and no processor for images"):
        FastVisionModel.from_pretrained(str(tmp_path), dtype="float32")


def test_its_memory_is_not_predicted(saved: Path) -> None:
    with pytest.raises(NotSupportedYetError, match="is a vision-language model: its memory cannot be predicted yet"):
        empty_causal_lm(find_model(str(saved)))


def test_a_template_is_set_on_processor_and_tokenizer(saved: Path) -> None:
    processor = get_chat_template(load_processor(str(saved)), "chatml")
    assert processor.chat_template == processor.tokenizer.chat_template
    assert "<|im_start|>" in processor.chat_template
    assert processor.chat_template != tiny_vision.vision_processor(saved.name.rstrip("0123456789")).chat_template


def test_a_saved_processor_names_its_part_for_videos_as_it_was(tmp_path: Path) -> None:
    tiny_vision.vision_processor("qwen2-vl").save_pretrained(tmp_path)
    load_processor(str(tmp_path)).save_pretrained(tmp_path / "again")
    again = load_processor(str(tmp_path / "again"))
    assert again.video_processor.to_dict()["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert type(again).__name__ == "Qwen2VLProcessor"


def test_videos_need_torchvision() -> None:
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        pytest.skip("torchvision is installed")
    with pytest.raises(ModelError, match="videos need the package torchvision"):
        tiny_vision.vision_processor("qwen2-vl").video_processor(["a.mp4"])
