"""One update of each stage, as a function of the state of the training that gives the next one.

Gradients are accumulated over the leading axis of a batch, its micro-batches; noise comes from the key alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from sd35flash_jax.distill.adversarial import (
    HeadParams,
    adversarial_loss,
    discriminator_loss,
    draw_reinitialised,
    init_heads,
    replace_heads,
)
from sd35flash_jax.distill.config import MatchingConfig
from sd35flash_jax.distill.distribution_matching import (
    directed_loss,
    guidance_direction,
    matching_direction,
    proxy_loss,
    renoise,
    shared_sigmas,
    student_point,
)
from sd35flash_jax.distill.flow import Velocity, add_noise, guided, rollout, timesteps
from sd35flash_jax.distill.split_timestep import average
from sd35flash_jax.distill.trajectory import chord_loss, own_points, trajectory_guidance_loss

Features = Callable[[Float[Array, "b ..."], Float[Array, " b"], Any], Sequence[Float[Array, "b *t c"]]]
"""latents, timestep, conditioning -> intermediate features: a network with its parameters bound."""
Metrics = dict[str, Float[Array, ""]]
RENOISED = (0.02, 0.98)
"""The noise levels that DMD draws from."""
Loss = Callable[[PyTree, Any, Array], tuple[Float[Array, ""], Metrics]]


@dataclass(frozen=True)
class Networks:
    """How parameters become networks. `student`, `proxy` and `features` (of the proxy) take what is trained and the
    teacher's parameters, on which a LoRA builds."""

    teacher: Callable[[PyTree], Velocity]
    student: Callable[[PyTree, PyTree], Velocity]
    proxy: Callable[[PyTree, PyTree], Velocity]
    features: Callable[[PyTree, PyTree], Features]


def full_networks(velocity: Callable[[PyTree], Velocity], features: Callable[[PyTree], Features]) -> Networks:
    """Student and proxy of which every parameter is trained."""
    return Networks(
        teacher=velocity,
        student=lambda params, _: velocity(params),
        proxy=lambda params, _: velocity(params),
        features=lambda params, _: features(params),
    )


@partial(jax.tree_util.register_dataclass, data_fields=["conditioning", "student", "negative", "real"], meta_fields=[])
@dataclass(frozen=True)
class Batch:
    """What an update reads; every array has a leading axis of micro-batches.

    `conditioning` is the teacher's and the proxy's; `student` is the student's, of which text-encoder dropout may have
    taken some; `negative` is what guidance leads away from. `real` is the teacher's: trajectories `(m, k+1, b, ...)`
    at the student's levels for stage (a), samples `(m, b, ...)` for stage (b). An update that reads none of them takes
    the latents' shape from it.
    """

    conditioning: Any
    student: Any
    negative: Any
    real: Float[Array, "m ..."]


@partial(jax.tree_util.register_dataclass, data_fields=["params", "moments"], meta_fields=[])
@dataclass(frozen=True)
class Learner:
    """Parameters under training, with their optimizer's state."""

    params: PyTree
    moments: PyTree


@partial(jax.tree_util.register_dataclass, data_fields=["student", "ema", "proxy", "heads"], meta_fields=[])
@dataclass(frozen=True)
class State:
    """All that training changes; stage (a) leaves proxy and heads alone. `ema` is the student's average."""

    student: Learner
    ema: PyTree
    proxy: Learner
    heads: Learner


@dataclass(frozen=True)
class Optimizers:
    student: optax.GradientTransformation
    proxy: optax.GradientTransformation
    heads: optax.GradientTransformation


def begin(params: PyTree, optimizer: optax.GradientTransformation) -> Learner:
    return Learner(params, optimizer.init(params))


def descend(learner: Learner, gradients: PyTree, optimizer: optax.GradientTransformation) -> Learner:
    """One step of an optimizer."""
    steps, moments = optimizer.update(gradients, learner.moments, learner.params)
    return Learner(optax.apply_updates(learner.params, steps), moments)


def accumulated_gradients(loss: Loss, params: PyTree, batch: PyTree, key: Array) -> tuple[PyTree, Metrics]:
    """The mean over micro-batches of a loss's gradients, one micro-batch in memory at a time, and of its metrics."""
    count = len(jax.tree.leaves(batch)[0])
    gradient = jax.grad(loss, has_aux=True)

    def add(total: PyTree, micro: tuple[Any, Array]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, gradient(params, *micro)), None

    keys = jax.random.split(key, count)
    shapes = jax.eval_shape(gradient, params, *jax.tree.map(lambda array: array[0], (batch, keys)))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (batch, keys))
    return jax.tree.map(lambda array: array / count, total)


# Stage (a)


