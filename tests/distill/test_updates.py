"""Whole updates, on networks small enough to know the answer."""

import operator
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sd35flash_jax.distill.adversarial import init_heads
from sd35flash_jax.distill.config import MatchingConfig
from sd35flash_jax.distill.flow import guided
from sd35flash_jax.distill.split_timestep import branch_steps
from sd35flash_jax.distill.trajectory import own_points, teacher_sigmas
from sd35flash_jax.distill.updates import (
    Batch,
    MatchingUpdate,
    Networks,
    Optimizers,
    State,
    Teaching,
    TrajectoryUpdate,
    accumulated_gradients,
    begin,
    full_networks,
)
from tests.distill.networks import assert_same_gradients, mlp, mlp_features, numeric_gradient, numpy_mlp, random_mlp

SIGMAS = {4: (1.0, 0.75, 0.5, 0.25, 0.0), 2: (1.0, 0.5, 0.0), 1: (1.0, 0.0)}
MEAN, FACTOR = np.array([1.0, -0.5], np.float32), np.array([[0.8, 0.0], [0.5, 0.4]], np.float32)


def gaussian_velocity(params):
    """The exact velocity of the flow to a Gaussian of this mean and factor of the covariance, linear in the latents."""
    mean, factor = params

    def velocity(latents, timestep, _):
        sigma = timestep[:, None, None] / 1000
        covariance = factor @ factor.T
        noisy = (1 - sigma) ** 2 * covariance + sigma**2 * jnp.eye(2)
        determinant = noisy[:, 0, 0] * noisy[:, 1, 1] - noisy[:, 0, 1] * noisy[:, 1, 0]
        inverse = (jnp.trace(noisy, axis1=1, axis2=2)[:, None, None] * jnp.eye(2) - noisy) / determinant[:, None, None]
        offset = latents - (1 - sigma[..., 0]) * mean
        clean = mean + (1 - sigma[..., 0]) * jnp.einsum("ij,bjk,bk->bi", covariance, inverse, offset)
        return (latents - clean) / sigma[..., 0]

    return velocity


def linear_student(sigmas, params, _):
    """One affine map for each step."""

    def velocity(latents, timestep, _):
        step = jnp.argmin(jnp.abs(jnp.array(sigmas)[:, None] * 1000 - timestep), axis=0)
        return jnp.einsum("bij,bj->bi", params["matrix"][step], latents) + params["offset"][step]

    return velocity


def student_distribution(sigmas, params):
    """Mean and covariance of the student's samples, exactly."""
    mean, covariance = np.zeros(2), np.eye(2)
    for k, (sigma, following) in enumerate(zip(sigmas, sigmas[1:])):
        matrix = np.eye(2) + (following - sigma) * np.array(params["matrix"][k], float)
        mean = matrix @ mean + (following - sigma) * np.array(params["offset"][k], float)
        covariance = matrix @ covariance @ matrix.T
    return mean, covariance


@pytest.mark.parametrize(("points", "steps"), [("shared", 4), ("renoised", 2)])
def test_distribution_matching_converges_to_a_gaussian_teachers_mean_and_covariance(points, steps):
    sigmas, updates = SIGMAS[steps], 1200
    networks = Networks(
        teacher=gaussian_velocity,
        student=partial(linear_student, sigmas),
        proxy=lambda params, _: gaussian_velocity(params),
        features=lambda params, _: lambda *inputs: [],
    )
    optimizer = optax.adam(optax.cosine_decay_schedule(0.02, updates))
    optimizers = Optimizers(optimizer, optax.adam(0.02), optax.adam(1e-3))
    config = MatchingConfig(guidance=1.0, adversarial_weight=0.0, points=points, proxy_updates=2, end_sigma=0.1)
    update = MatchingUpdate(networks, optimizers, sigmas, (0, steps), 0.99, config)
    params = {"matrix": jnp.tile(jnp.eye(2), (steps, 1, 1)) * 0.5, "offset": jnp.zeros((steps, 2))}
    nothing = jnp.zeros((1, 128, 0))
    batch = Batch(nothing, nothing, nothing, jnp.zeros((1, 128, 2)))
    state = State(
        begin(params, optimizers.student),
        params,
        begin((jnp.zeros(2), jnp.eye(2)), optimizers.proxy),
        begin(init_heads(jax.random.key(0), 1, 1, 1), optimizers.heads),
    )

    @jax.jit
    def train(state, keys):
        return jax.lax.scan(lambda state, key: (update(state, (MEAN, FACTOR), batch, key)[0], None), state, keys)[0]

    before_mean, _ = student_distribution(sigmas, state.student.params)
    state = train(state, jax.random.split(jax.random.key(1), updates))
    mean, covariance = student_distribution(sigmas, state.ema)
    assert np.abs(before_mean - MEAN).max() > 0.9
    np.testing.assert_allclose(mean, MEAN, atol=0.06)
    np.testing.assert_allclose(covariance, FACTOR @ FACTOR.T, atol=0.06)


