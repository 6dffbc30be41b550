"""tunesmith: fine-tune open language models on your own data, on one machine, and know what you trained.

Importing this package imports nothing heavy and changes nothing anywhere: every public name is loaded on first use.
Read next: ``api.py``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_HOME_OF = {
    "FastLanguageModel": "tunesmith.api",
    "FastModel": "tunesmith.api",
    "FastVisionModel": "tunesmith.api",
    "SFTConfig": "tunesmith.training.config",
    "SFTTrainer": "tunesmith.training.sft",
    "SamplingParams": "tunesmith.serving.outputs",
    "VisionDataCollator": "tunesmith.training.vision",
    "TaskTrainer": "tunesmith.training.tasks.trainer",
    "embed_texts": "tunesmith.models.embed",
    "train_on_responses_only": "tunesmith.training.responses",
    "get_chat_template": "tunesmith.api",
    "standardize_data_formats": "tunesmith.data.standardize",
    "standardize_sharegpt": "tunesmith.data.standardize",
    "is_bf16_supported": "tunesmith.core.device",
    "is_bfloat16_supported": "tunesmith.core.device",
    "TunesmithError": "tunesmith.core.errors",
    "to_sharegpt": "tunesmith.data.standardize",
    "FastCohereModel": "tunesmith.compat",
    "FastGemma2Model": "tunesmith.compat",
    "FastGemmaModel": "tunesmith.compat",
    "FastGraniteModel": "tunesmith.compat",
    "FastLlamaModel": "tunesmith.compat",
    "FastMistralModel": "tunesmith.compat",
    "FastQwen2Model": "tunesmith.compat",
    "FastQwen3Model": "tunesmith.compat",
    "FastQwen3MoeModel": "tunesmith.compat",
    "FastSentenceTransformer": "tunesmith.compat",
    "FastTextModel": "tunesmith.compat",
    "PatchDPOTrainer": "tunesmith.compat",
    "PatchFastRL": "tunesmith.compat",
    "PatchKTOTrainer": "tunesmith.compat",
    "RawTextDataLoader": "tunesmith.compat",
    "SyntheticDataKit": "tunesmith.compat",
    "UnslothTrainer": "tunesmith.compat",
    "UnslothTrainingArguments": "tunesmith.compat",
    "UnslothVisionDataCollator": "tunesmith.compat",
    "add_new_tokens": "tunesmith.compat",
    "check_python_modules": "tunesmith.compat",
    "create_locked_down_function": "tunesmith.compat",
    "execute_with_time_limit": "tunesmith.compat",
    "launch_openenv": "tunesmith.compat",
    "unsloth_train": "tunesmith.compat",
}

__all__ = [*_HOME_OF, "__version__"]

if TYPE_CHECKING:
    from tunesmith.api import FastLanguageModel as FastLanguageModel
    from tunesmith.api import FastModel as FastModel
    from tunesmith.api import FastVisionModel as FastVisionModel
    from tunesmith.api import get_chat_template as get_chat_template
    from tunesmith.compat import FastCohereModel as FastCohereModel
    from tunesmith.compat import FastGemma2Model as FastGemma2Model
    from tunesmith.compat import FastGemmaModel as FastGemmaModel
    from tunesmith.compat import FastGraniteModel as FastGraniteModel
    from tunesmith.compat import FastLlamaModel as FastLlamaModel
    from tunesmith.compat import FastMistralModel as FastMistralModel
    from tunesmith.compat import FastQwen2Model as FastQwen2Model
    from tunesmith.compat import FastQwen3Model as FastQwen3Model
    from tunesmith.compat import FastQwen3MoeModel as FastQwen3MoeModel
    from tunesmith.compat import FastSentenceTransformer as FastSentenceTransformer
    from tunesmith.compat import FastTextModel as FastTextModel
    from tunesmith.compat import PatchDPOTrainer as PatchDPOTrainer
    from tunesmith.compat import PatchFastRL as PatchFastRL
    from tunesmith.compat import PatchKTOTrainer as PatchKTOTrainer
    from tunesmith.compat import RawTextDataLoader as RawTextDataLoader
    from tunesmith.compat import SyntheticDataKit as SyntheticDataKit
    from tunesmith.compat import UnslothTrainer as UnslothTrainer
    from tunesmith.compat import UnslothTrainingArguments as UnslothTrainingArguments
    from tunesmith.compat import UnslothVisionDataCollator as UnslothVisionDataCollator
    from tunesmith.compat import add_new_tokens as add_new_tokens
    from tunesmith.compat import check_python_modules as check_python_modules
    from tunesmith.compat import create_locked_down_function as create_locked_down_function
    from tunesmith.compat import execute_with_time_limit as execute_with_time_limit
    from tunesmith.compat import launch_openenv as launch_openenv
    from tunesmith.compat import unsloth_train as unsloth_train
    from tunesmith.core.device import is_bf16_supported as is_bf16_supported
    from tunesmith.core.device import is_bfloat16_supported as is_bfloat16_supported
    from tunesmith.core.errors import TunesmithError as TunesmithError
    from tunesmith.data.standardize import standardize_data_formats as standardize_data_formats
    from tunesmith.data.standardize import standardize_sharegpt as standardize_sharegpt
    from tunesmith.data.standardize import to_sharegpt as to_sharegpt
    from tunesmith.models.embed import embed_texts as embed_texts
    from tunesmith.serving.outputs import SamplingParams as SamplingParams
    from tunesmith.training.config import SFTConfig as SFTConfig
    from tunesmith.training.responses import train_on_responses_only as train_on_responses_only
    from tunesmith.training.sft import SFTTrainer as SFTTrainer
    from tunesmith.training.tasks.trainer import TaskTrainer as TaskTrainer
    from tunesmith.training.vision import VisionDataCollator as VisionDataCollator


def __getattr__(name: str) -> Any:
    """Import the home module of a public name when it is first asked for."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
