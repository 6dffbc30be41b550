"""One process of a distributed run: torchrun starts several of it, or a test forks them.

python -m tests.e2e._worker FOLDER equal|endless|poisoned
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

EQUAL: dict[str, Any] = {
    "rows": 22, "optim": "sgd", "learning_rate": 0.01, "max_grad_norm": 0.0, "num_train_epochs": 2,
    "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant", "save_steps": 3,
}  # fmt: skip
"""22 rows by 8: the last step of an epoch has 6, so that one process gets fewer rows than the other."""


class PoisonOneProcess(TrainerCallback):
    """After two steps, the frozen base of process 1 computes NaN."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 2 and args.process_index == 1:
            model.get_input_embeddings().weight.data.fill_(float("nan"))


def forked(folder: Path, kind: str, environment: dict[str, str]) -> None:
    """Be a process that torchrun would have started."""
    os.environ.update(environment)
    main(folder, kind)


def main(folder: Path, kind: str) -> None:
    """Train as asked and leave gradients, losses and the adapter in the folder."""
    import torch
    from tests import tiny
    from tests.training import support
    from tests.training.test_equality import GradientRecorder

    torch.set_num_threads(1)
    plain = torch.distributed.barrier

    def barrier(*group: Any, device_ids: Any = None, **how: Any) -> Any:
        """Wait as on a machine with one GPU, where naming that of process 1 fails though the run is on the CPU."""
        assert not device_ids or device_ids[0] == 0, "invalid device ordinal"
        return plain(*group, **how)

    torch.distributed.barrier = barrier
    rank = os.environ["RANK"]
    recorder = GradientRecorder()
    settings = EQUAL if kind == "equal" else {"rows": 40, "max_steps": 100_000, "save_strategy": "no"}
    if kind == "poisoned":
        settings["callbacks"] = [PoisonOneProcess()]
    evaluation = tiny.chat_rows(5, seed=9) if kind == "equal" else None
    trainer = support.trainer(
        folder / "run",
        per_device_train_batch_size=2,
        eval_dataset=evaluation,
        **{**settings, "callbacks": [recorder, *settings.get("callbacks", ())]},
    )
    tokens = [sum(len(batch["rows"]) for batch in trainer.get_train_dataloader())]
    trainer.train()
    result = {
        "gradients": recorder.steps,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "eval": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "weights": support.trainable(trainer.model),
        "tokens": tokens[0],
    }
    torch.save(result, folder / f"result-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
