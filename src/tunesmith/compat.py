"""Names and call styles of Unsloth scripts, translated: users change the import lines and nothing else.

What has the same meaning here is the same object under both names. What has no counterpart is there too, and says what
to do instead when it is used. Read next: ``api.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NoReturn

from tunesmith.api import FastLanguageModel, FastModel
from tunesmith.core.errors import AdapterError, NotSupportedYetError, SettingsError
from tunesmith.models.vocabulary import grow_vocabulary
from tunesmith.training.config import SFTConfig
from tunesmith.training.sft import SFTTrainer
from tunesmith.training.vision import VisionDataCollator

__all__ = [
    "FastCohereModel",
    "FastGemma2Model",
    "FastGemmaModel",
    "FastGraniteModel",
    "FastLlamaModel",
    "FastMistralModel",
    "FastQwen2Model",
    "FastQwen3Model",
    "FastQwen3MoeModel",
    "FastSentenceTransformer",
    "FastTextModel",
    "PatchDPOTrainer",
    "PatchFastRL",
    "PatchKTOTrainer",
    "RawTextDataLoader",
    "SyntheticDataKit",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "UnslothVisionDataCollator",
    "add_new_tokens",
    "apply_chat_template",
    "check_python_modules",
    "create_locked_down_function",
    "execute_with_time_limit",
    "launch_openenv",
    "unsloth_train",
]

_log = logging.getLogger(__name__)

FastLlamaModel = FastMistralModel = FastGemmaModel = FastGemma2Model = FastCohereModel = FastLanguageModel
FastQwen2Model = FastQwen3Model = FastQwen3MoeModel = FastGraniteModel = FastLanguageModel
FastTextModel = FastModel

UnslothTrainer = SFTTrainer
UnslothTrainingArguments = SFTConfig
UnslothVisionDataCollator = VisionDataCollator


def PatchDPOTrainer() -> None:
    """Do nothing: our models run in TRL's trainers as both are."""


PatchKTOTrainer = PatchDPOTrainer


def PatchFastRL(algorithm: str | None = None, FastLanguageModel: Any = None) -> None:
    """Do nothing, for any algorithm: our models run in TRL's trainers as both are."""


def unsloth_train(trainer: Any, *arguments: Any, **named: Any) -> Any:
    """Return ``trainer.train(...)``, which counts the tokens of accumulated batches together."""
    return trainer.train(*arguments, **named)


def add_new_tokens(
    model: Any, tokenizer: Any, new_tokens: Sequence[str] = (), method: str = "mean", interpolation: float = 0.5
) -> None:
    """Add tokens to ``tokenizer``, or a processor, and rows for them to a model without an adapter, in place.

    Added rows are the mean of the old ones; spare rows that a model has are used as they are, which is said. Train
    them: ``get_peft_model(..., modules_to_save=["embed_tokens", "lm_head"])``. ``interpolation`` is of another method.

    Raises:
        SettingsError: another ``method``, or new tokens that are no list of texts.
        AdapterError: the model carries an adapter.
    """
    if method != "mean":
        raise SettingsError(f"add_new_tokens(method={method!r}): new rows are the mean of the old ones. Use 'mean'.")
    if isinstance(new_tokens, str) or not all(isinstance(token, str) and token for token in new_tokens):
        raise SettingsError(f"add_new_tokens(new_tokens={new_tokens!r}): a list of texts is needed.")
    if hasattr(model, "peft_config"):
        raise AdapterError("add_new_tokens changes a base, and the model carries an adapter: call it before.")
    own = getattr(tokenizer, "tokenizer", tokenizer)  # that of a processor
    own.add_tokens(list(new_tokens))
    rows = model.get_input_embeddings().weight.shape[0]
    if len(own) > rows:
        grow_vocabulary(model, len(own))
    else:
        _log.warning("the model has %d rows for %d tokens: new ones take spare rows as they are", rows, len(own))


class _Absent:
    """A name that scripts import and that has no counterpart here; to use it is an error that says what to do."""

    def __init__(self, name: str, instead: str) -> None:
        self._message = f"{name} is not part of tunesmith. {instead}"

    def __call__(self, *arguments: Any, **named: Any) -> NoReturn:
        raise NotSupportedYetError(self._message)

    def __getattr__(self, name: str) -> NoReturn:
        # Names with an underscore are asked for by Python itself.
        raise AttributeError(name) if name.startswith("_") else NotSupportedYetError(self._message)


_RUN_CODE = (
    "Run code that a model wrote in a process of its own, in a container without network: "
    "subprocess.run([sys.executable, '-I', file], timeout=seconds)."
)

FastSentenceTransformer = _Absent(
    "FastSentenceTransformer",
    "Load with FastModel.from_pretrained(name, task_type='FEATURE_EXTRACTION'), train pairs of texts with TaskTrainer, "
    "and take vectors from embed_texts.",
)
RawTextDataLoader = _Absent(
    "RawTextDataLoader",
    "Give SFTTrainer rows with a column text: train_dataset=[{'text': ...}, ...], or a file.",
)
SyntheticDataKit = _Absent(
    "SyntheticDataKit",
    "Make rows with its own package (pip install synthetic-data-kit); SFTTrainer reads the messages that it writes.",
)
apply_chat_template = _Absent(
    "apply_chat_template of a data set",
    "Give SFTTrainer the conversations as they are: it renders them by the tokenizer's template. For one of your own "
    "write Jinja: get_chat_template(tokenizer, (jinja, end_of_turn)).",
)
check_python_modules = _Absent("check_python_modules", _RUN_CODE)
create_locked_down_function = _Absent("create_locked_down_function", _RUN_CODE)
execute_with_time_limit = _Absent("execute_with_time_limit", _RUN_CODE)
launch_openenv = _Absent(
    "launch_openenv", "Start the environment's server yourself and give its address to the client of OpenEnv."
)
