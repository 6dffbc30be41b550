"""What an export says of itself, and the refusal of one that is another model than the live one."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.errors import ExportError
from tunesmith.export.card import About, export_card
from tunesmith.export.verify import Comparison

__all__ = ["ExportReport", "write_report"]

# Below _LITTLE nats there is too little training to tell it from rounding. Seen on SmolLM2 after 12 steps: merged into
# its 16-bit base and rounded to NF4, an adapter keeps 98 % or more; into what its NF4 base stands for and rounded
# again, 1 % of what it had gained in loss.
_LITTLE, _KEPT = 0.01, 0.5


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written and how near to the live model it is.

    Attributes:
        folder: where it lies.
        method: of :data:`tunesmith.export.methods.METHODS`.
        route: how the weights of the base were had: "base", "dequantized" or "original"; "adapter" for none.
        size: bytes of its weights.
        dtype: of its weights.
        seconds: for writing and comparing.
        comparisons: route -> how it compares with the live model.
        moved: mean KL divergence of the base from the live model: what the training did; None where it is not known.
        url: where it was uploaded, None where it was not.
    """

    folder: Path
    method: str
    route: str
    size: int
    dtype: str
    seconds: float
    comparisons: dict[str, Comparison]
    moved: float | None
    url: str | None = None

    @property
    def comparison(self) -> Comparison:
        """How what was kept compares with the live model."""
        return self.comparisons[self.route]

    def record(self) -> dict[str, Any]:
        """Return JSON values: what is true of the folder wherever it lies."""
        routes = {route: found.record() for route, found in self.comparisons.items()}
        return {"method": self.method, "route": self.route, "bytes": self.size, "dtype": self.dtype,
                "seconds": self.seconds, "moved": self.moved, "comparisons": routes}  # fmt: skip


def write_report(report: ExportReport, temporary: Path, bar: float, *, base: str, about: About) -> None:
    """Write export_report.json and the model card into ``temporary``, where the export still lies.

    ``base`` is what the user called the base, ``about`` what the card says beside the figures.

    Raises:
        ExportError: the export is another model than the live one, or its tokenizer another; it is kept under a name
            that says so.
    """
    (temporary / "export_report.json").write_text(json.dumps(report.record(), indent=1) + "\n", encoding="utf-8")
    (temporary / "README.md").write_text(export_card(report, base, about), encoding="utf-8")
    reason = _problem(report, bar)
    if reason is None:
        return
    failed = report.folder.with_name(f"{report.folder.name}-failed")
    shutil.rmtree(failed, ignore_errors=True)
    temporary.rename(failed)
    raise ExportError(f"the {report.method} export answers otherwise than the model: {reason}. It is kept as {failed}.")


def _problem(report: ExportReport, bar: float) -> str | None:
    found = report.comparison
    if found.tokenizer not in (None, "equal"):
        return f"its tokenizer {found.tokenizer}"
    if not found.kl <= bar:  # also where it is NaN
        return (
            f"KL divergence {found.kl:.2g} on {found.tokens} tokens (allowed {bar:g}), the same likeliest token in "
            f"{found.top1:.1%} of them"
        )
    if found.kept is not None and report.moved is not None and report.moved > _LITTLE and not found.kept >= _KEPT:
        return f"only {found.kept:.0%} of what the training changed is left"
    return None
