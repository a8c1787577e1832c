"""The CUDA side of the timing: a clock made of events, graphs of calls, cold inputs, and how much is launched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType

Step = Callable[[], None]
Clock = Callable[[Step, int], float]

# The smallest tensors stay cached all the same; their times are launch overhead whatever the cache holds.
MAX_SETS = 128
# How often a step runs before it is captured, so that nothing is compiled, loaded or tuned during the capture.
WARM_UP = 3


def input_sets(tensor_bytes: int, device: torch.device) -> int:
    """How many inputs to rotate so that twice the L2 cache is read before one comes round again; 1 to MAX_SETS."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_SETS, math.ceil(2 * l2_bytes / max(tensor_bytes, 1)) + 1)


def cuda_clock(device: torch.device, repeats: int = 1) -> Clock:
    """A clock for ``device``: seconds between two events around ``count`` calls on the current stream.

    One pair of events surrounds a whole block, so that the cost of launching shows only where it really is the limit,
    as it is for small tensors in user code. A step that stands for ``repeats`` calls (a graph of them) is charged for
    one.
    """

    def clock(step: Step, count: int) -> float:
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(count):
                step()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / repeats

    return clock


def captured(step: Step, repeats: int, device: torch.device) -> Step:
    """A step that replays a CUDA graph of ``repeats`` calls: the work of the GPU without the cost of calling."""
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(max(WARM_UP, repeats)):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                step()
    return graph.replay


def on_device(events: Iterable[torch.autograd.profiler_util.FunctionEvent]) -> list[str]:
    """The names of what ran on the GPU: kernels, copies and fills, but no ranges that only name a stretch of time."""
    return [e.name for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]


def launched(step: Step, device: torch.device) -> list[str]:
    """The names of the kernels, copies and fills that one call of ``step`` puts on the GPU, by torch.profiler."""
    with torch.cuda.device(device):
        for _ in range(WARM_UP):
            step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
    return on_device(profile.events())


def memory_needed(tensor_bytes: int, sets: int) -> int:
    """The bytes that a point takes at most: inputs and two contenders' gradients for each set, and what a step, a graph
    and the check of the results hold at once."""
    return tensor_bytes * (3 * sets + 16)
