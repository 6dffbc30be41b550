"""A tiny base on disk with four adapters that answer differently, and engines that are closed after a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.export.support import adapt, disturb, loaded
from tests.tiny import save_model

from tunesmith.serving.engine import Engine

RANKS = {"a": 4, "b": 8, "c": 4, "d": 2}


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving") / "base"
    save_model(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folders(base_folder: Path) -> dict[str, Path]:
    """Name -> folder: other ranks, other targets, rsLoRA and patterns among them."""
    import torch

    kinds: dict[str, dict[str, Any]] = {
        "a": {},
        "b": {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "c": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        "d": {"target_modules": ["gate_proj", "lm_head"]},
    }
    folders = {}
    for seed, (name, arguments) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        folders[name] = base_folder.parent / name
        tuned = disturb(adapt(loaded(base_folder)[0], r=RANKS[name], lora_alpha=32, **arguments))
        disturb(tuned)
        tuned.save_pretrained(folders[name])
    return folders


@pytest.fixture
def start(base_folder: Path) -> Iterator[Callable[..., Engine]]:
    """``start(adapters={}, **settings)``: an engine on the tiny base."""
    engines: list[Engine] = []

    def begin(adapters: dict[str, Path] | None = None, **settings: Any) -> Engine:
        engine = Engine(*loaded(base_folder), **settings)
        engines.append(engine)
        for name, folder in (adapters or {}).items():
            engine.shelf.add(name, folder)
        return engine

    yield begin
    for engine in engines:
        engine.close(drain=False)
