"""One base that speaks with one of several adapters at a time, for a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.errors import SettingsError

__all__ = ["BASE", "Voices", "load_voices", "named_folders"]

BASE = "base"
"""What the model without an adapter is called."""


@dataclass(slots=True)
class Voices:
    """A model and the adapters on it.

    Attributes:
        adapters: name that the user gave -> name in PEFT.
        tokenizers: the same name -> tokenizer with the template that the adapter was trained with.
        current: the name that answers: an adapter, or the base.
    """

    model: Any
    adapters: dict[str, str]
    tokenizers: dict[str, Any]
    current: str

    @property
    def names(self) -> list[str]:
        """All that can answer."""
        return [BASE, *self.adapters]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of what answers now."""
        return self.tokenizers[self.current]

    def use(self, name: str) -> None:
        """Answer with ``name`` from now on."""
        if name != BASE:
            self.model.set_adapter(self.adapters[name], inference_mode=True)
        self.current = name

    @contextmanager
    def speaking(self, name: str) -> Iterator[tuple[Any, Any]]:
        """Yield model and tokenizer as ``name`` speaks: the current adapter, or the base."""
        from tunesmith.engine.modes import adapter_disabled

        if name == BASE and self.adapters:
            with adapter_disabled(self.model):
                yield self.model, self.tokenizers[BASE]
        else:
            yield self.model, self.tokenizers[name]


def load_voices(model: str, adapters: Sequence[str], **how: Any) -> Voices:
    """Load ``model`` with ``adapters``, each a folder or NAME=FOLDER; the first one answers.

    ``how``: see :func:`tunesmith.cli.loading.load_for_answers`.

    Raises:
        SettingsError: two adapters of one name, or one called as the base is.
        AdapterError: an adapter does not fit, or cannot share the base with the others.
    """
    from tunesmith.adapters.state import attach_as_trained, load_beside, own_tokenizer
    from tunesmith.cli.loading import adapter_folder, load_for_answers
    from tunesmith.models.aliases import find_model

    is_adapter = find_model(model).kind == "adapter"
    places = named_folders([*([model] if is_adapter else []), *adapters])
    beside = None if is_adapter else next(iter(places.values()), None)
    # The base comes with its own tokenizer and end tokens, and not with those of the first adapter.
    loaded, tokenizer = load_for_answers(model, beside, attach=False, **how)
    if not places:
        return Voices(loaded, {}, {BASE: tokenizer}, BASE)
    first, *others = places
    source = find_model(places[first])
    loaded = attach_as_trained(loaded, source, whole=how.get("load_in_16bit", False), trainable=False)
    names, tokenizers = {first: "default"}, {BASE: tokenizer, first: tokenizer}
    if how.get("chat_template") is None:
        tokenizers[first] = own_tokenizer(first, Path(source.path), tokenizer) or tokenizer
    for index, (name, folder) in enumerate((name, places[name]) for name in others):
        names[name] = f"beside_{index}"  # a name of PEFT's may hold no dot
        place = adapter_folder(folder)
        load_beside(loaded, names[name], place)
        tokenizers[name] = own_tokenizer(name, place, tokenizer) or tokenizer
    return Voices(loaded, names, tokenizers, first)


def named_folders(adapters: Sequence[str], base: str = BASE) -> dict[str, str]:
    """Return name -> folder for values FOLDER or NAME=FOLDER; a folder alone gives its name.

    Args:
        base: what the base is called: no adapter can be.

    Raises: SettingsError for a name that is taken.
    """
    places: dict[str, str] = {}
    for value in adapters:
        name, equals, folder = value.partition("=")
        if not equals or Path(value).exists():
            name, folder = _name_of(value), value
        if not name or name in places or name == base:
            taken = "is empty" if not name else "is taken"
            raise SettingsError(f"--adapter {value}: the name {name!r} {taken}. Give it one: --adapter NAME={folder}")
        places[name] = folder
    return places


def _name_of(folder: str) -> str:
    """Return what an adapter is called after its folder: a run's adapter after the run."""
    path = Path(folder).expanduser().resolve()
    return path.parent.name if path.name in ("adapter", "model") else path.name
