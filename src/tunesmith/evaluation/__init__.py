"""Does it work? Generate, score with an interval, and put the base beside the tuned model.

``run.py`` is the door (:func:`evaluate`), ``metrics.py`` says how an answer is judged, ``intervals.py`` how sure the
figure is, ``generate.py`` makes the answers and ``likelihood.py`` the figures for perplexity.
"""

from tunesmith.engine.modes import adapter_disabled
from tunesmith.evaluation.generate import generate_answers
from tunesmith.evaluation.metrics import METRICS, Difference, Score, compare, perplexity_score, score_answers
from tunesmith.evaluation.run import EvaluationRow, Report, Side, evaluate, read_evaluation_rows

__all__ = [
    "METRICS",
    "Difference",
    "EvaluationRow",
    "Report",
    "Score",
    "Side",
    "adapter_disabled",
    "compare",
    "evaluate",
    "generate_answers",
    "perplexity_score",
    "read_evaluation_rows",
    "score_answers",
]
