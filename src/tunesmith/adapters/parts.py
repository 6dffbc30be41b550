"""The parts of a multimodal model, and the filters that say which of them get an adapter.

Each linear layer is sorted twice, by the structure of the model itself:

* its **part**: the tower that transformers' ``get_encoder`` or ``get_decoder`` finds it in - vision, audio, language -
  and vision for what stands between towers (a projector belongs to the images that it brings to the language model);
* its **kind**, inside a repeated layer (transformers' ``GradientCheckpointingLayer``): attention, where one of the
  modules around it is an attention class, else mlp. What is in no repeated layer - projectors, mergers - is a
  connector.

A layer gets an adapter when the filter of its part and that of its kind are on. Connectors follow the filter of their
part alone, and only when ``target_modules`` names them or is "all-linear".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from tunesmith.adapters.settings import FILTERS, AdapterSettings
from tunesmith.adapters.targets import linear_layers, matching_names, resolve_targets, usual_names
from tunesmith.core.errors import AdapterError
from tunesmith.models.vision import towers

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Place", "check_text_filters", "filtered_targets", "is_multimodal", "places_of"]

Part = Literal["vision", "language", "audio"]
Kind = Literal["attention", "mlp", "connector"]
_PARTS: tuple[Part, ...] = get_args(Part)
_SWITCH: dict[Part | Kind, str] = {part: f"finetune_{part}_layers" for part in _PARTS} | {
    kind: f"finetune_{kind}_modules" for kind in ("attention", "mlp")
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a linear layer belongs, see the top of this file; ``depth`` is the index of its repeated layer."""

    part: Part
    kind: Kind
    depth: int | None = None


def is_multimodal(model: nn.Module) -> bool:
    """Say whether a model has more than a language model."""
    config = getattr(model, "config", None)
    return any(getattr(config, f"{part}_config", None) is not None for part in ("vision", "audio"))


def places_of(model: nn.Module) -> dict[str, Place]:
    """Return name -> place of every linear layer but output heads, in model order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules = dict(model.named_modules())
    roots = {f"{name}.": part for part, name in towers(model).items()}
    found: dict[str, Place] = {}
    for name in linear_layers(model):
        part = next((part for root, part in roots.items() if name.startswith(root)), "vision")
        around = [name[: match.start()] for match in re.finditer(r"\.", name)]
        layer = next((outer for outer in around if isinstance(modules[outer], GradientCheckpointingLayer)), None)
        if layer is None:
            found[name] = Place(part, "connector")
            continue
        inside = [type(modules[outer]).__name__ for outer in around if len(outer) > len(layer)]
        kind: Kind = "attention" if any("Attention" in module for module in inside) else "mlp"
        depth = layer.rpartition(".")[2]
        found[name] = Place(part, kind, int(depth) if depth.isdigit() else None)
    return found


def filtered_targets(
    model: nn.Module,
    asked: Sequence[str] | str | None,
    filters: Mapping[str, bool],
    layers: Sequence[int] | None = None,
) -> str:
    """Return the expression by which PEFT finds the layers of a multimodal model that get an adapter.

    Args:
        asked: ``target_modules``, of which the filters leave some; None means all of attention and mlp, in the
            language model the usual projections.
        filters: a value for each of :data:`~tunesmith.adapters.settings.FILTERS`.
        layers: only these layers of the language model.

    Raises:
        AdapterError: all filters of the parts or of the kinds are off, they leave none of the layers, ``asked`` matches
            nothing, the model has no audio that was asked for, or ``layers`` are given while another part trains.
    """
    _check(filters, layers)
    places = places_of(model)
    if filters["finetune_audio_layers"] and "audio" not in towers(model):
        raise AdapterError(f"finetune_audio_layers=True, but {type(model).__name__} has no audio part. Leave it out.")
    if asked is None:
        inside = [name for name, place in places.items() if place.kind != "connector"]
        usual = usual_names(name.rpartition(".")[2] for name in inside if places[name].part == "language")
        wanted = [n for n in inside if places[n].part != "language" or n.rpartition(".")[2] in usual]
    elif asked == "all-linear":
        wanted = list(places)
    else:
        found = matching_names(model, resolve_targets(model, asked, passes_blocks=True))
        wanted = [name for name in found if name in places]
        outside = [] if isinstance(asked, str) and wanted else [name for name in found if name not in places]
        if outside:
            raise AdapterError(
                f"target_modules {asked!r} matches {outside[0]}, which is no linear layer of a part of "
                f"{type(model).__name__}. Embedding and output head train whole: modules_to_save."
            )
    chosen = [name for name in wanted if _is_on(places[name], filters)]
    if layers is not None:
        chosen = [name for name in chosen if places[name].depth in layers]
    if not chosen:
        off = ", ".join(f"{name}=False" for name in FILTERS if not filters[name])
        raise AdapterError(
            f"{off} leaves no layer of {type(model).__name__} to adapt"
            f"{'' if asked is None else f' among target_modules {asked!r}'}. Turn one of them on."
        )
    return _expression(chosen, others=places.keys() - set(chosen))


def check_text_filters(model: nn.Module, filters: Mapping[str, bool]) -> None:
    """Refuse filters that a model of text alone cannot follow; one that turns off what it does not have is followed.

    Raises:
        AdapterError: a filter other than ``finetune_vision_layers`` has another value than its default.
    """
    for name in FILTERS:
        if name != "finetune_vision_layers" and filters[name] != AdapterSettings.model_fields[name].default:
            raise AdapterError(
                f"{name}={filters[name]} chooses a part of a multimodal model, and {type(model).__name__} is a "
                "language model. Choose its layers with target_modules."
            )


def _check(filters: Mapping[str, bool], layers: Sequence[int] | None) -> None:
    of_parts = [_SWITCH[part] for part in _PARTS]
    for names in (of_parts, [_SWITCH["attention"], _SWITCH["mlp"]]):
        if not any(filters[name] for name in names):
            raise AdapterError(f"{', '.join(names)} are all False, so nothing would train. Turn one of them on.")
    others = [name for name in of_parts if filters[name] and name != _SWITCH["language"]]
    if layers is not None and others:
        raise AdapterError(
            "layers_to_transform and finetune_last_n_layers count the layers of the language model. Give "
            f"{', '.join(f'{name}=False' for name in others)} with them."
        )


def _is_on(place: Place, filters: Mapping[str, bool]) -> bool:
    return filters[_SWITCH[place.part]] and (place.kind == "connector" or filters[_SWITCH[place.kind]])


def _expression(names: Sequence[str], others: Iterable[str]) -> str:
    r"""Return an expression for exactly ``names``; short, layers as a number, unless it would match some of ``others``.

    An example: ``model\.language_model\.layers\.\d+\.(?:self_attn\.q_proj|mlp\.up_proj)``.
    """
    patterns = dict.fromkeys(re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", re.escape(name)) for name in names)
    ends: dict[str, list[str]] = {}
    for pattern in patterns:
        root, number, end = pattern.rpartition(r"\.\d+\.")
        ends.setdefault(root + number, []).append(end)
    short = "|".join(f"{root}(?:{'|'.join(found)})" for root, found in ends.items())
    return "|".join(map(re.escape, names)) if any(re.fullmatch(short, name) for name in others) else short
