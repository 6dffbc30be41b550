"""Answers to many requests at once, from one base and any number of adapters beside it.

One thread runs step after step. A step is one forward pass: a token for every answer that is being written, and parts
of the prompts of those that come next, side by side on one token axis (``attention.py``), each with its own adapter
(``lora.py``). Requests join and leave between two steps, so none waits for another to end.

The layers are those of transformers; only their attention is looked up elsewhere, and the linear modules that adapters
name are wrapped. Before the first request the engine compares its own logits with the plain model's, and refuses a
model that it would answer for differently.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from tunesmith.core.errors import EvaluationError, ModelError, ServingError, TunesmithError
from tunesmith.engine.install import engine_of, install
from tunesmith.models.prompts import Prompt, is_chat, refuse_one_prompt, require_prompt, stop_token_ids
from tunesmith.models.sampling import Sampling
from tunesmith.serving import attention, lora
from tunesmith.serving.adapters import AdapterShelf
from tunesmith.serving.choose import Choice, Chooser, choose
from tunesmith.serving.fit import cache_for, not_served, refuse_kind, slides, spare_bytes, window_of
from tunesmith.serving.lora import Adapter, Routing
from tunesmith.serving.request import Delta, Finish, Request
from tunesmith.serving.text import TextStream

__all__ = ["Counts", "Engine", "Ticket", "made_apart"]

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counts:
    """What an engine has done since it began."""

    prompt_tokens: int = 0
    answer_tokens: int = 0
    steps: int = 0
    finished: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that was taken; the engine's record of its answer.

    Attributes:
        is_cancelled: set it to have the answer end at the next step.
        ends: tokens that end the answer.
        cached: tokens whose keys and values are held.
    """

    request: Request
    adapter: Adapter | None
    deliver: Callable[[Delta], None]
    chooser: Chooser
    text: TextStream
    ends: frozenset[int]
    is_cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def longest(self) -> int:
        """Tokens of prompt and longest answer."""
        return len(self.request.prompt) + self.request.max_new_tokens

    @property
    def is_reading(self) -> bool:
        """Whether a part of the prompt has yet to be read."""
        return self.cached < len(self.request.prompt)

    def cancel(self) -> None:
        """Have the answer end at the next step."""
        self.is_cancelled = True


