"""A model for commands that answer rather than train: a base, a trained run, or a base with an adapter beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.adapters.model import base_beside, trained_for, trained_on
from tunesmith.adapters.state import load_beside, load_source
from tunesmith.api import FastLanguageModel
from tunesmith.cli.console import silence_libraries
from tunesmith.core.errors import AdapterError, ModelError
from tunesmith.core.settings import read_yaml
from tunesmith.core.tasks import CAUSAL_LM
from tunesmith.data.files import list_splits, read_rows
from tunesmith.models.aliases import find_model
from tunesmith.models.load import facts_of
from tunesmith.models.settings import choose_width

__all__ = ["adapter_folder", "add_adapters", "load_for_answers", "mapping_of_run"]


def load_for_answers(
    model: str,
    adapter: str | None = None,
    *,
    chat_template: str | None = None,
    max_seq_length: int | None = None,
    dtype: str | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    load_in_fp8: bool | str = False,
    load_in_16bit: bool = False,
    any_task: bool = False,
    attach: bool = True,
) -> tuple[Any, Any]:
    """Return (model, tokenizer), ready to generate, with the libraries below silenced.

    Args:
        any_task: also a model that does not write text.
        attach: False: of an adapter only the base that it was trained on (see
            :func:`tunesmith.adapters.state.load_source`, also for the tokenizer).

    Raises:
        ModelError: nothing usable is at ``model``, or it does not write text.
        SettingsError: more than one ``load_in_*``.
        AdapterError: ``adapter`` is no adapter, does not fit, or ``model`` has one already.
    """
    width = choose_width(
        load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit, load_in_16bit=load_in_16bit or None, dtype=dtype,
        load_in_fp8={"true": True, "false": False}.get(str(load_in_fp8).lower(), load_in_fp8),
    )  # fmt: skip
    # Names are looked up first: a mistyped one is said at once, not after the seconds that the libraries take.
    for name in filter(None, (model, adapter)):
        find_model(name)
    silence_libraries()
    loaded, tokenizer = load_source(
        model,
        adapter=adapter,
        max_seq_length=max_seq_length,
        dtype=dtype,
        width=width,
        whole=load_in_16bit,
        chat_template=chat_template,
        trainable=False,
        attach=attach,
    )
    task = facts_of(loaded).task
    if task != CAUSAL_LM and not any_task:
        raise ModelError(
            f"model {model} was trained for {task} and is no language model. `tunesmith evaluate` uses it."
        )
    return FastLanguageModel.for_inference(loaded), tokenizer


def adapter_folder(name: str) -> Path:
    """Return where the adapter that ``--adapter`` names lies: a folder, or that of a run.

    Raises:
        AdapterError: it is no adapter.
    """
    source = find_model(name)
    if source.kind != "adapter":
        raise AdapterError(f"--adapter {name} is no adapter folder: it holds no adapter_config.json.")
    return Path(source.path)


def add_adapters(model: Any, mix: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Load the adapters of ``mix`` (folder or run, share) beside the first, which ``model`` has, and return the shares.

    Raises:
        AdapterError: one is no adapter, does not fit the base, or was trained on it in another form than the first.
    """
    shares = {"default": mix[0][1]}
    for index, (name, share) in enumerate(mix[1:], start=2):
        folder = adapter_folder(name)
        if _base_of(folder) != _base_of(Path(find_model(mix[0][0]).path)):
            raise AdapterError(
                f"--adapter {name} was trained on its base in another form (bits, window, vocabulary) than "
                f"{mix[0][0]}: they cannot be added."
            )
        load_beside(model, f"adapter-{index}", folder)
        shares[f"adapter-{index}"] = share
    return shares


def mapping_of_run(name: str, data: str) -> dict[str, str] | None:
    """Return the ``map`` that the run ``name`` was trained with, where ``data`` has all columns that it names.

    Rows whose columns have the usual names need none, whatever those of the training were called.
    """
    folder = Path(find_model(name).path)
    file = next(
        (path / "settings.yaml" for path in (folder, folder.parent) if (path / "settings.yaml").is_file()), None
    )
    mapping = None if file is None else read_yaml(file).get("map")
    if not mapping:
        return None
    first = next(read_rows(data, split=list_splits(data)[0]))
    return dict(mapping) if set(mapping) <= set(first.value) else None


def _base_of(adapter: Path) -> tuple[object, ...]:
    """Return how the base of an adapter was when it was trained."""
    return trained_on(adapter), trained_for(adapter), base_beside(adapter)
