import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import PartitionSpec

from sd35flash_jax.checkpoint import parameter_shapes
from sd35flash_jax.config import PRESETS
from sd35flash_jax.sharding import make_mesh, parameter_shardings, partition

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def report():
    """What `tests/distill/sharded_update.py` says of four devices."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-m", "tests.distill.sharded_update"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def test_an_update_on_a_mesh_of_two_by_two_is_that_of_one_device(report):
    assert report["moved"] > 5e-3
    assert report["difference"] < 1e-5


def test_the_devices_share_the_arithmetic(report):
    assert report["flops"] < 0.3


def test_every_array_of_the_state_is_cut_as_the_table_says(report):
    cut = {array["path"]: array for array in report["arrays"]}
    for tree in ("student.params", "student.moments[1][0].nu", "ema", "proxy.params"):
        kernel = cut[f".{tree}['dual_blocks.image.feed_forward.linear_1.kernel']"]
        assert kernel["spec"] == [None, "fsdp", None] and kernel["on_device"] * 2 == kernel["size"]
    assert cut[".heads.params['hidden_kernel']"]["spec"] == [None, "fsdp", None]
    whole = [array for array in report["arrays"] if array["on_device"] == array["size"]]
    assert max(array["size"] for array in whole) < 1000 < 100_000 < sum(array["size"] for array in report["arrays"])


@pytest.mark.parametrize("preset", ["sd3.5-medium", "sd3.5-large"])
def test_no_large_parameter_of_a_published_model_stays_whole(preset):
    shapes = parameter_shapes("transformer", PRESETS[preset])
    whole = {path for path, shape in shapes.items() if not any(partition(path, shape))}
    elements = {path: jax.ShapeDtypeStruct(shape, "float32").size for path, shape in shapes.items()}
    assert all(path.endswith((".bias", ".scale")) for path in whole)
    assert sum(elements[path] for path in whole) < 1e-3 * sum(elements.values())
    for path in set(shapes) - whole:
        axis = partition(path, shapes[path]).index("fsdp")
        assert shapes[path][axis] % 64 == 0, path


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("position_table", (384, 384, 1536), (None, None, "fsdp")),
        ("out.kernel", (1536, 64), ("fsdp", None)),
        ("blocks.image.attention.qkv.kernel", (10, 1536, 4608), (None, "fsdp", None)),
        ("blocks.image.attention.qkv.kernel.a", (10, 1536, 8), (None, "fsdp", None)),
        ("blocks.image.attention.qkv.kernel.b", (10, 8, 4608), (None, None, "fsdp")),
        ("blocks.image.attention.qkv.bias", (10, 4608), (None, None)),
    ],
)
def test_the_table_cuts_kernels_loras_and_the_position_table(path, shape, spec):
    assert partition(path, shape) == PartitionSpec(*spec)


def test_what_does_not_divide_is_refused_by_name(monkeypatch):
    with pytest.raises(ValueError, match=r"1 devices do not divide into groups of sharding.fsdp=2; choose a divisor"):
        make_mesh(2)
    mesh = jax.sharding.AbstractMesh((1, 3), ("data", "fsdp"))
    odd = {"out.kernel": jax.ShapeDtypeStruct((64, 4), "float32")}
    with pytest.raises(ValueError, match=r"out.kernel of shape \(64, 4\) does not divide over sharding.fsdp=3 devices"):
        parameter_shardings(mesh, odd)
