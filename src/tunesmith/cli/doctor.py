"""``tunesmith doctor``: what this installation and this machine can do, with the reason where they cannot."""

from __future__ import annotations

import importlib
import platform
import shutil
from typing import Any

from tunesmith import __version__
from tunesmith.cli.console import console, silence_libraries
from tunesmith.cli.words import bytes_in_words
from tunesmith.core.versions import STACK, installed

__all__ = ["OPTIONAL", "command", "import_state", "packages"]

OPTIONAL = {
    "torchao": "torchao",
    "trl": "trl",
    "triton": "triton",
    "vllm": "vllm",
    "llama_cpp": "llama-cpp-python",
    "gguf": "gguf",
    "fastapi": "fastapi",
    "gradio": "gradio",
    "optuna": "optuna",
    "ray": "ray",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "flash_attn": "flash-attn",
}
"""Module -> distribution of the packages that some features use where they are there."""


def command() -> None:
    """Show versions, devices, the dtype choice with its reason, memory, disk, and optional packages."""
    silence_libraries()
    from tunesmith.cli.report import facts_table

    for title, rows in (
        ("versions", _versions()),
        ("machine", _machine()),
        ("ops", _ops()),
        ("optional packages", packages()),
    ):
        console().rule(title, align="left", style="dim")
        console().print(facts_table(rows))


def packages() -> list[tuple[str, str]]:
    """Return the state of each optional package; vLLM may lie in an environment of its own."""
    found = {module: import_state(module, name) for module, name in OPTIONAL.items()}
    command = shutil.which("vllm")
    if found["vllm"] == "not installed" and command is not None:
        found["vllm"] = f"in an environment of its own: {command}"
    return list(found.items())


def import_state(module: str, distribution: str) -> str:
    """Return ``"ok 1.2"``, ``"not installed"`` or ``"installed, import fails: ..."``."""
    version = installed(distribution)
    if version is None:
        return "not installed"
    try:
        importlib.import_module(module)
    # A broken package can raise anything at import (a missing library, a wrong driver, its own assert): here the
    # reason is the answer, whatever it is.
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        return f"{version} installed, import fails: {type(error).__name__}: {reason}"[:300]
    return f"ok {version}"


def _versions() -> list[tuple[str, str]]:
    stack = [(name, installed(name) or "not installed") for name in STACK if name != "tunesmith"]
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    return [("tunesmith", __version__), ("Python", platform.python_version()), ("system", system), *stack]


def _machine() -> list[tuple[str, str]]:
    import psutil
    import torch

    from tunesmith.core.device import choose_device, choose_dtype, describe_device
    from tunesmith.core.files import free_bytes
    from tunesmith.models.aliases import cache_folder

    device = choose_device()
    dtype = choose_dtype(None, device)
    memory = psutil.virtual_memory()
    cache = cache_folder()
    return [
        ("device", describe_device(device)),
        *_gpus(torch),
        ("dtype", f"{dtype.name} ({dtype.reason})"),
        ("threads", f"{torch.get_num_threads()} of {psutil.cpu_count()} cores"),
        ("memory", f"{bytes_in_words(memory.available)} free of {bytes_in_words(memory.total)}"),
        ("cache", f"{cache}, {bytes_in_words(free_bytes(cache))} free"),
    ]


def _ops() -> list[tuple[str, str]]:
    """Return which implementation of each op runs in the dtype that would be chosen here, and why."""
    import torch

    from tunesmith.core.device import choose_device, choose_dtype
    from tunesmith.ops.dispatch import OPS, choose

    device = choose_device()
    sample = torch.empty(0, device=device, dtype=choose_dtype(None, device).dtype)
    choices = [choose(op, sample) for op in OPS]
    return [(choice.op, f"{choice.implementation}: {choice.reason}") for choice in choices]


def _gpus(torch: Any) -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return [("GPU", "none found" if built else "none: this torch is built without CUDA")]
    rows: list[tuple[str, str]] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        rows.append((f"GPU {index}", f"{name}, {bytes_in_words(free)} free of {bytes_in_words(total)}"))
    return rows
