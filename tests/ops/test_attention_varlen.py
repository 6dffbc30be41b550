from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.core.errors import ShapeError
from tunesmith.ops.attention_varlen import attention_varlen, reference
from tunesmith.ops.attention_varlen.cpu import sizes_for

from ..numerics import assert_equal_in_float64, assert_no_worse

BLOCK = sizes_for(8, sharing=2)[1]


def attention_inputs(
    lengths: list[int], *, heads: int = 4, key_heads: int = 2, size: int = 8, value_size: int | None = None, **more: Any
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(lengths))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    tokens = sum(lengths)
    return {
        "query": draw(heads, tokens, size),
        "key": draw(key_heads, tokens, size),
        "value": draw(key_heads, tokens, value_size or size),
        "lengths": lengths,
        "scale": size**-0.5,
        **more,
    }


CASES = {
    "one document": attention_inputs([37]),
    "one token": attention_inputs([1]),
    "documents of one token": attention_inputs([1, 1, 1]),
    "several documents": attention_inputs([5, 1, 42, 13]),
    "one head for all": attention_inputs([11, 7], heads=3, key_heads=1),
    "no grouping": attention_inputs([11, 7], heads=3, key_heads=3),
    "odd sizes": attention_inputs([9, 14], heads=6, key_heads=2, size=5, value_size=3),
    "window": attention_inputs([37, 4, 12], window=5),
    "window of one": attention_inputs([6, 3], window=1),
    "window longer than the documents": attention_inputs([6, 3], window=100),
    "just below a block": attention_inputs([BLOCK - 1], heads=2, key_heads=1, size=4),
    "a whole block": attention_inputs([BLOCK], heads=2, key_heads=1, size=4),
    "just above a block": attention_inputs([BLOCK + 1], heads=2, key_heads=1, size=4),
    "many blocks": attention_inputs([600, 3], heads=2, key_heads=1, size=4),
    "window across blocks": attention_inputs([600, 259], heads=2, key_heads=1, size=4, window=100),
    "window longer than a block": attention_inputs([600], heads=2, key_heads=1, size=4, window=300),
    "documents of like length, computed together": attention_inputs([33, 47, 64, 33, 65, 5, 48, 64]),
    "documents of like length under a window": attention_inputs([33, 47, 64, 5, 48, 64], window=20),
    "softcap": attention_inputs([13, 6], softcap=2.0),
    "sinks": attention_inputs([13, 6], sinks=torch.randn(4, dtype=torch.float64).requires_grad_()),
    "all at once": attention_inputs(
        [13, 6], softcap=2.0, sinks=torch.zeros(4, dtype=torch.float64).requires_grad_(), window=4
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_equal_the_reference(name: str) -> None:
    assert_equal_in_float64(attention_varlen, reference.attention_varlen, CASES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", ["several documents", "documents of like length, computed together", "window across blocks", "many blocks"]
)
def test_as_accurate_as_plain_torch(name: str, dtype: torch.dtype) -> None:
    assert_no_worse(attention_varlen, reference.attention_varlen, CASES[name], dtype)


@pytest.mark.parametrize("name", ["window", "several documents"])
def test_equals_a_loop_over_tokens(name: str) -> None:
    """The reference itself, against the definition written out token by token."""
    given = CASES[name]
    query, key, value = (given[part].detach() for part in ("query", "key", "value"))
    window = given.get("window") or sum(given["lengths"])
    expected = torch.empty(query.shape[1], query.shape[0], value.shape[-1], dtype=torch.float64)
    start = 0
    for length in given["lengths"]:
        for token in range(start, start + length):
            seen = range(max(start, token - window + 1), token + 1)
            for head in range(query.shape[0]):
                group = head // (query.shape[0] // key.shape[0])
                scores = torch.stack([query[head, token] @ key[group, other] for other in seen]) * given["scale"]
                expected[token, head] = scores.softmax(0) @ value[group, list(seen)]
        start += length
    torch.testing.assert_close(attention_varlen(**given).detach(), expected)


def test_gradcheck() -> None:
    given = attention_inputs([3, 1, 5], heads=4, key_heads=2, size=3, window=3)
    fixed = {name: given[name] for name in ("lengths", "scale", "window")}
    assert torch.autograd.gradcheck(
        lambda query, key, value: attention_varlen(query, key, value, **fixed),
        (given["query"], given["key"], given["value"]),
    )


def test_strided_inputs_are_read_right() -> None:
    """As transformers hands them over: (T, H, E) transposed to (H, T, E)."""
    given = attention_inputs([7, 6])
    strided = dict(given)
    for name in ("query", "key", "value"):
        tensor = given[name].detach().transpose(0, 1).contiguous().transpose(0, 1)
        assert not tensor.is_contiguous()
        strided[name] = tensor.requires_grad_()
    assert_equal_in_float64(attention_varlen, reference.attention_varlen, strided)
    assert torch.equal(attention_varlen(**strided), attention_varlen(**given))


@pytest.mark.parametrize("wanted", [("query",), ("key",), ("value",), ("query", "value")], ids=str)
def test_only_the_gradients_that_are_wanted(wanted: tuple[str, ...]) -> None:
    given = attention_inputs([7, 6])
    some = {
        name: value.detach().requires_grad_(name in wanted) if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }
    assert_equal_in_float64(attention_varlen, reference.attention_varlen, some)


def test_a_document_does_not_change_its_neighbour() -> None:
    given = attention_inputs([9, 8])
    before = attention_varlen(**given)
    changed = dict(given)
    for name in ("query", "key", "value"):
        changed[name] = torch.cat([given[name][:, :9] * 3 + 1, given[name][:, 9:]], dim=1)
    after = attention_varlen(**changed)
    assert torch.equal(before[9:], after[9:])
    assert not torch.allclose(before[:9], after[:9])


def test_inputs_are_not_changed() -> None:
    given = attention_inputs([9, 8])
    copies = {name: given[name].detach().clone() for name in ("query", "key", "value")}
    attention_varlen(**given).sum().backward()
    for name, copy in copies.items():
        assert torch.equal(given[name].detach(), copy)


def test_large_scores_stay_finite() -> None:
    given = attention_inputs([20], size=16)
    for name in ("query", "key"):
        given[name] = (given[name].detach().float() * 100).requires_grad_()
    given["value"] = given["value"].detach().float().requires_grad_()
    output = attention_varlen(**given)
    output.sum().backward()
    assert all(torch.isfinite(t).all() for t in (output, given["query"].grad, given["key"].grad, given["value"].grad))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": [3, 3]}, r"document lengths sum to 6, the token axis has 7"),
        ({"key": torch.zeros(3, 7, 8)}, r"query \(4, 7, 8\), key \(3, 7, 8\)"),
        ({"key": torch.zeros(2, 6, 8)}, r"do not fit"),
        ({"value": torch.zeros(2, 6, 8)}, r"do not fit"),
    ],
    ids=["lengths", "heads", "keys", "values"],
)
def test_shapes_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        attention_varlen(**{**attention_inputs([7]), **change})
