"""What makes a run the same run: data, model and settings as short comparable values."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.models.load import facts_of

if TYPE_CHECKING:
    from tunesmith.training.config import SFTConfig

__all__ = ["FREE", "model_fingerprint", "settings_fingerprint"]

FREE = (
    "output_dir", "logging_dir", "run_name", "report_to", "logging_steps", "logging_strategy", "logging_first_step",
    "save_total_limit", "disable_tqdm", "log_level", "log_level_replica", "resume_from_checkpoint", "project",
    "dataloader_pin_memory", "local_rank", "ddp_timeout", "hub_token", "max_seq_length", "warmup_ratio", "eval_split",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "hub_model_id", "push_to_hub",
    "restore_callback_states_from_checkpoint", "dataset_num_proc",
    # Named otherwise by another version of transformers, and nothing is computed otherwise with it.
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs",
)  # fmt: skip
"""Settings that change neither weights nor order: a run may be resumed with other values of these."""

_SAMPLE = 1024


def model_fingerprint(model: Any) -> dict[str, Any]:
    """Return name-free facts of a model: dtype, adapter arguments, and a hash of a sample of every frozen weight."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        if not parameter.requires_grad:
            flat = parameter.detach().view(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE]
            digest.update(sample.to("cpu", torch.float32).numpy().tobytes())
    facts = facts_of(model)
    adapter = {} if facts.adapter is None else {f"adapter.{key}": _plain(value) for key, value in facts.adapter.items()}
    own = {"weights": digest.hexdigest(), "dtype": facts.dtype.name, "checkpointing": facts.checkpointing}
    # No weight tells how positions are turned.
    stretch = {} if facts.stretch is None else {"rope_scaling": _plain(facts.stretch.scaling),
                                                "rope_window": facts.stretch.window}  # fmt: skip
    return {**own, **stretch, **adapter}


def settings_fingerprint(config: SFTConfig, processes: int) -> dict[str, Any]:
    """Return the settings that decide weights and order, as JSON values."""
    values = {name: _plain(value) for name, value in config.to_dict().items() if name not in FREE}
    return {**values, "processes": processes}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
