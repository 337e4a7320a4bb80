"""Muon (arXiv 2502.16982) on the kernels within blocks, Adam on all else; a learning rate of one, scaled outside."""

from typing import Any

import optax
from optax.contrib import MuonDimensionNumbers, muon

BLOCKS = (".blocks.", ".dual_blocks.", ".last_block.", ".layers.")
LARGEST_NORM = 1.0
"""Of all gradients together; longer ones are scaled down to it."""


def adam() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(LARGEST_NORM), optax.scale_by_adam(b2=0.99), optax.scale(-1.0))


def blockwise_muon(params: dict[str, Any]) -> optax.GradientTransformation:
    """Updates of Muon have the size of Adam's (`consistent_rms`), so that both share one learning rate."""

    def dimensions(path: str, array: Any) -> MuonDimensionNumbers | None:
        matrix = path.endswith(".kernel") and any(name in path for name in BLOCKS)
        return MuonDimensionNumbers(array.ndim - 2, array.ndim - 1) if matrix else None

    numbers = {path: dimensions(path, array) for path, array in params.items()}
    rule = muon(
        1.0,
        adam_learning_rate=1.0,
        adam_b2=0.99,
        weight_decay=0.02,
        muon_weight_dimension_numbers=numbers,
        consistent_rms=0.2,
    )
    return optax.chain(optax.clip_by_global_norm(LARGEST_NORM), rule)
