"""What a run would need, before any weight is loaded: settings and data as they are, the model as shapes only.

Used by ``tunesmith plan``. Base and stored dtypes come from config.json and the headers of the weight files, lengths
from the real rows through the real tokenizer.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.adapters.inject import (
    continue_adapter,
    inject_adapter,
    train_all_weights,
    trainable_share,
)
from tunesmith.adapters.model import base_bytes_beside
from tunesmith.adapters.settings import AdapterSettings
from tunesmith.adapters.state import empty_source, load_source_tokenizer
from tunesmith.core.device import choose_device
from tunesmith.core.files import free_bytes
from tunesmith.core.memory import resident_bytes
from tunesmith.data.ledger import Ledger
from tunesmith.data.prepare import DocumentDataset, PackedDataset
from tunesmith.memory import MemoryShape, Probe, TrainingPlan, Work, plan_training, shape_of
from tunesmith.memory.estimate import present_when_loaded
from tunesmith.models.load import facts_of, stored_bytes
from tunesmith.models.qat import refuse_other_scheme
from tunesmith.models.settings import Width
from tunesmith.training.checkpoint import checkpoint_bytes
from tunesmith.training.config import SFTConfig, config_of
from tunesmith.training.graphs import GraphChoice, graphs_there
from tunesmith.training.lanes import lanes_there
from tunesmith.training.loading import source_arguments, source_window
from tunesmith.training.memory import memory_there_is, probe_run, state_bytes, work_of
from tunesmith.training.plan import choose_cadence
from tunesmith.training.settings import RunSettings

__all__ = ["Preview", "converted_bytes", "preview", "probe_settings"]

_STORED = {2: {"BF16", "F16"}, 4: {"F32"}, 8: {"F64"}}


@dataclass(frozen=True, slots=True)
class Preview:
    """What a run would need.

    Attributes:
        shape, work, plan: model, data and the choice.
        memory: bytes that were planned for.
        tokens_an_epoch: of the training documents.
        disk: name -> bytes that the run writes.
        disk_free: on the disk of its folder.
        stored: bytes of the weight files by dtype; empty where none is here.
        graphs: which parts are computed from CUDA graphs; None where there is no GPU.
    """

    shape: MemoryShape
    work: Work
    plan: TrainingPlan
    memory: int
    ledger: Ledger
    tokens_an_epoch: int
    disk: dict[str, int]
    disk_free: int
    dtype: str
    stored: dict[str, int]
    graphs: GraphChoice | None


def preview(settings: RunSettings, *, memory: int | None = None) -> Preview:
    """Plan the run of ``settings`` for ``memory`` bytes, or for what this machine has free.

    Raises:
        TunesmithError: what ``train`` would refuse before it loads weights.
    """
    from tunesmith.training.run import prepare_data

    device = choose_device()
    tokenizer, window = load_source_tokenizer(
        settings.model, chat_template=settings.chat_template, **source_window(settings)
    )
    train_data, eval_data = prepare_data(settings, tokenizer, window)
    model, source = empty_source(settings.model, **source_arguments(settings))
    wanted: AdapterSettings = settings.part(AdapterSettings)
    if settings.full_finetuning:
        mode, scheme = settings.use_gradient_checkpointing, settings.qat_scheme
        train_all_weights(model, mode, width=settings.width, qat_scheme=scheme)
    elif facts_of(model).adapter is None:
        model = inject_adapter(model, wanted, qat_scheme=settings.qat_scheme)
    else:
        refuse_other_scheme(model, settings.qat_scheme)
        continue_adapter(model, wanted, settings.model_fields_set)
    folder = Path(settings.output_dir).expanduser() if settings.output_dir else Path("runs/plan")
    args = config_of(settings, folder)
    dataset: Any = DocumentDataset(train_data.documents)
    if args.packing:
        dataset = PackedDataset(train_data.documents, settings.max_length or window)
    evaluated = None if eval_data is None else DocumentDataset(eval_data.documents)
    facts = facts_of(model)
    itemsize, stored = facts.dtype.dtype.itemsize, stored_bytes(source)
    beside = converted_bytes(stored, itemsize, device.type, facts.width)
    shape = shape_of(model, kind=device.type, load_bytes=beside)
    work = work_of(dataset, evaluated, args, multiple=1 if itemsize > 2 else 64)
    there_is = memory_there_is(device) if memory is None else memory
    plan = plan_training(
        shape,
        work,
        mode=settings.use_gradient_checkpointing,
        memory=there_is,
        present=present_when_loaded(shape, resident_bytes()),
        state_bytes=state_bytes(args.optim),
        lanes=lanes_there(model, args),
    )
    steps = choose_cadence(args, len(dataset), has_eval=evaluated is not None)
    kept = _checkpoints_kept(args, steps, settings.save_total_limit)
    disk = {
        f"checkpoints ({kept} at most, {'the newest and the best' if settings.save_total_limit else 'all are kept'})":
            kept * checkpoint_bytes(model),
        "model" if settings.full_finetuning else "adapter": shape.trained_bytes,
    }  # fmt: skip
    if base_bytes_beside(model):
        disk["base beside the adapter"] = base_bytes_beside(model)
    if not settings.full_finetuning:
        disk["merged in 16 bit, where asked for"] = 2 * trainable_share(model)[1]
    return Preview(
        shape=shape,
        work=work,
        plan=plan,
        memory=there_is,
        ledger=train_data.ledger,
        tokens_an_epoch=sum(map(len, train_data.documents)),
        disk=disk,
        disk_free=free_bytes(folder),
        dtype=facts_of(model).dtype.name,
        stored=stored,
        graphs=graphs_there(model, args, plan) if device.type == "cuda" else None,
    )


def _checkpoints_kept(args: SFTConfig, steps: int, limit: int | None) -> int:
    """Return the most checkpoints that a run of ``steps`` has at a time: the best one comes on top of ``limit``."""
    cadences = [args.save_steps, *([args.eval_steps] if args.load_best_model_at_end else [])]
    written = {steps, *(step for every in cadences for step in range(int(every), steps, int(every)))}
    return len(written) if limit is None else min(len(written), limit + 1)


def converted_bytes(stored: dict[str, int], itemsize: int, kind: str, width: Width | None = None) -> int:
    """Return the bytes of weight files that stand beside the weights while these are made in another dtype on a CPU.

    Those that are quantized to a ``width`` leave their files one by one.
    """
    same = _STORED.get(itemsize, ())
    is_kept = kind != "cpu" or width is not None
    return 0 if is_kept else sum(size for dtype, size in stored.items() if dtype not in same)


def probe_settings(settings: RunSettings, plan: TrainingPlan) -> Probe:
    """Load the model and measure one forward and backward of the longest batch under ``plan``."""
    from tunesmith.training.run import make_trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(settings, Path(folder) / "run")[0]
        trainer.follow(plan)
        return probe_run(trainer)
