"""The peers run every case they have, at test size, on what the machine has installed."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import worker
from benchmarks.cases import ITEMS, Case
from benchmarks.run import PEERS, _sides
from tests.benchmarks.test_benchmark import request_for
from tests.conftest import HAS_REFERENCE

needs_reference = pytest.mark.skipif(not HAS_REFERENCE, reason="needs the reference extra")


def rows_of(side, request) -> list[dict]:
    lines = []
    worker.run_side(side, request, lines.append)
    assert "device" in lines[0]["about"] and "gemm_flops" not in lines[1]
    return [line["row"] for line in lines[1:]]


@needs_reference
def test_diffusers_is_measured_in_the_same_items():
    from benchmarks.diffusers_peer import DiffusersPeer

    assert DiffusersPeer.items == tuple(ITEMS)
    request = replace(request_for("t5", "evaluation", "image", repeats=1), platform="cpu")
    rows = rows_of("diffusers-eager", request)
    assert [row["item"] for row in rows] == ["t5", "evaluation", "image"]
    assert all(row.get("median", 0) > 0 for row in rows), rows


@needs_reference
def test_diffusers_makes_images_of_the_size_asked_for():
    from benchmarks.diffusers_peer import DiffusersPeer

    peer = DiffusersPeer(replace(request_for("image", batches=(2,)), platform="cpu"), compiled=False)
    image = peer._call(Case("prompt_to_pixels", 32, 2))()
    assert image.shape == (2, 32, 32, 3) and image.dtype == np.uint8 and image.std() > 0


@pytest.mark.skipif(importlib.util.find_spec("keras_hub") is None, reason="needs the keras-hub extra")
def test_keras_hub_is_measured_in_an_evaluation():
    request = replace(request_for("decode", "evaluation", "step"), platform="cpu")
    rows = rows_of("keras-hub", request)
    assert [row["item"] for row in rows] == ["evaluation", "step"]
    assert all(row.get("median", 0) > 0 for row in rows), rows


def test_on_a_cpu_diffusers_is_compiled_only_when_asked():
    assert _sides(["diffusers", "keras-hub"], "cpu") == ["diffusers-eager", "keras-hub"]
    assert _sides(["diffusers", "diffusers-compile"], "cpu") == ["diffusers-eager", "diffusers-compile"]
    assert _sides(PEERS, "gpu") == ["diffusers-eager", "diffusers-compile", "keras-hub"]
    assert {side for peer in PEERS for side in _sides([peer], "gpu")} | {"ours"} == set(worker.SIDES)
