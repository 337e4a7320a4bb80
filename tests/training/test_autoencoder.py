import jax
import numpy as np

from training.autoencoder import random_scenes


def test_whether_a_background_is_a_gradient_says_nothing_of_what_is_mirrored():
    scenes = random_scenes(jax.random.key(0), 1000)
    gradient = np.abs(scenes.colours[:, 0] - scenes.colours[:, 1]).max(axis=-1) > 0.3
    agree = gradient == np.ravel(scenes.mirrored)[:1000]
    assert 0.45 < agree.mean() < 0.55 and 0.3 < gradient.mean() < 0.6
