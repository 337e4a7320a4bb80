"""The `parity` command, on the tiny reference folder and its conversion."""

import json

import numpy as np
import pytest
from PIL import Image

from conversion.parity import compare
from sd35flash_jax import save_checkpoint
from sd35flash_jax.checkpoint import load_checkpoint, parameters
from sd35flash_jax.cli import main

SIZE = ["--height", "96", "--width", "144"]


def test_a_faithful_checkpoint_passes_and_is_shown_side_by_side(reference_folder, checkpoint, tmp_path, capsys):
    arguments = [str(reference_folder), str(checkpoint), "--output", str(tmp_path), "--guidance", "3", *SIZE]
    status = main(["parity", *arguments])
    table = capsys.readouterr().out
    assert status == 0 and "TOO FAR" not in table
    rows = {row["item"]: row for row in json.loads((tmp_path / "parity.json").read_text())}
    assert {"clip_l context", "clip_g pooled", "t5 context", "velocity at timestep 1000", "vae encode"} <= set(rows)
    assert all(row["passed"] and row["max_abs"] > 0 for row in rows.values())
    assert rows["image, end to end"]["psnr"] > 80
    # A row for each of two prompts; reference, ours and difference side by side.
    assert Image.open(tmp_path / "parity.png").size == (3 * 144, 2 * 96)


def test_one_changed_weight_is_found_and_fails(reference_folder, checkpoint, tmp_path, capsys):
    loaded = load_checkpoint(checkpoint, dtype="float32")
    arrays = {name: parameters(module) for name, module in loaded.components.items()}
    kernel = np.array(arrays["transformer"]["last_block.image.attention.out.kernel"])
    kernel[0] += 0.5
    arrays["transformer"]["last_block.image.attention.out.kernel"] = kernel
    save_checkpoint(tmp_path / "changed", loaded.config, arrays, loaded.tokenizers)
    arguments = [str(reference_folder), str(tmp_path / "changed"), "--output", str(tmp_path / "report"), *SIZE]
    status = main(["parity", *arguments])
    captured = capsys.readouterr()
    assert status == 1
    assert "beyond tolerance: velocity at timestep 1000" in captured.err
    assert "| clip_l context" in captured.out and "TOO FAR" in captured.out


def test_a_source_that_is_no_diffusers_folder_is_refused(checkpoint, tmp_path, capsys):
    status = main(["parity", str(tmp_path), str(checkpoint), "--output", str(tmp_path / "report")])
    assert status == 1 and "is not a diffusers folder" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_figures_of_a_comparison_are_what_they_say():
    reference = np.float32([[3.0, 4.0], [0.0, 0.0]])
    row = compare("item", reference + np.float32([[0.0, 0.0], [0.0, 1.0]]), reference, 0.1, pixels=True)
    assert row.max_abs == 1.0 and row.largest == 4.0 and not row.passed
    assert row.relative == pytest.approx(1 / 5)
    assert row.cosine == pytest.approx(25 / (np.sqrt(26) * 5))
    assert row.psnr == pytest.approx(-20 * np.log10(0.5))
    assert compare("item", reference, reference, 0.0).passed
