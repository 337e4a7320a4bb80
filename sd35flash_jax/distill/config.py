"""The recipe's numbers: one typed TOML file, and overrides of single values."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from sd35flash_jax.config import Count, Positive, Size

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Level = Annotated[float, Field(gt=0.0, le=1.0)]


@dataclass(frozen=True)
class TrajectoryConfig:
    """Stage (a), trajectory guidance."""

    updates: Count = 2000
    learning_rate: Positive = 1e-6


@dataclass(frozen=True)
class MatchingConfig:
    """Stage (b), distribution matching with the adversary; stage (c) goes on with it.

    `points`: "shared" compares the scores at the student's own trajectory points and timesteps (SD3.5-Flash),
    "renoised" at re-noised clean estimates (DMD2). `guidance` is the teacher's; `guidance_term` "joint" takes guided
    scores, "decoupled" gives the guidance term a noise level of its own (Decoupled DMD). `end_sigma` is the level at
    which the last step's end is matched. `proxy_updates` is the two-time-scale ratio (DMD2). An `adversarial_weight`
    of 0 leaves the adversary out.
    """

    updates: Count = 800
    learning_rate: Positive = 1e-6
    proxy_learning_rate: Positive = 1e-6
    head_learning_rate: Positive = 1e-4
    proxy_updates: Size = 5
    points: Literal["shared", "renoised"] = "shared"
    guidance: Annotated[float, Field(ge=1.0, allow_inf_nan=False)] = 4.0
    guidance_term: Literal["joint", "decoupled"] = "joint"
    end_sigma: Level = 0.02
    adversarial_weight: Weight = 0.05
    head_size: Size = 256
    reinitialise: Probability = 0.005


@dataclass(frozen=True)
class SplitConfig:
    """Stage (c), split-timestep fine-tuning: `updates` for each branch, the decay of its average, and the weight of
    the branch of timesteps up to 500 in the merged student. 0 updates leave the stage out."""

    updates: Count = 400
    ema: Probability = 0.99
    low_weight: Probability = 0.3
