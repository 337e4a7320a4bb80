from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd35flash_jax.distill.data import (
    BatchMaker,
    Synthesis,
    kept_trajectories,
    prompt_order,
    read_prompts,
)
from sd35flash_jax.distill.trajectory import teacher_sigmas
from sd35flash_jax.sharding import make_mesh
from sd35flash_jax.text import Conditioning
from tests.distill.networks import numpy_mlp, random_mlp

LEVELS, INDICES = teacher_sigmas(np.array([1.0, 0.5, 0.0]), np.linspace(1, 0, 8))
TEACHER = {name: array.astype(np.float32) for name, array in random_mlp(1).items()}


def velocity(params):
    """`networks.mlp` on the rows of `pooled`."""
    return lambda latents, timestep, text: (
        jnp.tanh(latents @ params["A"] + timestep[:, None] / 1000 * params["t"] + text.pooled @ params["C"])
        @ params["D"]
    )


SYNTHESIS = Synthesis(velocity, tuple(map(float, LEVELS)), tuple(map(int, INDICES)), 2.0, (2,))
MAKER = BatchMaker(SYNTHESIS, make_mesh(1), 2, 0.0, (1, 2), 1)


def text(rows: int, seed: int = 0) -> Conditioning:
    draw = np.random.default_rng(seed)
    return Conditioning(
        jnp.array(draw.standard_normal((rows, 2, 3)), jnp.float32),
        jnp.array(draw.standard_normal((rows, 3)), jnp.float32),
    )


NEGATIVE = text(1, 9)


def numpy_trajectory(noise: np.ndarray, conditioning: Conditioning) -> list[np.ndarray]:
    """Guided Euler steps from noise, at the student's levels."""
    latents, points = noise, [noise]
    network = numpy_mlp(TEACHER)
    for sigma, following in zip(LEVELS, LEVELS[1:]):
        towards = network(latents, sigma, np.asarray(conditioning.pooled))
        away = network(latents, sigma, np.repeat(NEGATIVE.pooled, len(noise), 0))
        latents = latents + (following - sigma) * (away + 2 * (towards - away))
        if following in (0.5, 0.0):
            points.append(latents)
    return points


def test_prompts_come_in_a_new_order_each_epoch_and_each_once_an_epoch():
    order = np.concatenate([prompt_order(10, 3, update, 4) for update in range(5)])
    epochs = order.reshape(2, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all() and (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(order[8:12], prompt_order(10, 3, 2, 4))


def test_an_update_reads_trajectories_from_noise_of_its_own_and_the_next_stage_their_ends():
    conditioning, key = text(6), jax.random.key(0)
    batch = MAKER(TEACHER, conditioning, NEGATIVE, None, key, "trajectories")
    assert batch.real.shape == (2, 3, 3, 2) and batch.negative.pooled.shape == (2, 3, 3)
    noise = np.concatenate(list(np.asarray(batch.real[:, 0])))
    assert len(np.unique(noise)) == noise.size
    for point, expected in zip(np.asarray(batch.real).swapaxes(0, 1), numpy_trajectory(noise, conditioning)):
        np.testing.assert_allclose(np.concatenate(list(point)), expected, atol=1e-4)
    ends = MAKER(TEACHER, conditioning, NEGATIVE, None, key, "samples")
    np.testing.assert_array_equal(ends.real, batch.real[:, -1])


def test_a_batch_holds_the_trajectories_that_were_kept_row_by_row():
    kept = np.random.default_rng(0).standard_normal((6, 3, 2)).astype(np.float16)
    batch = MAKER(TEACHER, text(6), NEGATIVE, kept, jax.random.key(0), "trajectories")
    for row in range(6):
        np.testing.assert_array_equal(batch.real[row // 3, :, row % 3], kept[row])
    assert batch.real.dtype == jnp.float32
    ends = MAKER(TEACHER, text(6), NEGATIVE, kept[:, -1], jax.random.key(0), "samples")
    np.testing.assert_array_equal(ends.real, batch.real[:, -1])


def of_numbers(numbers: np.ndarray) -> jax.Array:
    conditioning = jax.tree.map(lambda array: array[numbers], text(8))
    return SYNTHESIS.of_rows(TEACHER, jax.random.key(0), jnp.asarray(numbers), conditioning, NEGATIVE)


def test_kept_trajectories_are_the_teachers_whatever_the_batch_they_were_made_in(tmp_path):
    shape = (8, 3, 2)
    kept = kept_trajectories(tmp_path / "three.npy", shape, 3, of_numbers)
    np.testing.assert_allclose(kept, kept_trajectories(tmp_path / "eight.npy", shape, 8, of_numbers), atol=2e-3)
    assert len(np.unique(kept[:, 0])) == 16
    for point, expected in zip(kept.swapaxes(0, 1), numpy_trajectory(np.float64(kept[:, 0]), text(8))):
        np.testing.assert_allclose(point, expected, atol=0.02)


def test_kept_trajectories_are_made_once_and_whole(tmp_path):
    path, shape = tmp_path / "kept.npy", (8, 3, 2)

    def dies_halfway(numbers):
        return of_numbers(numbers) if numbers[0] < 4 else 1 / 0

    with pytest.raises(ZeroDivisionError):
        kept_trajectories(path, shape, 2, dies_halfway)
    assert not path.exists()
    kept = kept_trajectories(path, shape, 2, of_numbers)
    np.testing.assert_array_equal(kept_trajectories(path, shape, 2, dies_halfway), kept)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.npy"]


def test_trajectories_that_half_precision_cannot_hold_are_refused(tmp_path):
    huge = partial(np.full, (2, 3, 2), np.float16(np.inf))
    with pytest.raises(FloatingPointError, match="trajectories are not finite; check its weights"):
        kept_trajectories(tmp_path / "kept.npy", (2, 3, 2), 2, lambda numbers: huge())


def test_a_prompt_list_skips_empty_lines_and_must_have_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a fox\n\n  two cats \n")
    assert read_prompts(path) == ["a fox", "two cats"]
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no prompt; write one prompt a line"):
        read_prompts(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_prompts(tmp_path / "absent.txt")
