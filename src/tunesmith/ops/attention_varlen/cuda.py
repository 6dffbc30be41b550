"""Causal attention over documents through torch's own variable-length flash attention, for a GPU.

Same functions and arguments as ``cpu.py``, to which everything goes that the kernels do not do; ``supports`` says what
that is. All documents are one call: the kernels read where each begins from int32 offsets on the device. Where the
caller has them there (:class:`Documents`) nothing waits for a copy. Documents of one length that come again and again
go to ``cudnn.py`` where that is faster. Kept for the backward is the log-sum-exp, a float32 a head and token, in the
shape of whichever computed it.
"""

from __future__ import annotations

import functools
import logging

import torch

from tunesmith.ops.attention_varlen import cpu, cudnn
from tunesmith.ops.attention_varlen.documents import Documents, Lengths, bounds_of

__all__ = ["backward", "fits", "forward", "missing", "supports"]

_log = logging.getLogger(__name__)

_LARGEST_HEAD = 256
# The backward adds up to this many rows between documents to its buffers, and counts their values in 32 bits.
_ROWS_BETWEEN = 128
_MOST_VALUES = 2**31


def supports(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Lengths,
    *,
    softcap: float | None = None,
) -> tuple[bool, str]:
    """Return whether the kernels compute this, and why not where they do not.

    ``query`` (T, H, E), ``key`` (T, K, E) and ``value`` (T, K, E').
    """
    tokens, heads, size = query.shape
    reason = missing(query.device)
    if reason:
        return False, reason
    count = len(lengths) if isinstance(lengths, Documents) else sum(map(bool, lengths))
    return fits(query.dtype, heads, size, value.shape[2], tokens, count, softcap)


def missing(device: torch.device) -> str | None:
    """Return what ``device`` lacks for the kernels, or None."""
    if device.type != "cuda":
        return f"{device.type} tensors"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without flash attention"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash attention needs a GPU of compute capability 8.0 or above"
    return None


def fits(
    dtype: torch.dtype, heads: int, size: int, value_size: int, tokens: int, documents: int, softcap: float | None
) -> tuple[bool, str]:
    """Return the answer of :func:`supports` from dtype and sizes alone, on a device that has the kernels."""
    if dtype not in (torch.float16, torch.bfloat16):
        return False, f"flash attention computes in 16 bits, not in {dtype}"
    if softcap is not None:
        return False, "torch's flash attention has no softcap"
    if value_size != size:
        return False, f"heads of {size} for query and key, of {value_size} for value"
    if size > _LARGEST_HEAD or size % 8:
        return False, f"heads of {size}; a multiple of 8 up to {_LARGEST_HEAD} is needed"
    if (tokens + _ROWS_BETWEEN * documents) * heads * size >= _MOST_VALUES:
        return False, f"{tokens} tokens in {documents} documents overflow 32-bit offsets in the backward"
    return True, ""


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Lengths,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Return (T, H, E') and what the backward needs: the log-sum-exp (H, T), or nothing where ``cpu.py`` computed.

    ``query`` (T, H, E), ``key`` (T, K, E) and ``value`` (T, K, E') may be strided. ``out`` costs a copy: torch's op
    makes its own result.
    """
    possible, reason = supports(query, key, value, lengths, softcap=softcap)
    if not possible or not len(query):
        if not possible:
            _note(reason)
        return cpu.forward(query, key, value, lengths, scale=scale, window=window, softcap=softcap, out=out)

    def flash() -> tuple[torch.Tensor, torch.Tensor]:
        return _flash(query, key, value, lengths, scale=scale, window=window)

    documents = cudnn.documents_for(query, key, value, lengths, window=window)
    if documents:
        result, log_sum_exp = cudnn.forward(query, key, value, documents, scale=scale)
        if not cudnn.agrees("forward", query, key, [result], lambda: flash()[:1]):
            result, log_sum_exp = flash()
    else:
        result, log_sum_exp = flash()
    return result if out is None else out.copy_(result), (log_sum_exp,)


def backward(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    kept: tuple[torch.Tensor, ...],
    lengths: Lengths,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dquery: torch.Tensor,
    dkey: torch.Tensor,
    dvalue: torch.Tensor,
) -> None:
    """Write the gradients of query, key and value to ``dquery``, ``dkey`` and ``dvalue``, of their shapes.

    ``out`` and ``kept`` are what forward returned. dQ is summed by atomics, in no fixed order, unless
    ``torch.use_deterministic_algorithms`` is on.
    """
    if not kept:
        cpu.backward(
            dout, query, key, value, out, kept, lengths, scale=scale, window=window, softcap=softcap,
            dquery=dquery, dkey=dkey, dvalue=dvalue,
        )  # fmt: skip
        return
    (log_sum_exp,) = kept

    def flash() -> tuple[torch.Tensor, ...]:
        # (documents, H, length, 1) of cuDNN is (H, T) here.
        rows = log_sum_exp if log_sum_exp.dim() == 2 else log_sum_exp[..., 0].transpose(0, 1).flatten(1).contiguous()
        return _flash_backward(dout, query, key, value, out, rows, lengths, scale=scale, window=window)

    if log_sum_exp.dim() == 4:
        found = cudnn.backward(dout, query, key, value, out, log_sum_exp, scale=scale)
        if not cudnn.agrees("backward", query, key, found, flash):
            found = flash()
    else:
        found = flash()
    for target, grad in zip((dquery, dkey, dvalue), found, strict=True):
        target.copy_(grad)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Lengths, *, scale: float, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output and the log-sum-exp (H, T)."""
    bounds, longest = _bounds(lengths, query.device)
    left, right = _sides(window)
    found = torch.ops.aten._flash_attention_forward(
        _packed(query), _packed(key), _packed(value), bounds, bounds, longest, longest, 0.0, True, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return found[0], found[1]


def _flash_backward(
    dout: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    log_sum_exp: torch.Tensor,
    lengths: Lengths,
    *,
    scale: float,
    window: int | None,
) -> tuple[torch.Tensor, ...]:
    bounds, longest = _bounds(lengths, query.device)
    left, right = _sides(window)
    # The state of the random numbers is read with dropout only.
    unused = torch.empty(2, dtype=torch.uint64, device=query.device)
    return torch.ops.aten._flash_attention_backward(  # type: ignore[no-any-return]
        dout, _packed(query), _packed(key), _packed(value), out, log_sum_exp, bounds, bounds, longest, longest, 0.0,
        True, unused, unused, scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip


def _packed(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` with the values of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sides(window: int | None) -> tuple[int | None, int | None]:
    """Return how many tokens are seen on the left and on the right, beside the token itself; None for all."""
    return (None, None) if window is None else (window - 1, 0)


# Once for a list of lengths, which every layer asks for.
_known_bounds = functools.lru_cache(maxsize=8)(bounds_of)


def _bounds(documents: Lengths, device: torch.device) -> tuple[torch.Tensor, int]:
    return bounds_of(documents, device) if isinstance(documents, Documents) else _known_bounds(documents, device)


@functools.lru_cache(maxsize=16)
def _note(reason: str) -> None:
    """Say once that attention runs in plain torch."""
    _log.warning("attention runs in plain torch, slower: %s", reason)
