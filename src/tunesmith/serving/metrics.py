"""What a server has done, in the text form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tunesmith.serving.engine import Engine

__all__ = ["CONTENT_TYPE", "Histogram", "Metrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(slots=True)
class Histogram:
    """Durations in seconds, counted by size. One thread writes; others may read.

    Attributes:
        counts: how many were at most as long as each bound, and longer than the one before; the last: longer than all.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        self.counts[sum(seconds > bound for bound in _BOUNDS)] += 1
        self.total += seconds

    def lines(self, name: str) -> Iterator[str]:
        """Yield the histogram in Prometheus' form."""
        below = 0
        for bound, count in zip((*_BOUNDS, "+Inf"), list(self.counts), strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {below}"


@dataclass(slots=True)
class Metrics:
    """What the engine does not count itself.

    Attributes:
        first_token: seconds from the arrival of a request to the first token of each of its answers.
        answer: seconds from the arrival of a request to the end of each of its answers.
        refused: HTTP status -> requests that got an error.
    """

    first_token: Histogram = field(default_factory=Histogram)
    answer: Histogram = field(default_factory=Histogram)
    refused: dict[int, int] = field(default_factory=dict)

    def refuse(self, status: int) -> None:
        """Count a request that got an error."""
        self.refused[status] = self.refused.get(status, 0) + 1

    def text(self, engine: Engine) -> str:
        """Return all figures."""
        counts = engine.counts
        lines = list(_family("answers_total", "counter", "Answers by what ended them"))
        lines += (f'tunesmith_answers_total{{finish="{why}"}} {count}' for why, count in list(counts.finished.items()))
        lines += _family("refused_total", "counter", "Requests that got an error, by HTTP status")
        lines += (f'tunesmith_refused_total{{status="{status}"}} {count}' for status, count in self.refused.items())
        for name, kind, words, value in (
            ("answers_running", "gauge", "Answers that are being written", engine.running),
            ("answers_waiting", "gauge", "Answers that wait for others to end", engine.waiting),
            ("prompt_tokens_total", "counter", "Tokens of prompts that were read", counts.prompt_tokens),
            ("answer_tokens_total", "counter", "Tokens that were written", counts.answer_tokens),
            ("steps_total", "counter", "Forward passes", counts.steps),
            ("adapters_known", "gauge", "Adapters that can be asked for", len(engine.shelf.folders)),
            ("adapters_loaded", "gauge", "Adapters whose weights are in memory", len(engine.shelf.loaded)),
        ):
            lines += [*_family(name, kind, words), f"tunesmith_{name} {value}"]
        for name, words, histogram in (
            ("first_token_seconds", "From arrival to the first token of an answer", self.first_token),
            ("answer_seconds", "From arrival to the end of an answer", self.answer),
        ):
            lines += [*_family(name, "histogram", words), *histogram.lines(f"tunesmith_{name}")]
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, words: str) -> tuple[str, str]:
    return f"# HELP tunesmith_{name} {words}.", f"# TYPE tunesmith_{name} {kind}"
