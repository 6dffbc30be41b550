"""Flags made from the settings, so that a setting has one name, one help text and one set of checks everywhere.

:func:`settings_flags` gives a command a flag for each setting it names; :func:`given_settings` turns what was typed
into the mapping that :func:`~tunesmith.training.settings.load_run_settings` validates. Values stay text until pydantic
reads them there, so a flag accepts and refuses exactly what the YAML file does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from tunesmith.cli.reference import Setting, settings_reference
from tunesmith.core.errors import SettingsError
from tunesmith.core.settings import parse_assignment
from tunesmith.models.sampling import Sampling
from tunesmith.training.aliases import ALIASES

__all__ = ["check_config", "check_sampling", "given_settings", "settings_flags"]

_OFF = "no_"


def settings_flags(names: Iterable[str] | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that puts the flags of ``names`` in the place of a command's ``**flags``.

    None means every setting, and hidden flags for the names that other tools use.
    """
    wanted = None if names is None else set(names)
    settings = [setting for setting in settings_reference() if wanted is None or setting.name in wanted]
    flags = [_flag(setting) for setting in settings]
    flags += [_off_flag(setting) for setting in settings if _is_switch(setting)]
    if wanted is None:
        flags += [_alias_flag(alias) for alias in ALIASES]

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function, eval_str=True)
        own = [entry for entry in signature.parameters.values() if entry.kind is not entry.VAR_KEYWORD]
        function.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
        return function

    return add


def given_settings(flags: Mapping[str, Any], assignments: Iterable[str] = ()) -> dict[str, Any]:
    """Return the settings that were typed: flags that are there, and the ``key=value`` of ``--set``.

    Raises:
        SettingsError: a setting is given twice, or an assignment or mapping cannot be read.
    """
    known = {setting.name: setting for setting in settings_reference()}
    values: dict[str, Any] = {}
    for name, typed in flags.items():
        if typed in (None, []):
            continue
        switch = name.removeprefix(_OFF)
        if name in known:
            values[name] = _value(known[name], typed)
        elif switch in known:
            if switch in values:
                raise SettingsError(f"{known[switch].flag} and --no-{known[switch].flag[2:]}: give one of them.")
            values[switch] = False
        else:
            values[name] = parse_assignment(f"{name}={typed}")[1]
    for assignment in assignments:
        key, value = parse_assignment(assignment)
        if key in values:
            raise SettingsError(f"{key} is given twice: {values[key]!r} and, with --set, {value!r}. Give one of them.")
        values[key] = value
    return values


def check_config(config: Path | None) -> None:
    """Refuse what stands in the place of a YAML file and is none: the value of a switch, or a file of rows.

    Raises:
        SettingsError: with the flag that was meant.
    """
    if config is None:
        return
    if config.name.lower() in ("true", "false", "yes", "no", "on", "off") and not config.exists():
        raise SettingsError(f"{config}: switches take no value. Write --NAME or --no-NAME, for example --no-packing.")
    if config.suffix.lower() in (".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt"):
        raise SettingsError(
            f"{config} is a file of rows, and the settings of a run are YAML. Give it as --data {config}."
        )


def check_sampling(temperature: float, top_p: float, max_new_tokens: int) -> None:
    """Refuse values with which no token can be chosen, before a model is loaded.

    Raises:
        SettingsError: with the range of the first one.
    """
    faults = Sampling(temperature, top_p).faults()
    if max_new_tokens < 1:
        faults.append(f"max_new_tokens={max_new_tokens} must be 1 or more")
    if faults:
        name, _, rest = faults[0].partition("=")
        raise SettingsError(f"--{name.replace('_', '-')} {rest}.")


def _flag(setting: Setting) -> inspect.Parameter:
    choices = f" One of {', '.join(setting.choices)}." if setting.choices else ""
    default = {"none": "", "required": " (required)"}.get(setting.default, f" (default: {setting.default})")
    words: dict[str, Any] = {
        "help": escape(f"{setting.summary}.{choices}{default}"),
        "rich_help_panel": setting.group,
        "show_default": False,
    }
    if _is_switch(setting):
        return _parameter(setting.name, bool | None, typer.Option(setting.flag, **words))
    kind = list[str] | None if _is_repeatable(setting) else str | None
    return _parameter(setting.name, kind, typer.Option(setting.flag, metavar=_metavar(setting), **words))


def _off_flag(setting: Setting) -> inspect.Parameter:
    """Return the hidden ``--no-`` form of a switch; shown, it would take a third of the help's width."""
    option = typer.Option(f"--no-{setting.flag[2:]}", hidden=True)
    return _parameter(_OFF + setting.name, bool | None, option)


def _alias_flag(alias: str) -> inspect.Parameter:
    return _parameter(alias, str | None, typer.Option(f"--{alias.replace('_', '-')}", hidden=True))


def _parameter(name: str, kind: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])


def _is_repeatable(setting: Setting) -> bool:
    return bool(setting.kinds & {list, dict})


def _is_switch(setting: Setting) -> bool:
    return setting.kinds == frozenset({bool})


def _metavar(setting: Setting) -> str:
    """Return a short word for what the flag takes; a long one would leave the help no room."""
    if setting.kinds & {dict}:
        return "K=V"
    if list in setting.kinds:
        return "LIST"
    return "N" if setting.kinds & {int, float} else "TEXT"


def _value(setting: Setting, typed: Any) -> Any:
    """Return what a YAML file would hold: ``none`` is null, lists and mappings are taken apart."""
    if not isinstance(typed, list):
        return None if typed == "none" and type(None) in setting.kinds else typed
    if typed == ["none"] and type(None) in setting.kinds:
        return None
    if dict in setting.kinds:
        return _mapping(setting, typed)
    # A single value stays as it is where text is allowed too: a regular expression keeps its commas.
    if str in setting.kinds and len(typed) == 1 and not all(part.isidentifier() for part in typed[0].split(",")):
        return typed[0]
    parts = [part.strip() for entry in typed for part in entry.split(",")]
    return parts[0] if str in setting.kinds and len(parts) == 1 else parts


def _mapping(setting: Setting, typed: list[str]) -> dict[str, str]:
    """Read ``a=x`` and ``a=x,b=y``; a key may itself hold ``=`` and ``,``."""
    pairs: dict[str, str] = {}
    for entry in typed:
        parts = entry.split(",")
        for part in parts if all("=" in part for part in parts) else [entry]:
            key, equals, value = part.rpartition("=")
            if not equals or not key.strip():
                wanted = "COLUMN=ROLE, for example question=user" if setting.name == "map" else "NAME=NUMBER"
                raise SettingsError(f"{setting.flag} {entry!r}: write {wanted}.")
            if key.strip() in pairs:
                raise SettingsError(f"{setting.flag}: {key.strip()!r} is given twice. Keep one.")
            pairs[key.strip()] = value.strip()
    return pairs
