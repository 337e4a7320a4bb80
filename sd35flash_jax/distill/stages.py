"""A training before its first update: its stages, its state, and an update as the program that it runs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from sd35flash_jax.checkpoint import abstract_component, parameters
from sd35flash_jax.config import ModelConfig
from sd35flash_jax.distill.adversarial import init_heads
from sd35flash_jax.distill.config import DistillConfig, TrajectoryConfig
from sd35flash_jax.distill.lora import Params, init_lora
from sd35flash_jax.distill.mmdit import mmdit_networks
from sd35flash_jax.distill.muon import blockwise_muon
from sd35flash_jax.distill.split_timestep import branch_steps
from sd35flash_jax.distill.trajectory import teacher_sigmas
from sd35flash_jax.distill.updates import (
    Batch,
    MatchingUpdate,
    Metrics,
    Optimizers,
    State,
    Teaching,
    TrajectoryUpdate,
    begin,
)
from sd35flash_jax.schedule import shifted_sigmas
from sd35flash_jax.sharding import parameter_shardings, replicated

Update = TrajectoryUpdate | MatchingUpdate


@dataclass(frozen=True)
class Stage:
    """What is done a number of times, and its name."""

    name: str
    updates: int
    update: Update


def make_stages(config: DistillConfig, model: ModelConfig) -> list[Stage]:
    """All stages of a distillation of the model's transformer, in order."""
    assert model.transformer is not None
    depths, lora = head_depths(model.transformer.depth), bool(config.student.lora_rank)
    networks = mmdit_networks(model, lora, depths, config.training.rematerialise)
    sigmas, ema = (*config.student.sigmas, 0.0), config.training.ema
    first = optimizers(config, trajectory_optimizer(config.trajectory))
    corrections = teaching(config, model) if config.trajectory.points == "student" else None
    guidance = TrajectoryUpdate(networks, first, sigmas, ema, corrections)
    second = optimizers(config, without_momentum(config.matching.learning_rate))
    matching = MatchingUpdate(networks, second, sigmas, (0, len(sigmas) - 1), ema, config.matching)
    stages = [
        Stage("trajectory", config.trajectory.updates, guidance),
        Stage("matching", config.matching.updates, matching),
    ]
    if config.split.updates:
        for branch in ("low", "high"):
            own_steps = branch_steps(np.array(sigmas), branch)
            update = replace(matching, steps=own_steps, ema=config.split.ema)
            stages.append(Stage(f"split-{branch}", config.split.updates, update))
    return stages


def teaching(config: DistillConfig, model: ModelConfig) -> Teaching:
    """How the teacher makes the trajectories of stage (a)."""
    own_levels = shifted_sigmas(config.teacher.steps, config.teacher.shift or model.schedule.shift)
    levels, indices = teacher_sigmas(np.array((*config.student.sigmas, 0.0)), own_levels)
    return Teaching(tuple(map(float, levels)), tuple(map(int, indices)), config.teacher.guidance)


def initial_state(
    config: DistillConfig, model: ModelConfig, optimizers: Optimizers, teacher: Params, start: Params, key: Array
) -> State:
    """The student as `start` is and the proxy as the teacher, or LoRAs that change nothing yet, and random heads."""
    assert model.transformer is not None
    transformer = model.transformer
    structure = abstract_component("transformer", model)
    trained = parameters(structure, nnx.Param)  # all but stored tables
    keys = jax.random.split(key, 3)

    def fresh(key: Array, whole: Params) -> Params:
        if config.student.lora_rank:
            return init_lora(key, {path: teacher[path] for path in trained}, config.student.lora_rank)
        return {path: jnp.array(whole[path], jnp.float32) for path in trained}

    count = len(head_depths(transformer.depth))
    heads = init_heads(keys[2], count, transformer.hidden_size, config.matching.head_size)
    return State(
        student=begin(fresh(keys[0], start), optimizers.student),
        ema=fresh(keys[0], start),
        proxy=begin(fresh(keys[1], teacher), optimizers.proxy),
        heads=begin(heads, optimizers.heads),
    )


def update_program(mesh: Mesh) -> Any:
    """The program of all updates: `update, state, teacher, batch, key -> state, metrics`. It takes over the arrays of
    the state. The update is an argument, so that what of it is data does not compile anew."""

    def run(update: Update, state: State, teacher: Params, batch: Batch, key: Array) -> tuple[State, Metrics]:
        made = update(state, teacher, batch, key)
        return jax.lax.with_sharding_constraint(made, (parameter_shardings(mesh, made[0]), replicated(mesh)))

    return jax.jit(run, donate_argnums=1)


def in_parts(mesh: Mesh, make: Callable[..., Any], *arguments: Any) -> Any:
    """What a function makes, on the devices as the table of partition rules says; it is never whole on one."""
    shardings = parameter_shardings(mesh, jax.eval_shape(make, *arguments))
    return jax.jit(make, out_shardings=shardings)(*arguments)


def head_depths(depth: int) -> tuple[int, ...]:
    """The heads sit a quarter, half and three quarters into the proxy, as far as it has so many blocks."""
    return tuple(sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)}))


def trajectory_schedule(config: TrajectoryConfig) -> optax.Schedule:
    """Stage (a)'s learning rate falls to 0 by half a cosine: what it learns stands still, unlike in (b) and (c)."""
    return optax.cosine_decay_schedule(config.learning_rate, max(1, config.updates))


def trajectory_optimizer(config: TrajectoryConfig) -> optax.GradientTransformation:
    schedule = trajectory_schedule(config)
    return blockwise_muon(schedule) if config.optimizer == "muon" else without_momentum(schedule)


def without_momentum(rate: float | optax.Schedule) -> optax.GradientTransformation:
    """Adam without momentum, since in distribution matching every network learns against another that moves (DMD2).

    `optax.adam(b1=0)` would keep a first moment all the same, of a whole model: this RMSprop is what it is without.
    """
    return optax.rmsprop(rate, decay=0.999, eps=1e-8, eps_in_sqrt=False, bias_correction=True)


def optimizers(config: DistillConfig, student: optax.GradientTransformation) -> Optimizers:
    """A stage's optimizer of the student, and those of proxy and heads, all on clipped gradients."""

    def clipped(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(config.training.clip), optimizer)

    proxy, heads = config.matching.proxy_learning_rate, config.matching.head_learning_rate
    return Optimizers(clipped(student), clipped(without_momentum(proxy)), clipped(without_momentum(heads)))
