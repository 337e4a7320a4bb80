"""Every test in this folder compares with the reference, without gradients and at full float32 precision."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    torch = pytest.importorskip("torch", reason="needs the reference extra")
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield
