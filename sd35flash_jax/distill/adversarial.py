"""Stage (b), the latent adversary: small heads on several of the proxy's intermediate features tell the teacher's noisy
latents from the student's (SD3.5-Flash, arXiv 2509.21318; latent adversarial distillation, arXiv 2403.12015).

Both are compared at the same noise level: the student's points are those of its own trajectory, the teacher's are
its samples noised to that level. The heads alone are trained by the discriminator's loss; the proxy that carries them
learns by flow matching.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

HeadParams = dict[str, Float[Array, "heads ..."]]
"""The parameters of all heads, stacked on a leading axis."""


def init_heads(key: Array, heads: int, feature_size: int, hidden_size: int) -> HeadParams:
    """Fresh heads: a layer norm without parameters, a hidden layer with SiLU, and one logit for each token."""

    def one(key: Array) -> HeadParams:
        first, second = jax.random.split(key)
        return {
            "hidden_kernel": jax.random.normal(first, (feature_size, hidden_size)) / jnp.sqrt(feature_size),
            "hidden_bias": jnp.zeros(hidden_size),
            "out_kernel": jax.random.normal(second, (hidden_size, 1)) / jnp.sqrt(hidden_size),
            "out_bias": jnp.zeros(1),
        }

    return jax.vmap(one)(jax.random.split(key, heads))


def discriminate(heads: HeadParams, features: Sequence[Float[Array, "b *t c"]]) -> Float[Array, "heads b *t"]:
    """The logit of each head for each token of its feature: positive for the teacher's, negative for the student's."""

    def one(head: HeadParams, feature: Array) -> Array:
        feature = jax.nn.standardize(feature.astype(jnp.float32), axis=-1)
        hidden = jax.nn.silu(feature @ head["hidden_kernel"] + head["hidden_bias"])
        return (hidden @ head["out_kernel"] + head["out_bias"])[..., 0]

    return jax.vmap(one)(heads, jnp.stack(features))


def discriminator_loss(
    heads: HeadParams,
    real: Sequence[Float[Array, "b *t c"]],
    fake: Sequence[Float[Array, "b *t c"]],
) -> Float[Array, ""]:
    """The hinge loss of the heads; the features are constants to it.

    L = E max(0, 1 - D(real)) + E max(0, 1 + D(fake))
    """
    real, fake = jax.lax.stop_gradient((list(real), list(fake)))
    return jnp.mean(jax.nn.relu(1 - discriminate(heads, real))) + jnp.mean(jax.nn.relu(1 + discriminate(heads, fake)))


def adversarial_loss(heads: HeadParams, fake: Sequence[Float[Array, "b *t c"]]) -> Float[Array, ""]:
    """The student's loss, `L = -E D(fake)`: its gradient passes through the features to the student's point; the heads
    are constants to it."""
    return -jnp.mean(discriminate(jax.lax.stop_gradient(heads), fake))


def draw_reinitialised(key: Array, heads: int, probability: float) -> Array:
    """Which heads start afresh at this step, each with a small probability, so that none overfits: `(heads,)` bool."""
    return jax.random.bernoulli(key, probability, (heads,))


def replace_heads(chosen: Array, fresh: PyTree, current: PyTree) -> PyTree:
    """`fresh` in the rows of the chosen heads, `current` in the others. Leaves without a row for each head (such as an
    optimizer's step count) stay."""

    def choose(new: Array, old: Array) -> Array:
        if old.ndim == 0:
            return old
        return jnp.where(chosen.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, fresh, current)
