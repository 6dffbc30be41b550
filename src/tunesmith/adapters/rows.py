"""Starts of an adapter that look at rows of data first: EVA, CorDA and LoRA-GA.

* EVA (Paischer et al. 2024, arXiv:2410.07170): A holds the R leading principal directions of what goes into a layer, B
  is zero, the base stays. Each layer keeps the rank that was asked for: ranks are not moved between layers.
* CorDA (Yang et al. 2024, arXiv:2406.05223): with C the mean of x x' over the inputs x, W C = U S V', B A = U S V' C^-1
  for the R largest directions, which are taken out of the base.
* LoRA-GA (Wang et al. 2024, arXiv:2407.05000): A and B are singular directions of the gradient of the loss, and are
  taken out of the base; as PEFT computes it.

The rows run through the model once, documents joined to batches of about a thousand tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import AdapterError
from tunesmith.data.collate import DocumentCollator
from tunesmith.data.masks import ExampleEncoder
from tunesmith.data.prepare import DocumentDataset, PreparedData, prepare
from tunesmith.data.types import TrainOn
from tunesmith.engine.host import compute_device
from tunesmith.engine.install import engine_of
from tunesmith.engine.modes import evaluation_mode
from tunesmith.models.load import facts_of

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

__all__ = ["MOST_ROWS", "as_rows", "check_sizes", "look_before", "start_eva"]

MOST_ROWS = 256
"""So many rows are looked at: in CorDA's paper more made no difference."""

_BATCH = 1024


def as_rows(
    model: Any, source: Any, *, mapping: Mapping[str, str] | None = None, train_on: TrainOn | None = None
) -> PreparedData:
    """Return ``source`` (anything that a trainer takes) as documents, encoded for ``model``; 256 rows at most.

    Raises:
        AdapterError: the tokenizer of the model is not known.
        DataError: the source cannot be read, or trains on nothing.
    """
    if isinstance(source, PreparedData):
        return source
    facts = facts_of(model)
    if facts.tokenizer is None:
        raise AdapterError(
            "init_data cannot be encoded: this model came without its tokenizer. Load it with "
            "FastLanguageModel.from_pretrained, or give rows that tunesmith.data.prepare has encoded."
        )
    encoder = ExampleEncoder(facts.tokenizer, train_on=train_on)
    rows = prepare(source, encoder, max_length=facts.window, on_too_long="truncate", mapping=mapping, limit=MOST_ROWS)
    rows.ledger.check()
    return rows


def look_before(model: Any, config: LoraConfig, rows: PreparedData, targets: Mapping[str, int]) -> None:
    """Leave on the layers of ``model`` what PEFT starts CorDA or LoRA-GA from.

    ``targets`` are the names of the layers that get an adapter, with their ranks.

    Raises:
        AdapterError: no gradient reached a layer.
    """
    layers = {name: model.get_submodule(name) for name in targets}
    if config.init_lora_weights == "lora_ga":
        _keep_gradients(model, config, layers, rows)
    else:
        _keep_directions(model, layers, targets, rows)


def start_eva(model: Any, rows: PreparedData) -> None:
    """Start the A of every adapted layer of ``model`` as EVA does; B stays zero.

    Raises:
        AdapterError: a layer is too small for its rank, or there are fewer tokens than that.
    """
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.utils.incremental_pca import IncrementalPCA

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    ranks = {name: layer.r["default"] for name, layer in layers.items()}
    check_sizes({name: layer.get_base_layer() for name, layer in layers.items()}, ranks, "eva")
    found = {name: IncrementalPCA(n_components=rank) for name, rank in ranks.items()}
    with _watched(layers, lambda name, x: found[name].partial_fit(x.float())):
        _run(model, rows, least=max(ranks.values()))
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A["default"].weight.copy_(found[name].components_)


