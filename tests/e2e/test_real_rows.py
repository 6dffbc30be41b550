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


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_four_bits_learn_as_sixteen_do(smollm2):
    from benchmarks.train import WORKLOAD, build_workload, run_arm

    build_workload(WORKLOAD)
    job = {"workload": WORKLOAD, "steps": 30, "warmup": 0, "loss": "answers", "device": "cpu", "dtype": "float32"}
    whole, four = (run_arm(arm, **job) for arm in ("ours", "ours-4bit"))
    # The same rows in the same order. Before training NF4 raises the loss of so small a model by 12 to 17 %; measured
    # after 30 steps: 7 %.
    means = [sum(record["losses"][-10:]) / 10 for record in (whole, four)]
    assert four["losses"][0] > whole["losses"][0]
    assert means[1] <= 1.1 * means[0]
    assert means[1] / means[0] < four["losses"][0] / whole["losses"][0]
    assert four["peak_bytes"] < whole["peak_bytes"]
