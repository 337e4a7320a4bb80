"""The trained detector and the bundled model, where they are there."""

import json

import pytest

from sd35flash_jax.checkpoint import BUNDLED
from sd35flash_jax.evaluate.detector import WEIGHTS
from sd35flash_jax.evaluate.run import COMPOSED, Sampler, evaluate
from sd35flash_jax.evaluate.suite import CATEGORIES, suite

needs_detector = pytest.mark.skipif(not WEIGHTS.is_file(), reason="the detector is not trained yet")
needs_model = pytest.mark.skipif(not BUNDLED.is_dir(), reason="no model is bundled yet")


@needs_detector
def test_the_detector_reads_composed_pictures_right_98_times_in_100_at_least(tmp_path):
    evaluate([], suite(), 1, tmp_path)
    (row,) = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert row["name"] == COMPOSED
    below = {name: row["figures"][name]["mean"] for name in CATEGORIES if row["figures"][name]["mean"] < 0.98}
    assert below == {}


@needs_detector
@needs_model
def test_the_bundled_model_draws_most_of_a_small_suite_right_in_four_steps(tmp_path):
    evaluate([Sampler("bundled")], suite(4), 1, tmp_path, batch=20, dtype="float32")
    _, row = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert row["figures"]["overall"]["mean"] >= 0.75
