"""Muon (arXiv 2502.16982): momentum whose matrices are made nearly orthogonal, one moment for each parameter."""

import re
from typing import Any

import optax
from optax.contrib import MuonDimensionNumbers, muon

_IN_BLOCKS = re.compile(r"(.*\.)?(blocks|dual_blocks|last_block|layers)\..*kernel")


def blockwise_muon(rate: float | optax.Schedule, weight_decay: float = 0.0) -> optax.GradientTransformation:
    """Muon on the kernels within blocks, of a dictionary of parameters by dotted path, and Adam on all else. Updates of
    Muon have the size of Adam's (`consistent_rms`), so that both share one learning rate; its kernels alone decay."""

    def dimensions(params: dict[str, Any]) -> dict[str, MuonDimensionNumbers | None]:
        return {
            path: MuonDimensionNumbers(array.ndim - 2, array.ndim - 1) if _IN_BLOCKS.fullmatch(path) else None
            for path, array in params.items()
        }

    return muon(
        rate,
        adam_b2=0.99,
        weight_decay=weight_decay,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=0.2,
    )
