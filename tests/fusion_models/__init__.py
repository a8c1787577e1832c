"""Models as people write them, for tests that compare native, converted and fused ones.

Each forward is a way of writing batch norm and what follows it; `fused` counts the passes that one call of the fused
model computes by the fused operator, 0 where nothing may fuse. Inputs are (N, C) for all of them.
"""

from . import control, outsiders, residuals, sequentials, writing
from .base import MODELS, C

__all__ = ["MODELS", "C", "control", "outsiders", "residuals", "sequentials", "writing"]
