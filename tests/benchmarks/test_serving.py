"""The measurement of the server on a tiny model: every case runs and is recorded."""

from __future__ import annotations

from pathlib import Path

from tests import tiny

from benchmarks import serving


def test_every_case_is_measured(tmp_path: Path) -> None:
    tiny.save_model(tmp_path / "model")
    record = serving.measure(str(tmp_path / "model"), "float32", [1, 3], tokens=4, rounds=2, requests=1, times=2)
    assert record["dtype"] == "float32"
    for case in ("base", "adapters"):
        assert {count: len(values) for count, values in record["rates"][case].items()} == {"1": 2, "3": 2}
        assert record["gain"][case] == record["tokens_per_second"][case]["3"] / record["tokens_per_second"][case]["1"]
    assert set(record["swap"]) == {"loaded_ms", "first_token_same_ms", "first_token_other_ms", "unloaded_ms"}
    assert all(value > 0 for value in record["swap"].values())
