"""Which layers keep what, and how many tokens are computed together: the fastest choice that fits the memory.

Every layer starts with keeping all (``none``) and is moved down a ladder none -> sel_mlp -> sel_min -> full, one layer
at a time: a product's output frees the same bytes for each FLOP that making it again costs, so that the order of the
layers does not matter, and attention, the dearest to repeat, comes last. Each rung is tried with each number of tokens,
its peak estimated (``estimate.py``) and its time by the costs below. ``offload`` is the last rung: a file on a CPU.

A plan is a value: the same settings, data and memory give the same plan, and a resumed run takes the plan of the run
that it continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from tunesmith.core.errors import SettingsError
from tunesmith.engine.policies import Policy
from tunesmith.memory.estimate import (
    LIBRARIES_BYTES,
    Estimate,
    MemoryShape,
    PartShape,
    Setting,
    estimate,
    kept_bytes,
    transformers_peak,
)
from tunesmith.memory.words import KEEPING, describe_policies
from tunesmith.memory.work import Work

__all__ = ["Alternative", "TrainingPlan", "check_fits", "plan_training", "unpredicted_plan"]

UNSLOTH_SHARE = 0.7
"""``use_gradient_checkpointing="unsloth"``: at most this share of the peak of transformers' own checkpointing."""
_MARGIN = 1.05
"""A prediction may be too low by this; what is planned to fit leaves as much room."""

_NEARLY = 1.05
"""Less memory is worth nothing where it is less by this."""
_LAYERS_A_DENSE_ONE = 3
"""``use_gradient_checkpointing="unsloth"``: of so many layers at most one keeps its quantized weights written out. The
least that fewer bits save, with 8 of 16, is half of a layer; a third given back leaves the run below a whole base."""

# Rate of matrix products over tokens computed together, 1 = the largest. float32, AMD EPYC with AVX2, 2 threads: a
# forward and backward of SmolLM2-135M at 512 tokens runs at 0.93 of the rate at 1,024 and above.
_RATE = {64: 0.6, 128: 0.75, 256: 0.85, 512: 0.93, 1024: 1.0}
# GFLOP/s of products and of attention, GB/s at which fresh memory is had (a page is cleared before it is given), by
# device and bytes of a value. CPU: two threads of a server, AVX2 or AMX. GPU: in 16 bits what an H200 reached in a step
# of an 8B shape, published rates in the others.
_SPEED = {
    ("cpu", 2): (1500.0, 150.0, 5.0),
    ("cpu", 4): (100.0, 40.0, 5.0),
    ("cpu", 8): (50.0, 20.0, 5.0),
    ("cuda", 2): (700e3, 300e3, 4000.0),
    ("cuda", 4): (50e3, 30e3, 3000.0),
    ("cuda", 8): (30e3, 20e3, 3000.0),
}
_DISK_GBPS, _HOST_GBPS = 0.5, 50.0
# Seconds that Python takes to launch forward and backward of one layer; 0.14 to 0.21 for 30 were measured.
_LAUNCH_S = 0.15 / 30
_MOST_HOST_BOUND = 2**16
_LADDER = (Policy.NONE, Policy.SEL_MLP, Policy.SEL_MIN, Policy.FULL)
_FIXED = {False: Policy.NONE, True: Policy.FULL, "selective": Policy.SEL_MIN, "offload": Policy.OFFLOAD}
_CPU_TOKENS = (512, 1024, 2048, 4096)
_GPU_TOKENS = (16384, 8192, 4096, 2048, 1024)


