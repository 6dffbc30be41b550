"""The comparison of 4 bits with the whole base: which sets are chosen, and what the table makes of the records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import nf4, record


def test_sets_are_chosen_by_their_rows_and_answers() -> None:
    found = nf4.chosen_sets()
    assert {"soc_codes", "ner_finance", "imperial_date_to_string"} <= set(found) and found == sorted(found)
    # Answers of one character; too large a file; fewer than 300 rows.
    assert not {"sarcasm", "french-lexicon", "spider_sql"} & set(found)


def test_what_is_recorded_is_not_measured_again_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (nf4, record):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    factor = {"whole": 1.0, "nf4": 1.02, "loftq": 1.5}
    asked: list[str] = []

    def trained(arm: str, rows: list[dict[str, Any]], dtype: str, rate: float) -> dict[str, Any]:
        asked.append(arm)
        return dict.fromkeys(nf4.FIGURES, 2 * factor[arm])

    monkeypatch.setattr(nf4, "trained", trained)
    assert not nf4.measure(["soc_codes"], "float32", 1e-3, minutes=-1) and not asked
    for _ in range(2):
        assert nf4.measure(["soc_codes", "ner_finance"], "float32", 1e-3, minutes=5)
    assert asked == [*nf4.ARMS] * 2
    assert len([json.loads(line) for line in (tmp_path / "nf4.jsonl").read_text().splitlines()]) == 6
    *_, median, within = nf4.table("float32", 1e-3).splitlines()
    assert [cell.strip() for cell in median.split("|")[5:-1]] == ["+2.0%"] * 3 + ["+50.0%"] * 3
    assert [cell.strip() for cell in within.split("|")[5:-1]] == ["2 of 2"] * 3 + ["0 of 2"] * 3
    # Another rate is another table.
    assert "soc_codes" not in nf4.table("float32", 2e-4)
