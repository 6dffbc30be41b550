"""Every setting of a run described from its model: the one source of flags, ``explain`` and ``docs/parameters.md``.

Name, type, default and help come from :class:`~tunesmith.training.settings.RunSettings`, advice from each field's
:class:`~tunesmith.core.settings.Guide`.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass
from typing import Any

from tunesmith.adapters.settings import AdapterSettings
from tunesmith.core.errors import SettingsError
from tunesmith.core.names import nearest
from tunesmith.core.settings import Guide, Settings, describe_type, first_clause, guide_of
from tunesmith.data.settings import DataSettings
from tunesmith.models.settings import LoadingArguments, ModelSettings
from tunesmith.training.aliases import ALIASES
from tunesmith.training.settings import RunSettings, TrainingSettings

__all__ = ["GROUPS", "Setting", "find_setting", "settings_reference"]

GROUPS: dict[str, type[Settings]] = {
    "Model": ModelSettings,
    "Data": DataSettings,
    "Adapter": AdapterSettings,
    "Training": TrainingSettings,
}
"""Title -> the part of the settings under it, in the order of the help."""

_IN_SCRIPTS = {"Arguments of from_pretrained that are no settings": LoadingArguments}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting in words.

    Attributes:
        meaning: its docstring on one line; ``summary`` is the first clause of it.
        kinds: the types that a value may have (``NoneType`` where it may be left out on purpose).
        choices: the allowed words, empty where any value of a kind will do.
        allowed: type and range in words.
        default: as a user would write it; "required" where there is none.
        aliases: what other tools call it.
    """

    name: str
    group: str
    meaning: str
    kinds: frozenset[type]
    choices: tuple[str, ...]
    allowed: str
    default: str
    guide: Guide
    aliases: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The meaning up to the first full stop or semicolon that ends a clause."""
        return first_clause(self.meaning)

    @property
    def flag(self) -> str:
        """The name as a flag: ``--learning-rate``."""
        return f"--{self.name.replace('_', '-')}"


def settings_reference(*, in_scripts: bool = False) -> list[Setting]:
    """Return all settings, group by group; with ``in_scripts`` also what only Python code can say."""
    groups = {**GROUPS, **_IN_SCRIPTS} if in_scripts else GROUPS
    return [_describe(name, group, kind) for group, kind in groups.items() for name in kind.model_fields]


def find_setting(name: str) -> tuple[Setting, str | None]:
    """Return a setting, and the alias where ``name`` is one; dashes count as underscores, a leading ``--`` not at all.

    Raises:
        SettingsError: there is none; the message names the nearest.
    """
    key = name.lstrip("-").replace("-", "_")
    known = {setting.name: setting for setting in settings_reference(in_scripts=True)}
    if key in known:
        return known[key], None
    if key in ALIASES:
        return known[ALIASES[key]], key
    near = nearest(key, [*known, *ALIASES], most=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise SettingsError(f"there is no setting {name!r}.{hint} `tunesmith explain` lists all.")


def _describe(name: str, group: str, kind: type[Settings]) -> Setting:
    # A run may have narrowed what its parts say.
    field = RunSettings.model_fields.get(name) or kind.model_fields[name]
    kinds, choices = _kinds(field.annotation)
    return Setting(
        name=name,
        group=group,
        meaning=" ".join((field.description or "").split()),
        kinds=frozenset(kinds),
        choices=tuple(dict.fromkeys(choices)),
        allowed=describe_type(field.annotation) + _range(field.metadata),
        default="required" if field.is_required() else written(field.default),
        guide=guide_of(field),
        aliases=tuple(alias for alias, ours in ALIASES.items() if ours == name),
    )


def written(value: Any) -> str:
    """Return a value as YAML writes it: ``none`` for None, ``"none"`` for the word, ``true``, ``2e-4``."""
    if value is None:
        return "none"
    if value == "none":
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        # 0.0002 is read more easily as 2e-4, and 0.05 as it is.
        return (
            f"{value:g}".replace("e-0", "e-") if value >= 0.001 or value == 0 else f"{value:.0e}".replace("e-0", "e-")
        )
    return str(value)


def _kinds(annotation: Any) -> tuple[set[type], list[str]]:
    """Return the plain types of an annotation, and the words that its literals allow."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kinds(arguments[0])
    if origin is typing.Literal:
        return {str}, [str(value) for value in arguments]
    if origin in (typing.Union, types.UnionType):
        parts = [_kinds(member) for member in arguments]
        return {kind for kinds, _ in parts for kind in kinds}, [word for _, words in parts for word in words]
    return {origin or annotation}, []


_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _range(metadata: list[Any]) -> str:
    bounds = [
        f"{word} {written(value)}"
        for entry in metadata
        for name, word in _BOUNDS.items()
        if (value := getattr(entry, name, None)) is not None
    ]
    return f", {' and '.join(bounds)}" if bounds else ""