@dataclass(frozen=True, slots=True)
class Alternative:
    """One choice that was looked at."""

    policies: str
    part_tokens: int | None
    peak: int
    slowdown: float
    fits: bool


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What a run does with the memory there is.

    Attributes:
        mode: ``use_gradient_checkpointing`` as it was asked for.
        policies: what each layer keeps.
        part_tokens: most tokens computed together; None computes micro-batches as they are.
        parts: bytes by part at the peak of a step.
        phases: peaks of loading, evaluation and saving.
        peak: the predicted peak of the run.
        budget: the bytes that it had to stay below, or None.
        reason: why this choice, in one sentence.
        alternatives: the choices that were looked at, the fastest first.
        advice: the cheapest change that fits, when nothing that was asked for does.
        lanes: parts of what is computed together that threads compute side by side.
        dense: layers whose quantized weights stay written out, where every layer keeps all.
        host_bound: tokens of a part up to which a GPU computes for less time than it takes to launch its kernels.
    """

    mode: bool | str
    policies: tuple[Policy, ...]
    part_tokens: int | None
    parts: dict[str, int]
    phases: dict[str, int]
    peak: int
    budget: int | None
    reason: str
    tokens: int = 0
    alternatives: tuple[Alternative, ...] = ()
    advice: str | None = None
    least: int = 0
    lanes: int = 1
    dense: int = 0
    host_bound: int = 0

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is below the budget."""
        return self.advice is None

    def describe(self) -> str:
        """Return in words what is kept: ``"12 layers keep everything, 18 layers compute gate and up again"``."""
        whole = self.dense == len(self.policies)
        layers = "all layers" if whole else f"{self.dense} layers"
        dense = f", and the quantized weights of {layers} written out" if self.dense else ""
        return describe_policies(self.policies) + dense

    def together(self) -> str:
        """Return what is computed together in words: ``"at most 512 tokens, in 2 lanes side by side"``."""
        tokens = "whole micro-batches" if self.part_tokens is None else f"at most {self.part_tokens:,} tokens"
        return f"{tokens}, in {self.lanes} lanes side by side" if self.lanes > 1 else tokens

    def record(self) -> dict[str, Any]:
        """Return JSON values, from which :meth:`restored` makes the same choice again."""
        values = asdict(self)
        values["policies"] = [str(policy) for policy in self.policies]
        return values

    def restored(self, record: dict[str, Any]) -> TrainingPlan:
        """Return this plan with the choice that ``record`` holds: that of the run which is continued."""
        chosen = tuple(Policy(name) for name in record["policies"])
        # Records of older runs have no lanes: they had one.
        record = {"lanes": 1, "dense": 0, "host_bound": 0, **record}
        names = ("part_tokens", "lanes", "dense", "host_bound")
        if chosen == self.policies and all(record[name] == getattr(self, name) for name in names):
            return self
        same = {name: record[name] for name in (*names, "parts", "phases", "peak", "reason", "tokens")}
        return replace(self, policies=chosen, alternatives=(), advice=None, **same)


