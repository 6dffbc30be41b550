"""Pure functions on tensors: no module, no global state. One folder an op, each with a readable reference.

``explain(op, x)`` says which implementation runs on a tensor, and why.
"""

from __future__ import annotations

from tunesmith.ops.dispatch import explain

__all__ = ["explain"]
