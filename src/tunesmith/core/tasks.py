"""What a model can be trained for: one table of PEFT's task types, read by every layer.

The names are PEFT's. Which rows a task takes is in ``data/tasks.py``, how it learns in ``training/tasks.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.core.errors import SettingsError
from tunesmith.core.names import did_you_mean

__all__ = ["CAUSAL_LM", "TASKS", "Task", "find_task", "task_of"]


@dataclass(frozen=True, slots=True)
class Task:
    """One task type.

    Attributes:
        name: PEFT's name for it.
        words: the long name, accepted as well.
        auto: the Auto class of transformers that loads it.
        suffixes: how transformers' model classes for it end.
        heads: names of the modules that are new on a pretrained base; they train whole beside an adapter, as in PEFT.
        has_labels: whether the head is as wide as there are labels.
    """

    name: str
    words: str
    auto: str
    suffixes: tuple[str, ...]
    heads: tuple[str, ...] = ()
    has_labels: bool = False


CAUSAL_LM = "CAUSAL_LM"
_CLASSIFIERS = ("classifier", "score")

TASKS = {
    task.name: task
    for task in (
        Task(CAUSAL_LM, "causal_lm", "AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
        Task(
            "SEQ_CLS", "sequence_classification", "AutoModelForSequenceClassification", ("ForSequenceClassification",),
            heads=_CLASSIFIERS, has_labels=True,
        ),
        Task(
            "TOKEN_CLS", "token_classification", "AutoModelForTokenClassification", ("ForTokenClassification",),
            heads=_CLASSIFIERS, has_labels=True,
        ),
        Task("SEQ_2_SEQ_LM", "seq2seq", "AutoModelForSeq2SeqLM", ("ForConditionalGeneration",)),
        Task(
            "QUESTION_ANS", "question_answering", "AutoModelForQuestionAnswering", ("ForQuestionAnswering",),
            heads=("qa_outputs",),
        ),
        Task("FEATURE_EXTRACTION", "feature_extraction", "AutoModel", ("Model",)),
    )
}  # fmt: skip
"""Every task type by its name."""


def find_task(name: str) -> Task:
    """Return the task called ``name``: PEFT's name or the long one, in any case, with ``-`` or ``_``.

    Raises:
        SettingsError: there is none; the message names the nearest.
    """
    wanted = str(getattr(name, "value", name)).replace("-", "_").lower()
    by_name = {word: task for task in TASKS.values() for word in (task.name.lower(), task.words)}
    if wanted not in by_name:
        known = ", ".join(f"{task.name} ({task.words})" for task in TASKS.values())
        raise SettingsError(f"task {str(name)!r} is not known.{did_you_mean(wanted, by_name)} Tasks are: {known}.")
    return by_name[wanted]


def task_of(architecture: str, config: Any) -> str:
    """Return the task of a transformers class with this name and ``config``; CAUSAL_LM where nothing else is sure."""
    found = next((task for task in TASKS.values() if architecture.endswith(task.suffixes)), TASKS[CAUSAL_LM])
    # Models of text and images are called so too.
    is_other = found.name == "SEQ_2_SEQ_LM" and not getattr(config, "is_encoder_decoder", False)
    return CAUSAL_LM if is_other else found.name
