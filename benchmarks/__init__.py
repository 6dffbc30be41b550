"""Measurements. Each prints a table, then one JSON line a run; committed records stand in ``results/``."""