DEFAULT = ("shared", "joint")
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""These programs run once or a few times: their compilation is what takes long."""
OPTIMIZERS = Optimizers(*[optax.sgd(0.1)] * 3)
TEACHER = random_mlp(7)


def mlp_state(heads_seed=0):
    student, proxy = (jax.tree.map(jnp.float32, random_mlp(seed)) for seed in (1, 2))
    heads = init_heads(jax.random.key(heads_seed), 2, 5, 4)
    return State(
        begin(student, OPTIMIZERS.student), student, begin(proxy, OPTIMIZERS.proxy), begin(heads, OPTIMIZERS.heads)
    )


def mlp_batch(micro_batches=1, rows=8, trajectory=None):
    draw = np.random.default_rng(3)
    conditioning = draw.standard_normal((micro_batches, rows, 3)).astype(np.float32)
    real = draw.standard_normal((micro_batches, *(trajectory or ()), rows, 2)).astype(np.float32)
    return Batch(conditioning, conditioning, -conditioning, real)


def matching_update(steps, **config):
    networks = full_networks(mlp, mlp_features)
    options = MatchingConfig(**{"proxy_updates": 1, "reinitialise": 0.0} | config)
    return MatchingUpdate(networks, OPTIMIZERS, SIGMAS[steps], (0, steps), 0.9, options)


@cache
def run(steps, **config):
    """One update from the same start with the same key, and its metrics."""
    return jax.jit(matching_update(steps, **config), compiler_options=QUICK)(
        mlp_state(), TEACHER, mlp_batch(), jax.random.key(0)
    )


def changed(before, after) -> bool:
    return any(np.any(old != new) for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after)))


@pytest.mark.parametrize(
    ("steps", "points", "guidance_term"),
    [(4, "shared", "joint"), (2, "renoised", "decoupled"), (1, "renoised", "joint")],
)
def test_an_update_of_every_ablation_and_step_count_moves_student_proxy_and_heads(steps, points, guidance_term):
    different = {"points": points, "guidance_term": guidance_term} if (points, guidance_term) != DEFAULT else {}
    state, metrics = run(steps, **different)
    before = mlp_state()
    assert changed(before.student.params, state.student.params) and changed(before.proxy.params, state.proxy.params)
    assert changed(before.heads.params, state.heads.params)
    assert all(np.isfinite(value) for value in metrics.values())
    expected = {"matching", "adversarial", "student_gradient", "proxy", "discriminator", "proxy_gradient"}
    assert set(metrics) == expected


def test_the_discriminators_loss_trains_the_heads_and_not_the_proxy_that_carries_them():
    with_adversary, without = run(4)[0], run(4, adversarial_weight=0.0)[0]
    assert not changed(with_adversary.proxy.params, without.proxy.params)
    assert changed(with_adversary.heads.params, mlp_state().heads.params)
    assert not changed(without.heads.params, mlp_state().heads.params)


def test_the_adversary_reaches_the_student_in_proportion_to_its_weight():
    """Twice the weight makes twice the difference to a step of plain descent."""
    once_weight = MatchingConfig().adversarial_weight
    runs = run(4, adversarial_weight=0.0), run(4), run(4, adversarial_weight=2 * once_weight)
    for none, once, twice in zip(*(jax.tree.leaves(state.student.params) for state, _ in runs)):
        np.testing.assert_allclose(twice - none, 2 * (once - none), atol=2e-6)
        assert np.abs(once - none).max() > 2e-5


def test_the_proxy_is_updated_as_often_as_asked_for_each_update_of_the_student():
    optimizers = replace(OPTIMIZERS, student=optax.adam(1e-3), proxy=optax.adam(1e-3))
    update = replace(matching_update(4, proxy_updates=3), optimizers=optimizers)
    state = replace(
        mlp_state(),
        student=begin(mlp_state().student.params, optimizers.student),
        proxy=begin(mlp_state().proxy.params, optimizers.proxy),
    )
    state, _ = jax.jit(update, compiler_options=QUICK)(state, TEACHER, mlp_batch(), jax.random.key(0))
    assert state.proxy.moments[0].count == 3 and state.student.moments[0].count == 1


def test_a_branch_trains_its_own_steps_alone():
    """With one affine map a step, the maps of the other branch stay as they were."""
    sigmas = SIGMAS[4]
    networks = Networks(
        teacher=gaussian_velocity,
        student=partial(linear_student, sigmas),
        proxy=lambda params, _: gaussian_velocity(params),
        features=lambda params, _: lambda *inputs: [],
    )
    config = MatchingConfig(guidance=1.0, adversarial_weight=0.0, proxy_updates=1)
    params = {"matrix": jnp.ones((4, 2, 2)) * 0.3, "offset": jnp.zeros((4, 2))}
    state = State(
        begin(params, OPTIMIZERS.student),
        params,
        begin((jnp.zeros(2), jnp.eye(2)), OPTIMIZERS.proxy),
        mlp_state().heads,
    )
    nothing = jnp.zeros((8, 16, 0))
    batch = Batch(nothing, nothing, nothing, jnp.zeros((8, 16, 2)))
    update = MatchingUpdate(networks, OPTIMIZERS, sigmas, branch_steps(np.array(sigmas), "low"), 0.99, config)
    after, _ = jax.jit(update, compiler_options=QUICK)(state, (MEAN, FACTOR), batch, jax.random.key(0))
    moved = np.abs(after.student.params["offset"] - params["offset"]).max(axis=1) > 0
    assert moved.tolist() == [False, False, True, True]


def test_one_program_serves_stage_b_and_both_branches_of_stage_c():
    compiled = jax.jit(operator.call, compiler_options=QUICK)
    whole = matching_update(4)
    for steps, ema in ((whole.steps, whole.ema), ((0, 2), 0.99), ((2, 4), 0.99)):
        update = replace(whole, steps=steps, ema=ema)
        compiled(update, mlp_state(), TEACHER, mlp_batch(), jax.random.key(0))
    assert compiled._cache_size() == 1


def test_the_average_follows_the_student():
    before, (after, _) = mlp_state(), run(4)
    for ema, old, new in zip(*map(jax.tree.leaves, (after.ema, before.ema, after.student.params))):
        np.testing.assert_allclose(ema, 0.9 * old + 0.1 * new, atol=1e-6)


@pytest.mark.parametrize("steps", [4, 1])
def test_trajectory_guidance_lowers_its_loss(steps):
    optimizers = replace(OPTIMIZERS, student=optax.adam(0.01))
    update = jax.jit(
        TrajectoryUpdate(full_networks(mlp, mlp_features), optimizers, SIGMAS[steps], 0.9), compiler_options=QUICK
    )
    params = mlp_state().student.params
    state = replace(mlp_state(), student=begin(params, optimizers.student))
    losses = []
    for index in range(100):
        batch = mlp_batch(2, trajectory=(steps + 1,))
        state, metrics = update(state, TEACHER, batch, jax.random.key(index))
        losses.append(float(metrics["trajectory"]))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


@pytest.mark.parametrize("steps", [4, 1])
def test_corrections_descend_the_error_at_the_students_own_points_and_not_through_them(steps):
    sigmas, optimizers = SIGMAS[steps], replace(OPTIMIZERS, student=optax.sgd(1.0))
    levels, indices = teacher_sigmas(np.array(sigmas), np.linspace(1, 0, 8))
    teaching = Teaching(tuple(map(float, levels)), tuple(map(int, indices)), 2.0)
    update = TrajectoryUpdate(full_networks(mlp, mlp_features), optimizers, sigmas, 0.9, teaching)
    state, batch, key = mlp_state(), mlp_batch(), jax.random.key(5)
    after, metrics = jax.jit(update, compiler_options=QUICK)(state, TEACHER, batch, key)

    text, away, student = batch.conditioning[0], batch.negative[0], state.student.params
    noise = jax.random.normal(jax.random.split(key, 1)[0], (8, 2))
    teacher = guided(mlp(TEACHER), text, away, 2.0)
    points, ends = map(np.asarray, own_points(mlp(student), teacher, noise, levels, indices, text))

    def twin(params):
        errors = [
            numpy_mlp(params)(here, sigma, text) - (there - here) / (following - sigma)
            for here, there, sigma, following in zip(points, ends, sigmas, sigmas[1:])
        ]
        return np.square(errors).mean()

    exact = {name: np.asarray(array, float) for name, array in student.items()}
    assert float(metrics["trajectory"]) == pytest.approx(twin(exact), rel=1e-4)
    descent = jax.tree.map(lambda old, new: old - new, student, after.student.params)
    assert_same_gradients(descent, numeric_gradient(twin, exact))


def test_accumulated_gradients_are_the_mean_over_micro_batches():
    def loss(params, micro, key):
        value = jnp.sum(jnp.sin(params * micro)) + jax.random.uniform(key)
        return value, {"value": value}

    micros, key, params = jnp.arange(12.0).reshape(3, 4), jax.random.key(0), jnp.arange(4.0)
    gradients, metrics = accumulated_gradients(loss, params, micros, key)
    parts = [jax.value_and_grad(loss, has_aux=True)(params, *pair) for pair in zip(micros, jax.random.split(key, 3))]
    np.testing.assert_allclose(gradients, np.mean([gradient for _, gradient in parts], axis=0), rtol=1e-5)
    assert float(metrics["value"]) == pytest.approx(np.mean([float(value) for (value, _), _ in parts]), rel=1e-5)
