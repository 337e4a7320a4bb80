import numpy as np
import pytest

from sd35flash_jax.distill.split_timestep import average, branch_steps, interpolate


@pytest.mark.parametrize(
    ("sigmas", "low", "high"),
    [
        ([1, 0.75, 0.5, 0.25, 0], (2, 4), (0, 2)),
        ([1, 0.8577, 0.6022, 0.0089, 0], (3, 4), (0, 3)),
        ([1, 0.5, 0], (1, 2), (0, 1)),
    ],
)
def test_each_branch_has_the_steps_of_its_half_of_the_timesteps(sigmas, low, high):
    assert branch_steps(np.array(sigmas), "low") == low
    assert branch_steps(np.array(sigmas), "high") == high


def test_a_one_step_student_has_no_low_branch():
    assert branch_steps(np.array([1, 0]), "high") == (0, 1)
    with pytest.raises(ValueError, match="at or below timestep 500"):
        branch_steps(np.array([1, 0]), "low")


def test_the_average_forgets_by_its_decay():
    ema = {"w": np.array([0.0])}
    for _ in range(10):
        ema = average(ema, {"w": np.array([1.0])}, 0.99)
    assert ema["w"][0] == pytest.approx(1 - 0.99**10)


def test_branches_are_merged_three_to_seven():
    merged = interpolate({"w": np.array([10.0])}, {"w": np.array([20.0])})
    assert merged["w"][0] == pytest.approx(0.3 * 10 + 0.7 * 20)
