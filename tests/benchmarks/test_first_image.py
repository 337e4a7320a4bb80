from dataclasses import replace

import pytest

from benchmarks import first_image
from sd35flash_jax.checkpoint import bundled_checkpoint, load_checkpoint, read_config
from sd35flash_jax.config import PRESETS, read_json
from tests.tiny_model import CONFIG


@pytest.fixture
def tiny(monkeypatch):
    """A small model with the vocabularies of the bundled tokenizers."""
    bundled = read_config(bundled_checkpoint())
    encoders = {
        name: replace(getattr(CONFIG, name), vocabulary=getattr(bundled, name).vocabulary)
        for name in ("clip_l", "clip_g", "t5")
    }
    config = replace(CONFIG, **encoders)
    monkeypatch.setitem(PRESETS, "tiny", config)
    return config


def test_each_state_of_a_process_is_measured_and_programs_are_kept_from_the_first_on(tiny, tmp_path, capsys):
    checkpoint, output = tmp_path / "weights", tmp_path / "out" / "first.json"
    arguments = ["--preset", "tiny", "--size", "64", "--repeats", "1"]
    assert first_image.main([*arguments, "--checkpoint", str(checkpoint), "--output", str(output)]) == 0
    report = read_json(output)
    assert list(report["runs"]) == list(first_image.STATES)
    cold, warm, from_disk = (runs[0] for runs in report["runs"].values())
    assert cold["compiled"] > 5 and warm["compiled"] == from_disk["compiled"] == 0
    assert min(run["seconds"] for run in (cold, warm, from_disk)) > 0
    assert all("denoise" in run["stages"] for run in (cold, warm, from_disk))
    printed = capsys.readouterr().out
    assert f"{warm['seconds']:.1f}" in printed and "programs of an earlier process" in printed
    assert load_checkpoint(checkpoint).config == tiny


def test_a_failure_of_the_process_is_reported_in_its_words(tiny, tmp_path, capsys):
    assert first_image.main(["--preset", "tiny", "--size", "40", "--checkpoint", str(tmp_path / "weights")]) == 1
    assert "height 40 is not a positive multiple of 16" in capsys.readouterr().err
    assert first_image.main(["--preset", "tiny", "--repeats", "0"]) == 1
    assert "--repeats must be positive" in capsys.readouterr().err
