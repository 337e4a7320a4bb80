"""How long a call takes: first call, then the median of many with its quartiles, by the host's clock."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST_RUNS = 3


@dataclass(frozen=True)
class Timing:
    """Seconds. `first` is the first call, with whatever it traces and compiles; the rest is of `runs` later calls."""

    first: float
    median: float
    lower_quartile: float
    upper_quartile: float
    runs: int


def measure(call: Callable[[], Any], repeats: int, seconds: float) -> Timing:
    """Time a call that returns when its work is done: once, once more to warm up, then up to `repeats` times, fewer
    once these have taken `seconds`, but at least `LEAST_RUNS` times."""
    first = duration(call)
    call()
    durations: list[float] = []
    while len(durations) < repeats and (len(durations) < LEAST_RUNS or sum(durations) < seconds):
        durations.append(duration(call))
    lower, median, upper = np.quantile(durations, [0.25, 0.5, 0.75])
    return Timing(first, float(median), float(lower), float(upper), len(durations))


def duration(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