def _keep_directions(model: Any, layers: Mapping[str, Any], ranks: Mapping[str, int], rows: PreparedData) -> None:
    """What PEFT's ``preprocess_corda`` leaves for its ``corda_init``; its own needs a package more."""
    import torch

    sums: dict[str, torch.Tensor] = {}
    tokens = dict.fromkeys(layers, 0)

    def add(name: str, x: torch.Tensor) -> None:
        tokens[name] += len(x)
        product = x.float().T @ x.float()
        sums[name] = sums[name] + product if name in sums else product

    with _watched(layers, add):
        _run(model, rows)
    for name, layer in layers.items():
        weight, rank = layer.weight.detach().double(), ranks[name]
        moments = sums.pop(name).double() / tokens[name]
        # Inputs that never differ in a direction leave C without an inverse there.
        moments.diagonal().add_(0.01 * moments.diagonal().mean())
        u, s, v = torch.linalg.svd(weight @ moments, full_matrices=False)
        right = torch.linalg.solve(moments, v[:rank].T)  # C is symmetric: (V' C^-1)' = C^-1 V
        parts = {"U_WC": u[:, :rank], "S_WC": s[:rank], "V_WC": right}
        layer.eigens = SimpleNamespace(**{key: value.float().contiguous() for key, value in parts.items()})


def _keep_gradients(model: Any, config: LoraConfig, layers: Mapping[str, Any], rows: PreparedData) -> None:
    import torch
    from peft.tuners.lora.loraga import preprocess_loraga

    def step() -> None:
        for batch in _batches(model, rows, 1):
            logits = _forward(model, batch)[0, batch["rows"]]
            torch.nn.functional.cross_entropy(logits.float(), batch["targets"]).backward()

    with _quiet(model):
        preprocess_loraga(model, config, step)
    missing = [name for name, layer in layers.items() if not hasattr(layer, "_peft_loraga_grad")]
    if missing:
        raise AdapterError(f"init_lora_weights='lora_ga': no gradient reached {missing[0]}. Leave it out.")


def check_sizes(layers: Mapping[str, Any], ranks: Mapping[str, int], start: str) -> None:
    """Refuse a rank above the directions that a layer has: A and B would be smaller than their config says.

    Raises:
        AdapterError: naming the layer.
    """
    times = 2 if start == "lora_ga" else 1
    for name, layer in layers.items():
        if times * ranks[name] > min(layer.in_features, layer.out_features):
            raise AdapterError(
                f"init_lora_weights={start!r} takes {times * ranks[name]} directions of {name} at rank {ranks[name]}, "
                f"which has {min(layer.in_features, layer.out_features)}. Give a lower r, or another start."
            )


@contextmanager
def _watched(layers: Mapping[str, Any], look: Callable[[str, torch.Tensor], Any]) -> Iterator[None]:
    """Show ``look`` the inputs (T, D) of every layer for the block."""

    def hook(name: str) -> Callable[..., None]:
        def see(module: Any, inputs: Any, output: Any) -> None:
            look(name, inputs[0].detach().flatten(0, -2))

        return see

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _quiet(model: Any) -> Iterator[None]:
    """What ran as modules because it was watched is no news about the run."""
    engine = engine_of(model.get_base_model() if hasattr(model, "get_base_model") else model)
    notes = [] if engine is None else list(engine.notes)
    try:
        yield
    finally:
        if engine is not None:
            engine.notes[:] = notes


def _run(model: Any, rows: PreparedData, *, least: int = 1) -> None:
    import torch

    with torch.no_grad(), evaluation_mode(model), _quiet(model):
        for batch in _batches(model, rows, least):
            _forward(model, batch)


def _forward(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


def _batches(model: Any, rows: PreparedData, least: int) -> Iterator[dict[str, Any]]:
    """Yield the documents of ``rows`` in batches of about ``_BATCH`` tokens, none with fewer than ``least``."""
    groups: list[list[Any]] = [[]]
    for feature in DocumentDataset(rows.documents):
        if sum(len(other["input_ids"]) for other in groups[-1]) >= max(_BATCH, least):
            groups.append([])
        groups[-1].append(feature)
    last = sum(len(feature["input_ids"]) for feature in groups[-1])
    if last < least and len(groups) > 1:
        groups[-2:] = [groups[-2] + groups[-1]]
    elif last < least:
        raise AdapterError(f"init_data has {last} tokens, and a rank of {least} needs as many. Give more rows.")
    device = compute_device(model)
    for group in groups:
        yield {
            key: value.to(device) if hasattr(value, "to") else value for key, value in DocumentCollator()(group).items()
        }
