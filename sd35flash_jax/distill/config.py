"""The recipe's numbers: one typed TOML file, and overrides of single values."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from sd35flash_jax.config import Count, Positive, Size, describe_faults
from sd35flash_jax.distill.split_timestep import branch_steps
from sd35flash_jax.schedule import TRAIN_TIMESTEPS

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Level = Annotated[float, Field(gt=0.0, le=1.0)]
Guidance = Annotated[float, Field(ge=1.0, allow_inf_nan=False)]

section = validated(frozen=True, config=ConfigDict(extra="forbid"))
"""A dataclass whose values are checked, and which has no other fields."""


@section
class TrajectoryConfig:
    """Stage (a), trajectory guidance, from `points` of the "teacher"'s trajectory, or of the "student"'s own, from each
    of which the teacher goes on: nothing of it can be cached, and a row of the batch is all steps in place of one. Its
    learning rate falls from `learning_rate` to 0. `optimizer` "adam" has no momentum, as in the other stages; "muon" is
    Muon on the kernels of the blocks. The last `held_out` of the trajectories that are cached are never trained on; the
    averaged student's loss on them is written every `check_every` updates and after the last one."""

    updates: Count = 2000
    points: Literal["teacher", "student"] = "teacher"
    optimizer: Literal["adam", "muon"] = "adam"
    learning_rate: Positive = 1e-6
    held_out: Count = 0
    check_every: Size = 100


@section
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
    guidance: Guidance = 4.0
    guidance_term: Literal["joint", "decoupled"] = "joint"
    end_sigma: Level = 0.02
    adversarial_weight: Weight = 0.05
    head_size: Size = 256
    reinitialise: Probability = 0.005


@section
class SplitConfig:
    """Stage (c), split-timestep fine-tuning: `updates` for each branch, the decay of its average, and the weight of
    the branch of timesteps up to 500 in the merged student. 0 updates leave the stage out."""

    updates: Count = 400
    ema: Probability = 0.99
    low_weight: Probability = 0.3


@section
class TeacherConfig:
    """The teacher: a checkpoint directory, and how it synthesizes trajectories and samples: in `steps` at levels with
    `shift` (the checkpoint's own unless given), for each batch anew, or `cached` of them once, `cache_batch` at a time
    (0 is the training's batch)."""

    checkpoint: str
    steps: Annotated[int, Field(ge=1, le=TRAIN_TIMESTEPS)] = 32
    shift: Positive | None = None
    guidance: Guidance = 4.0
    negative_prompt: str = ""
    cached: Count = 0
    cache_batch: Count = 0


@section
class StudentConfig:
    """The student: the `checkpoint` whose weights it begins with (the teacher's, unless given), its own sigmas, without
    the final 0, and how it is trained: every parameter, or a LoRA of a rank on the teacher (`lora_rank` 0 is every
    parameter). The proxy is trained in the same way, and begins as the teacher."""

    checkpoint: str | None = None
    sigmas: tuple[Level, ...] = (1.0, 0.75, 0.5, 0.25)
    lora_rank: Count = 0


@section
class TrainingConfig:
    """What all stages share. `batch` rows an update, in `micro_batches` parts; sizes are in pixels; a prompt's text
    encoders are each left out with `text_dropout`, and T5 reads the teacher's own number of tokens unless given one;
    gradients are clipped to the norm `clip`; `rematerialise` computes each block's activations again on the way back.
    Checkpoints, sample grids (of `sample_prompts`) and the last `keep` checkpoints count in updates. `keep_stages` also
    writes the students that stages (a) and (b) end with."""

    prompts: str
    output: str
    seed: Count = 0
    batch: Size = 8
    micro_batches: Size = 1
    rematerialise: bool = True
    height: Size = 512
    width: Size = 512
    max_t5_tokens: Size | None = None
    text_dropout: Probability = 0.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    ema: Probability = 0.99
    clip: Positive = 1.0
    checkpoint_every: Size = 100
    keep: Size = 2
    keep_stages: bool = False
    sample_every: Count = 0
    sample_prompts: tuple[str, ...] = ()


@section
class ShardingConfig:
    """Over how many devices each large parameter is cut; all devices there are train, in groups of so many."""

    fsdp: Size = 1


@section
class DistillConfig:
    """A whole distillation: one section of the file for each field."""

    teacher: TeacherConfig
    training: TrainingConfig
    student: StudentConfig = StudentConfig()
    trajectory: TrajectoryConfig = TrajectoryConfig()
    matching: MatchingConfig = MatchingConfig()
    split: SplitConfig = SplitConfig()
    sharding: ShardingConfig = ShardingConfig()


def read_distill_config(path: Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a TOML file, then set single values as `section.key=value`, where a value that is no TOML is a string.

    Raises:
        ValueError: the file is missing or no TOML, an override has no such form, or a value is unknown, missing, of the
            wrong type, out of range or at odds with another; the message names it.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; write a configuration as docs/distillation.md shows") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    for override in overrides:
        _override(data, override)
    return make_distill_config(data, str(path))


def make_distill_config(data: dict[str, Any], source: str) -> DistillConfig:
    """A configuration from its sections, each a dictionary; `source` is what a message calls it.

    Raises:
        ValueError: a value is unknown, missing, of the wrong type, out of range or at odds with another.
    """
    try:
        config = TypeAdapter(DistillConfig).validate_python(data)
    except ValidationError as error:
        raise ValueError(f"{source} is not a valid configuration: {describe_faults(error)}") from None
    _check_consistency(config)
    return config


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    section, dot, name = key.strip().partition(".")
    if not separator or not dot or not isinstance(data.setdefault(section, {}), dict):
        raise ValueError(f"{override!r} sets nothing; write it as section.key=value, such as matching.updates=100")
    try:
        data[section][name] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        data[section][name] = text


def _check_consistency(config: DistillConfig) -> None:
    sigmas = config.student.sigmas
    if not sigmas or sigmas[0] != 1 or any(later >= sigma for sigma, later in zip(sigmas, sigmas[1:])):
        raise ValueError(f"student.sigmas must fall strictly from 1, such as 1.0 0.75 0.5 0.25, not {list(sigmas)}")
    if config.training.batch % config.training.micro_batches:
        raise ValueError(
            f"training.batch {config.training.batch} does not divide into {config.training.micro_batches} micro_batches"
        )
    held_out, part = config.trajectory.held_out, config.training.batch // config.training.micro_batches
    if held_out and held_out >= config.teacher.cached:
        raise ValueError(
            f"trajectory.held_out {held_out} leaves none of teacher.cached {config.teacher.cached} to train on"
        )
    if held_out % part:
        raise ValueError(f"trajectory.held_out {held_out} is not a multiple of {part}, the rows of a micro-batch")
    if config.student.checkpoint and config.student.lora_rank:
        raise ValueError("a LoRA begins as the teacher; leave out student.checkpoint, or set student.lora_rank=0")
    if config.split.updates and config.student.lora_rank:
        raise ValueError("the branches of stage (c) cannot be interpolated as LoRAs; set split.updates=0")
    if config.split.updates:
        for branch in ("low", "high"):
            branch_steps(np.array([*sigmas, 0.0]), branch)
