"""The strict base of every settings class, and the one way to read settings.

A settings class is a pydantic model that forbids unknown keys. The docstring under a field is its help text on the
command line and in the docs; :class:`Guide` adds the typical range and what too little or too much does. Reading
collects **all** problems and raises one :class:`SettingsError` that lists them, each with the nearest known name.
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from tunesmith.core.errors import SettingsError
from tunesmith.core.names import did_you_mean

__all__ = [
    "Guide",
    "Settings",
    "check",
    "complaint",
    "first_clause",
    "guide_of",
    "parse_assignment",
    "read_yaml",
    "validate",
]


@dataclass(frozen=True, slots=True)
class Guide:
    """Advice on one setting, shown by ``tunesmith explain`` and the docs page.

    Attributes:
        typical: the usual range, in words.
        low: what happens when the value is too low (or the option is off).
        high: what happens when the value is too high (or the option is on).
    """

    typical: str = ""
    low: str = ""
    high: str = ""


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, assignments are checked, docstrings are descriptions."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_assignment=True, frozen=True, allow_inf_nan=False
    )

    other_names: ClassVar[Sequence[str]] = ()
    """Names under which settings are read too, for the nearest one to a mistyped key."""

    @field_validator("*", mode="before")
    @classmethod
    def _plain_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Take paths and numpy's numbers as texts and numbers. Python counts True as 1: a rank of True is refused."""
        assert info.field_name is not None
        accepted = _plain_types(cls.model_fields[info.field_name].annotation)
        if getattr(value, "ndim", None) == 0:
            value = value.item()
        if isinstance(value, os.PathLike) and str in accepted:
            return os.fspath(typing.cast("os.PathLike[str]", value))
        if isinstance(value, bool) and bool not in accepted and accepted & {int, float}:
            raise ValueError(f"{value} is a truth value, a number is needed")
        return value

    def replace(self, **changes: Any) -> Self:
        """Return a copy with ``changes`` applied and everything validated again."""
        return validate(type(self), {**self.model_dump(exclude_unset=True), **changes})


def _plain_types(annotation: Any) -> set[Any]:
    """Return the members of a possibly nested union, ``Literal`` values counted by their types."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _plain_types(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    if origin in (typing.Union, types.UnionType):
        return set[Any]().union(*(_plain_types(member) for member in typing.get_args(annotation)))
    return {origin or annotation}


def guide_of(field: FieldInfo) -> Guide:
    """Return the :class:`Guide` among a field's annotations, or an empty one."""
    return next((entry for entry in field.metadata if isinstance(entry, Guide)), Guide())


S = TypeVar("S", bound=Settings)


def validate(kind: type[S], values: Mapping[str, Any], *, source: str = "settings", strict: bool = False) -> S:
    """Build ``kind`` from ``values``; ``strict``: a text is no number and no truth value, which in files it may be.

    Raises:
        SettingsError: listing every problem, one line each; ``source`` (a file name) opens the message.
    """
    settings, problems = check(kind, values, strict=strict)
    if settings is None:
        raise complaint(source, problems)
    return settings


def check(kind: type[S], values: Mapping[str, Any], *, strict: bool = False) -> tuple[S | None, list[str]]:
    """Return ``kind`` built from ``values`` and no problems, or None and a sentence for every problem."""
    try:
        return kind.model_validate(dict(values), strict=strict), []
    except ValidationError as error:
        return None, list(dict.fromkeys(_sentence(kind, problem) for problem in error.errors()))


def complaint(source: str, problems: Sequence[str]) -> SettingsError:
    """Return the error that lists ``problems``, one line each where there are several."""
    if len(problems) == 1:
        return SettingsError(f"{source}: {problems[0]}")
    return SettingsError(f"{source}: {len(problems)} problems\n" + "\n".join(f"  - {problem}" for problem in problems))


