"""Real rows, real model, minutes long: training has to help on rows that it never saw."""

from __future__ import annotations

import pytest


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_training_on_sarcastic_headlines_helps_on_held_out_ones(smollm2):
    from benchmarks.record import append_record
    from benchmarks.sarcasm import measure

    figures = measure(train=1500, held_out=300)
    append_record("sarcasm", figures)
    scores = figures["evaluation"]
    assert scores["model"]["count"] == 300
    assert scores["model"]["value"] >= max(scores["base"]["value"], figures["majority"]) + 0.15
