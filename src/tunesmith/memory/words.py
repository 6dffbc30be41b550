"""What layers keep, in the words of the banner and of ``tunesmith plan``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from tunesmith.engine.policies import Policy

__all__ = ["KEEPING", "describe_policies"]

KEEPING = {
    Policy.NONE: "keep everything",
    Policy.SEL_MLP: "compute gate and up again",
    Policy.SEL_MIN: "compute all but attention again",
    Policy.FULL: "compute everything again",
    Policy.OFFLOAD: "compute everything again, from inputs that wait elsewhere",
}
"""Policy -> what layers with it do."""


def describe_policies(policies: Sequence[Policy]) -> str:
    """Return in words how many layers have which policy."""
    counted = [(policy, len(list(same))) for policy, same in groupby(policies)]
    if len(counted) == 1:
        return f"all layers {KEEPING[counted[0][0]]}"
    return ", ".join(
        f"{count} layers {KEEPING[policy]}" if count > 1 else f"1 layer: {KEEPING[policy]}" for policy, count in counted
    )