@dataclass(frozen=True)
class Teaching:
    """How the teacher makes trajectories: its noise levels, of which those at `indices` are the student's, and its
    guidance."""

    levels: tuple[float, ...]
    indices: tuple[int, ...]
    guidance: float


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ema"],
    meta_fields=["networks", "optimizers", "sigmas", "corrections"],
)
@dataclass(frozen=True)
class TrajectoryUpdate:
    """One update of stage (a): each row of the batch learns one step of its trajectory, drawn at random.

    With `corrections`, the rows' own trajectories of the teacher are not read: each learns all the steps of the
    student's own trajectory, of which the teacher goes on from every point.
    """

    networks: Networks
    optimizers: Optimizers
    sigmas: tuple[float, ...]
    ema: float
    corrections: Teaching | None = None

    def __call__(self, state: State, teacher: PyTree, batch: Batch, key: Array) -> tuple[State, Metrics]:
        def loss(params: PyTree, micro: Batch, key: Array) -> tuple[Array, Metrics]:
            student = self.networks.student(params, teacher)
            if self.corrections is None:
                index = jax.random.randint(key, micro.real.shape[1:2], 0, len(self.sigmas) - 1)
                value = trajectory_guidance_loss(student, micro.real, jnp.array(self.sigmas), index, micro.student)
            else:
                frozen = self.networks.student(state.student.params, teacher)
                value = self._corrected(student, frozen, teacher, self.corrections, micro, key)
            return value, {"trajectory": value}

        gradients, metrics = accumulated_gradients(loss, state.student.params, batch, key)
        metrics["student_gradient"] = optax.tree.norm(gradients)
        student = descend(state.student, gradients, self.optimizers.student)
        return replace(state, student=student, ema=average(state.ema, student.params, self.ema)), metrics

    def _corrected(
        self, student: Velocity, frozen: Velocity, teacher: PyTree, teaching: Teaching, batch: Batch, key: Array
    ) -> Array:
        """The loss of all steps from the points of the student's own trajectory, which `frozen` makes."""
        strong = guided(self.networks.teacher(teacher), batch.conditioning, batch.negative, teaching.guidance)
        noise, indices = jax.random.normal(key, batch.real.shape), np.array(teaching.indices)
        lines = own_points(frozen, strong, noise, jnp.array(teaching.levels), indices, batch.student)
        # A row's steps stay together, so that rows that are cut over devices stay where they are.
        here, there = (points.swapaxes(0, 1).reshape(-1, *noise.shape[1:]) for points in lines)
        sigmas = jnp.tile(jnp.array(self.sigmas), (len(noise), 1))
        conditioning = jax.tree.map(lambda array: jnp.repeat(array, len(indices) - 1, axis=0), batch.student)
        return chord_loss(student, here, there, sigmas[:, :-1].ravel(), sigmas[:, 1:].ravel(), conditioning)


