"""The training workload that every arm reads: real chat rows as token ids, the model's folder, a seeded adapter.

    python -m benchmarks.workload .cache/benchmarks/smollm2-135m [--model smollm2-135m] [--rows 3000]

Rows come from the ``evals`` package: its jsonl files of 2,000 bytes to 3 MB, names shuffled with ``random.seed(0)``, at
most 12 rows a file whose ``input`` is a message list not ending with the assistant and whose ``ideal`` is (or starts
with) a string; those rows shuffled by the same generator, rendered with the model's own chat template, kept when they
have 20 to 1,024 tokens; the first 3,000 of them, in that order, 8 a step. Rows stay outside the repository.

A workload is a folder that needs neither tunesmith nor the tokenizer to be read, so that each library reads it in an
environment of its own:

    model/                the weights in bfloat16, as models are published, with config and tokenizer
    rows.npz              ``ids`` and ``answers`` (whether the token is part of an answer), ``offsets`` of the rows
    adapter.safetensors   A of every linear layer under PEFT's names, drawn as PEFT draws it; B is zero
    workload.json         counts, for the records
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = ["RANK", "TARGETS", "Workload", "build", "load", "load_adapter"]

RANK = 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_IGNORED = -100
_FILE_BYTES = (2_000, 3_000_000)
_ROWS_A_FILE = 12
_SHORTEST, _LONGEST = 20, 1024


@dataclass(frozen=True, slots=True)
class Workload:
    """What :func:`build` wrote.

    Attributes:
        ids: (N,) int32, all rows one behind the other.
        answers: (N,) bool.
        offsets: (rows + 1,) int64.
        facts: the content of ``workload.json``.
    """

    folder: Path
    ids: np.ndarray
    answers: np.ndarray
    offsets: np.ndarray
    facts: dict[str, Any]

    @property
    def model(self) -> str:
        """The folder of the model."""
        return str(self.folder / "model")

    def rows(self, loss: str, count: int) -> list[dict[str, list[int]]]:
        """Return the first ``count`` rows as ``input_ids`` and unshifted ``labels``, -100 where nothing is trained.

        ``loss`` is "answers", or "all" for every token but the first of a row. Rows repeat when there are too few.
        """
        rows: list[dict[str, list[int]]] = []
        for index in range(count):
            where = index % (len(self.offsets) - 1)
            span = slice(int(self.offsets[where]), int(self.offsets[where + 1]))
            ids = self.ids[span]
            trained = self.answers[span].copy() if loss == "answers" else np.ones(len(ids), dtype=bool)
            trained[0] = False  # Nothing stands before it that could predict it.
            rows.append({"input_ids": ids.tolist(), "labels": np.where(trained, ids, _IGNORED).tolist()})
        return rows


def load(folder: str | Path) -> Workload:
    """Read a workload folder."""
    folder = Path(folder)
    with np.load(folder / "rows.npz") as arrays:
        facts = json.loads((folder / "workload.json").read_text(encoding="utf-8"))
        return Workload(folder, arrays["ids"], arrays["answers"], arrays["offsets"], facts)


def load_adapter(model: Any, folder: str | Path) -> None:
    """Copy the seeded A into a PEFT ``model`` in place, and zero into B.

    Raises:
        ValueError: the model's adapter has other layers than the file.
    """
    import torch
    from safetensors.torch import load_file

    wanted = load_file(Path(folder) / "adapter.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.zero_()
            elif ".lora_A." in name:
                key = name.replace(".default.", ".").replace("_orig_mod.", "")
                if key not in wanted:
                    raise ValueError(f"{name} has no counterpart in adapter.safetensors")
                parameter.copy_(wanted.pop(key))
    if wanted:
        raise ValueError(f"{len(wanted)} layers of adapter.safetensors are not adapted, e.g. {next(iter(wanted))}")


def build(
    folder: Path, *, model: str = "smollm2-135m", rows: int = 3000, longest: int = _LONGEST, seed: int = 0
) -> dict[str, Any]:
    """Write the workload for ``model`` (a name that tunesmith knows, or a folder) and return its facts."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    targets = _write_model(_model_folder(model), folder / "model")
    _write_adapter(targets, folder / "adapter.safetensors", seed)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    for chat in _chats():
        ids, answers = _encode(chat, tokenizer)
        if _SHORTEST <= len(ids) <= longest:
            kept.append((ids, answers))
        if len(kept) == rows:
            break
    lengths = np.array([len(ids) for ids, _ in kept])
    answers = np.concatenate([answers for _, answers in kept])
    np.savez_compressed(
        folder / "rows.npz",
        ids=np.concatenate([ids for ids, _ in kept]),
        answers=answers,
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
    facts = {
        "model": model,
        "rows": len(kept),
        "mean_tokens": round(float(lengths.mean()), 1),
        "max_tokens": int(lengths.max()),
        "answer_share": round(float(answers.mean()), 4),
    }
    (folder / "workload.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return facts


def _chats() -> Iterator[list[dict[str, Any]]]:
    """Yield the conversations of the ``evals`` package in the order of the workload."""
    found = {str(file): Path(str(file.locate())) for file in importlib.metadata.files("evals") or ()}
    names = sorted(name for name in found if name.endswith(".jsonl") and found[name].is_file())
    names = [name for name in names if _FILE_BYTES[0] <= found[name].stat().st_size <= _FILE_BYTES[1]]
    generator = random.Random(0)
    generator.shuffle(names)
    chats: list[list[dict[str, Any]]] = []
    for name in names:
        taken = 0
        for line in found[name].read_text(encoding="utf-8").splitlines():
            chat = _chat(line)
            if chat is not None and taken < _ROWS_A_FILE:
                chats.append(chat)
                taken += 1
    generator.shuffle(chats)
    yield from chats


def _chat(line: str) -> list[dict[str, Any]] | None:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return None
    if not isinstance(row, dict):
        return None
    messages, ideal = row.get("input"), row.get("ideal")
    if isinstance(ideal, list) and ideal:
        ideal = ideal[0]
    is_chat = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
    if not is_chat or not isinstance(ideal, str) or messages[-1].get("role") == "assistant":
        return None
    return [*messages, {"role": "assistant", "content": ideal}]


def _encode(chat: list[dict[str, Any]], tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids of a chat and whether each is part of an answer, the token that ends it included.

    Rendered by the template in one piece. tunesmith's own data step would refuse some of these rows (a system message
    in the middle); here every library is to see the same ones.
    """
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts, ends = np.array(encoded["offset_mapping"]).T
    answers = np.zeros(len(starts), dtype=bool)
    for index, message in enumerate(chat):
        if message.get("role") == "assistant":
            before = tokenizer.apply_chat_template(chat[:index], tokenize=False, add_generation_prompt=True)
            until = tokenizer.apply_chat_template(chat[: index + 1], tokenize=False).rstrip()
            if not text.startswith(before) or not text.startswith(until):
                raise ValueError("the chat template renders the turns of a longer chat in another way")
            answers |= (starts >= len(before)) & (ends <= len(until))
    return np.array(encoded["input_ids"], dtype=np.int32), answers


def _model_folder(name: str) -> Path:
    from tunesmith.models.aliases import find_model
    from tunesmith.models.gguf_cache import converted_gguf

    source = find_model(name)
    return converted_gguf(Path(source.path)) if source.kind == "gguf" else Path(source.path)


def _write_model(source: Path, target: Path) -> dict[str, int]:
    """Save ``source`` in bfloat16 and return the layers to adapt with the width of their input."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: linear.in_features for name, linear in linears.items() if name.rsplit(".", 1)[-1] in TARGETS}


def _write_adapter(targets: dict[str, int], file: Path, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, width in targets.items():
        # kaiming_uniform_(a=sqrt(5)), PEFT's own start, is uniform within 1 / sqrt(width).
        values = torch.rand(RANK, width, generator=generator) * 2 - 1
        tensors[f"base_model.model.{name}.lora_A.weight"] = values / math.sqrt(width)
    save_file(tensors, file)


def main() -> None:
    """Build a workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--longest", type=int, default=_LONGEST)
    arguments = parser.parse_args()
    print(json.dumps(build(arguments.folder, model=arguments.model, rows=arguments.rows, longest=arguments.longest)))


if __name__ == "__main__":
    main()
