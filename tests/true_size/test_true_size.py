"""The published dimensions, with random weights: run by hand with `pytest -m slow -s tests/true_size`. Needs 24 GiB of
memory and 50 GB of disk; each step runs in a process of its own."""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd35flash_jax.checkpoint import abstract_component
from sd35flash_jax.config import PRESETS
from sd35flash_jax.frozen import Frozen
from sd35flash_jax.sampling import STEPS_MODULATED, add_velocity, modulations

pytestmark = pytest.mark.slow

PARAMETERS = {"transformer": 2_469_663_936, "t5": 4_762_310_656, "clip_g": 694_659_840}
LARGEST_TENSOR_GIB = 32128 * 4096 * 2 / 2**30  # T5's embedding


def run(step: str, component: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.true_size.worker", step, component, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    print(f"{component} {step}: {figures}")
    return figures


@pytest.mark.parametrize("component", ["transformer", "clip_g", "t5"])
def test_a_component_converts_and_agrees_with_the_reference(component, tmp_path, record_parity):
    pytest.importorskip("torch", reason="needs the reference extra")
    assert run("make", component, tmp_path)["parameters"] == PARAMETERS[component]
    converted = run("convert", component, tmp_path)
    assert converted["peak_gib"] < 3
    run("reference", component, tmp_path)
    run("ours", component, tmp_path)
    for output in ("", "_pooled") if component == "clip_g" else ("",):
        reference = np.load(tmp_path / f"reference{output}.npy")
        error = np.abs(np.load(tmp_path / f"ours{output}.npy") - reference).max()
        scale = np.abs(reference).max()
        record_parity(f"true size, {component}{output}", error, 1e-4 * max(scale, 1), relative=error / scale)


def test_converting_takes_at_most_twice_as_long_as_copying(tmp_path):
    for component in PARAMETERS:
        run("make", component, tmp_path)
    copying, converting = [], []
    for _ in range(3):  # in turn, because disks and neighbours have their moods
        start = time.perf_counter()
        subprocess.run(["cp", "-r", tmp_path / "source", tmp_path / "copy"], check=True)
        copying.append(time.perf_counter() - start)
        shutil.rmtree(tmp_path / "copy")
        converted = run("convert", "all", tmp_path)
        converting.append(converted["total_s"])
        shutil.rmtree(tmp_path / "checkpoint")
        assert converted["peak_gib"] <= LARGEST_TENSOR_GIB + 1.5
    shutil.rmtree(tmp_path / "source")
    ratio = statistics.median(copying) / statistics.median(converting)
    print(f"cp -r: {copying} s, convert: {converting} s, throughput of convert to that of cp -r: {ratio:.2f}")
    assert ratio >= 0.5


@pytest.mark.parametrize("side", [32, 64, 128])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_sampling_programs_of_sd35_medium_compile_within_ten_seconds(side, dtype):
    def shaped(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    transformer = abstract_component("transformer", PRESETS["sd3.5-medium"])
    transformer = Frozen(jax.tree.map(lambda array: shaped(*array.shape, dtype=dtype), transformer))
    latents, pooled, context = (
        shaped(1, side, side, 16),
        shaped(1, 2048, dtype=dtype),
        shaped(1, 333, 4096, dtype=dtype),
    )
    timesteps = shaped(STEPS_MODULATED, 1)
    start = time.perf_counter()
    modulations.lower(transformer, timesteps, pooled).compile()
    modulation = jax.eval_shape(modulations, transformer, timesteps, pooled)
    add_velocity.lower(transformer, latents, modulation, shaped(dtype="int32"), context, shaped(), latents).compile()
    seconds = time.perf_counter() - start
    print(f"sampling programs, {8 * side} px, {jnp.dtype(dtype).name}: traced and compiled in {seconds:.1f} s")
    assert seconds <= 10
