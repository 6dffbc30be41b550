"""Settings that say which model is loaded and how. Their meaning is the contract of ``from_pretrained``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tunesmith.core.settings import Guide, Settings

__all__ = ["ModelSettings"]


class ModelSettings(Settings):
    """Which model, in which precision, with which window."""

    model: str
    """Folder, .gguf file, hub id, adapter folder (base and adapter are loaded), or a built-in name (smollm2-135m)."""

    max_seq_length: Annotated[
        int | None,
        Field(ge=1),
        Guide("512 to 2048", "rows longer than it are dropped", "costs memory; above the model's own it is refused"),
    ] = None
    """Longest training row and generation window in tokens; none means 2048, or the model's own where that is less."""

    dtype: Annotated[
        str | None,
        Guide("leave out", "16-bit halves memory and is faster where there are units for it", "float32 is exact"),
    ] = None
    """bfloat16, float16 or float32; none lets the hardware decide and prints the reason."""

    chat_template: str | None = None
    """Built-in name (chatml, llama-3, gemma, mistral) or a .jinja file, for base models without a template."""

    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Only for repositories that you have read."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    attn_implementation: str | None = None
    """sdpa, eager or flash_attention_2 as in transformers; none uses the library's attention per document."""
