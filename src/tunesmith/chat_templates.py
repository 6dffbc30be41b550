"""The names of ``unsloth.chat_templates``, for scripts that import them from there."""

from tunesmith.api import get_chat_template
from tunesmith.compat import apply_chat_template
from tunesmith.data.standardize import standardize_data_formats, standardize_sharegpt, to_sharegpt
from tunesmith.training.responses import train_on_responses_only

__all__ = [
    "apply_chat_template",
    "get_chat_template",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
]
