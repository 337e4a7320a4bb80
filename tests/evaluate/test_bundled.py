"""The trained detector and the bundled model, where they are there."""

import json

import numpy as np
import pytest

from sd35flash_jax.checkpoint import BUNDLED
from sd35flash_jax.evaluate.detector import WEIGHTS, WIDTHS, load_detector
from sd35flash_jax.evaluate.run import Sampler, compose_prompts, evaluate
from sd35flash_jax.evaluate.scoring import WorldScorer
from sd35flash_jax.evaluate.suite import suite
from training.model import SIZE

needs_detector = pytest.mark.skipif(not WEIGHTS.is_file(), reason="the detector is not trained yet")
needs_model = pytest.mark.skipif(not BUNDLED.is_dir(), reason="no model is bundled yet")


@needs_detector
def test_the_detector_reads_composed_pictures_right_98_times_in_100_at_least():
    scorer, prompts = WorldScorer(load_detector(), np.zeros((0, WIDTHS[-1]))), suite()
    marks = []
    for start in range(0, len(prompts), 67):
        part = prompts[start : start + 67]
        marks += scorer.mark(part, compose_prompts(part, start, SIZE))
    figures = scorer.figures(prompts, [marks])
    assert [f"{name}: {figure.mean:.3f}" for name, figure in figures.items() if figure.mean < 0.98] == []


@needs_detector
@needs_model
def test_the_bundled_model_draws_most_of_a_small_suite_right_in_four_steps(tmp_path):
    evaluate([Sampler("bundled")], suite(4), 1, tmp_path, batch=20, dtype="float32")
    _, row = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert row["figures"]["overall"]["mean"] >= 0.75