def plan_training(
    shape: MemoryShape,
    work: Work,
    *,
    mode: bool | str,
    memory: int | None = None,
    present: int | None = None,
    peak_so_far: int = 0,
    state_bytes: int = 8,
    splits: bool = True,
    lanes: int = 1,
) -> TrainingPlan:
    """Choose policies and tokens computed together.

    Args:
        mode: ``use_gradient_checkpointing``. "unsloth": the fastest mix with at most 0.7 of the peak of transformers'
            own checkpointing; "auto": the fastest that fits; the others have one policy, and only tokens are chosen.
        memory: bytes that the whole run may have.
        present, peak_so_far: what this process holds and has held, with base and adapter loaded; None before that.
        state_bytes: optimizer state of one trained parameter.
        splits: whether micro-batches may be cut at all.
        lanes: parts that can be computed side by side (``training/lanes.py``).
    """
    planner = _Planner(shape, work, present, peak_so_far, state_bytes, lanes if splits else 1)
    limit = None if memory is None else int(memory / _MARGIN)
    tried = [
        planner.try_out(policies, tokens)
        for tokens in _token_choices(shape.kind, work, splits)
        for policies in _policy_choices(shape, mode)
    ]
    tried.sort(key=lambda choice: (choice.time, choice.estimate.peak))
    least = min(tried, key=lambda choice: choice.estimate.peak)
    fitting = [choice for choice in tried if limit is None or choice.estimate.peak <= limit]
    budget, advice, room = limit, None, 0
    if not fitting and lanes > 1:
        # In one piece a step needs fewer buffers and one set of gradients.
        return plan_training(
            shape, work, mode=mode, memory=memory, present=present, peak_so_far=peak_so_far, state_bytes=state_bytes,
            splits=splits,
        )  # fmt: skip
    if not fitting:
        chosen = least
        advice = _cheapest_change(shape, work, mode, limit or 0, planner)
        reason = f"the least memory that use_gradient_checkpointing={mode!r} can do with"
    elif mode == "unsloth":
        chosen, budget, room, reason = _saver(fitting, shape, work, state_bytes, present, limit)
    else:
        chosen, room = fitting[0], limit or 0
        reason = (
            "the fastest that fits the memory"
            if mode == "auto"
            else f"use_gradient_checkpointing={mode!r} was asked for"
        )
    # Of a share of transformers' peak no more than the memory that there is.
    room = 0 if limit is None else min(room, limit - chosen.estimate.peak)
    most = shape.count // _LAYERS_A_DENSE_ONE if mode == "unsloth" else shape.count
    dense = _layers_to_keep(shape, chosen, room, most)
    chosen = planner.try_out(chosen.policies, chosen.tokens, dense) if dense else chosen
    return TrainingPlan(
        mode=mode,
        policies=chosen.policies,
        part_tokens=chosen.tokens,
        parts=chosen.estimate.parts,
        phases=chosen.estimate.phases,
        peak=chosen.estimate.peak,
        budget=budget,
        reason=reason,
        tokens=chosen.part.tokens,
        alternatives=tuple(_alternatives(tried, tried[0].time, budget)),
        advice=advice,
        lanes=planner.lanes_under(chosen.policies, chosen.tokens),
        dense=dense,
        host_bound=_host_bound(shape, chosen.policies, work),
        least=min(planner.try_out(p, t).estimate.peak for t in _token_choices(shape.kind, work, splits)[:1]
                  for p in _policy_choices(shape, "auto")[-1:]),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Choice:
    policies: tuple[Policy, ...]
    tokens: int | None
    part: PartShape
    estimate: Estimate
    time: float


@dataclass(slots=True)
class _Planner:
    shape: MemoryShape
    work: Work
    present: int | None
    peak_so_far: int
    state_bytes: int
    lanes: int = 1
    _parts: dict[Any, PartShape] = field(default_factory=dict)
    _lanes: dict[int | None, int] = field(default_factory=dict)

    def lanes_under(self, policies: tuple[Policy, ...], tokens: int | None) -> int:
        """Return the lanes that a run has: a file of offloaded inputs has one reader, and some parts are too short."""
        if Policy.OFFLOAD in policies or self.lanes == 1:
            return 1
        if tokens not in self._lanes:
            is_cut = self.work.has_even_parts(tokens, self.lanes, width=self.shape.hidden)
            self._lanes[tokens] = self.lanes if is_cut else 1
        return self._lanes[tokens]

    def try_out(self, policies: tuple[Policy, ...], tokens: int | None, dense: int = 0) -> _Choice:
        """Estimate one choice, with the quantized weights of ``dense`` layers written out."""
        for of in ("batches", "evaluated"):
            if (of, tokens) not in self._parts and getattr(self.work, of):
                self._parts[of, tokens] = self.work.largest(tokens, of=of)
        part = self._parts["batches", tokens]
        found = estimate(
            self.shape,
            part,
            Setting(policies, self.state_bytes, self.lanes_under(policies, tokens), dense),
            present=self.present,
            peak_so_far=self.peak_so_far,
            evaluated=self._parts.get(("evaluated", tokens)),
        )
        return _Choice(policies, tokens, part, found, _time(self.shape, policies, part, self.work))


def _token_choices(kind: str, work: Work, splits: bool) -> list[int | None]:
    """Return the numbers of tokens to try: on a CPU small ones, on a GPU whole micro-batches and what is below."""
    if not splits or not work.batches:
        return [None]
    whole = max(sum(length for length, _ in batch) for batch in work.batches)
    if kind == "cuda":
        return [None, *(tokens for tokens in _GPU_TOKENS if work.longest <= tokens < whole)]
    smallest = max(_CPU_TOKENS[0], -(-work.longest // 64) * 64)
    larger = [tokens for tokens in _CPU_TOKENS if smallest < tokens and tokens < 2 * whole]
    return [smallest, *larger]


def _policy_choices(shape: MemoryShape, mode: bool | str) -> list[tuple[Policy, ...]]:
    """Return the mixes of a mode, from the most that is kept to the least."""
    if isinstance(mode, Policy):
        return [(mode,) * shape.count]
    if mode in _FIXED:
        return [(_FIXED[mode],) * shape.count]
    if not shape.layers:
        return [(Policy.FULL,) * shape.count]  # transformers recomputes all or nothing
    mixes = [(_LADDER[0],) * shape.count]
    for richer, leaner in pairwise(_LADDER):
        mixes += [(leaner,) * k + (richer,) * (shape.count - k) for k in range(1, shape.count + 1)]
    return [*mixes, (Policy.OFFLOAD,) * shape.count] if mode == "auto" else mixes


def _saver(
    fitting: list[_Choice],
    shape: MemoryShape,
    work: Work,
    state_bytes: int,
    present: int | None,
    limit: int | None,
) -> tuple[_Choice, int | None, int, str]:
    """Return the choice of "unsloth", its budget, the room that it leaves and the reason."""
    theirs, activations = transformers_peak(shape, *work.padded, state_bytes=state_bytes)
    # Compared without what this process happens to hold, so that the same settings give the same plan anywhere.
    held = 0 if present is None else present
    budget = int(UNSLOTH_SHARE * theirs)

    def alone(choice: _Choice) -> int:
        return choice.estimate.step - (0 if present is None else held - _standing(shape))

    below = [choice for choice in fitting if alone(choice) <= budget]
    if below:
        room = budget - alone(below[0])
        reason = f"the fastest below {UNSLOTH_SHARE:g} of the peak of transformers' own checkpointing"
        return below[0], budget, room, reason
    share = int(UNSLOTH_SHARE * activations)
    below = [choice for choice in fitting if choice.estimate.activations <= share]
    if below:
        reason = (
            f"the weights alone come near {UNSLOTH_SHARE:g} of the peak of transformers' own checkpointing; the "
            f"fastest below {UNSLOTH_SHARE:g} of what it adds to them"
        )
        return below[0], limit, 0, reason
    least = min(choice.estimate.peak for choice in fitting)
    near = [choice for choice in fitting if choice.estimate.peak <= _NEARLY * least]
    reason = f"the fastest within {_NEARLY - 1:.0%} of the least memory: steps are small beside the rest"
    return near[0], limit, 0, reason


def _layers_to_keep(shape: MemoryShape, choice: _Choice, room: int, most: int) -> int:
    """Return how many layers' quantized weights stay written out in half of ``room``, where all else is kept already.

    Writing them out costs less than anything that a policy computes again. At most ``most`` do.
    """
    size = shape.quantized * shape.itemsize
    if not size or any(policy is not Policy.NONE for policy in choice.policies):
        return 0
    return max(0, min(room // 2 // size, most))  # room is below 0 where nothing fits


def _standing(shape: MemoryShape) -> int:
    return shape.base_bytes + shape.trained_bytes + (LIBRARIES_BYTES if shape.kind == "cpu" else 0)


def _time(shape: MemoryShape, policies: Sequence[Policy], part: PartShape, work: Work) -> float:
    """Return about how many seconds a token takes: products, what is computed again, fresh memory, offload."""
    gemm, attention, fresh = _SPEED[shape.kind, shape.itemsize if shape.itemsize in (2, 4, 8) else 2]
    products = _layer_products(shape)
    mean = work.tokens / max(1, sum(len(batch) for batch in work.batches))
    scores = 2.0 * mean * shape.heads * shape.head_dim
    flops, slow, moved = 0.0, 0.0, 0.0
    for policy in policies:
        again = {Policy.NONE: 0.0, Policy.SEL_MLP: products[2]}.get(policy, sum(products[:3]))
        flops += 2 * sum(products) + again
        slow += 3.5 * scores + (scores if policy in (Policy.FULL, Policy.OFFLOAD) else 0.0)
        moved += shape.hidden * shape.itemsize if policy is Policy.OFFLOAD else 0.0
    tokens = max(1, part.tokens)
    kept = kept_bytes(shape, part, policies) / tokens
    share = sum(rows for batch in work.batches for _, rows in batch) / max(1, work.tokens)
    flops += 4 * shape.vocabulary * shape.hidden * share
    seconds = flops / (gemm * 1e9 * _rate(shape.kind, tokens)) + slow / (attention * 1e9) + kept / (fresh * 1e9)
    return seconds + 2 * moved / ((_DISK_GBPS if shape.kind == "cpu" else _HOST_GBPS) * 1e9)


def _host_bound(shape: MemoryShape, policies: Sequence[Policy], work: Work) -> int:
    """Return the most tokens of a part that are computed in less time than launching their kernels takes."""
    if shape.kind != "cuda" or not shape.layers:
        return 0

    def is_waited_for(tokens: int) -> bool:
        return tokens * _time(shape, policies, PartShape((tokens,), tokens), work) < _LAUNCH_S * shape.count

    return _largest(is_waited_for, _MOST_HOST_BOUND)


def _layer_products(shape: MemoryShape) -> tuple[float, float, float, float]:
    """Return the FLOPs a token of the products q k v, o, gate up, down of one layer."""
    attention = shape.heads * shape.head_dim
    qkv = attention + 2 * shape.key_heads * shape.head_dim
    hidden = shape.hidden
    return 2.0 * hidden * qkv, 2.0 * hidden * attention, 4.0 * hidden * shape.ffn, 2.0 * hidden * shape.ffn


def _rate(kind: str, tokens: int) -> float:
    """Return the rate of products at ``tokens``, between the entries of the table on a straight line."""
    if kind == "cuda":
        return tokens / (tokens + 1500)  # kernels too short to fill the card
    points = sorted(_RATE.items())
    if tokens <= points[0][0]:
        return points[0][1]
    for (low, slow), (high, fast) in pairwise(points):
        if tokens <= high:
            return slow + (fast - slow) * (tokens - low) / (high - low)
    return points[-1][1]


def _alternatives(tried: list[_Choice], fastest: float, budget: int | None) -> Iterator[Alternative]:
    """Yield the choices with one policy for all layers."""
    for choice in tried:
        if len(set(choice.policies)) == 1:
            fits = budget is None or choice.estimate.peak <= budget
            name = KEEPING[choice.policies[0]]
            yield Alternative(name, choice.tokens, choice.estimate.peak, choice.time / fastest, fits)


def _cheapest_change(shape: MemoryShape, work: Work, mode: bool | str, limit: int, planner: _Planner) -> str:
    """Return the change that costs the least and makes the run fit, in one sentence."""
    tokens = _token_choices(shape.kind, work, True)

    def fits(policies: tuple[Policy, ...], **changes: Any) -> bool:
        other = replace(planner, _parts={}, **changes)
        choices = _token_choices(shape.kind, other.work, True) if changes else tokens
        return any(other.try_out(policies, count).estimate.peak <= limit for count in choices)

    mixes = _policy_choices(shape, "auto")
    if mode not in ("auto", "offload") and shape.layers:
        if any(fits(mix) for mix in mixes[:-1]):
            return "use_gradient_checkpointing='auto' fits: it computes again as much as it has to."
        if fits(mixes[-1]):
            return "use_gradient_checkpointing='offload' fits: inputs of layers go to a file, a little slower."
    if not shape.layers and mode is False and fits((Policy.FULL,) * shape.count):
        return "use_gradient_checkpointing=True fits: layers are computed again in the backward pass."
    leanest = mixes[-1]
    libraries = planner.try_out(leanest, tokens[0]).estimate.parts.get("libraries", 0)
    if libraries > limit:
        return (
            f"no setting fits: Python, the libraries and the data alone take {libraries / 2**20:,.0f} MiB. Give the "
            "run more memory."
        )
    length = _largest(lambda count: fits(leanest, work=_cut(work, count)), work.longest)
    if length >= 128:
        return f"max_length={length} with use_gradient_checkpointing='auto' fits: longer rows are dropped or cut."
    for division in (2, 4, 8):
        smaller = replace(shape, trained=shape.trained // division, trained_bytes=shape.trained_bytes // division)
        if fits(leanest, shape=smaller, work=_cut(work, 128)):
            return f"a rank r {division} times smaller with max_length=128 fits."
    if shape.itemsize > 2:
        return "no setting fits in this dtype: dtype='bfloat16' halves the weights, or take a smaller model."
    return "no setting fits: the weights alone need nearly all of it. Take a smaller model."


def _largest(is_enough: Callable[[int], bool], most: int) -> int:
    """Return the largest multiple of 64 up to ``most`` for which ``is_enough``, or 0."""
    low, high = 0, most // 64
    while low < high:
        middle = (low + high + 1) // 2
        if is_enough(64 * middle):
            low = middle
        else:
            high = middle - 1
    return 64 * low


def _cut(work: Work, length: int) -> Work:
    """Return the work without what is longer than ``length``."""

    def cut(batches: Sequence[Sequence[tuple[int, int]]]) -> list[list[tuple[int, int]]]:
        return [[(min(own, length), min(rows, length)) for own, rows in batch] for batch in batches]

    batches = cut(work.batches)
    whole = max((sum(own for own, _ in batch) for batch in batches), default=1)
    return replace(work, batches=batches, evaluated=cut(work.evaluated), whole=min(work.whole, whole))


def unpredicted_plan(mode: bool | str, reason: str) -> TrainingPlan:
    """Return the plan of a run whose memory is not predicted: transformers recomputes all layers or none."""
    policy = Policy.NONE if mode is False else Policy.FULL
    return TrainingPlan(mode, (policy,), part_tokens=None, parts={}, phases={}, peak=0, budget=None, reason=reason)


def check_fits(plan: TrainingPlan, memory: int) -> None:
    """Refuse a run whose smallest possible peak is above the memory there is.

    Raises:
        SettingsError: with the predicted peak, the memory and the cheapest change that fits.
    """
    if plan.advice is None or min(plan.least, plan.peak) <= memory:
        return
    raise SettingsError(
        f"the run needs {plan.peak / 2**30:.2f} GiB at its peak and there are {memory / 2**30:.2f} GiB. {plan.advice} "
        "`tunesmith plan` shows where the memory goes."
    )
