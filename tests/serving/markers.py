"""Adapters that are trained to answer everything with a word of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARKERS = {"red": "red house", "dog": "dog run", "rain": "rain fell", "hill": "green hill"}
"""Name of an adapter -> all that it says."""


def prompt_of(number: int) -> str:
    """Return one of the twelve prompts that the adapters know."""
    words = ("the cat", "sat on", "a mat", "and saw", "run to", "while")
    return f"{words[number % 6]} {words[number // 2 % 6]} {number % 12}"


def train_marker(
    model: Any,
    tokenizer: Any,
    folder: Path,
    marker: str,
    *,
    targets: Sequence[str],
    rate: float,
    prompts: int = 12,
) -> None:
    """Train an adapter on ``model``, which stays as it is, to answer with ``marker``, and save it in ``folder``."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=list(targets), task_type="CAUSAL_LM")
    tuned: Any = get_peft_model(model, config)
    rows, labels = zip(*(_row(tokenizer, prompt_of(number), marker) for number in range(prompts)), strict=True)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    wanted = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.AdamW([weight for weight in tuned.parameters() if weight.requires_grad], lr=rate)
    for _ in range(30):
        loss = tuned(input_ids=ids, attention_mask=mask, labels=wanted).loss
        if loss.item() < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.01, f"the adapter did not learn its marker: {loss.item()}"
    tuned.save_pretrained(folder)
    tuned.unload()


def _row(tokenizer: Any, prompt: str, marker: str) -> tuple[list[int], list[int]]:
    """Return token ids and labels of one exchange."""
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    start = tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = tokenizer(f"{marker}<|im_end|>", add_special_tokens=False)["input_ids"]
    return start + answer, [-100] * len(start) + answer
