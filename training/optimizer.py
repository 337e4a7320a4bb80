"""What trains autoencoder, detector and teacher; a learning rate of one, scaled outside."""

import optax

from sd35flash_jax.distill.muon import blockwise_muon

LARGEST_NORM = 1.0
"""Of all gradients together; longer ones are scaled down to it."""


def adam() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(LARGEST_NORM), optax.scale_by_adam(b2=0.99), optax.scale(-1.0))


def muon() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(LARGEST_NORM), blockwise_muon(1.0, weight_decay=0.02))
