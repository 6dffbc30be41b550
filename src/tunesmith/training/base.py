"""What every trainer of ours adds to transformers' Trainer: gradients checked, logs with speed, checkpoints that hold.

* ``create_optimizer``: embedding and output head have a rate of their own where they train;
* ``training_step``: gradients summed over processes once a step, and computed again where float16 overflowed;
* ``check_gradients``: non-finite values stop the run before they reach the weights, and the first step proves that
  every lora_B learns;
* ``train``, ``_save_checkpoint``: a checkpoint is there whole or not at all and says which run it belongs to; a run
  that continues from it is bit-equal to one that was never interrupted.

A trainer says what makes a run its own in :meth:`RunTrainer.run_fingerprint`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import Trainer

from tunesmith.adapters.model import raw_weights
from tunesmith.core.errors import OutputError, SettingsError, TrainingError
from tunesmith.core.files import damage, require_space, whole_folder
from tunesmith.core.memory import peak_bytes
from tunesmith.engine.install import engine_of
from tunesmith.models.load import facts_of
from tunesmith.training.callbacks import InterruptWatch
from tunesmith.training.checkpoint import (
    RUN_FILE,
    checkpoint_at,
    checkpoint_bytes,
    checkpoints_in,
    find_checkpoint,
    record_of,
    remove_old_checkpoints,
    require_disk_space,
)
from tunesmith.training.fingerprint import model_fingerprint
from tunesmith.training.optimizer import give_embeddings_their_rate
from tunesmith.training.processes import gather_objects, naming_lost_processes, sum_gradients, wait_for_processes
from tunesmith.training.scale import LossScale, check_scalable

__all__ = ["RunTrainer"]

_log = logging.getLogger(__name__)


class RunTrainer(Trainer):
    """See the module. A subclass makes ``_interrupts`` and ``_keep`` before it calls ``Trainer.__init__``."""

    _interrupts: InterruptWatch
    _keep: int | None
    _tokens_since_log = 0
    _log_time = 0.0
    _proved_gradients = False
    _made_optimizer = False
    _found: list[tuple[str, torch.nn.Parameter]] | None = None
    _size: int | None = None
    _scale: LossScale | None = None
    _places: tuple[str, ...] = ()  # of the rows of the step in progress, to name them if it breaks
    _again: tuple[tuple[dict[str, Any], Any], ...] = ()  # its micro-batches, where it may be computed again

    def run_fingerprint(self) -> dict[str, Any]:
        """Return data, model and settings of this run as comparable values."""
        raise NotImplementedError

    def run_record(self) -> dict[str, Any]:
        """Return what a checkpoint says of its run: its fingerprint, and what a continued run takes over."""
        scale = {} if self._scale is None else {"loss_scale": self._scale.record()}
        return {**self.run_fingerprint(), **scale}

    def continue_from(self, record: dict[str, Any]) -> None:
        """Take over what the run whose checkpoint says ``record`` decided."""
        if self._scale is not None:
            self._scale.restore(record["loss_scale"])

    def backward_of(self, model: Any, inputs: dict[str, Any], divisor: Any) -> torch.Tensor:
        """Return the summed loss of a micro-batch over ``divisor``, after its backward."""
        return super().training_step(model, inputs, divisor)

    def reaches(self, name: str) -> bool:
        """Return whether the loss of the batches so far must have given the parameter ``name`` a gradient."""
        return True

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer, with a group of its own for embedding and output head where they train."""
        has_one = self.optimizer is not None and not self._made_optimizer
        optimizer, self._made_optimizer = super().create_optimizer(model), not has_one
        if has_one:
            self._refuse_left_out(optimizer)
        if has_one and self.args.embedding_learning_rate is not None:
            raise SettingsError("embedding_learning_rate beside an optimizer of your own: give it a group there.")
        if not has_one:
            give_embeddings_their_rate(optimizer, self.model, self.args.embedding_learning_rate)
            for group in optimizer.param_groups:
                if isinstance(group["lr"], float):  # torchao's is a tensor
                    group["lr"] = float(group["lr"])  # a checkpoint with a default's own type could not be read
        return optimizer

    def _refuse_left_out(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer of the user's that would leave weights as they are though they take gradients."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        left_out = [name for name, parameter in self.trainable() if id(parameter) not in held]
        if left_out:
            raise SettingsError(
                f"{len(left_out):,} weights that train are not in the optimizer ({left_out[0]}): it was made before "
                "the adapter, or of some weights only. Make it of all that train, and freeze the others."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As Trainer's, which leaves only the first of several active adapters active."""
        tuner = getattr(self.model, "base_model", None) if hasattr(self.model, "peft_config") else None
        active = list(getattr(tuner, "active_adapters", ()))
        trained = {name for name, _ in self.trainable()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if tuner is not None and list(tuner.active_adapters) != active:
            tuner.set_adapter(active)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in trained)

    def _load_best_model(self) -> None:
        """Load the weights of the best step; Trainer's own loads the first adapter's file into whichever is active."""
        if self.state.best_global_step != self.state.global_step and self.args.process_index == 0:
            _log.warning(
                "the weights are those of step %d of %d, which had the lowest eval loss (in Python "
                "load_best_model_at_end=False keeps the last)", self.state.best_global_step, self.state.global_step,
            )  # fmt: skip
        if not hasattr(self.model, "peft_config"):
            super()._load_best_model()
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """As Trainer's, whose answer decides with save_strategy="best" what is saved: also a run that Ctrl-C ends."""
        return super()._determine_best_metric(*args, **kwargs) or self._interrupts.is_stopping

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's, which takes from a checkpoint how often is logged, whatever is asked for now."""
        found = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return found

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """As Trainer's, which with eval_on_start (it skips the schedule there alone) evaluates at each resume too."""
        if skip_scheduler and self.state.global_step > 0:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)  # type: ignore[no-any-return]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, which takes a step before it looks whether a checkpoint has one left to take."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    # ---- one step ----

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Return the parameters that take gradients, by name; during a run those that took them at its start."""
        if self._found is not None:
            return self._found
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    @contextmanager
    def _walking_once(self) -> Iterator[None]:
        """Look for what trains once a run.

        The Trainer walks over all modules for every step, to count them, to clip and to set gradients to None. With a
        model of SmolLM2's shape on an H200 a step took 55 ms with these walks and takes 22 without.
        """
        model, self._found = self.model, self.trainable()

        def zero_grad(set_to_none: bool = True) -> None:
            for _, parameter in self._found or ():
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.detach_().zero_()

        model.zero_grad = zero_grad
        try:
            yield
        finally:
            del model.zero_grad
            self._found = self._size = None

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of one micro-batch; at the last one of a step, sum gradients and check them."""
        loss = self._scaled_backward(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss) and self.args.world_size == 1:
            self.stop("the loss", list(inputs.get("where", ())))
        # With several processes all must see it, or the others would wait: the summed gradient carries it to them.
        self._places += tuple(inputs.get("where", ()))
        if self._scale is not None:
            self._again += ((inputs, num_items_in_batch),)
        if self.accelerator.sync_gradients:
            self._sum_gradients(model)
            self.check_gradients(list(self._places))
            self._places, self._again = (), ()
        # The Trainer reports the mean over processes; each holds its share of one sum.
        return loss * self.args.world_size

    def _scaled_backward(self, model: Any, inputs: dict[str, Any], divisor: Any) -> torch.Tensor:
        """Return the loss of a micro-batch after a backward in which it was larger by the factor of the scale."""
        if self._scale is None:
            return self.backward_of(model, inputs, divisor)
        # A smaller divisor, since the gradient of a loss without logits is made in its forward.
        return self.backward_of(model, inputs, divisor / self._scale.factor) / self._scale.factor

    def _sum_gradients(self, model: Any) -> None:
        """Sum the gradients of a step over processes, and compute them again as long as they overflow float16."""
        weights = [parameter for _, parameter in self.trainable()]
        sum_gradients(weights, self.args.world_size)
        while self._scale is not None and not self._scale.takes([w.grad for w in weights if w.grad is not None]):
            _log.info(
                "step %d overflowed float16: again at a scale of %g", self.state.global_step + 1, self._scale.factor
            )
            for weight in weights:
                weight.grad = None
            for inputs, divisor in self._again:
                self._scaled_backward(model, inputs, divisor)
            sum_gradients(weights, self.args.world_size)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return what Trainer would count for ``inputs``, from a number of parameters that is counted once a run."""
        main = getattr(self.model, "main_input_name", "input_ids")
        if self._found is None or main not in inputs or not hasattr(self.model, "num_parameters"):
            return super().floating_point_ops(inputs)
        if self._size is None:
            self._size = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs[main].numel() * self._size

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip what trains; where FSDP or DeepSpeed look after the model it is theirs."""
        kinds = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        if self._found is None or self.accelerator.distributed_type not in kinds:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_([weight for _, weight in self._found], self.args.max_grad_norm)

    def check_gradients(self, places: list[str]) -> None:
        """Stop the run on gradients that are not finite, or missing in the first step; ``places`` name its rows."""
        grads = [(name, parameter.grad) for name, parameter in self.trainable()]
        norms = torch._foreach_norm([grad for _, grad in grads if grad is not None])
        if not torch.isfinite(torch.stack([norm.float() for norm in norms]).sum()):
            self.stop("a gradient", places)
        if not self._proved_gradients:
            reached = [(name, grad) for name, grad in grads if self.reaches(name)]
            dead = [name for name, grad in reached if "lora_B" in name and (grad is None or not grad.any())]
            if dead:
                raise TrainingError(
                    f"{len(dead)} lora_B weights got no gradient in the first step (for example {dead[0]}): the "
                    "adapter would not train. A layer is not reached by the loss; leave it out of target_modules."
                )
            self._proved_gradients = len(reached) == len(grads)

    def stop(self, what: str, places: list[str]) -> None:
        """Keep the weights of the last good step, and say which rows broke the run, where they are known."""
        self.model.zero_grad()
        saved = ""
        if self.state.global_step > 0:
            self._save_checkpoint(self.model_wrapped, None)
            saved = f" The state after step {self.state.global_step} is kept in {self._checkpoint_folder()}."
        rows = ", ".join(places[:8]) + (f" and {len(places) - 8} more" if len(places) > 8 else "")
        where, look = (f", rows {rows}", "Look at these rows, or start") if places else ("", "Start")
        if self._scale is not None:
            look = f"float16 ends at 65,504, and dtype='float32' does not. {look}"
        raise TrainingError(
            f"{what} is not finite in step {self.state.global_step + 1}{where}: the run stops before it reaches the "
            f"weights.{saved} {look} a new run with a lower learning_rate or max_grad_norm."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens per second of all processes and the peak memory of this one to every line of training metrics."""
        if "loss" in logs:
            now = time.perf_counter()
            logs["tokens_per_s"] = self._tokens_since_log * self.args.world_size / max(now - self._log_time, 1e-9)
            logs["peak_bytes"] = peak_bytes()
            self._tokens_since_log, self._log_time = 0, now
        super().log(logs, start_time)

    def report_evaluation(self, metrics: dict[str, float], began: float) -> None:
        """Log what an evaluation gave and tell the callbacks; the time since ``began`` is no training time."""
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._log_time += time.perf_counter() - began

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C ended the last ``train()`` before its last step."""
        return self._interrupts.interrupted and self.state.global_step < self.state.max_steps

    # ---- checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train. ``resume_from_checkpoint=True`` continues from the newest whole checkpoint, bit-equal to a run that
        was never interrupted; without one it starts from the beginning.

        Raises:
            CheckpointError: the checkpoint belongs to another run, or all are damaged.
            OutputError: ``output_dir`` holds another run's checkpoints and nothing was said about resuming.
            TrainingError: a loss or gradient is not finite, a lora_B gets no gradient, or another process died.
        """
        self._model_fingerprint = model_fingerprint(self.model)
        self._places, self._again, self._scale = (), (), None
        if facts_of(self.model).dtype.dtype == torch.float16:
            check_scalable(self)
            self._scale = LossScale()
        folder = Path(self.args.output_dir)
        checkpoint: Path | None = None
        if resume_from_checkpoint is True:
            checkpoint = find_checkpoint(folder, self.run_fingerprint())
            _log.info("Resuming from %s.", checkpoint or "the beginning: there is no checkpoint yet")
        elif resume_from_checkpoint:
            checkpoint = checkpoint_at(Path(resume_from_checkpoint), self.run_fingerprint())
        # A step that is there already is not written again: those of another run would stand for this one's.
        is_elsewhere = checkpoint is None or checkpoint.resolve().parent != folder.resolve()
        if resume_from_checkpoint is not True and is_elsewhere and checkpoints_in(folder):
            raise OutputError(
                f"{folder} already holds checkpoints of a run. Resume it (resume_from_checkpoint=True, --resume), "
                "or choose another output_dir."
            )
        if checkpoint is not None:
            self.continue_from(record_of(checkpoint))
        if self.args.should_save:
            require_disk_space(self.model, folder)
        self._log_time = time.perf_counter()
        try:
            # The Trainer gathers and waits too, for its log and at checkpoints.
            with naming_lost_processes(), self._walking_once():
                return super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint), **kwargs)
        finally:
            # An error ends the run without on_train_end.
            self._interrupts.release()
            engine = engine_of(self.model)
            if engine is not None:
                engine.dense.clear()

    def forget_buffers(self) -> None:
        """Give back what the engine holds for the next step, before something else needs memory."""
        engine = engine_of(self.model)
        if engine is not None:
            engine.scratch.clear()

    def _checkpoint_folder(self) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write model, optimizer, scheduler, RNG states and trainer state into one folder, whole or not at all."""
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(self._checkpoint_folder())
        self.store_flos()
        generators = self._generator_states()
        self.forget_buffers()
        # A damaged one of an earlier process is written anew.
        if self.args.should_save and damage(self._checkpoint_folder()) is not None:
            require_space(Path(self.args.output_dir), checkpoint_bytes(self.model), "a checkpoint")
            with whole_folder(self._checkpoint_folder()) as folder:
                with raw_weights(self.model):
                    self.save_model(str(folder), _internal_call=True)
                self._save_optimizer_and_scheduler(str(folder))
                for rank, states in enumerate(generators):
                    name = "rng_state.pth" if len(generators) == 1 else f"rng_state_{rank}.pth"
                    torch.save(states, folder / name)
                self.state.stateful_callbacks.update(self._callback_states())
                self.state.save_to_json(str(folder / "trainer_state.json"))
                (folder / RUN_FILE).write_text(json.dumps(self.run_record(), indent=1), encoding="utf-8")
            remove_old_checkpoints(
                self._checkpoint_folder(),
                keep=self._keep,
                best=self.state.best_model_checkpoint,
            )
        wait_for_processes(self.args)

    def _callback_states(self) -> dict[str, Any]:
        from transformers.trainer_callback import ExportableState

        sources = [*self.callback_handler.callbacks, self.control]
        return {type(source).__name__: source.state() for source in sources if isinstance(source, ExportableState)}

    def _generator_states(self) -> list[dict[str, Any]]:
        """Return the random states of every process, in the form that the Trainer reads on resume."""
        import random

        import numpy as np

        states: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "cpu": torch.random.get_rng_state(),
        }
        if torch.cuda.is_available():
            distributed = self.args.world_size > 1
            states["cuda"] = torch.cuda.random.get_rng_state_all() if distributed else torch.cuda.get_rng_state()
        return gather_objects(states, self.args.world_size)
