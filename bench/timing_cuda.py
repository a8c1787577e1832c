"""The CUDA side of the timing: a clock made of events, and how many input sets keep the L2 cache cold."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

# Enough for the small tensors too, whose times are launch overhead whatever the cache holds.
MAX_SETS = 32


def input_sets(tensor_bytes: int, device: torch.device) -> int:
    """How many inputs to rotate so that twice the L2 cache is read before one comes round again; 1 to MAX_SETS."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_SETS, math.ceil(2 * l2_bytes / max(tensor_bytes, 1)) + 1)


def cuda_clock(device: torch.device) -> Callable[[Callable[[], None], int], float]:
    """A clock for ``device``: seconds between two events around ``count`` calls on the current stream.

    One pair of events surrounds a whole block, so that the cost of launching shows only where it really is the limit,
    as it is for small tensors in user code.
    """

    def clock(step: Callable[[], None], count: int) -> float:
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(count):
                step()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3

    return clock
