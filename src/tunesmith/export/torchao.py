"""Real quantization by torchao: a folder that transformers loads again, with the numbers that were trained.

``save_torchao`` writes the weights, adapters merged, as a plain model beside the target, lets transformers quantize
them while it loads that, saves the result and loads it once more. For a model that was trained for the scheme
(``models/qat.py``) every weight must come back as what it was rounded to in training, bit for bit. Losses are compared
too, but less strictly: where activations are rounded to int8, the last bit of a sum can become a step, and the steps of
thirty layers add up. ``export_torchao`` also loads the folder in a process of its own and compares distributions.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.core.errors import ExportError, ModelError, SettingsError
from tunesmith.core.files import require_new, require_space, whole_folder
from tunesmith.engine.attention import ATTENTION, use_document_attention
from tunesmith.engine.lora import merged_weight
from tunesmith.engine.modes import evaluation_mode
from tunesmith.export.card import About
from tunesmith.export.report import ExportReport, write_report
from tunesmith.export.verify import compare, reference_of
from tunesmith.export.weights import adapter_shares, merged_weights
from tunesmith.models.load import facts_of
from tunesmith.models.prompts import set_ends
from tunesmith.models.qat import SCHEMES, Scheme, conversion_fails, scheme_of
from tunesmith.models.whole import decoder_linears

__all__ = ["TORCHAO_METHODS", "export_torchao", "save_torchao", "why_not"]

TORCHAO_METHODS = {f"torchao-{name}": name for name in SCHEMES}
"""Method of export -> the scheme."""

TRAINED_BAR, UNTRAINED_BAR = 0.01, 1.0
"""Mean KL divergence in nats above which an export has failed: of a model that was trained for its scheme, and not."""

_log = logging.getLogger(__name__)
_NOTHING = About()
_TOLERANCE = 1e-2  # of a loss


def save_torchao(model: Any, save_directory: str | Path, tokenizer: Any = None, torchao_config: Any = None) -> float:
    """Quantize ``model`` for real, save it to ``save_directory`` and return by how much that changed its loss.

    Args:
        model: trained for a scheme; or any other with weights in 16 or 32 bits, for which ``torchao_config`` is needed.
        tokenizer: saved beside it.
        torchao_config: a name of ``models/qat.py`` or a config of torchao; None: what the model was trained for.
    Raises:
        SettingsError: no scheme, or another one than that which the model was trained for.
        ModelError: the weights are quantized already, or this machine cannot quantize in this way.
        ExportError: what was saved for a model that was trained for the scheme is not what was trained.
        OutputError: the disk is full, or the folder cannot be written.
    """
    scheme, folder = _chosen(model, torchao_config), Path(save_directory).expanduser()
    _require_machine(model, scheme)
    with whole_folder(folder) as temporary:
        return _write(model, temporary, tokenizer, scheme)


def export_torchao(
    model: Any,
    folder: Path,
    tokenizer: Any = None,
    torchao_config: Any = None,
    *,
    prompts: Sequence[Any] = (),
    about: About = _NOTHING,
) -> ExportReport:
    """Do what :func:`save_torchao` does, load the folder in another process and compare it with the live model.

    Args: as there; ``prompts`` and ``about`` as in :func:`tunesmith.export.merge.merge_model`.
    Raises: as there, and:
        OutputError: the folder is there already.
        ExportError: the export differs too much from the live model; it is kept as ``<folder>-failed``.
    """
    require_new(folder)
    start, scheme = time.perf_counter(), _chosen(model, torchao_config)
    _require_machine(model, scheme)
    reference = reference_of(model, tokenizer, prompts)
    bar = UNTRAINED_BAR if facts_of(model).qat is None else TRAINED_BAR
    with whole_folder(folder) as temporary:
        _write(model, temporary, tokenizer, scheme)
        found = {"base": compare(reference, temporary)}
        size = sum(file.stat().st_size for file in temporary.glob("*.safetensors"))
        report = ExportReport(folder, f"torchao-{scheme.name}", "base", size, scheme.name, time.perf_counter() - start,
                              found, reference.moved)  # fmt: skip
        write_report(report, temporary, bar + reference.rounding, base=facts_of(model).name, about=about)
    return report


def _require_machine(model: Any, scheme: Scheme) -> None:
    reason = why_not(model, scheme)
    if reason is not None:
        raise ModelError(reason)


def _write(model: Any, temporary: Path, tokenizer: Any, scheme: Scheme) -> float:
    """Write the quantized model into ``temporary`` and return by how much that changed its loss."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    dtype = facts_of(model).dtype.dtype
    set_ends(base, tokenizer)
    weights = {
        weight.name: weight.make().to(dtype) if weight.is_float else weight.make()
        for weight in merged_weights(model, adapter_shares(model, None))
    }
    size = sum(value.nbytes for value in weights.values())
    require_space(temporary, 2 * size, "the weights and what torchao makes of them")
    plain = temporary / ".plain"
    base.save_pretrained(plain, state_dict=weights)
    del weights
    # Both on the device that trained: some schemes run on a GPU alone, and another device rounds in other places.
    device = next(layer.weight.device for _, layer in decoder_linears(base))
    _quantize(plain, temporary, scheme, device)
    shutil.rmtree(plain)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    stored = _load(temporary, base.config._attn_implementation, device)
    live_loss, stored_loss = _loss(base), _loss(stored)
    if facts_of(model).qat is not None:
        _refuse_difference(base, stored, live_loss, stored_loss)
    _log.info("%s: loss on a probe %.4f, quantized %.4f", scheme, live_loss, stored_loss)
    return stored_loss - live_loss


