import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from sd35flash_jax.schedule import TRAIN_TIMESTEPS, shifted_sigmas


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.15, 2.0, 3.0, 3.5, 6.0, 12.0])
def test_sigmas_and_timesteps_equal_the_reference_bit_for_bit(shift, record_parity):
    difference = 0.0
    for steps in range(1, 51):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        sigmas = shifted_sigmas(steps, shift)
        np.testing.assert_array_equal(sigmas, scheduler.sigmas.numpy())
        np.testing.assert_array_equal(sigmas[:-1] * np.float32(TRAIN_TIMESTEPS), scheduler.timesteps.numpy())
        difference = max(difference, float(np.abs(sigmas - scheduler.sigmas.numpy()).max()))
    record_parity(f"schedule, shift {shift:g}, 1 to 50 steps", difference, 0.0)