# Stages (b) and (c)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["steps", "ema"],
    meta_fields=["networks", "optimizers", "sigmas", "config"],
)
@dataclass(frozen=True)
class MatchingUpdate:
    """One update of stage (b), or of one branch of stage (c): several of the proxy and the heads, then one of the
    student (two time scales, DMD2).

    `steps` are the student's steps that are trained, `[first, stop)`; each micro-batch draws one of them. They and the
    average's decay `ema` are data, so that one program serves the stage and both branches.
    """

    networks: Networks
    optimizers: Optimizers
    sigmas: tuple[float, ...]
    steps: tuple[int, int]
    ema: float
    config: MatchingConfig

    def __call__(self, state: State, teacher: PyTree, batch: Batch, key: Array) -> tuple[State, Metrics]:
        proxy_key, head_key, student_key = jax.random.split(key, 3)

        def update_proxy(state: State, key: Array) -> tuple[State, Metrics]:
            return self._update_proxy(state, teacher, batch, key)

        state, metrics = jax.lax.scan(update_proxy, state, jax.random.split(proxy_key, self.config.proxy_updates))
        state = self._reinitialise_heads(state, head_key)

        loss = partial(self._student_loss, state, teacher)
        gradients, student_metrics = accumulated_gradients(loss, state.student.params, batch, student_key)
        student = descend(state.student, gradients, self.optimizers.student)
        state = replace(state, student=student, ema=average(state.ema, student.params, self.ema))
        metrics = jax.tree.map(jnp.mean, metrics) | student_metrics
        return state, metrics | {"student_gradient": optax.tree.norm(gradients)}

    def _student_loss(
        self, state: State, teacher: PyTree, params: PyTree, batch: Batch, key: Array
    ) -> tuple[Array, Metrics]:
        """Matching and adversarial loss of one step of the student, from a point of its own trajectory."""
        start_key, noise_key, guidance_key = jax.random.split(key, 3)
        config, networks = self.config, self.networks
        frozen_student = networks.student(state.student.params, teacher)
        latents, index = self._start(frozen_student, batch, start_key)
        student, proxy = networks.student(params, teacher), networks.proxy(state.proxy.params, teacher)
        point, level, clean = self._compared(student, latents, index, batch, noise_key)

        plain = networks.teacher(teacher)
        joint = config.guidance_term == "joint"
        target = guided(plain, batch.conditioning, batch.negative, config.guidance) if joint else plain
        direction = matching_direction(target, proxy, point, level, clean, batch.conditioning)
        matching = directed_loss(point if config.points == "shared" else clean, direction)
        if not joint:
            noisier, noisier_level = renoise(clean, jnp.array(self.sigmas)[index + 1], 1.0, guidance_key)
            augmentation = guidance_direction(
                plain, noisier, noisier_level, clean, batch.conditioning, batch.negative, config.guidance
            )
            matching += directed_loss(clean, augmentation)
        metrics = {"matching": matching}
        if not config.adversarial_weight:
            return matching, metrics
        features = networks.features(state.proxy.params, teacher)
        seen = features(point, timesteps(level, point), batch.conditioning)
        metrics["adversarial"] = adversarial_loss(state.heads.params, seen)
        return matching + config.adversarial_weight * metrics["adversarial"], metrics

    def _update_proxy(self, state: State, teacher: PyTree, batch: Batch, key: Array) -> tuple[State, Metrics]:
        """One update of the proxy by flow matching on the student's samples, and of the heads."""
        student = self.networks.student(state.student.params, teacher)

        def loss(trained: tuple[PyTree, HeadParams], micro: Batch, key: Array) -> tuple[Array, Metrics]:
            proxy_params, heads = trained
            start_key, point_key, level_key, noise_key, real_key = jax.random.split(key, 5)
            latents, index = self._start(student, micro, start_key)
            sigmas = jnp.array(self.sigmas)
            samples = rollout(student, latents, sigmas, index, len(sigmas) - 1, micro.student)
            sigma = self._draw_levels(samples.shape[:1], level_key)
            noise = jax.random.normal(noise_key, samples.shape)
            proxy = self.networks.proxy(proxy_params, teacher)
            metrics = {"proxy": proxy_loss(proxy, samples, noise, sigma, micro.conditioning)}
            if not self.config.adversarial_weight:
                return metrics["proxy"], metrics
            point, level, _ = self._compared(student, latents, index, micro, point_key)
            features = self.networks.features(jax.lax.stop_gradient(proxy_params), teacher)
            timestep = timesteps(level, point)
            real = add_noise(micro.real, jax.random.normal(real_key, point.shape), level)
            metrics["discriminator"] = discriminator_loss(
                heads, features(real, timestep, micro.conditioning), features(point, timestep, micro.conditioning)
            )
            return metrics["proxy"] + metrics["discriminator"], metrics

        trained = (state.proxy.params, state.heads.params)
        (for_proxy, for_heads), metrics = accumulated_gradients(loss, trained, batch, key)
        metrics["proxy_gradient"] = optax.tree.norm(for_proxy)
        proxy = descend(state.proxy, for_proxy, self.optimizers.proxy)
        if not self.config.adversarial_weight:
            return replace(state, proxy=proxy), metrics
        heads = descend(state.heads, for_heads, self.optimizers.heads)
        return replace(state, proxy=proxy, heads=heads), metrics

    def _start(self, student: Velocity, batch: Batch, key: Array) -> tuple[Array, Array]:
        """A point of the student's own trajectory, from which one of the trained steps starts, and that step."""
        index_key, noise_key = jax.random.split(key)
        index = jax.random.randint(index_key, (), *self.steps)
        noise = jax.random.normal(noise_key, batch.real.shape)
        return rollout(student, noise, jnp.array(self.sigmas), 0, index, batch.student), index

    def _compared(
        self, student: Velocity, latents: Array, index: Array, batch: Batch, key: Array
    ) -> tuple[Array, Array, Array]:
        """Where the scores are compared, its noise level, and the student's clean estimate."""
        sigma, level = jnp.array(self.sigmas)[index], self._matched()[index]
        point, clean = student_point(student, latents, sigma, level, batch.student)
        if self.config.points == "shared":
            return point, level, clean
        return *renoise(clean, *RENOISED, key), clean

    def _draw_levels(self, shape: tuple[int, ...], key: Array) -> Array:
        """Noise levels for the proxy's flow matching, out of those at which it will be asked."""
        if self.config.points == "shared":
            return jax.random.choice(key, self._matched(), shape)
        return jax.random.uniform(key, shape, minval=RENOISED[0], maxval=RENOISED[1])

    def _matched(self) -> Array:
        return jnp.asarray(shared_sigmas(np.array(self.sigmas), self.config.end_sigma))

    def _reinitialise_heads(self, state: State, key: Array) -> State:
        draw_key, init_key = jax.random.split(key)
        heads = state.heads
        count, feature_size, hidden_size = heads.params["hidden_kernel"].shape
        chosen = draw_reinitialised(draw_key, count, self.config.reinitialise)
        fresh = begin(init_heads(init_key, count, feature_size, hidden_size), self.optimizers.heads)
        return replace(state, heads=replace_heads(chosen, fresh, heads))
