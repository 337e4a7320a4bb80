import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd35flash_jax.config import ScheduleConfig
from sd35flash_jax.schedule import choose_sigmas, shifted_sigmas, unshifted


def test_four_steps_at_shift_3_have_the_published_sigmas():
    np.testing.assert_allclose(shifted_sigmas(4, 3.0), [1.0, 0.8577, 0.6022, 0.0089, 0.0], atol=5e-5)


@given(steps=st.integers(1, 1000), shift=st.floats(0.1, 20))
def test_sigmas_fall_from_one_to_zero(steps, shift):
    sigmas = shifted_sigmas(steps, shift)
    assert sigmas.shape == (steps + 1,) and sigmas.dtype == np.float32
    assert abs(sigmas[0] - 1) < 1e-5 and sigmas[-1] == 0
    assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("steps", [0, -3, 1001])
def test_a_step_count_out_of_range_is_refused(steps):
    with pytest.raises(ValueError, match=f"steps must be from 1 to 1000, not {steps}"):
        shifted_sigmas(steps, 3.0)


def test_explicit_sigmas_take_the_place_of_the_steps():
    sigmas = choose_sigmas(ScheduleConfig(), steps=50, sigmas=[1.0, 0.75, 0.5])
    np.testing.assert_array_equal(sigmas, np.float32([1.0, 0.75, 0.5, 0.0]))


def test_a_final_zero_in_explicit_sigmas_is_not_repeated():
    np.testing.assert_array_equal(choose_sigmas(ScheduleConfig(), 4, [0.6, 0.0]), np.float32([0.6, 0.0]))


@pytest.mark.parametrize(
    "sigmas", [[], [0.0], [1.1, 0.5], [0.5, 0.5], [0.2, 0.4], [1.0, -0.5], [1.0, float("nan")], [[1.0, 0.5]]]
)
def test_sigmas_that_do_not_fall_within_range_are_refused(sigmas):
    with pytest.raises(ValueError, match="sigmas must fall strictly"):
        choose_sigmas(ScheduleConfig(), 4, sigmas)


def test_a_checkpoint_s_own_schedule_serves_its_step_count_alone():
    schedule = ScheduleConfig(shift=3.0, sigmas=((1.0, 0.6), (1.0, 0.9, 0.75, 0.5)))
    np.testing.assert_array_equal(choose_sigmas(schedule, 2), np.float32([1.0, 0.6, 0.0]))
    np.testing.assert_array_equal(choose_sigmas(schedule, 4), np.float32([1.0, 0.9, 0.75, 0.5, 0.0]))
    np.testing.assert_array_equal(choose_sigmas(schedule, 3), shifted_sigmas(3, 3.0))


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8), st.floats(0.5, 6.0))
def test_unshifted_sigmas_are_the_given_ones_after_the_shift(sigmas, shift):
    shifted = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in unshifted(sigmas, shift)]
    np.testing.assert_allclose(shifted, sigmas, rtol=1e-12)
