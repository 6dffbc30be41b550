"""A process that trains and is killed.

    python -m tests.training._victim

Importing torch and transformers takes seconds, a training run of a tiny model takes one: so this process imports
everything once, then forks a child for every order that it reads, and the child is what trains and really dies. An
order is a line of JSON on standard input::

    {"folder": "...", "model": "tiny", "resume": false, "kill": {"after_s": 0.4}}
    {"folder": "...", "model": "tiny", "resume": true, "kill": {"in_checkpoint": 3, "after_s": 0.01}}

``kill`` is when SIGKILL (or ``"signal"``) is sent: so many seconds after the child was forked, or after the so-maniest
partial checkpoint folder appeared. The answer is a line of JSON: {"status": ..., "seconds": ..., "partial": ...} with
the exit status (negative: the signal) and whether a half written checkpoint was left behind. The child's output goes
to ``<folder>.log``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

STEPS = 30


def tiny_run(folder: str) -> Any:
    """Return a trainer with everything that draws random numbers or keeps state: dropout, noise, evaluation, epochs."""
    from tests import tiny
    from tests.training import support

    return support.trainer(
        folder,
        rows=40,
        model=support.adapted("llama", lora_dropout=0.2, use_gradient_checkpointing=True),
        eval_dataset=tiny.chat_rows(6, seed=1),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        learning_rate=3e-3,
        neftune_noise_alpha=5,
        eval_steps=1,
        save_steps=1,
    )


def real_run(folder: str) -> Any:
    """Return a trainer of the real SmolLM2 on a few rows."""
    from tests import tiny

    from tunesmith import FastLanguageModel, SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained("smollm2-135m", dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=8, lora_dropout=0.1)
    args = SFTConfig(
        output_dir=folder,
        max_steps=STEPS,
        save_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    return SFTTrainer(model=model, args=args, train_dataset=tiny.chat_rows(40), processing_class=tokenizer)


RUNS = {"tiny": tiny_run, "smollm2": real_run}


def train(order: dict[str, Any]) -> None:
    """Train and leave the adapter in ``<folder>/adapter``."""
    trainer = RUNS[order["model"]](order["folder"])
    trainer.train(resume_from_checkpoint=order["resume"] or None)
    trainer.model.save_pretrained(Path(order["folder"]) / "adapter")


def main() -> None:
    """Answer orders until standard input ends."""
    import torch

    import tunesmith.training.sft  # noqa: F401

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _in_child(order)
        status = _watch(child, Path(order["folder"]), order.get("kill"))
        partial = any(Path(order["folder"]).glob(".checkpoint-*.partial-*"))
        print(json.dumps({"status": status, "seconds": time.monotonic() - began, "partial": partial}), flush=True)


def _in_child(order: dict[str, Any]) -> None:
    log = os.open(order["folder"] + ".log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        train(order)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def _watch(child: int, folder: Path, kill: dict[str, Any] | None) -> int:
    """Wait for the end of ``child``, and bring it about where ``kill`` says so."""
    if kill is not None:
        if "in_checkpoint" in kill and not _saw_partial(child, folder, kill["in_checkpoint"]):
            return _status(child)
        time.sleep(kill["after_s"])
        os.kill(child, kill.get("signal", signal.SIGKILL))
    return _status(child)


def _saw_partial(child: int, folder: Path, count: int) -> bool:
    """Return whether ``count`` different partial checkpoints were seen before ``child`` ended."""
    seen: set[str] = set()
    while len(seen) < count:
        seen |= {path.name for path in folder.glob(".checkpoint-*.partial-*")}
        # Looks without reaping: the child stays to be killed.
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
    return True


def _status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main()
