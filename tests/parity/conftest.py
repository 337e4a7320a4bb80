"""Every test in this folder compares with the reference, without gradients and at full float32 precision."""

from collections.abc import Iterator

import jax
import pytest

from tests.conftest import HAS_REFERENCE

# Without the reference extra nothing here can even be imported; tests/conftest.py says so at the head of the run.
collect_ignore_glob = [] if HAS_REFERENCE else ["test_*"]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    import torch

    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield
