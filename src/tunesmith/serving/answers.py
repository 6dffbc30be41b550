"""The answers to one HTTP request: written in the engine's thread, read in the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from tunesmith.serving.choose import Choice
from tunesmith.serving.engine import Engine, Ticket
from tunesmith.serving.metrics import Metrics
from tunesmith.serving.request import Delta, Request
from tunesmith.serving.schema import ApiError

__all__ = ["Answer", "Answers"]


@dataclass(slots=True)
class Answer:
    """One whole answer."""

    text: str = ""
    choices: list[Choice] = field(default_factory=list)
    finish: str = ""

    def take(self, delta: Delta) -> None:
        """Add a part."""
        self.text += delta.text
        self.choices += delta.choices
        self.finish = delta.finish or ""


class Answers:
    """One or more answers that belong together.

    Make it in the event loop, :meth:`submit` in any thread, read :meth:`parts` or :meth:`whole` in the loop, and
    :meth:`close` it in any case: what is still being written then ends.

    Args:
        requests: one for each answer.
        began: ``time.perf_counter()`` when the HTTP request came.
        on_close: called once, by the first :meth:`close`.
    """

    def __init__(
        self, requests: Sequence[Request], metrics: Metrics, *, began: float, on_close: Callable[[], None]
    ) -> None:
        self.requests = list(requests)
        self.answer_tokens = 0
        self._metrics, self._began, self._on_close = metrics, began, on_close
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._has_begun = [False] * len(self.requests)
        self._is_closed = False

    def submit(self, engine: Engine) -> None:
        """Hand all to the engine; raises what :meth:`Engine.submit` does."""
        for index, request in enumerate(self.requests):
            ticket = engine.submit(request, partial(self._deliver, index))
            self._tickets.append(ticket)
            # In this order here, and the other way round in close: whichever comes second sees the other.
            if self._is_closed:
                ticket.cancel()

    def close(self) -> None:
        """End what is still being written."""
        if not self._is_closed:
            self._is_closed = True
            self._on_close()
        for ticket in self._tickets:
            ticket.cancel()

    async def parts(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (which answer, its next part) until all have ended.

        Raises:
            ApiError: an answer failed, or the server is cut off.
        """
        left = len(self.requests)
        while left:
            index, delta = await self._parts.get()
            if delta.finish == "error":
                raise ApiError(500, f"the answer failed: {delta.error}", code="answer_failed")
            if delta.finish == "cancelled":
                raise ApiError(503, "the server is stopping and has cut the answer off.", code="stopping")
            self.answer_tokens += len(delta.choices)
            left -= delta.finish is not None
            yield index, delta

    async def whole(self) -> list[Answer]:
        """Return all answers when they have ended. Raises as :meth:`parts` does."""
        answers = [Answer() for _ in self.requests]
        async for index, delta in self.parts():
            answers[index].take(delta)
        return answers

    def _deliver(self, index: int, delta: Delta) -> None:
        seconds = time.perf_counter() - self._began
        if delta.choices and not self._has_begun[index]:
            self._has_begun[index] = True
            self._metrics.first_token.observe(seconds)
        if delta.finish is not None:
            self._metrics.answer.observe(seconds)
        try:
            self._loop.call_soon_threadsafe(self._parts.put_nowait, (index, delta))
        except RuntimeError:  # the loop is closed: the server was cut off and nobody waits any more
            self.close()
