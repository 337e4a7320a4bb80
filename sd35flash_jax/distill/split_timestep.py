"""Stage (c), split-timestep fine-tuning: two branches of the student are trained apart, on the timesteps (0, 500] and
(500, 1000], each averaged over its updates, and merged by interpolating their weights 3:7 (SD3.5-Flash, arXiv
2509.21318)."""

from typing import Literal

import jax
import numpy as np
from jaxtyping import Array, PyTree

Branch = Literal["low", "high"]

SPLIT_SIGMA = 0.5


def branch_steps(sigmas: np.ndarray, branch: Branch) -> tuple[int, int]:
    """The student's steps that a branch is trained on, as `[first, stop)`: those that start above timestep 500
    ("high"), or at most there ("low").

    Raises:
        ValueError: the branch has no step.
    """
    starts = np.asarray(sigmas)[:-1]
    above = int((starts > SPLIT_SIGMA).sum())
    first, stop = (0, above) if branch == "high" else (above, len(starts))
    if first == stop:
        side = "above" if branch == "high" else "at or below"
        raise ValueError(
            f"no step of the sigmas {starts.round(4).tolist()} starts {side} timestep 500, so that branch has "
            "nothing to learn; leave split-timestep fine-tuning out or choose other sigmas"
        )
    return first, stop


def average(ema: PyTree, params: PyTree, decay: float | Array) -> PyTree:
    """The exponential moving average: `decay ema + (1 - decay) params`."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, ema, params)


def interpolate(low: PyTree, high: PyTree, low_weight: float = 0.3) -> PyTree:
    """The merged student: `low_weight low + (1 - low_weight) high`."""
    return jax.tree.map(lambda one, other: low_weight * one + (1 - low_weight) * other, low, high)
