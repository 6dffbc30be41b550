"""What transformers, safetensors and the hub raise on unusable files, as one sentence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tunesmith.core.errors import ModelError, TunesmithError
from tunesmith.models.aliases import ALIASES, ModelSource

__all__ = ["readable_errors", "refuse_missing_weights"]


@contextmanager
def readable_errors(source: ModelSource) -> Iterator[None]:
    """Turn what transformers, safetensors and the hub raise on unusable files into one sentence."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except TunesmithError:
        raise
    except SafetensorError as error:
        raise ModelError(
            f"model {source.name}: a .safetensors file is corrupt or cut short ({error}). Copy or download it again."
        ) from error
    except json.JSONDecodeError as error:
        raise ModelError(
            f"model {source.name}: a .json file is not valid JSON (line {error.lineno}: {error.msg})."
        ) from error
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise ModelError(_cannot_load(source, error)) from error
    except (
        ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError, AssertionError,
        StrictDataclassError,
    ) as error:  # fmt: skip
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"model {source.name} comes with Python code of its own, which is not run unasked. Read it, and give "
                "trust_remote_code=True if you trust it."
            ) from error
        if "backend tokenizer" in str(error):  # its first line ends where the reasons begin
            raise ModelError(
                f"model {source.name} has no tokenizer that can be read. Save one beside it: "
                "tokenizer.save_pretrained(folder)."
            ) from error
        raise ModelError(f"model {source.name} cannot be loaded: {_first_sentence(error)}") from error


def refuse_encoder(source: ModelSource, config: Any) -> None:
    """Refuse an encoder where a model that writes text is wanted: transformers would give it a head from chance."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    writes = any(name.endswith(("LMHeadModel", "ForCausalLM")) for name in config.architectures or ())
    if config.model_type in ENCODERS and not (writes or config.is_encoder_decoder or getattr(config, "is_decoder", 0)):
        raise ModelError(
            f"model {source.name} is an encoder ({config.model_type}) and writes no text. Train it for another task: "
            "--task SEQ_CLS, TOKEN_CLS, QUESTION_ANS or FEATURE_EXTRACTION (in Python task_type=...)."
        )


def refuse_missing_weights(source: ModelSource, kind: str, info: dict[str, Any], new: set[str]) -> None:
    """Transformers fills missing weights with random numbers and only warns: such a model must not train.

    ``kind`` is the class of the model; ``new`` are the weights of a head that is to be trained.
    """
    missing = sorted(set(info.get("missing_keys", ())) - new)
    mismatched = sorted(str(entry[0]) for entry in info.get("mismatched_keys", ()))
    broken = missing + mismatched
    there = {key.partition(".")[2] for key in info.get("unexpected_keys", ())}
    if missing and there.issuperset(key.partition(".")[2] for key in missing):
        raise ModelError(
            f"model {source.name}: {kind} of transformers looks for its weights under other names than its base has "
            f"({missing[0]}, ...), so it cannot be used for this task. Use another base, such as one of BERT's kin."
        )
    if broken:
        raise ModelError(
            f"model {source.name}: {len(broken)} weights are missing or have another shape than config.json says "
            f"({', '.join(broken[:3])}{', ...' if len(broken) > 3 else ''}). The files do not belong together, or one "
            "is incomplete."
        )


def _cannot_load(source: ModelSource, error: Exception) -> str:
    if source.kind != "hub":
        return f"model {source.name} cannot be loaded: {_first_sentence(error)}"
    from tunesmith.core.names import did_you_mean

    return (
        f"model {source.name!r} is no local folder and the hub did not give it ({_first_sentence(error)})."
        f"{did_you_mean(source.name.split('/')[-1], ALIASES)} To use local files, give the path of the model's folder."
    )


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")
