"""Model cards: of a run (what was trained, on what, how, and with which versions) and of an export (how near it is).

They name no licence: that is for who publishes to say, from the base model's and the data's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.core.errors import ModelError
from tunesmith.core.settings import read_yaml
from tunesmith.core.tasks import CAUSAL_LM, TASKS
from tunesmith.core.versions import stack_versions
from tunesmith.models.aliases import find_model

if TYPE_CHECKING:
    from tunesmith.export.report import ExportReport

__all__ = ["About", "export_card", "model_card"]

# What a card tells of a run: no paths, no names of accounts, no tokens.
_SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "learning_rate", "lr_scheduler_type", "optim",
             "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
             "max_seq_length", "load_in_4bit", "load_in_8bit", "load_in_fp8", "full_finetuning", "seed")  # fmt: skip
_RESULTS = ("steps", "first_loss", "last_loss", "best_eval_loss", "seconds", "trainable_parameters", "parameters")


@dataclass(frozen=True, slots=True)
class About:
    """What a card says that the export does not know.

    Attributes:
        tags, datasets: for the head that the hub reads.
        run: the folder of the run that trained the model, or of its adapter.
    """

    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    run: Path | None = None


def model_card(
    *,
    base: str,
    is_adapter: bool = True,
    task: str = CAUSAL_LM,
    labels: Sequence[str] = (),
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
        labels: of its head, in the order of their numbers.
        settings: the resolved settings of the run.
        ledger: counts of the data, plain values.
        result: final numbers (steps, losses, seconds), plain values.
        versions: library -> version.
    """
    import yaml

    library, tags = ("peft", ["lora", "sft"]) if is_adapter else ("transformers", ["sft"])
    head = yaml.safe_dump({"base_model": base, "library_name": library, "tags": [*tags, "tunesmith"]}, sort_keys=False)
    parts = [
        f"---\n{head}---",
        f"# LoRA adapter for {base}" if is_adapter else f"# {base}, all weights trained",
        "Trained with tunesmith. Load it with `FastLanguageModel.from_pretrained(folder)`, or with "
        + _other_way(task, labels if is_adapter else (), is_adapter=is_adapter),
        "## Result\n\n" + _table(result),
        "## Data\n\n" + _table({key: value for key, value in ledger.items() if isinstance(value, (int, float, str))}),
        "## Settings\n\n```yaml\n" + yaml.safe_dump(dict(settings), sort_keys=False).rstrip() + "\n```",
        "## Versions\n\n" + _table(versions),
    ]
    return "\n\n".join(parts) + "\n"


def _other_way(task: str, labels: Sequence[str], *, is_adapter: bool) -> str:
    """Return how a model is loaded without this library; an adapter's base gets a head of ``labels`` first."""
    auto = TASKS[task].auto
    theirs = "ForFeatureExtraction" if auto == "AutoModel" else auto.removeprefix("AutoModel")
    call = f"peft.AutoPeftModel{theirs}.from_pretrained" if is_adapter else f"transformers.{auto}.from_pretrained"
    if not labels:
        return f"`{call}(folder)`."
    return (
        f"PEFT:\n\n```python\nlabels = {list(labels)}\nmodel = {call}(\n    folder,\n"
        "    id2label=dict(enumerate(labels)),\n    label2id={label: number for number, label in enumerate(labels)},\n"
        ")\n```"
    )


def export_card(report: ExportReport, base: str, about: About) -> str:
    """Return the README.md of an export of a model whose base the user called ``base``."""
    import yaml

    is_adapter = report.method == "lora"
    head: dict[str, Any] = {"base_model": base} if _is_on_hub(base) else {}
    head["library_name"] = "peft" if is_adapter else "transformers"
    head["tags"] = [*dict.fromkeys([*(["lora"] if is_adapter else []), "tunesmith", *about.tags])]
    if about.datasets:
        head["datasets"] = list(about.datasets)
    name = base if _is_on_hub(base) else Path(base).name  # no path of this machine
    found, title = report.comparison, "LoRA adapter for" if is_adapter else "Fine-tuned from"
    figures = {
        "KL divergence from the trained model, nats a token": found.kl,
        "largest KL divergence of a token": found.largest_kl,
        "same likeliest token": f"{found.top1:.1%}",
        "equal greedy texts": f"{found.equal_texts} of {found.texts}",
        "perplexity": found.perplexity,
        "perplexity of the trained model": found.live_perplexity,
        "tokens compared": found.tokens,
    }
    if report.moved is not None:
        figures["KL divergence of the untuned base"] = report.moved
    if found.kept is not None:
        figures["share of what the training changed that is there"] = f"{found.kept:.1%}"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---",
        f"# {title} {name}",
        f"Exported with tunesmith: {report.method}, weights in {report.dtype}, {_ROUTES[report.route]}.",
        f"## Verification\n\nLoaded by {found.runtime} in a process of its own and compared with the trained model:\n\n"
        + _table(figures),
        *_training(about.run),
        "## Versions\n\n" + _table(stack_versions()),
    ]
    return "\n\n".join(parts) + "\n"


_ROUTES = {
    "adapter": "the adapter as it was trained",
    "base": "the adapter merged in float32",
    "dequantized": "the adapter merged in float32 into what the quantized weights of its base stand for",
    "original": "the adapter merged in float32 into the weights that its base was quantized from",
}


def _is_on_hub(base: str) -> bool:
    try:
        return find_model(base).kind == "hub"
    except ModelError:
        return False


def _training(run: Path | None) -> list[str]:
    """Return what is known of the training, from the folder of the run or of its adapter."""
    for place in () if run is None else (run, run.parent):
        if (place / "settings.yaml").is_file() and (place / "result.json").is_file():
            break
    else:
        return []
    try:
        settings = read_yaml(place / "settings.yaml")
        numbers = json.loads((place / "result.json").read_text(encoding="utf-8"))
        ledger = json.loads((place / "ledger.json").read_text(encoding="utf-8")).get("train", {})
    except (OSError, ValueError):
        return []  # another program's, or edited: a card without it is still right
    known = {name: numbers[name] for name in _RESULTS if numbers.get(name) is not None}
    counts = {name: value for name, value in ledger.items() if isinstance(value, (int, float))}
    chosen = {name: settings[name] for name in _SETTINGS if settings.get(name) not in (None, False)}
    return ["## Training\n\n" + _table(known), "## Data\n\n" + _table(counts), "## Settings\n\n" + _table(chosen)]


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {_cell(value)} |" for key, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
