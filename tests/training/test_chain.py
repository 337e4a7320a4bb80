"""Every stage from sprites to pictures, at a tiny size. It compiles for minutes on a CPU, and is marked slow."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sd35flash_jax import FlashPipeline
from sd35flash_jax.checkpoint import load_checkpoint, parameters, read_config, read_origin
from sd35flash_jax.cli import main
from sd35flash_jax.distill.config import read_distill_config
from sd35flash_jax.distill.trainer import check_teacher
from sd35flash_jax.evaluate.detector import load_detector
from tests.training.tiny import SIZE, TINY
from training.bundle import bundle
from training.model import FLASH_MINI, SOURCE
from training.model import SIZE as OWN_SIZE
from training.pieces import load_pieces

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "training" / "distill_flash.toml"


@pytest.mark.parametrize("name", ["distill_flash.toml", "distill_flash_own.toml"])
def test_the_recipe_distils_the_kept_teacher_at_its_own_size(name, monkeypatch):
    config = read_distill_config(RECIPE.with_name(name))
    assert (config.training.height, config.training.width) == (OWN_SIZE, OWN_SIZE) == (FLASH_MINI.default_size,) * 2
    shift, even = 5, np.array([1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(config.student.sigmas, shift * even / (1 + (shift - 1) * even), atol=5e-9)
    monkeypatch.chdir(ROOT)
    described = read_config(config.teacher.checkpoint)
    check_teacher(config, described)
    assert replace(described, vae=None) == replace(FLASH_MINI, vae=None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the stages before distillation left. Read it only."""
    folder = tmp_path_factory.mktemp("runs")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-m", "tests.training.chain", str(folder)], cwd=ROOT, env=environment, check=True)
    return folder


@pytest.mark.slow
def test_every_stage_logs_finite_losses_of_a_few_calls_and_how_it_was_trained(trained):
    for stage in ("autoencoder", "detector", "first", "teacher"):
        with (trained / f"{stage}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert 3 < len(rows) < 9
        assert all(np.isfinite(float(value)) for row in rows for value in row.values())
        summary = json.loads((trained / f"{stage}.json").read_text())
        assert summary["updates"] == len(rows) * (2 if stage == "autoencoder" else 1)
    assert len(summary["devices"]) == 2


@pytest.mark.slow
def test_the_autoencoder_is_stored_with_its_latents_scale_and_the_detector_as_the_evaluation_reads_it(trained):
    vae = read_config(trained / "autoencoder").vae
    summary = json.loads((trained / "autoencoder.json").read_text())
    assert (vae.scale, vae.shift) == (summary["scale"], summary["shift"]) != (TINY.vae.scale, TINY.vae.shift)
    load_detector(trained / "detector.safetensors")


@pytest.mark.slow
def test_a_later_stretch_begins_where_the_first_ended(trained):
    first, later = (load_pieces(trained / f"{name}-weights") for name in ("first", "teacher"))
    assert first.keys() == later.keys()
    moved = [np.abs(np.float32(later[path]) - np.float32(first[path])).max() for path in first]
    assert 0 < max(moved) < 0.02


@pytest.mark.slow
def test_a_distilled_teacher_goes_into_the_box_and_draws_pictures(trained, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a rocket at night\nthree cats\n")
    settings = {
        "teacher.checkpoint": trained / "teacher",
        "teacher.steps": 4,
        "teacher.cached": 4,
        "teacher.cache_batch": 2,
        "training.prompts": prompts,
        "training.output": tmp_path / "flash",
        "training.batch": 2,
        "training.height": SIZE,
        "training.width": SIZE,
        "training.dtype": "float32",
        "trajectory.updates": 1,
        "matching.updates": 1,
        "matching.proxy_updates": 1,
        "matching.head_size": 8,
        "split.updates": 1,
    }
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    assert main(["distill", str(RECIPE), *overrides]) == 0
    student, box = tmp_path / "flash" / "student", tmp_path / "box"
    assert bundle(student, box) > 25
    assert read_origin(box) == SOURCE and read_config(box) == read_config(student)
    assert read_config(box).schedule.sigmas == (read_distill_config(RECIPE).student.sigmas,)
    sizes = [sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in (box, student)]
    assert sizes[0] < sizes[1]
    for path, array in parameters(load_checkpoint(student, ["vae"], "float32").components["vae"]).items():
        assert np.isfinite(array).all(), path
    result = FlashPipeline.from_pretrained(box, dtype="float32")(["a rocket at night"])
    (image,) = result.images
    assert np.asarray(image).shape == (SIZE, SIZE, 3) and np.asarray(image).std() > 1
