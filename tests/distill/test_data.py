import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd35flash_jax.checkpoint import save_checkpoint
from sd35flash_jax.config import ModelConfig
from sd35flash_jax.distill.data import (
    Ahead,
    BatchMaker,
    Synthesis,
    kept_trajectories,
    prompt_order,
    weights_digest,
)
from sd35flash_jax.distill.trajectory import teacher_sigmas
from sd35flash_jax.distill.updates import Teaching
from sd35flash_jax.sharding import make_mesh
from sd35flash_jax.text import Conditioning
from tests.distill.networks import numpy_mlp, random_mlp
from tests.tiny_model import CONFIG, random_parameters

LEVELS, INDICES = teacher_sigmas(np.array([1.0, 0.5, 0.0]), np.linspace(1, 0, 8))
TEACHER = {name: array.astype(np.float32) for name, array in random_mlp(1).items()}


def velocity(params):
    """`networks.mlp` on the rows of `pooled`."""
    return lambda latents, timestep, text: (
        jnp.tanh(latents @ params["A"] + timestep[:, None] / 1000 * params["t"] + text.pooled @ params["C"])
        @ params["D"]
    )


SYNTHESIS = Synthesis(velocity, Teaching(tuple(map(float, LEVELS)), tuple(map(int, INDICES)), 2.0), (2,))
MAKER = BatchMaker(SYNTHESIS, make_mesh(1), 2, 0.0, (1, 2), 1)


def text(rows: int, seed: int = 0) -> Conditioning:
    draw = np.random.default_rng(seed)
    return Conditioning(
        jnp.array(draw.standard_normal((rows, 2, 3)), jnp.float32),
        jnp.array(draw.standard_normal((rows, 3)), jnp.float32),
    )


NEGATIVE = text(1, 9)


def numpy_trajectory(noise: np.ndarray, conditioning: Conditioning) -> list[np.ndarray]:
    """Guided steps of the second order from noise, at the student's levels."""
    latents, points = noise, [noise]
    network = numpy_mlp(TEACHER)
    ratios = np.append(0, np.diff(LEVELS)[1:] / np.diff(LEVELS)[:-1])
    earlier = np.zeros_like(noise)
    for sigma, following, ratio in zip(LEVELS, LEVELS[1:], ratios):
        towards = network(latents, sigma, np.asarray(conditioning.pooled))
        away = network(latents, sigma, np.repeat(NEGATIVE.pooled, len(noise), 0))
        velocity = away + 2 * (towards - away)
        latents = latents + (following - sigma) * (velocity + ratio / 2 * (velocity - earlier))
        earlier = velocity
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
    assert list(tmp_path.iterdir()) == []
    kept = kept_trajectories(path, shape, 2, of_numbers)
    np.testing.assert_array_equal(kept_trajectories(path, shape, 2, dies_halfway), kept)
    assert [file.name for file in tmp_path.iterdir()] == ["kept.npy"]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from sd35flash_jax.distill.data import kept_trajectories

def synthesize(numbers):
    if numbers[0] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return np.ones((len(numbers), 3, 2), np.float16)

kept_trajectories(Path(sys.argv[1]), (8, 3, 2), 2, synthesize)
"""


def test_what_a_killed_process_left_of_trajectories_is_not_taken_for_them(tmp_path):
    path = tmp_path / "kept.npy"
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)]).returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover != path
    assert kept_trajectories(path, (8, 3, 2), 2, of_numbers).shape == (8, 3, 2)
    assert len(np.unique(np.load(path)[:, 0])) == 16


def test_a_disk_that_fills_up_while_trajectories_are_kept_is_said_and_nothing_is_left(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match=r"has no space left for kept\.npy"):
        kept_trajectories(tmp_path / "kept.npy", (8, 3, 2), 2, of_numbers)
    assert list(tmp_path.iterdir()) == []


def test_trajectories_that_half_precision_cannot_hold_are_refused(tmp_path):
    huge = partial(np.full, (2, 3, 2), np.float16(np.inf))
    with pytest.raises(FloatingPointError, match="trajectories are not finite; check its weights"):
        kept_trajectories(tmp_path / "kept.npy", (2, 3, 2), 2, lambda numbers: huge())


@pytest.fixture
def encoder(tmp_path) -> Callable[[str, int], Path]:
    """Writes a checkpoint of one text encoder under a name, with weights of a seed."""

    def write(name: str, seed: int) -> Path:
        (tmp_path / "tokenizer").mkdir(exist_ok=True)
        (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
        components = {"clip_l": random_parameters("clip_l", seed)}
        tokenizers = {"clip_l": tmp_path / "tokenizer"}
        save_checkpoint(tmp_path / name, ModelConfig(clip_l=CONFIG.clip_l), components, tokenizers)
        return tmp_path / name

    return write


def test_weights_are_known_by_their_digest_wherever_and_whenever_they_were_written(encoder):
    one, again, other = encoder("one", 0), encoder("again", 0), encoder("other", 1)
    assert weights_digest(one, ["clip_l"]) == weights_digest(again, ["clip_l"]) != weights_digest(other, ["clip_l"])


def test_a_single_weight_or_a_tokenizer_makes_another_digest(encoder):
    checkpoint = encoder("one", 0)
    digests = [weights_digest(checkpoint, ["clip_l"])]
    chunk = max((checkpoint / "clip_l").rglob("0*"), key=lambda file: file.stat().st_size)
    weights = np.fromfile(chunk, np.float32)
    weights[-1] += 1
    weights.tofile(chunk)
    digests.append(weights_digest(checkpoint, ["clip_l"]))
    (checkpoint / "tokenizers" / "clip_l" / "vocab.json").write_text('{"a": 0}')
    digests.append(weights_digest(checkpoint, ["clip_l"]))
    assert len(set(digests)) == 3


def test_what_is_made_ahead_is_what_would_be_made_at_once():
    made = []

    def make(number: int) -> int:
        made.append(number)
        return number**2

    ahead = Ahead(make)
    assert [ahead(number) for number in (3, 4, 5, 9, 10)] == [9, 16, 25, 81, 100]
    ahead.thread.shutdown()
    assert made == [3, 4, 5, 6, 9, 10, 11], "none is made twice"


def test_an_error_in_what_is_made_ahead_is_raised_where_it_is_asked_for():
    ahead = Ahead(lambda number: 1 // (number - 1))
    assert ahead(0) == -1
    with pytest.raises(ZeroDivisionError):
        ahead(1)
