"""What is asked of a model beside its weights: its task, its labels, and how a head that is new starts.

A head that the files do not hold is random when it is loaded. It is the same for one ``random_state``, it is named in
the model's facts, and ``get_peft_model`` trains it whole, so that it is saved with the adapter. Anything else that the
files lack is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import ModelError, SettingsError
from tunesmith.core.tasks import CAUSAL_LM, TASKS, Task, task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Head", "give_padding", "labels_of", "read_labels", "reads"]


@dataclass(frozen=True, slots=True)
class Head:
    """The task of a model and what its head is made from.

    Attributes:
        task: a name of :data:`tunesmith.core.tasks.TASKS`; None: that of the files.
        labels: their names in the order of their numbers; None: those of the files.
        auto_model: the class that loads the model; None: the Auto class of the task.
        seed: of weights that the files do not hold.
        gives_way: whether ``labels`` are only for a head that is new.
    """

    task: str | None = None
    labels: tuple[str, ...] | None = None
    auto_model: Any = None
    seed: int = 3407
    gives_way: bool = False

    def task_for(self, config: Any) -> Task:
        """Return the task that was asked for, by name or class, else the one that the model was saved for."""
        asked = getattr(self.auto_model, "__name__", "")
        by_class = next((name for name, task in TASKS.items() if task.auto == asked), None)
        if asked and not asked.startswith("Auto"):
            by_class = task_of(asked, config)
        return TASKS[self.task or by_class or _saved_for(config)]

    def arguments(self, config: Any) -> dict[str, Any]:
        """Return the keywords of transformers that give the head its labels.

        Raises:
            SettingsError: the task has no labels.
            ModelError: the files hold a head for another number of labels.
        """
        if self.labels is None:
            return {}
        task = self.task_for(config)
        if not task.has_labels:
            raise SettingsError(f"num_labels, id2label and label2id have no effect on {task.name}. Leave them out.")
        if _saved_for(config) == task.name and self.gives_way:
            return {}
        if _saved_for(config) == task.name and config.num_labels != len(self.labels):
            raise ModelError(
                f"{len(self.labels)} labels are asked for, and the model was saved with {config.num_labels}: "
                f"{_listed(labels_of(config))}. Leave the labels out, or start from a base without a head."
            )
        return {"id2label": dict(enumerate(self.labels)),
                "label2id": {label: index for index, label in enumerate(self.labels)}}  # fmt: skip

    def new_modules(self, model: PreTrainedModel, config: Any, missing: set[str]) -> dict[str, list[str]]:
        """Return the modules that may be new, each with its ``missing`` keys: heads, and the pooler under them.

        Where the files were saved with a head, it has to be there.
        """
        task = self.task_for(config)
        if _saved_for(config) == task.name != "FEATURE_EXTRACTION":
            return {}
        found: dict[str, list[str]] = {}
        for key in missing:
            inside = key.removeprefix(f"{model.base_model_prefix}.")
            name = inside.split(".")[0]
            if (task.heads and inside == key) or name == "pooler":
                found.setdefault(name, []).append(key)
        return found


def _saved_for(config: Any) -> str:
    architecture = next(iter(getattr(config, "architectures", None) or ()), "")
    return task_of(architecture, config) if architecture else CAUSAL_LM


def read_labels(
    num_labels: int | None = None,
    id2label: Mapping[Any, str] | None = None,
    label2id: Mapping[str, Any] | None = None,
) -> tuple[str, ...] | None:
    """Return the names of the labels by their numbers, None where none are given. A number alone names none.

    Raises:
        SettingsError: the three do not agree, or numbers are not 0, 1, 2 ...
    """
    if num_labels is None and not id2label and not label2id:
        return None
    if num_labels is not None and (isinstance(num_labels, bool) or num_labels < 2):
        raise SettingsError(f"num_labels={num_labels!r}: a whole number of at least 2 is needed; a head for one "
                            "number (regression) is not supported yet.")  # fmt: skip
    names = {int(index): str(name) for index, name in (id2label or {}).items()}
    inverse = {int(index): str(name) for name, index in (label2id or {}).items()}
    if names and inverse and names != inverse:
        raise SettingsError("id2label and label2id do not agree. Give one of them.")
    names = names or inverse or {index: f"LABEL_{index}" for index in range(num_labels or 0)}
    count = len(names) if num_labels is None else num_labels
    if sorted(names) != list(range(count)) or len(set(names.values())) != count:
        raise SettingsError(
            f"the labels must be numbered 0 to {count - 1}, each with a name of its own; given: {names}."
        )
    return tuple(names[index] for index in range(count))


def labels_of(config: Any) -> tuple[str, ...]:
    """Return the names of a model's labels in the order of their numbers."""
    return tuple(str(config.id2label[index]) for index in sorted(config.id2label))


def give_padding(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tell a model which token pads its batches: a causal model with one label a row looks for the last other one.

    Raises:
        ModelError: the tokenizer has none.
    """
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "the tokenizer has no padding token, and rows of one batch are padded. Give it one that no row holds: "
            "tokenizer.pad_token = '<|pad|>' where the vocabulary has it, or add pad_token to tokenizer_config.json."
        )
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def reads(model: Any, name: str) -> bool:
    """Return whether a model takes the input ``name``: a tokenizer may give more than it does (token_type_ids)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(base.forward).parameters


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