class Engine:
    """See the head of this file.

    Args:
        model: a causal language model of transformers, without adapters. The engine owns it until :meth:`close`.
        most_sequences: answers that are written at once; others wait.
        most_adapters: adapters whose weights stay in memory.
        memory_bytes: for keys and values; None takes half of what is free (of a GPU four fifths).
        prompt_tokens: tokens of prompts read in a step, beside the answers: more reads prompts sooner and makes the
            answers wait longer. None: 128, on a GPU 2048.
    Raises:
        ModelError: the model is of a kind that cannot be served like this.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        most_sequences: int = 32,
        most_adapters: int = 16,
        memory_bytes: int | None = None,
        prompt_tokens: int | None = None,
    ) -> None:
        refuse_kind(model)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.window = window_of(model)
        embedding = model.get_input_embeddings().weight
        self.device, self._rows = embedding.device, embedding.shape[0]
        on_gpu = self.device.type == "cuda"
        self.shelf = AdapterShelf(model, tokenizer, most_adapters)
        self.counts = Counts()
        self._most = most_sequences
        self._prompt_tokens = prompt_tokens or (2048 if on_gpu else 128)
        self._routing = Routing(self.shelf.holds)
        self._wrapped: set[str] = set()  # modules that add what adapters add
        self._ends = frozenset(stop_token_ids(model, tokenizer))
        self._cache = cache_for(model, self.device)
        self._memory = memory_bytes if memory_bytes is not None else spare_bytes(self.device)
        self._waiting: deque[Ticket] = deque()
        self._active: list[Ticket] = []  # in the order of their slots: first those that are written, then read
        self._changed = threading.Condition()
        self._is_closing = False
        self._failure: BaseException | None = None
        self._plain_attention = model.config._attn_implementation
        # Fused layers are made for training: here they would hand every call on.
        fused = engine_of(model)
        self._was_fused = fused is not None
        if fused is not None:
            fused.revert()
        self._take_over()
        self._thread = threading.Thread(target=self._run, name="tunesmith-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests that were taken and are not being answered yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that are being written."""
        return len(self._active)

    @property
    def is_serving(self) -> bool:
        """Whether requests are taken: false once it closes or has failed."""
        return not self._is_closing

    def submit(self, request: Request, deliver: Callable[[Delta], None]) -> Ticket:
        """Take a request; ``deliver`` is called from the engine's thread with every part of its answer.

        Raises:
            EvaluationError: a value outside its range, or more tokens than the window holds.
            AdapterError: no adapter has that name, or it can no longer be read.
            ServingError: the engine is closing, or the request alone needs more memory than there is.
        """
        faults = request.faults(self.window, self._rows)
        if faults:
            raise EvaluationError(f"the request cannot be served: {'; '.join(faults)}.")
        needed = (len(request.prompt) + request.max_new_tokens) * self._cache.bytes_per_token
        if needed > self._memory:
            raise ServingError(
                f"{len(request.prompt)} tokens of prompt and {request.max_new_tokens} of answer need "
                f"{needed / 2**20:,.0f} MiB for keys and values, and there are {self._memory / 2**20:,.0f}. Ask for "
                "fewer tokens."
            )
        adapter = None if request.adapter is None else self.shelf.get(request.adapter)
        if adapter is not None and not self._wrapped.issuperset(adapter.pairs):
            lora.install(self.model, list(adapter.pairs), self._routing)
            self._wrapped.update(adapter.pairs)
        seed = int.from_bytes(os.urandom(7), "little") if request.seed is None else request.seed
        chooser = Chooser.of(
            request.sampling,
            seed,
            request.prompt,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            top_logprobs=request.top_logprobs,
        )
        context = request.prompt if request.continues else ()
        text = TextStream((adapter and adapter.tokenizer) or self.tokenizer, request.stop, context)
        ticket = Ticket(request, adapter, deliver, chooser, text, (adapter and adapter.ends) or self._ends)
        with self._changed:
            if self._failure is not None:
                raise ServingError(f"the engine has failed: {self._failure!r}. Start it again.")
            if self._is_closing:
                raise ServingError("the engine is closing and takes no more requests.")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def stream(self, request: Request) -> Iterator[Delta]:
        """Yield the parts of one answer; leaving the loop ends it. Raises as :meth:`submit` does."""
        parts: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        ticket = self.submit(request, parts.put)
        try:
            while True:
                delta = parts.get()
                yield delta
                if delta.finish is not None:
                    return
        finally:
            ticket.cancel()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        adapters: Sequence[str | None] | str | None = None,
        max_new_tokens: int = 256,
        sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
        stop: str | Sequence[str] = (),
        seed: int | None = None,
    ) -> list[str]:
        """Return the answers to all prompts, which are written side by side.

        Args:
            adapters: one name for all, or one for each prompt; None: the base alone.
            stop: texts that end an answer and are no part of it, or one such text.
        Raises: see :meth:`submit`; ServingError also where an answer failed.
        """
        refuse_one_prompt(prompts)
        names = [adapters] * len(prompts) if adapters is None or isinstance(adapters, str) else list(adapters)
        results: list[queue.SimpleQueue[Delta]] = [queue.SimpleQueue() for _ in prompts]
        tickets: list[Ticket] = []
        try:
            for row, (prompt, name, result) in enumerate(zip(prompts, names, results, strict=True), 1):
                ids = tuple(require_prompt(self.tokenizer_of(name), prompt, row))
                stops = (stop,) if isinstance(stop, str) else tuple(stop)
                request = Request(ids, max_new_tokens, name, sampling, stops, seed, continues=not is_chat(prompt))
                tickets.append(self.submit(request, result.put))
            return [_text_of(result) for result in results]
        finally:
            # Nobody reads what is still being written where one of them was refused or has failed.
            for ticket in tickets:
                ticket.cancel()

    def tokenizer_of(self, adapter: str | None) -> Any:
        """Return the tokenizer whose template the adapter was trained with. Raises AdapterError for a wrong name."""
        own = None if adapter is None else self.shelf.get(adapter).tokenizer
        return own or self.tokenizer

    def unload(self, name: str) -> None:
        """Forget an adapter; answers that it is writing go on. Raises AdapterError for a wrong name."""
        self.shelf.remove(name)

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, finish those that were taken (or end them), and give the model back as it was."""
        with self._changed:
            self._is_closing = True
            if not drain:
                for ticket in [*self._waiting, *self._active]:
                    ticket.cancel()
            self._changed.notify()
        self._thread.join()
        self._give_back()

    def _give_back(self) -> None:
        """Make the model what it was."""
        lora.uninstall(self.model)
        self.model.set_attn_implementation(self._plain_attention)
        if self._was_fused:
            install(self.model)

    def _take_over(self) -> None:
        """Put our attention into the model, and compare it with the model's own on two sequences of one step."""
        attention.register()
        ids = [[(7 * i + 3) % self._rows for i in range(9)], [(11 * i + 5) % self._rows for i in range(6)]]
        with torch.no_grad():
            device = self.device
            plain = [self.model(torch.tensor([row], device=device), use_cache=False).logits[0].float() for row in ids]
            self.model.set_attn_implementation(attention.NAME)
            try:
                ours = self._probe(ids)
            except (RuntimeError, TypeError, AttributeError, IndexError, ModelError) as error:
                self._give_back()
                raise not_served(self.model, f"{error}") from error
        apart = [(row[-1] - own).norm() / row[-1].norm() for row, own in zip(plain, ours, strict=True)]
        difference = torch.stack(apart).max().item()  # NaN where one is
        if not difference <= (1e-4 if self.model.dtype == torch.float32 else 0.05):
            self._give_back()
            raise not_served(self.model, f"logits differ by {difference:.2g} from those of the plain model")

    def _probe(self, ids: list[list[int]]) -> list[torch.Tensor]:
        """Return the logits after each of two sequences, read in pieces and then token by token."""
        cache = self._cache
        cache.reserve(2, 16)
        first, second = ids
        steps = (
            attention.Step(cache, [], [attention.Piece(0, 0, 5)]),
            attention.Step(cache, [], [attention.Piece(0, 5, 3), attention.Piece(1, 0, 5)]),
            attention.Step(cache, [8, 5], []),
        )
        tokens = (first[:5], first[5:8] + second[:5], [first[8], second[5]])
        for step, row in zip(steps, tokens, strict=True):
            logits = self._forward(row, step, list(range(len(row))))
        cache.clear()
        # The sequences are too short for most windows to show.
        if slides(self.model, self.window) and not any(step.windows - {None} for step in steps):
            raise ModelError("its layers do not say how far back their attention sees (sliding_window)")
        return [logits[0].float(), logits[1].float()]

    def _forward(self, tokens: list[int], step: attention.Step, wanted: list[int]) -> torch.Tensor:
        """Return the logits (len(wanted), V) after the wanted ones of the tokens."""
        output = self.model(
            input_ids=torch.tensor([tokens], device=self.device),
            position_ids=step.positions[None],
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, device=self.device),
            serving=step,
        )
        return output.logits[0]

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._wait_for_work():
                    self._drop_cancelled()
                    self._admit()
                    try:
                        if self._active:
                            self._step()
                    except (RuntimeError, TunesmithError) as error:
                        _log.error("a step failed; its %d answers end", len(self._active), exc_info=error)
                        self._fail(self._active, error)
                        self._active.clear()
                    if not self._active:
                        self._cache.clear()
                        self._routing.clear()
        except BaseException as error:
            self._failure = error
            raise
        finally:
            # Whoever waits for an answer must not wait for ever.
            with self._changed:
                self._is_closing = True
                left = [*self._active, *self._waiting]
                self._waiting.clear()
            self._fail(left, self._failure or ServingError("the engine was closed"))

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; false when the engine is to end."""
        with self._changed:
            while not self._waiting and not self._active:
                if self._is_closing:
                    return False
                self._changed.wait()
        return True

    def _admit(self) -> None:
        """Give slots to waiting requests, first come first served, as long as their longest answers fit."""
        with self._changed:
            while self._waiting and len(self._active) < self._most:
                longest = max(ticket.longest for ticket in [*self._active, self._waiting[0]])
                if (len(self._active) + 1) * longest * self._cache.bytes_per_token > self._memory and self._active:
                    return
                self._active.append(self._waiting.popleft())

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [ticket for ticket in self._waiting if ticket.is_cancelled]
            for ticket in gone:
                self._waiting.remove(ticket)
        for ticket in gone:
            self._end(ticket, "cancelled")
        for ticket in [ticket for ticket in self._active if ticket.is_cancelled]:
            self._finish(ticket, "cancelled")

    def _step(self) -> None:
        """Run one forward pass and hand out what it brought."""
        writing = [ticket for ticket in self._active if not ticket.is_reading]
        tokens = [ticket.tokens[-1] for ticket in writing]
        owners = [ticket.adapter for ticket in writing]
        pieces: list[attention.Piece] = []
        room = self._prompt_tokens
        for slot, ticket in enumerate(self._active[len(writing) :], len(writing)):
            count = min(room, len(ticket.request.prompt) - ticket.cached)
            if count == 0:
                break
            pieces.append(attention.Piece(slot, ticket.cached, count))
            tokens += ticket.request.prompt[ticket.cached : ticket.cached + count]
            owners += [ticket.adapter] * count
            room -= count
        lengths = [ticket.cached for ticket in writing]
        held = [*(length + 1 for length in lengths), *(piece.offset + piece.count for piece in pieces)]
        self._cache.reserve(len(self._active), max(held))
        step = attention.Step(self._cache, lengths, pieces)
        ends = step.last_tokens
        changed = [*writing, *(self._active[piece.slot] for piece in pieces)]
        for ticket, count in zip(changed, [*[1] * len(writing), *(piece.count for piece in pieces)], strict=True):
            ticket.cached += count
        chosen = [(ticket, end) for ticket, end in zip(changed, ends, strict=True) if not ticket.is_reading]
        # A step that reads a part of one long prompt wants no logits; one row is made and not looked at.
        wanted = [end for _, end in chosen] or ends[-1:]
        self._routing.begin(owners, wanted)
        logits = self._forward(tokens, step, wanted)
        self.counts.steps += 1
        self.counts.prompt_tokens += sum(piece.count for piece in pieces)
        if chosen:
            for (ticket, _), choice in zip(chosen, choose(logits, [t.chooser for t, _ in chosen]), strict=True):
                if choice is None:
                    self._finish(ticket, "error", error=self._overflow(ticket.adapter))
                else:
                    self._hand_out(ticket, choice)

    def _overflow(self, adapter: Adapter | None) -> str:
        who = "the base" if adapter is None else f"adapter {adapter.name!r}"
        return (
            f"{who} gives infinite or NaN scores for the next token: its weights are damaged, or too large for "
            f"{str(self.model.dtype).removeprefix('torch.')}. Load it in another dtype, or train it again."
        )

    def _hand_out(self, ticket: Ticket, choice: Choice) -> None:
        """Add a token to an answer, and end the answer where it is over."""
        if choice.token in ticket.ends and not ticket.request.ignore_end:
            self._finish(ticket, "stop", ticket.text.end())
            return
        self.counts.answer_tokens += 1
        ticket.tokens.append(choice.token)
        text = ticket.text.add(choice.token)
        if ticket.text.is_stopped:
            self._finish(ticket, "stop", text, choice)
        elif len(ticket.tokens) == ticket.request.max_new_tokens:
            rest = ticket.text.end()
            self._finish(ticket, "stop" if ticket.text.is_stopped else "length", text + rest, choice)
        else:
            ticket.deliver(Delta(text, (choice,)))

    def _finish(self, ticket: Ticket, why: Finish, text: str = "", *choices: Choice, error: str | None = None) -> None:
        """End an answer and close the gap that it leaves among the slots."""
        gap = self._active.index(ticket)
        if ticket.cached:
            self._cache.forget(gap)
        last = sum(not other.is_reading for other in self._active) - 1
        # The last of those that are written moves into the gap.
        if gap < last:
            self._cache.move(last, gap, self._active[last].cached)
            self._active[gap], gap = self._active[last], last
        # Prompts are read in the order in which they came: they move up by one. All but the first are unread.
        for slot, behind in enumerate(self._active[gap + 1 :], gap + 1):
            if behind.cached:
                self._cache.move(slot, slot - 1, behind.cached)
        del self._active[gap]
        self._end(ticket, why, text, *choices, error=error)

    def _end(self, ticket: Ticket, why: Finish, text: str = "", *choices: Choice, error: str | None = None) -> None:
        self.counts.finished[why] = self.counts.finished.get(why, 0) + 1
        ticket.deliver(Delta(text, choices, why, error))

    def _fail(self, tickets: Sequence[Ticket], error: BaseException) -> None:
        for ticket in tickets:
            self._end(ticket, "error", error=f"{type(error).__name__}: {error}")


def made_apart(make: Callable[[], Engine]) -> Engine:
    """Return the engine that ``make`` loads a model for, made in a thread that ends with it.

    OpenMP keeps a team for every thread that has computed on several cores. Where there are two teams for the same
    cores, libgomp lets their members fall asleep between operations, and the engine's steps take twice as long. The
    team of a thread that has ended is gone.
    """
    with ThreadPoolExecutor(1, "tunesmith-load") as pool:
        return pool.submit(make).result()


def _text_of(parts: queue.SimpleQueue[Delta]) -> str:
    text = ""
    while True:
        delta = parts.get()
        text += delta.text
        if delta.finish == "error":
            raise ServingError(f"an answer failed: {delta.error}")
        if delta.finish is not None:
            return text
