"""Causal attention over documents of one length through cuDNN: on Hopper half the time of flash attention.

Measured on an H200 (torch 2.11, 32/8 heads of 128): one document of 8,192 tokens takes 0.90 ms forward and 2.63 ms
backward where flash attention takes 1.70 and 4.78; sixteen of 512 take 0.10 and 0.44 against 0.24 and 0.64. But cuDNN
prepares itself for every shape, for 0.1 s. So a shape goes to flash attention until what that cost is what preparing
costs: a shape that never comes back costs nothing, one that does at most twice the best. cuDNN's form for documents of
unlike lengths prepares itself in every call (42 ms) and is of no use.

cuDNN has computed wrong results in silence (pytorch issue 193893), so for each kind of heads its first results are
compared with those of flash attention on the same data, forward and backward; where they differ it is not used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from tunesmith.ops.attention_varlen.documents import Documents, Lengths

__all__ = ["agrees", "backward", "documents_for", "forward", "is_able"]

_log = logging.getLogger(__name__)

_LARGEST_HEAD = 128
_PREPARING_SECONDS = 0.1
# What flash attention computes a second there, and the part of its time that cuDNN saves.
_FLASH_FLOPS, _SAVED = 3e14, 0.45
# Largest norm of a difference to flash attention, of the norm. Both round to 8 bits: 0.002 to 0.004 were seen.
_ALLOWED = 0.02
_MOST_SHAPES = 1024

_lost: dict[tuple[object, ...], float] = {}
_agreed: dict[tuple[object, ...], bool] = {}


def is_able(device: torch.device) -> bool:
    """Return whether cuDNN is there, faster and wanted."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and torch.backends.cudnn.is_available()
        and torch.backends.cuda.cudnn_sdp_enabled()
        # Its gradients are summed in no fixed order, and preparing cannot be recorded.
        and not torch.are_deterministic_algorithms_enabled()
        and not torch.cuda.is_current_stream_capturing()
    )


def documents_for(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Lengths, *, window: int | None
) -> int:
    """Return how many documents cuDNN is to compute now, 0 for none of them; counts what that costs.

    ``query`` (T, H, E), ``key`` and ``value`` (T, K, E) that flash attention can compute.
    """
    known = lengths.lengths if isinstance(lengths, Documents) else lengths
    if known is None or not known or len(set(known)) > 1 or (window is not None and window < known[0]):
        return 0
    size = query.shape[2]
    if size > _LARGEST_HEAD or not all(_is_aligned(x) for x in (query, key, value)) or not is_able(query.device):
        return 0
    if not all(_agreed.get((what, *_kind(query, key)), True) for what in ("forward", "backward")):
        return 0
    shape = (*_kind(query, key), len(known), known[0])
    lost = _lost.get(shape, 0.0)
    if lost < _PREPARING_SECONDS:
        if len(_lost) >= _MOST_SHAPES:
            _lost.clear()
        # Two products forward and five backward over half of each square, 2 FLOP each.
        flops = 7 * query.shape[1] * size * len(known) * known[0] ** 2
        _lost[shape] = lost + _SAVED * flops / _FLASH_FLOPS
        return 0
    return len(known)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: int, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output (T, H, E) and the log-sum-exp (documents, H, T / documents, 1) in float32."""
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(_apart(x, documents) for x in (query, key, value)), None, True, 0.0, True, False, scale=scale
    )
    return _joined(found[0]), found[1]


def backward(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sum_exp: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of query, key and value, of their shapes."""
    documents, _, length, _ = log_sum_exp.shape
    # The state of the random numbers is read with dropout only.
    unused = torch.empty((), dtype=torch.int64, device=query.device)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(_apart(x if _is_aligned(x) else x.contiguous(), documents) for x in (dout, query, key, value, out)),
        log_sum_exp, unused, unused, None, None, None, length, length, 0.0, True, scale=scale,
    )  # fmt: skip
    return tuple(_joined(grad) for grad in found)


def agrees(
    what: str,
    query: torch.Tensor,
    key: torch.Tensor,
    found: Sequence[torch.Tensor],
    expected: Callable[[], Sequence[torch.Tensor]],
) -> bool:
    """Return whether results ("forward" or "backward") for this kind of heads are those of flash attention.

    ``expected`` is called the first time only.
    """
    kind = (what, *_kind(query, key))
    if kind not in _agreed:
        apart = [float((ours - theirs).float().norm() / theirs.float().norm().clamp(min=1e-30))
                 for ours, theirs in zip(found, expected(), strict=True)]  # fmt: skip
        _agreed[kind] = all(difference <= _ALLOWED for difference in apart)
        if not _agreed[kind]:
            _log.warning(
                "cuDNN's attention (%s, %d/%d heads of %d, %s) differs from flash attention's by %.2g of its norm and "
                "is not used", what, query.shape[1], key.shape[1], query.shape[2], query.dtype, max(apart),
            )  # fmt: skip
    return _agreed[kind]


def _kind(query: torch.Tensor, key: torch.Tensor) -> tuple[object, ...]:
    return query.device, query.dtype, query.shape[1], key.shape[1], query.shape[2]


def _is_aligned(x: torch.Tensor) -> bool:
    """Return whether every head begins at a multiple of 16 bytes, its values side by side."""
    return x.stride(2) == 1 and not any(step % 8 for step in x.stride()[:2]) and x.data_ptr() % 16 == 0


def _apart(x: torch.Tensor, documents: int) -> torch.Tensor:
    """Return (T, H, E) as (documents, H, T / documents, E), without a copy."""
    return x.unflatten(0, (documents, -1)).transpose(1, 2)


def _joined(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(0, 1)
