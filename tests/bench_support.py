"""What the benchmark's tests share: a measurement as its files hold it, and the shortest run."""

from __future__ import annotations

import sys
from typing import Any

from processes import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import timing

TINY = timing.Plan(block=1e-5, budget=0.0, min_rounds=2)


def record(contender: str, low: float, median: float, high: float, **others: Any) -> dict[str, Any]:
    times = {"p20_us": low, "median_us": median, "p80_us": high}
    point = {"shape": [32, 64], "dtype": "float32", "layout": "contiguous", "mode": "eval"}
    return {**point, "contender": contender, **times, **others}
