"""Every error that a user can cause, in one small tree.

A message has four parts: what failed with the value, what is allowed, why if that is not obvious, and what to do.
The command line prints the message alone and exits with code 2; anything that is not a :class:`TunesmithError` is a
bug of ours and keeps its traceback. Each class is also a stdlib type, so that callers who know nothing of this
library can still catch what they expect. To add one: subclass both, no ``__init__``, one line that says when.
"""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "CheckpointError",
    "DataError",
    "EvaluationError",
    "ExportError",
    "HubError",
    "ModelError",
    "NotSupportedYetError",
    "OutputError",
    "ServingError",
    "SettingsError",
    "ShapeError",
    "TrainingError",
    "TunesmithError",
]


class TunesmithError(Exception):
    """Root of all errors that the user can mend."""


class SettingsError(TunesmithError, ValueError):
    """A setting is unknown, has a wrong type or value, or conflicts with another."""


class DataError(TunesmithError, ValueError):
    """A data file or row cannot be used; the message names file and line."""


class ModelError(TunesmithError, ValueError):
    """A model or tokenizer cannot be found, read, or used for the task."""


class AdapterError(TunesmithError, ValueError):
    """An adapter request matches nothing, or an adapter does not fit its base."""


class CheckpointError(TunesmithError, ValueError):
    """A checkpoint is damaged or belongs to another run."""


class OutputError(TunesmithError, OSError):
    """A folder cannot be written: it exists, is read-only, or the disk is full."""


class EvaluationError(TunesmithError, ValueError):
    """A metric cannot be computed on what it was given."""


class ExportError(TunesmithError, RuntimeError):
    """What was exported cannot be loaded, or answers otherwise than the model that it was made of."""


class ServingError(TunesmithError, RuntimeError):
    """A request cannot be taken now: the engine is closing, has failed, or has not the memory."""


class HubError(TunesmithError, OSError):
    """The model hub cannot be reached, or does not take an upload."""


class ShapeError(TunesmithError, ValueError):
    """Two tensors do not fit; the message prints both shapes."""


class TrainingError(TunesmithError, RuntimeError):
    """Training cannot go on: a loss is not finite, a weight gets no gradient, another process died."""


class NotSupportedYetError(TunesmithError, NotImplementedError):
    """An argument of the public contract whose code is not written yet. It is refused, never ignored."""