def why_not(model: Any, scheme: Scheme) -> str | None:
    """Return the sentence that says why this machine cannot quantize ``model`` for ``scheme``, or None."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    widths = {layer.in_features for _, layer in decoder_linears(base)}
    reason = conversion_fails(scheme, widths, facts_of(model).dtype.dtype)
    return None if reason is None else f"{reason}. Save the model as it is and convert it there."


def _chosen(model: Any, asked: Any) -> Scheme:
    facts = facts_of(model)
    stored = facts.width or facts.trained_in
    if stored is not None:
        raise ModelError(
            f"the weights of this model are rounded to {stored} already. Train in 16 bits with qat_scheme."
        )
    if asked is None and facts.qat is None:
        raise SettingsError("torchao_config is missing: the model was not trained for a scheme. Name one: int8-int4.")
    if asked is None:
        return facts.qat
    scheme = scheme_of(asked)
    if facts.qat is not None and scheme != facts.qat:
        raise SettingsError(
            f"torchao_config is {scheme.name}, and the model was trained for {facts.qat.name}. Leave it out."
        )
    return scheme


def _quantize(source: Path, target: Path, scheme: Scheme, device: torch.device) -> None:
    """Load the plain model in ``source`` through torchao on ``device`` and save it to ``target``."""
    from transformers import AutoModelForCausalLM, TorchAoConfig

    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=TorchAoConfig(scheme.config), device_map={"": str(device)}
    )
    model.save_pretrained(target)


def _load(folder: Path, attention: str, device: torch.device) -> Any:
    """Return the saved model on ``device``; with the live one's ``attention``, lest it add in another order."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": str(device)})
    if attention == ATTENTION:
        use_document_attention(model)
    return model


@torch.no_grad()
def _refuse_difference(live: Any, stored: Any, live_loss: float, stored_loss: float) -> None:
    """Compare every weight with what it was rounded to in training, and the losses."""
    layers = {name.removesuffix(".base_layer"): layer for name, layer in decoder_linears(live)}
    adapted = dict(live.named_modules())
    for name, layer in decoder_linears(stored):
        own, holder = layers[name], adapted[name]
        weight = own.weight if holder is own else merged_weight(holder)
        if not torch.equal(own.weight_fake_quantizer(weight), layer.weight.dequantize().to(weight.dtype)):
            raise ExportError(
                f"the weight {name} was saved as other numbers than it was trained to be. It is not kept."
            )
    if not abs(stored_loss - live_loss) <= _TOLERANCE * live_loss:
        raise ExportError(
            f"the quantized model has the loss {stored_loss:.4f} on a probe, and the one that was trained "
            f"{live_loss:.4f}. It is not kept."
        )


@torch.no_grad()
def _loss(model: Any) -> float:
    """Return the loss of ``model`` on a few tokens, the same in every call."""
    embedding = model.get_input_embeddings().weight
    ids = ((torch.arange(128, device=embedding.device) * 7919 + 11) % embedding.shape[0]).view(4, 32)
    with evaluation_mode(model):
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss)
