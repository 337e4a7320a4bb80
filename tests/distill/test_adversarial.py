import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sd35flash_jax.distill.adversarial import (
    adversarial_loss,
    discriminate,
    discriminator_loss,
    draw_reinitialised,
    init_heads,
    replace_heads,
)
from tests.distill.networks import is_zero, numeric_gradient

HEADS = jax.tree.map(lambda array: array + 0.1, init_heads(jax.random.key(0), 3, 6, 4))


@pytest.fixture
def features():
    draw = np.random.default_rng(0)
    return {kind: list(draw.standard_normal((3, 5, 7, 6))) for kind in ("real", "fake")}


def literal_logits(heads, features):
    logits = []
    for head, feature in enumerate(features):
        centred = feature - feature.mean(-1, keepdims=True)
        normed = centred / np.sqrt(feature.var(-1, keepdims=True) + 1e-5)
        hidden = normed @ heads["hidden_kernel"][head] + heads["hidden_bias"][head]
        silu = hidden / (1 + np.exp(-hidden))
        logits.append((silu @ heads["out_kernel"][head] + heads["out_bias"][head])[..., 0])
    return np.stack(logits)


def test_every_head_gives_every_token_of_its_feature_a_logit(features):
    logits = discriminate(HEADS, features["real"])
    assert logits.shape == (3, 5, 7)
    np.testing.assert_allclose(logits, literal_logits(HEADS, features["real"]), atol=1e-4)


def test_the_gradient_of_the_hinge_loss_is_that_of_its_literal_twin(features):
    heads = {name: np.array(array, float) for name, array in HEADS.items()}

    def twin(heads):
        real, fake = literal_logits(heads, features["real"]), literal_logits(heads, features["fake"])
        return np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()

    value, gradient = jax.value_and_grad(discriminator_loss)(HEADS, features["real"], features["fake"])
    assert float(value) == pytest.approx(twin(heads), rel=1e-4)
    for name, array in numeric_gradient(twin, heads).items():
        np.testing.assert_allclose(gradient[name], array, atol=2e-3, err_msg=name)


def test_the_hinge_loss_is_zero_once_both_sides_are_told_apart_by_the_margin(features):
    blind = jax.tree.map(jnp.zeros_like, HEADS)
    assert float(discriminator_loss(blind, features["real"], features["fake"])) == 2
    sure = blind | {"hidden_kernel": blind["hidden_kernel"].at[:, 0].set(1), "out_kernel": blind["out_kernel"] + 10}
    ramp = np.zeros((5, 7, 6))
    ramp[..., 0] = 1
    loss = discriminator_loss(sure | {"out_bias": blind["out_bias"] - 20}, [ramp] * 3, [-ramp] * 3)
    assert float(loss) == 0


def test_the_discriminators_loss_leaves_the_features_alone(features):
    gradients = jax.grad(discriminator_loss, argnums=(1, 2))(HEADS, features["real"], features["fake"])
    assert is_zero(gradients)


def test_the_students_loss_moves_its_features_up_the_logits_and_leaves_the_heads_alone(features):
    to_heads, to_features = jax.grad(adversarial_loss, argnums=(0, 1))(HEADS, features["fake"])
    assert is_zero(to_heads) and not is_zero(to_features)
    moved = [
        feature - 0.01 * gradient / np.abs(gradient).max() for feature, gradient in zip(features["fake"], to_features)
    ]
    assert adversarial_loss(HEADS, moved) < adversarial_loss(HEADS, features["fake"])
    assert float(adversarial_loss(HEADS, features["fake"])) == pytest.approx(
        -literal_logits(HEADS, features["fake"]).mean(), abs=1e-5
    )


def test_only_the_chosen_heads_start_afresh_with_their_optimizer_state():
    optimizer = optax.adam(1e-3)
    _, moments = optimizer.update(HEADS, optimizer.init(HEADS))
    fresh = init_heads(jax.random.key(1), 3, 6, 4)
    chosen = jnp.array([False, True, False])
    heads, kept = replace_heads(chosen, (fresh, optimizer.init(fresh)), (HEADS, moments))
    for name in HEADS:
        np.testing.assert_array_equal(heads[name][1], fresh[name][1])
        np.testing.assert_array_equal(heads[name][::2], HEADS[name][::2])
        np.testing.assert_array_equal(kept[0].mu[name][1], 0)
        np.testing.assert_array_equal(kept[0].mu[name][::2], moments[0].mu[name][::2])
    assert kept[0].count == 1


def test_heads_are_reinitialised_as_often_as_asked():
    chosen = jax.vmap(lambda key: draw_reinitialised(key, 4, 0.005))(jax.random.split(jax.random.key(0), 20000))
    assert chosen.shape == (20000, 4) and abs(chosen.mean() - 0.005) < 0.001
    assert not draw_reinitialised(jax.random.key(0), 4, 0.0).any()
