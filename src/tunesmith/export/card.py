"""The model card of a trained adapter or model: what was trained, on what, how, and with which versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.core.tasks import CAUSAL_LM, TASKS

__all__ = ["model_card"]


def model_card(
    *,
    base: str,
    is_adapter: bool = True,
    task: str = CAUSAL_LM,
    settings: Mapping[str, Any],
    ledger: Mapping[str, Any],
    result: Mapping[str, Any],
    versions: Mapping[str, str],
) -> str:
    """Return a README.md with the YAML head that the hub reads.

    Args:
        base: the name of the base model.
        is_adapter: whether the folder holds an adapter, and not all weights.
        task: what the model is for, a name of :data:`tunesmith.core.tasks.TASKS`.
        settings: the resolved settings of the run.
        ledger: counts of the data, plain values.
        result: final numbers (steps, losses, seconds), plain values.
        versions: library -> version.
    """
    import yaml

    library, tags = ("peft", ["lora", "sft"]) if is_adapter else ("transformers", ["sft"])
    head = yaml.safe_dump({"base_model": base, "library_name": library, "tags": [*tags, "tunesmith"]}, sort_keys=False)
    auto = TASKS[task].auto
    theirs = "ForFeatureExtraction" if auto == "AutoModel" else auto.removeprefix("AutoModel")
    other = f"peft.AutoPeftModel{theirs}" if is_adapter else f"transformers.{auto}"
    parts = [
        f"---\n{head}---",
        f"# LoRA adapter for {base}" if is_adapter else f"# {base}, all weights trained",
        (
            "Trained with tunesmith. Load it with `FastLanguageModel.from_pretrained(folder)`, or with "
            f"`{other}.from_pretrained(folder)`."
        ),
        "## Result\n\n" + _table(result),
        "## Data\n\n" + _table({key: value for key, value in ledger.items() if isinstance(value, (int, float, str))}),
        "## Settings\n\n```yaml\n" + yaml.safe_dump(dict(settings), sort_keys=False).rstrip() + "\n```",
        "## Versions\n\n" + _table(versions),
    ]
    return "\n\n".join(parts) + "\n"


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {_cell(value)} |" for key, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
