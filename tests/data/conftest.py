"""Fixtures shared by the data tests."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from .chat_families import build_tokenizer


@pytest.fixture(scope="session")
def chat_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """``chat_tokenizer(family)`` builds a small tokenizer with that family's special tokens and chat template."""
    return build_tokenizer


@pytest.fixture
def rng() -> random.Random:
    """A seeded source of random choices."""
    return random.Random(3407)
