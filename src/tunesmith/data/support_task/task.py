"""Make the rows: draw a ticket, write it as a message, answer with its JSON.

The ticket is drawn first and the message is written from it, so the answer is right by construction. A message has
these sentences, in this order; those in brackets may be absent:

    [greeting] report [order] [distractor] [request] [sign-off]        one of greeting and sign-off carries the name

The order mention and the distractor change places in half of the rows. A distractor states a second product, order
number or person that must not be copied, or a city or date that no field asks for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, Literal

from tunesmith.core.errors import DataError
from tunesmith.data.support_task.words import HELDOUT, ISSUES, REQUESTS, TRAIN, Words

__all__ = ["SCHEMA", "SYSTEM_PROMPT", "few_shot_prompt", "generate"]

Row = dict[str, Any]
Ticket = dict[str, str | None]

SYSTEM_PROMPT = "Extract the ticket as JSON."

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "first name of the customer who writes"},
        "product": {"type": "string", "description": "full name of the product with the problem"},
        "order": {"type": ["string", "null"], "description": "its order number, digits only"},
        "issue": {"type": "string", "enum": list(ISSUES)},
        "request": {"type": ["string", "null"], "enum": [*REQUESTS, None]},
    },
    "required": ["name", "product", "order", "issue", "request"],
    "additionalProperties": False,
}
"""What an answer must look like, in JSON Schema's words. The key order is the order of the answer's keys."""

_HAS_ORDER, _HAS_REQUEST, _HAS_DISTRACTOR, _HAS_VARIANT = 0.65, 0.7, 0.6, 0.3
_WORDS: dict[str, Words] = {"train": TRAIN, "heldout": HELDOUT}


def generate(split: Literal["train", "heldout"], count: int, seed: int) -> list[Row]:
    """Return ``count`` different rows ``{"messages": [system, user, assistant]}``; the same for the same arguments.

    Rows of ``"heldout"`` use frames, names, products, order numbers and phrasings that occur in no ``"train"`` row of
    any seed.

    Raises:
        DataError: ``split`` is neither "train" nor "heldout", or ``count`` is negative.
    """
    if split not in _WORDS:
        raise DataError(f"support task: split {split!r} is unknown. Use 'train' or 'heldout'.")
    if count < 0:
        raise DataError(f"support task: count is {count}. Ask for 0 rows or more.")
    words = _WORDS[split]
    # A string seed is hashed by random itself in a way that does not depend on PYTHONHASHSEED.
    rng = random.Random(f"{split}/{seed}")
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = _draw_row(words, rng)
        rows.setdefault(row["messages"][1]["content"], row)
    return list(rows.values())


def few_shot_prompt(row: Row) -> list[dict[str, str]]:
    """Return the best fair prompt for an untouched model: schema in the system turn, two solved training rows, ``row``.

    One of the two examples has every field, the other has nulls. The answer of ``row`` is not in the prompt.
    """
    schema = json.dumps(SCHEMA, separators=(",", ":"))
    system = f"{SYSTEM_PROMPT} Answer with one line of JSON that fits this schema and nothing else: {schema}"
    messages = [{"role": "system", "content": system}]
    for example in _two_examples():
        messages += example["messages"][1:]
    return [*messages, row["messages"][1]]


def _two_examples() -> tuple[Row, Row]:
    """Return a training row with every field and one of another issue with both optional fields null."""
    tickets = [(row, json.loads(row["messages"][-1]["content"])) for row in generate("train", 50, seed=0)]
    full, first = next((row, ticket) for row, ticket in tickets if None not in ticket.values())
    bare = next(
        row
        for row, ticket in tickets
        if ticket["order"] is ticket["request"] is None and ticket["issue"] != first["issue"]
    )
    return full, bare


def _draw_row(words: Words, rng: random.Random) -> Row:
    """Draw one ticket and write it."""
    ticket: Ticket = {
        "name": rng.choice(words.names),
        "product": _draw_product(words, rng),
        "order": _draw_order(words, rng) if rng.random() < _HAS_ORDER else None,
        "issue": rng.choice(ISSUES),
        "request": rng.choice(REQUESTS) if rng.random() < _HAS_REQUEST else None,
    }
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": _write_message(ticket, words, rng)},
            {"role": "assistant", "content": json.dumps(ticket, separators=(",", ":"))},
        ]
    }


def _draw_product(words: Words, rng: random.Random) -> str:
    """Return an invented product, such as ``"Kelfex Mini lamp"``."""
    brand = rng.choice(words.brand_starts) + rng.choice(words.brand_ends)
    variant = [rng.choice(words.variants)] if rng.random() < _HAS_VARIANT else []
    return " ".join([brand, *variant, rng.choice(words.things)])


def _draw_order(words: Words, rng: random.Random) -> str:
    """Return five digits whose remainder modulo 5 belongs to the split."""
    return str(5 * rng.randrange(2000, 20000) + rng.choice(words.order_residue))


def _write_message(ticket: Ticket, words: Words, rng: random.Random) -> str:
    """Return the customer's message for ``ticket``."""
    slots = {**_draw_distractor_values(ticket, words, rng), **ticket}
    slots["problem"] = rng.choice(words.problems[str(ticket["issue"])])
    details: list[str] = []
    if ticket["order"] is not None:
        details.append(rng.choice(words.order_mentions))
    if rng.random() < _HAS_DISTRACTOR:
        details.insert(rng.randrange(len(details) + 1), rng.choice(words.distractors))
    frames = [rng.choice(words.reports), *details]
    if ticket["request"] is not None:
        frames.append(rng.choice(words.requests[ticket["request"]]))
    if rng.random() < 0.5:
        frames.insert(0, rng.choice(words.greetings))
    else:
        frames.append(rng.choice(words.signoffs))
    return " ".join(frames).format_map(slots)


def _draw_distractor_values(ticket: Ticket, words: Words, rng: random.Random) -> dict[str, str | None]:
    """Return values for the slots of a distractor; none equals a value of ``ticket``."""
    return {
        "other_name": rng.choice([name for name in words.names if name != ticket["name"]]),
        "other_product": _draw_other(ticket["product"], lambda: _draw_product(words, rng)),
        "other_order": _draw_other(ticket["order"], lambda: _draw_order(words, rng)),
        "city": rng.choice(words.cities),
        "date": rng.choice(words.dates),
    }


def _draw_other(taken: str | None, draw: Callable[[], str]) -> str:
    """Draw until the value differs from ``taken``."""
    value = draw()
    while value == taken:
        value = draw()
    return value
