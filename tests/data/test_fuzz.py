"""Valid files, damaged 500 times in seeded ways: only ``DataError`` may come out, soon, and no row is kept that trains
nothing."""

from __future__ import annotations

import copy
import csv
import io
import json
import random
import time
from collections import Counter

import numpy as np
import pytest

from tunesmith.core.errors import DataError
from tunesmith.data.prepare import prepare
from tunesmith.data.types import Completion, Conversation, Document

CASES_PER_FORMAT = 63
SECONDS_PER_CASE = 3.0
ODD_VALUES = [
    None, True, False, 0, -1, 3.5, 10**30, "", " ", "\n", "x", "\x00", "\ud800", "\u202e", "NaN", "[]", "{}", [], {},
    "é" * 1000, [[]], [None], {"a": None}, ["x"], [{}], {"role": "user"}, [{"role": "assistant", "content": "y"}],
]  # fmt: skip


class LengthEncoder:
    """Encodes as cheaply as a tokenizer could: a token per 8 bytes of strictly encoded text, answers trained."""

    def encode(self, example):
        if isinstance(example, Conversation):
            parts = [
                (json.dumps(message, ensure_ascii=False), message["role"] == "assistant" if flag is None else flag)
                for message, flag in zip(example.messages, example.train, strict=True)
            ]
        elif isinstance(example, Completion):
            parts = [(example.prompt, False), (example.completion, True)]
        else:
            parts = [(example.text, True)]
        trained = np.concatenate([np.full(1 + len(text.encode()) // 8, trains) for text, trains in parts])
        ends = np.flatnonzero(trained[:-1] & ~trained[1:]).tolist() + ([len(trained) - 1] if trained[-1] else [])
        return [Document(np.arange(len(trained), dtype=np.int32), trained, example.where, tuple(ends))]


def messages_row(number):
    return {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Question {number}? é"},
            {"role": "assistant", "content": f"Answer {number}.", "weight": number % 2},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": '{"n": 1}'}]},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    }


def alpaca_row(number):
    return {"instruction": f"Add {number}", "input": "1, 2" * (number % 2), "output": str(number + 3)}


def evals_row(number):
    return {"input": [{"role": "user", "content": f"Q {number}"}], "ideal": [f"A {number}"] if number % 2 else "A"}


def sharegpt_row(number):
    return {"conversations": [{"from": "human", "value": f"Q {number}"}, {"from": "gpt", "value": f"A {number}"}]}


def dump(rows, suffix):
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps(rows, indent=1).encode()
    if suffix == ".csv":
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, fieldnames=sorted({str(key) for row in rows for key in row}), restval="")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode("utf-8", "surrogatepass")
    import pyarrow as pa
    from pyarrow import parquet

    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    if suffix == ".parquet":
        parquet.write_table(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    return sink.getvalue()


FORMATS = [
    (messages_row, ".jsonl"),
    (alpaca_row, ".jsonl"),
    (evals_row, ".jsonl"),
    (sharegpt_row, ".json"),
    (alpaca_row, ".csv"),
    (messages_row, ".parquet"),
    (alpaca_row, ".parquet"),
    (messages_row, ".arrow"),
]
ARROW = (".parquet", ".arrow")


# --- damage to values -------------------------------------------------------------------------------------------------


def places(value, path=()):
    """Yield the path of every value inside ``value``."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def swap_values(rows, rng):
    """Put odd values, a huge text, or another part of the row in random places; rename or delete keys."""
    rows = copy.deepcopy(rows)
    for _ in range(rng.randint(1, 6)):
        row = rng.choice(rows)
        found = list(places(row))
        if not found:
            continue
        *parents, key = rng.choice(found)
        holder = row
        for parent in parents:
            holder = holder[parent]
        action = rng.randrange(6)
        if action == 0:
            holder[key] = "huge " * rng.choice([1, 1000, 50_000])
        elif action == 1 and isinstance(holder, dict):
            holder[rng.choice(["text", "role", "from", "x", "", "prompt", "label"])] = holder.pop(key)
        elif action == 2:
            del holder[key]
        elif action == 3:
            holder[key] = copy.deepcopy(row)
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return rows


# --- damage to bytes --------------------------------------------------------------------------------------------------


def flip_bytes(content, rng):
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 3, 20])):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


def cut_off(content, rng):
    return content[: rng.randrange(len(content))]


def shuffle_lines(content, rng):
    """Delete, double, or insert lines."""
    lines = content.split(b"\n")
    odd = [b"", b"{}", b"[]", b"null", b'"', b"\xff\xfe", b"{" * 5000, b"[" * 200_000, b",,,,,,"]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        junk = rng.choice([*odd, lines[at]])
        lines[at : at + rng.randint(0, 1)] = [junk] * rng.randint(0, 2)
        lines = lines or [b""]
    return b"\n".join(lines)


def splice(content, rng):
    """Move a slice of the file elsewhere."""
    start, end, at = sorted(rng.randrange(len(content)) for _ in range(3))
    return content[:start] + content[end:at] + content[start:end] + content[at:]


def damage(rows, suffix, rng):
    action = rng.choice([swap_values, swap_values, flip_bytes, cut_off, shuffle_lines, splice])
    if action is not swap_values:
        return action(dump(rows, suffix), rng)
    if suffix not in ARROW:
        return dump(swap_values(rows, rng), suffix)
    # Arrow takes one type a column, so the damage is the same in every row; what Arrow itself refuses stays undamaged.
    try:
        return dump(swap_values(rows[:1], rng) * len(rows), suffix)
    except (ValueError, TypeError, OverflowError, NotImplementedError):  # pyarrow's own errors are among these
        return flip_bytes(dump(rows, suffix), rng)


# --- the test ---------------------------------------------------------------------------------------------------------


def outcome_of(path):
    """Return "error", "dropped" (some rows) or "kept" (all), after checking what must hold."""
    started = time.perf_counter()
    try:
        data = prepare(path, LengthEncoder(), max_length=1000)
        ledger = data.ledger
        assert ledger.rows_in == ledger.rows_kept + sum(ledger.dropped.values()) > 0
        for row in data.rows:
            assert row.documents
            assert all(document.trained[1:].any() for document in row.documents)
        assert all(len(line) <= 80 and line.isprintable() for line in ledger.lines(80))
        json.dumps(ledger.as_dict()).encode("utf-8")
        ledger.check()
    except DataError as error:
        assert str(error).encode("utf-8"), "a message that no terminal could print"
        return "error"
    finally:
        assert time.perf_counter() - started < SECONDS_PER_CASE
    return "dropped" if ledger.dropped else "kept"


@pytest.mark.parametrize(("make", "suffix"), FORMATS, ids=[f"{make.__name__}{suffix}" for make, suffix in FORMATS])
def test_damaged_files_are_errors_or_counted(tmp_path, make, suffix):
    rows = [make(number) for number in range(8)]
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(dump(rows, suffix))
    assert outcome_of(path) == "kept", "the undamaged file must be whole"
    outcomes = Counter()
    for case in range(CASES_PER_FORMAT):
        rng = random.Random(f"{make.__name__}{suffix}{case}")
        path.write_bytes(damage(rows, suffix, rng))
        try:
            outcomes[outcome_of(path)] += 1
        except BaseException:
            print(f"case {case} of {make.__name__}{suffix}")
            raise
    assert set(outcomes) >= {"error", "kept"} and len(outcomes) >= 2 + (suffix not in ARROW), outcomes


def test_there_are_500_cases():
    assert CASES_PER_FORMAT * len(FORMATS) >= 500
