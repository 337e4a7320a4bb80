import jax
import jax.numpy as jnp
import numpy as np

from sd35flash_jax.distill.text_dropout import drop_text_encoders
from sd35flash_jax.text import Conditioning

FULL = Conditioning(jnp.ones((4000, 5, 7)), jnp.ones((4000, 5)))
WIDTHS, CLIP_TOKENS = (2, 3), 3


def dropped(probability):
    return drop_text_encoders(FULL, jax.random.key(0), probability, WIDTHS, CLIP_TOKENS)


def test_each_encoder_is_left_out_whole_for_each_prompt_on_its_own():
    result = dropped(0.3)
    context, pooled = np.array(result.context), np.array(result.pooled)
    regions = {
        "clip_l": [context[:, :3, :2], pooled[:, :2, None]],
        "clip_g": [context[:, :3, 2:], pooled[:, 2:, None]],
        "t5": [context[:, 3:]],
    }
    left_out = {}
    for encoder, parts in regions.items():
        rows = np.concatenate([part.reshape(4000, -1) for part in parts], axis=1)
        assert (rows == rows[:, :1]).all(), encoder
        left_out[encoder] = rows[:, 0] == 0
        assert abs(left_out[encoder].mean() - 0.3) < 0.03
    assert abs((left_out["clip_l"] & left_out["t5"]).mean() - 0.09) < 0.02


def test_no_dropout_changes_nothing_and_certain_dropout_leaves_nothing():
    np.testing.assert_array_equal(dropped(0.0).context, FULL.context)
    assert not dropped(1.0).context.any() and not dropped(1.0).pooled.any()
