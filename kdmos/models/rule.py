"""The training-free rule as a student: what a learnt one has to beat, and labels where there are no weights."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from kdmos.motion import moving_by_rule
from kdmos.settings import MotionSettings, StudentSettings


class RuleOutput(NamedTuple):
    """point_logits: float [N, 2], static and moving."""

    point_logits: Tensor


class Rule(nn.Module):
    """A point moves if at least half of its published motion channels are non-zero.

    Has what a `Student` offers for prediction: `settings`, `classes`, `moving`, `forward`. It cannot be trained.

    Args:
        motion: Its motion channels; None: the published ones.
    """

    def __init__(self, motion: MotionSettings | None = None) -> None:
        super().__init__()
        self.settings = StudentSettings(classes=("static", "moving"), motion=motion or MotionSettings())
        self.classes, self.moving, self.header = self.settings.classes, self.settings.moving, {}

    def forward(self, points: Tensor, offsets: Tensor, residual: Tensor) -> RuleOutput:
        """As `Student.forward`; the logits are +-4: the rule knows no probabilities."""
        sign = moving_by_rule(residual).to(residual.dtype) * 8 - 4
        return RuleOutput(sign[:, None] * residual.new_tensor([-1.0, 1.0]))
