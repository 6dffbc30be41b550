"""From a trainer to a memory plan: the documents of its micro-batches, the memory there is, and the plan in effect."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.core.memory import available_bytes, peak_bytes, resident_bytes, trim_heap
from tunesmith.data.parts import split_batch
from tunesmith.engine.install import engine_of
from tunesmith.engine.policies import Policy
from tunesmith.engine.vision import VisionHead
from tunesmith.memory import Probe, TrainingPlan, Work, plan_training, probe_step, shape_of
from tunesmith.memory.plan import unpredicted_plan
from tunesmith.models.load import facts_of
from tunesmith.training.loader import DocumentBatches

if TYPE_CHECKING:
    from tunesmith.training.sft import SFTTrainer

__all__ = ["apply_plan", "memory_there_is", "plan_run", "probe_run", "state_bytes", "work_of"]

_EPOCHS_LOOKED_AT = 3
_AXIS = 64  # whole micro-batches are rounded up to it (training/loader.py)
# Optimizers that do not keep two moments of every parameter, by a part of their name.
_MOMENTS = {"ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1}


def state_bytes(optim: Any) -> int:
    """Return the bytes of optimizer state for one trained float32 parameter."""
    name = str(getattr(optim, "value", optim))
    if name in ("sgd", "adafactor"):
        return 0 if name == "sgd" else 1  # of a matrix Adafactor keeps sums of rows and columns
    moments = next((count for part, count in _MOMENTS.items() if part in name), 2)
    return moments if "8bit" in name else moments // 2 if "4bit" in name else 4 * moments


def work_of(dataset: Any, eval_dataset: Any, args: Any, *, multiple: int) -> Work:
    """Return the documents of the micro-batches of the first epochs that the run comes to, and of an evaluation."""
    most = args.max_steps * args.gradient_accumulation_steps
    items, lengths = _items(dataset)
    order = DocumentBatches(
        len(items),
        args.per_device_train_batch_size,
        shuffle=True,
        seed=args.seed if args.data_seed is None else args.data_seed,
        rank=args.process_index,
        processes=args.world_size,
    )
    batches: list[list[tuple[int, int]]] = []
    whole, padded = 1, (1, 1)
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        epochs = args.max_steps / np.ceil(len(order) / args.gradient_accumulation_steps)
    for epoch in range(max(1, min(_EPOCHS_LOOKED_AT, int(np.ceil(epochs))))):
        order.set_epoch(epoch)
        for indices in order:
            if 0 < most <= len(batches):
                break
            chosen = [index for index in indices if index >= 0]
            if not chosen:
                continue
            batches.append([document for index in chosen for document in items[index]])
            sizes = [length for index in chosen for length in lengths[index]]
            whole = max(whole, sum(sizes))
            padded = max(padded, (len(sizes), max(sizes)), key=lambda shape: shape[0] * shape[1])
    evaluated: list[list[tuple[int, int]]] = []
    if eval_dataset is not None:
        others, _ = _items(eval_dataset)
        size = args.per_device_eval_batch_size
        for start in range(0, len(others), size):
            evaluated.append([document for item in others[start : start + size] for document in item])
    return Work(
        batches=batches,
        evaluated=evaluated,
        whole=-(-whole // _AXIS) * _AXIS,
        multiple=multiple,
        padded=padded,
    )


def memory_there_is(device: Any) -> int:
    """Return the bytes that a run in this process may have, what it holds already included."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused + torch.cuda.memory_allocated(device)
    # Each of several processes that torchrun starts on this machine needs as much as the others.
    return available_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + resident_bytes()


def plan_run(trainer: SFTTrainer) -> TrainingPlan:
    """Plan the run of a trainer with what its process holds now; what images need is not predicted yet."""
    import torch

    args, model = trainer.args, trainer.model
    if isinstance(trainer.head, VisionHead):
        mode = facts_of(model).checkpointing
        return unpredicted_plan(mode, "what images need is not predicted yet")
    on_gpu = args.device.type == "cuda"
    trim_heap()  # what loading freed is no part of what the run needs
    work = work_of(trainer.train_dataset, trainer.eval_dataset, args, multiple=trainer.axis_multiple)
    return plan_training(
        shape_of(model, kind=args.device.type),
        work,
        mode=facts_of(model).checkpointing,
        memory=memory_there_is(args.device),
        present=torch.cuda.memory_allocated(args.device) if on_gpu else resident_bytes(),
        peak_so_far=0 if on_gpu else peak_bytes(),
        state_bytes=state_bytes(args.optim),
        splits=trainer.head.joins_documents,
        lanes=trainer.lanes,
    )


def apply_plan(model: Any, plan: TrainingPlan) -> None:
    """Let the engine keep what a plan says; policies only where its mode leaves them to the plan."""
    engine = engine_of(model)
    if engine is not None:
        engine.dense.clear()
        engine.dense.count = plan.dense
    is_open = plan.mode in ("unsloth", "auto") or isinstance(plan.mode, Policy)
    if engine is not None and is_open and len(plan.policies) == len(engine.policies):
        engine.set_policy(plan.policies)


def probe_run(trainer: SFTTrainer) -> Probe:
    """Run forward and backward of the longest micro-batch of a trainer, and leave no trace."""
    loader, lengths = trainer.get_train_dataloader(), trainer.train_dataset.lengths
    longest = max(loader.batch_sampler, key=lambda batch: sum(lengths[index] for index in batch if index >= 0))
    batch = loader.collate_fn([loader.dataset[index] for index in longest])
    cut = trainer.part_tokens
    parts = split_batch(batch, cut, multiple=trainer.axis_multiple) if cut else [batch]
    divisor = float(max(1, sum(len(part["rows"]) for part in parts)))

    def backward() -> None:
        for part in parts:
            trainer._part_step(trainer.model, part, divisor)

    try:
        return probe_step(trainer.model, backward, batch["tokens"])
    finally:
        trainer._lanes.close()


def _items(dataset: Any) -> tuple[list[list[tuple[int, int]]], list[list[int]]]:
    """Return the documents of every item of a dataset as (tokens up to the last trained one, trained), and lengths."""
    sizes = [_size(document) for document in dataset.documents]
    bins: Sequence[Sequence[int]] = getattr(dataset, "bins", None) or [[index] for index in range(len(sizes))]
    lengths = [[len(dataset.documents[member]) for member in members] for members in bins]
    return [[sizes[member] for member in members] for members in bins], lengths


def _size(document: Any) -> tuple[int, int]:
    trained = np.flatnonzero(document.trained)
    trained = trained[trained > 0]
    return (int(trained[-1]) + 1, len(trained)) if len(trained) else (1, 0)
