"""A stretch of training: as many updates as fit before a moment, with a learning rate that falls to zero by then."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

WARM_UP = 0.03
"""The share of a stretch in which the learning rate rises."""


def learning_rate(progress: float, peak: float) -> float:
    """Of an update at `progress` in [0, 1] through the stretch: a linear rise, a plateau, and a fall to zero over the
    second half (arXiv 2405.18392)."""
    rise = min(1.0, progress / WARM_UP)
    fall = min(1.0, 2 * (1 - progress))
    return peak * max(0.0, min(rise, fall))


def train(
    update: Callable[[Any, np.float32, jax.Array], tuple[Any, dict[str, jax.Array]]],
    state: Any,
    until: float,
    peak: float,
    seed: int,
    log: Path,
) -> tuple[Any, int]:
    """Run `state, metrics = update(state, learning rate, key)` until a moment of `time.monotonic`. The first two calls,
    which compile, have a learning rate of zero. Metrics go to a CSV file, and every update is awaited one call later.

    Returns the last state and the number of calls.

    Raises:
        FloatingPointError: a metric is not finite.
        ValueError: the time was over before any call had a learning rate above zero.
    """
    key = jax.random.key(seed)
    log.parent.mkdir(parents=True, exist_ok=True)
    rows, calls, started, pending = [], 0, math.inf, None
    total = max(0, round(until - time.monotonic()))
    with tqdm(total=total, unit="s", desc=log.stem) as bar:
        while (now := time.monotonic()) < until:
            if calls == 2:
                jax.block_until_ready(state)
                started = now = time.monotonic()
            elapsed = max(0.0, now - started)
            rate = learning_rate(elapsed / (until - started), peak) if elapsed else 0.0
            state, metrics = update(state, np.float32(rate), jax.random.fold_in(key, calls))
            if pending is not None:
                rows.append(_row(*pending))
                bar.n = min(round(total - (until - now)), total)
                bar.set_postfix({name: f"{value:.4g}" for name, value in rows[-1].items()})
            pending = (calls, elapsed, rate, metrics)
            calls += 1
    if pending is not None:
        rows.append(_row(*pending))
    if not any(row["rate"] for row in rows):
        raise ValueError(f"the time was over after {calls} calls, before anything was learned; allow more seconds")
    header = list(rows[-1])
    log.write_text("\n".join([",".join(header), *(",".join(f"{row[n]:.6g}" for n in header) for row in rows)]) + "\n")
    return state, calls


def _row(call: int, elapsed: float, rate: float, metrics: dict[str, jax.Array]) -> dict[str, float]:
    values = {name: float(value) for name, value in metrics.items()}
    if not all(map(math.isfinite, values.values())):
        raise FloatingPointError(f"call {call} gave {values}; lower the learning rate")
    return {"call": call, "seconds": elapsed, "rate": rate} | values
