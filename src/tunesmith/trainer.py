"""The names of ``unsloth.trainer``, for scripts that import them from there."""

from tunesmith.compat import UnslothTrainer, UnslothTrainingArguments, UnslothVisionDataCollator, unsloth_train

__all__ = ["UnslothTrainer", "UnslothTrainingArguments", "UnslothVisionDataCollator", "unsloth_train"]
