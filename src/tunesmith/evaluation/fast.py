"""``model.fast_generate``, as scripts written for Unsloth call it."""

from __future__ import annotations

import types
from typing import Any

from tunesmith.core.errors import NotSupportedYetError

__all__ = ["with_fast_generate"]


def with_fast_generate(model: Any) -> Any:
    """Return ``model`` with :func:`fast_generate` as a method of this instance."""
    model.fast_generate = types.MethodType(fast_generate, model)
    return model


def fast_generate(
    model: Any, inputs: Any = None, *, sampling_params: Any = None, lora_request: Any = None, **arguments: Any
) -> Any:
    """Return what ``model.generate`` does for token ids (B, T) and its arguments.

    Raises:
        NotSupportedYetError: texts, ``sampling_params`` or ``lora_request``, which only vLLM takes.
    """
    is_text = isinstance(inputs, str) or (isinstance(inputs, (list, tuple)) and any(isinstance(x, str) for x in inputs))
    if is_text or sampling_params is not None or lora_request is not None:
        raise NotSupportedYetError(
            "fast_generate takes texts, sampling_params and lora_request only where vLLM generates, which is not "
            "supported yet. Give token ids and the arguments of generate, or use tunesmith.evaluation.generate_answers "
            "for texts; many at once, with many adapters: tunesmith.serving.engine.Engine."
        )
    return model.generate(inputs, **arguments) if inputs is not None else model.generate(**arguments)
