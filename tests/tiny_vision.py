"""Tiny vision-language models of two families, their processors, and images to train on.

qwen2-vl cuts an image into as many patches as it has room for and turns positions in three dimensions; gemma3 gives
each image the same number of tokens, which see each other in both directions.
"""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

from tests import tiny

from tunesmith.models.processor import ImagesOnly, images_only

FAMILIES = ("qwen2-vl", "gemma3")
COLOURS = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230)}

_TEXT: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": tiny.WINDOW,
    "initializer_range": 0.3,  # large, so that every layer moves the logits
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vision_model(family: str, *, seed: int = 0, **changes: Any) -> Any:
    """Return a seeded float32 vision-language model in training mode; ``changes`` are those of its config."""
    import torch
    import transformers

    ids = vision_tokenizer(family).convert_tokens_to_ids
    if family == "qwen2-vl":
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        config: Any = transformers.Qwen2VLConfig(
            text_config={**_TEXT, "rope_parameters": rope},
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
                           "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2},
            image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
            vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"), **changes,
        )  # fmt: skip
    else:
        config = transformers.Gemma3Config(
            text_config={**_TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16,
                         "layer_types": ["sliding_attention", "full_attention"]},
            vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 16,
                           "num_attention_heads": 2, "patch_size": 4, "vision_use_head": False},
            mm_tokens_per_image=4, image_token_index=ids("<image_soft_token>"),
            boi_token_index=ids("<start_of_image>"), eoi_token_index=ids("<end_of_image>"), **changes,
        )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
            elif not parameter.any():  # gemma3's projector starts at zero: nothing would be seen
                parameter.data.normal_(0.0, 0.2)
    return model.train()


@cache
def vision_tokenizer(family: str) -> Any:
    """Return the tiny tokenizer with the image tokens of a family: one instance for all, not to change."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tiny.tiny_tokenizer().backend_tokenizer),
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        extra_special_tokens={} if family == "qwen2-vl" else _GEMMA,
    )
    qwen = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_tokens(qwen if family == "qwen2-vl" else [], special_tokens=True)
    return tokenizer


def vision_processor(family: str) -> Any:
    """Return a processor with a ChatML template that knows images."""
    import transformers

    tokenizer = copy.deepcopy(vision_tokenizer(family))
    if family == "qwen2-vl":
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        images = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 32 * 32}
        )
        place = "<|vision_start|><|image_pad|><|vision_end|>"
        processor = _with_videos(images, tokenizer)
    else:
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
        place = "<start_of_image>"
        processor = transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)
    processor.chat_template = tokenizer.chat_template = _TEMPLATE.replace("IMAGE", place)
    return processor


def _with_videos(images: Any, tokenizer: Any) -> Any:
    """Return the processor of qwen2-vl, with its part for videos where torchvision is installed."""
    import transformers
    from transformers.utils import is_torchvision_available

    settings = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    if is_torchvision_available():
        return transformers.Qwen2VLProcessor(images, tokenizer, transformers.Qwen2VLVideoProcessor(**settings))
    videos = ImagesOnly({"video_processor_type": "Qwen2VLVideoProcessor", **settings})
    return images_only(transformers.Qwen2VLProcessor)(images, tokenizer, videos)


def save_vision_model(folder: Any, family: str) -> None:
    """Write a tiny model and its processor to ``folder``."""
    vision_model(family).save_pretrained(folder)
    vision_processor(family).save_pretrained(folder)


def image(colour: str, *, seed: int = 0, size: tuple[int, int] = (16, 16)) -> Any:
    """Return a noisy PIL image of one colour."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(seed).integers(-20, 20, (size[1], size[0], 3))
    return Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8))


def colour_rows(count: int, *, seed: int = 0, size: tuple[int, int] = (16, 16)) -> list[dict[str, Any]]:
    """Return rows that ask for the colour of an image, which only its pixels tell."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for index in range(count):
        colour = draw.choice(list(COLOURS))
        rows.append(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": image(colour, seed=1000 * seed + index, size=size)},
                            {"type": "text", "text": "the colour"},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": colour}]},
                ]
            }
        )
    return rows
