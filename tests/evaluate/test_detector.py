import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from sd35flash_jax.checkpoint import parameters
from sd35flash_jax.evaluate.detector import GRID, SIDE, WIDTHS, Detector, Sight, find, load_detector, look
from sd35flash_jax.world.objects import THINGS
from sd35flash_jax.world.scenes import BACKGROUNDS


def sight(*things):
    """What the network says of one picture with `(row, column, thing, presence logit, side)`."""
    presence = np.full((1, GRID, GRID), -9.0)
    kinds = np.zeros((1, GRID, GRID, len(THINGS)))
    sides = np.zeros((1, GRID, GRID))
    for row, column, thing, logit, side in things:
        presence[0, row, column], sides[0, row, column] = logit, np.log(side)
        kinds[0, row, column, thing] = 5
    centre = np.full((1, GRID, GRID, 2), 0.5)
    return Sight(presence, kinds, centre, sides, np.zeros((1, len(BACKGROUNDS))), np.zeros((1, 3)))


def test_a_find_is_where_the_grid_says():
    (found,) = find(sight((3, 10, 42, 4.0, 0.25)), 0)
    assert found == pytest.approx((42, 10.5 / GRID, 3.5 / GRID, 0.25, 1 / (1 + np.exp(-4))))


def test_finds_of_one_thing_in_neighbouring_places_count_once_and_the_most_certain_stays():
    (found,) = find(sight((8, 8, 1, 2.0, 0.4), (8, 9, 2, 3.0, 0.4), (9, 8, 1, 1.0, 0.4)), 0)
    assert found.thing == 2


def test_neighbours_that_do_not_overlap_count_each():
    found = find(sight((8, 4, 1, 2.0, 0.3), (8, 8, 1, 3.0, 0.3), (4, 4, 5, 1.0, 0.3)), 0)
    assert [find.thing for find in found] == [1, 1, 5]
    assert [find.certainty for find in found] == sorted((find.certainty for find in found), reverse=True)


def test_what_is_not_certain_enough_is_not_there():
    assert find(sight((8, 8, 1, -0.5, 0.4)), 0) == []


@pytest.fixture(scope="module")
def detector():
    return Detector(rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def weights(detector, tmp_path_factory):
    file = tmp_path_factory.mktemp("detector") / "detector.safetensors"
    save_file({name: np.asarray(array, jnp.bfloat16) for name, array in parameters(detector).items()}, file)
    return file


def test_a_detector_sees_the_same_after_it_was_stored(detector, weights):
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), np.uint8)
    rounded = load_detector(weights)
    assert all(array.dtype == jnp.float32 for array in parameters(rounded).values())
    for ours, own in zip(look(rounded, images), look(detector, images)):
        assert ours.features.shape == (WIDTHS[-1],)
        np.testing.assert_allclose(ours.features, own.features, atol=0.05)
        assert ours.background in BACKGROUNDS


def test_pictures_of_another_size_are_resized(detector):
    image = np.kron(
        np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8), np.ones((1, 32, 32, 1), np.uint8)
    )
    larger = np.kron(image, np.ones((1, 2, 2, 1), np.uint8))
    (one,), (other,) = look(detector, image), look(detector, larger)
    np.testing.assert_allclose(one.features, other.features, atol=0.1)


def test_missing_weights_are_named_with_the_command_that_makes_them(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.safetensors are missing.*python -m training\.detector"):
        load_detector(tmp_path / "absent.safetensors")


def test_weights_of_another_detector_are_refused(tmp_path):
    save_file({"stem.bias": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="weights of another detector"):
        load_detector(tmp_path / "other.safetensors")


def test_a_truncated_file_of_weights_is_named(weights, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cut\.safetensors is truncated or damaged"):
        load_detector(cut)


def test_certainty_is_of_a_thing_being_there_however_unsure_its_kind_is():
    sure = sight((8, 8, 1, 2.0, 0.4))
    unsure = sure._replace(thing=0.01 * sure.thing)
    assert find(sure, 0) == find(unsure, 0)
