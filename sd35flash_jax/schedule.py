"""Sigmas of the rectified flow: `x_sigma = (1 - sigma) image + sigma noise`, from sigma 1 (noise) to 0 (image)."""

from collections.abc import Sequence

import numpy as np

from sd35flash_jax.config import ScheduleConfig

TRAIN_TIMESTEPS = 1000


def shifted_sigmas(steps: int, shift: float) -> np.ndarray:
    """The sigmas of `steps` evenly spaced steps after the shift, `(steps + 1,)` float32, ending in 0.

    As `FlowMatchEulerDiscreteScheduler` of diffusers computes them, bit for bit: the ends of the training range are
    shifted in float32 once, and the points between them in float64 once more.

    Raises:
        ValueError: `steps` is not in [1, 1000] or `shift` is not positive.
    """
    if not 1 <= steps <= TRAIN_TIMESTEPS:
        raise ValueError(f"steps must be from 1 to {TRAIN_TIMESTEPS}, not {steps}")
    if not shift > 0:
        raise ValueError(f"shift must be positive, not {shift}")
    ends = np.array([TRAIN_TIMESTEPS, 1], np.float32) / np.float32(TRAIN_TIMESTEPS)
    ends = np.float32(shift) * ends / (1 + np.float32(shift - 1) * ends)
    first, last = (float(end) * TRAIN_TIMESTEPS for end in ends)
    sigmas = np.linspace(first, last, steps) / TRAIN_TIMESTEPS
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return np.append(sigmas, 0.0).astype(np.float32)


def unshifted(sigmas: Sequence[float], shift: float) -> list[float]:
    """What `StableDiffusion3Pipeline` of diffusers has to be given as `sigmas` to sample at these: it shifts them."""
    return [sigma / (shift - (shift - 1) * sigma) for sigma in sigmas]


def choose_sigmas(
    schedule: ScheduleConfig, steps: int, sigmas: Sequence[float] | np.ndarray | None = None
) -> np.ndarray:
    """The sigmas to sample with, `(steps + 1,)` float32, ending in 0.

    `sigmas`, where given, takes the place of `steps`: strictly falling in (0, 1], a final 0 optional. Otherwise the
    checkpoint's own schedule for that many steps is used where it has one, and the shifted spacing where it has none.

    Raises:
        ValueError: `steps` or `sigmas` is out of range.
    """
    if sigmas is None:
        sigmas = next((own for own in schedule.sigmas if len(own) == steps), None)
    if sigmas is None:
        return shifted_sigmas(steps, schedule.shift)
    levels = np.asarray(sigmas, np.float32)
    if levels.ndim == 1 and levels.size and levels[-1] != 0:
        levels = np.append(levels, np.float32(0))
    if levels.ndim != 1 or levels.size < 2 or not (levels[0] <= 1 and (np.diff(levels) < 0).all() and levels[-1] == 0):
        raise ValueError(
            f"sigmas must fall strictly within (0, 1], such as 1.0 0.75 0.5 0.25, not {np.asarray(sigmas).tolist()}"
        )
    return levels
