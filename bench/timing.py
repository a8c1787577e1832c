"""Timing several functions against each other, in blocks that take turns.

Sequential measurements drift: clocks, other processes and the state of the allocator move between them. Here every
round times one short block of each contender, in an order shuffled anew, so that a drift meets all of them alike.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Step = Callable[[], None]
# Runs a step some number of times and returns the seconds that all of them took together.
Clock = Callable[[Step, int], float]


@dataclass(frozen=True)
class Plan:
    """How long to measure: seconds of one block, seconds over all contenders, and the least and most rounds."""

    block: float
    budget: float
    min_rounds: int
    max_rounds: int = 200


@dataclass(frozen=True)
class Times:
    """Seconds of one call: the median over the rounds, the 20th and 80th percentile, and the number of rounds."""

    median: float
    p20: float
    p80: float
    rounds: int


def cpu_clock(step: Step, count: int) -> float:
    """Seconds that ``count`` calls take by the wall clock."""
    repeat = itertools.repeat(None, count)
    start = time.perf_counter()
    for _ in repeat:
        step()
    return time.perf_counter() - start


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep the cyclic collector, whose pauses hit whoever happens to run, out of a measurement."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def calibrate(step: Step, clock: Clock, block: float) -> int:
    """How many calls fill ``block`` seconds; warms the step up on the way."""
    clock(step, 1)
    count = 1
    while True:
        seconds = clock(step, count)
        if seconds >= block / 4 or count >= 1 << 20:
            return max(1, round(count * block / max(seconds, 1e-9)))
        count *= 4


def percentile(values: list[float], fraction: float) -> float:
    """The value below which ``fraction`` of ``values`` lie, interpolated between neighbours."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def race(steps: dict[str, Step], clock: Clock, plan: Plan) -> dict[str, Times]:
    """Time every step against the others; the result has the same keys."""
    shuffle = random.Random(0)
    with no_garbage_collection():
        counts = {name: calibrate(step, clock, plan.block) for name, step in steps.items()}
        samples: dict[str, list[float]] = {name: [] for name in steps}
        order = list(steps)
        deadline = time.perf_counter() + plan.budget
        for done in range(plan.max_rounds):
            if done >= plan.min_rounds and time.perf_counter() >= deadline:
                break
            shuffle.shuffle(order)
            for name in order:
                # The contender before left its own marks in caches and allocator; one untimed call brings ours back.
                steps[name]()
                samples[name].append(clock(steps[name], counts[name]) / counts[name])
    return {
        name: Times(statistics.median(v), percentile(v, 0.2), percentile(v, 0.8), len(v)) for name, v in samples.items()
    }