def _sentence(kind: type[Settings], problem: Any) -> str:
    """Turn one pydantic problem into a sentence that names the key, the value and what is allowed."""
    # For a union pydantic reports one problem a member, with the member's name behind the field's.
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":
        return f"unknown key {name!r}.{did_you_mean(name, [*kind.model_fields, *kind.other_names])}"
    message = problem["msg"].removeprefix("Value error, ")
    if not name:
        return message
    if problem["type"] == "missing":
        return f"{name} is missing: {first_clause(kind.model_fields[name].description or '')}."
    allowed = describe_type(kind.model_fields[name].annotation)
    value = problem["input"]
    shown = repr(value) if len(repr(value)) < 80 else repr(value)[:77] + "..."
    if problem["type"] == "value_error" and message.startswith(f"{name} {shown} "):
        return message
    if problem["type"] == "value_error":
        return f"{name} = {shown}: {message}"
    if len(problem["loc"]) == 2 and _plain_types(kind.model_fields[name].annotation) <= {dict, type(None)}:
        return f"{name}[{problem['loc'][1]!r}] = {shown}: {message[0].lower()}{message[1:]}"
    if len(problem["loc"]) > 1 or problem["type"].endswith(("_type", "_parsing")):
        return f"{name} = {shown}: {allowed} is needed"
    return f"{name} = {shown}: {message[0].lower()}{message[1:]}"


def first_clause(text: str) -> str:
    """Return ``text`` on one line up to the first full stop or semicolon outside of brackets that ends a clause."""
    line, depth = " ".join(text.split()), 0
    for place, letter in enumerate(line):
        depth += (letter in "([{") - (letter in ")]}")
        is_end = letter == ";" or (letter == "." and line[place - 1] not in " .")  # three dots end nothing
        if depth == 0 and is_end and line[place + 1 : place + 2] in ("", " "):
            return line[:place]
    return line


_TYPE_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "a mapping",
    Path: "a path",
    Any: "what transformers takes",
    type(None): "nothing",
}


def describe_type(annotation: Any) -> str:
    """Say in words what a field's annotation accepts: ``"a whole number or nothing"``."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return describe_type(args[0])
    if origin is typing.Literal:
        words = ", ".join(str(value) for value in args)
        return f"one of {words}" if len(args) > 1 else words
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe_type(member) for member in args))
    return _TYPE_WORDS.get(origin or annotation, str(annotation))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        SettingsError: the file is missing, is not UTF-8, is not YAML (line and column named) or is no mapping, or a
            key stands twice.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file. Give a YAML file with the settings of the run.") from None
    except IsADirectoryError:
        raise SettingsError(f"{path} is a folder. Give the YAML file inside it.") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 text (byte {error.start}). Save the file as UTF-8.") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}). Give the YAML file of a run.") from None
    try:
        _refuse_repeated_keys(path, yaml.compose(text, Loader=yaml.SafeLoader))
        values = yaml.safe_load(text)
    except (ValueError, RecursionError) as error:  # a date that no calendar has; lists in lists without end
        raise SettingsError(f"{path}: not valid YAML: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise SettingsError(f"{path}{place}: not valid YAML: {problem}") from None
    if values is None:
        raise SettingsError(f"{path}: the file is empty. A run needs at least `model` and `data`.")
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: a mapping of `key: value` lines is needed, not a {type(values).__name__}.")
    return {str(key): value for key, value in typing.cast(dict[Any, Any], values).items()}


def _refuse_repeated_keys(path: Path, node: Any) -> None:
    import yaml

    seen: dict[str, int] = {}
    for key, _ in node.value if isinstance(node, yaml.MappingNode) else []:
        if not isinstance(key, yaml.ScalarNode):
            raise SettingsError(f"{path}:{key.start_mark.line + 1}: a key must be a name, not a list or a mapping.")
        line = key.start_mark.line + 1
        if key.value in seen:
            raise SettingsError(f"{path}:{line}: {key.value!r} is already set in line {seen[key.value]}. Keep one.")
        seen[key.value] = line


def parse_assignment(text: str) -> tuple[str, Any]:
    """Split ``"key=value"``; the value is read as YAML, so that lists, numbers and null work.

    Raises:
        SettingsError: there is no ``=``, or the value is not YAML.
    """
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SettingsError(f"--set {text!r}: write key=value, for example --set learning_rate=1e-4.")
    try:
        return key.strip(), yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise SettingsError(f"--set {text!r}: the value is not valid YAML. Quote it if it holds : or {{.") from None
