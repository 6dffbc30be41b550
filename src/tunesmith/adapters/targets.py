"""Which modules of a model get an adapter, and clear errors for names that match nothing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tunesmith.core.errors import AdapterError
from tunesmith.core.names import did_you_mean
from tunesmith.core.tasks import TASKS

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "check_patterns",
    "expert_tensors",
    "linear_layers",
    "linear_names",
    "matching_names",
    "resolve_exclusions",
    "resolve_targets",
    "usual_names",
]

_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Fused projections of families that have no separate ones: phi-3, the plain MLP of phi and gpt-neox; BERT's names.
_EQUIVALENTS = (
    "qkv_proj", "gate_up_proj", "query_key_value", "query", "key", "value", "dense", "dense_h_to_4h", "dense_4h_to_h",
    "fc1", "fc2", "ffn", "ffn_output",
)  # fmt: skip
# One of these is the query's projection: without it the names that are usual say nothing of a family's attention.
_QUERIES = {"q_proj", "qkv_proj", "query_key_value", "query"}


# Kind of model -> layers whose weights it reads past their forward: PEFT refuses an adapter there, or none is seen.
_READ_PAST = {
    **dict.fromkeys(("mamba", "falcon_mamba"), ("dt_proj", "out_proj")),
    **dict.fromkeys(("mamba2", "falcon_h1", "nemotron_h"), ("out_proj",)),
    "jamba": ("dt_proj",),
}


def linear_layers(model: nn.Module) -> list[str]:
    """Return the names of all linear layers except output heads, in model order.

    A layer that carries an adapter counts as the layer that it was.
    """
    from torch import nn

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = tuple(name for task in TASKS.values() for name in task.heads)
    layers = {name: getattr(module, "base_layer", module) for name, module in model.named_modules()}
    adapted = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer"))
    return [
        name
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear)
        and layer is not head
        and not any(part.endswith(heads) for part in name.split("."))
        and not name.startswith(adapted)
    ]


def linear_names(model: nn.Module) -> list[str]:
    """Return the last name parts of :func:`linear_layers`, each once."""
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linear_layers(model)))


def usual_names(existing: Iterable[str]) -> list[str]:
    """Return those of the ``existing`` last name parts that get an adapter when nothing is said.

    The seven projections of llama-like models, or the family's equivalents; all where attention has other names.
    """
    there = list(dict.fromkeys(existing))
    if _QUERIES.isdisjoint(there):
        return there
    # Where there is a q_proj, BART and OPT call the o_proj so; elsewhere it is something else.
    output = ("out_proj",) if "q_proj" in there else ()
    return [name for name in (*_SEVEN, *output, *_EQUIVALENTS) if name in there]


def matching_names(model: nn.Module, targets: Sequence[str] | str) -> list[str]:
    """Return the names of the modules that PEFT finds by ``targets``, as :func:`resolve_targets` returns them."""
    modules = [name for name, _ in model.named_modules()]
    if isinstance(targets, str):
        return [name for name in modules if re.fullmatch(targets, name)]
    return [name for name in modules if any(name == target or name.endswith(f".{target}") for target in targets)]


def resolve_targets(
    model: nn.Module, asked: Sequence[str] | str | None, *, passes_blocks: bool = False
) -> list[str] | str:
    """Return what PEFT gets as ``target_modules``: a list of names, or a regular expression as given.

    None means the seven projections of llama-like models, else the family's equivalents, else every linear layer, of
    those that the model repeats: heads, poolers and projections between parts have names of their own.
    ``passes_blocks``: an expression may match more than layers, because the caller takes these out of it.

    Raises:
        AdapterError: a name or expression matches no layer that can carry an adapter; the message lists those that
            exist and the nearest one.
    """
    existing = linear_names(model)
    if not existing:
        raise AdapterError(f"{type(model).__name__} has no linear layers that LoRA could adapt.")
    if asked is None:
        # A repeated layer has a number in its name.
        repeated = [name for name in linear_layers(model) if re.search(r"\.\d+\.", name)]
        names = usual_names(name.rpartition(".")[2] for name in repeated) or existing
        kind = getattr(getattr(model, "config", None), "model_type", "")
        return [name for name in names if name not in _READ_PAST.get(kind, ())]
    if asked == "all-linear":
        return existing
    if not asked:
        raise AdapterError(f"target_modules is empty. Linear layers are: {', '.join(existing)}.")
    if isinstance(asked, str):
        found = _checked_expression(model, asked, existing)
        if not passes_blocks:
            _refuse_blocks(model, asked, found, existing)
        return found
    modules = [name for name, _ in model.named_modules()]
    for wanted in asked:
        if not any(name == wanted or name.endswith("." + wanted) for name in modules):
            raise AdapterError(
                f"target_modules {wanted!r} matched no layer of {type(model).__name__}. Linear layers are: "
                f"{', '.join(existing)}.{did_you_mean(wanted, existing)} "
                'Use target_modules="all-linear" for every linear layer except the output head.'
            )
        _refuse_blocks(model, wanted, [wanted], existing)
    return list(asked)


def expert_tensors(model: nn.Module, asked: Sequence[str]) -> list[str]:
    """Return the whole names of the expert tensors that ``asked`` names: 3-D parameters, one matrix for each expert.

    Raises:
        AdapterError: a name matches none; the message lists those that exist and the nearest one.
    """
    # Below an adapter they are what they were.
    existing = [name.replace(".base_layer", "") for name, value in model.named_parameters() if value.ndim == 3]
    short = list(dict.fromkeys(".".join(name.rsplit(".", 2)[-2:]) for name in existing))
    found: list[str] = []
    for wanted in asked:
        matched = [name for name in existing if name == wanted or name.endswith("." + wanted)]
        if not matched:
            there_are = f"It has: {', '.join(short)}.{did_you_mean(wanted, short)}" if short else "It has none."
            raise AdapterError(
                f"target_parameters {wanted!r} matched no tensor of experts of {type(model).__name__}. {there_are} "
                "Linear layers are named in target_modules."
            )
        found += matched
    return found


def resolve_exclusions(model: nn.Module, asked: Sequence[str] | str | None) -> list[str] | str | None:
    """Return what PEFT gets as ``exclude_modules``: a list of names, or a regular expression as given.

    Raises:
        AdapterError: a name or expression matches no module, or is no regular expression.
    """
    modules = [name for name, _ in model.named_modules()]
    last_parts = {name.rsplit(".", 1)[-1] for name in modules}
    if isinstance(asked, str) and asked not in last_parts:
        if not any(_compiled("exclude_modules", asked).fullmatch(name) for name in modules):
            raise AdapterError(
                f"exclude_modules {asked!r} matched no module of {type(model).__name__} (an expression must match the "
                f"whole name, for example r'.*\\.q_proj').{did_you_mean(asked, last_parts)}"
            )
        found = matching_names(model, asked)
        if _blocks(model, found) == found:
            raise AdapterError(
                f"exclude_modules {asked!r} matches blocks, and none of the layers in them, which r'{asked}\\..*' does."
            )
        return asked
    entries = [asked] if isinstance(asked, str) else asked
    for entry in entries or ():
        if not any(name == entry or name.endswith("." + entry) for name in modules):
            raise AdapterError(
                f"exclude_modules {entry!r} matched no module of {type(model).__name__}."
                f"{did_you_mean(entry, last_parts)}"
            )
        found = matching_names(model, [entry])
        if _blocks(model, found) == found:
            raise AdapterError(
                f"exclude_modules {entry!r} names blocks, and none of the layers in them. Name these layers, or give "
                f"an expression for the whole names: r'.*{re.escape(entry)}\\..*'."
            )
    return None if entries is None else list(entries)


def check_patterns(setting: str, patterns: Iterable[str], targets: Sequence[str]) -> None:
    """Refuse a key of rank_pattern or alpha_pattern (``setting``) that matches none of the layers ``targets``.

    Raises:
        AdapterError: the key has no effect, or is no regular expression.
    """
    for pattern in patterns:
        _compiled(setting, pattern)
        # PEFT matches in this way.
        whole = re.compile(rf"(.*\.)?({pattern})$")
        if not any(whole.match(name) for name in targets):
            names = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in targets))
            raise AdapterError(
                f"{setting} {pattern!r} matched no layer that gets an adapter. These are: {', '.join(names)}."
                f"{did_you_mean(pattern, names)}"
            )


def _compiled(setting: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise AdapterError(f"{setting} {expression!r} is no regular expression: {error}.") from None


def _blocks(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return those of ``names`` that are no layers but hold some."""
    from torch import nn

    def is_block(module: nn.Module) -> bool:
        # Below an adapter a layer is what it was.
        is_layer = isinstance(module, nn.Linear) or hasattr(module, "base_layer") or hasattr(module, "original_module")
        holds_weights = any(True for _ in module.parameters(recurse=False))
        return not is_layer and not holds_weights and any(True for _ in module.children())

    return [name for name in names if is_block(model.get_submodule(name))]


def _refuse_blocks(model: nn.Module, asked: str, targets: Sequence[str] | str, existing: list[str]) -> None:
    blocks = _blocks(model, matching_names(model, targets))
    if blocks:
        kind = type(model.get_submodule(blocks[0])).__name__
        raise AdapterError(
            f"target_modules {asked!r} matches {blocks[0] or 'the model itself'} ({kind}), which is no layer but holds "
            f"some. Linear layers are: {', '.join(existing)}."
        )


def _checked_expression(model: nn.Module, expression: str, existing: list[str]) -> list[str] | str:
    if expression in existing:
        return [expression]
    pattern = _compiled("target_modules", expression)
    if not any(pattern.fullmatch(name) for name, _ in model.named_modules()):
        raise AdapterError(
            f"target_modules {expression!r} matched no layer of {type(model).__name__} (the expression must match the "
            f"whole name, for example r'.*\\.q_proj'). Linear layers are: {', '.join(existing)}."
            f"{did_you_mean(expression, existing)}"
        )
    return expression
