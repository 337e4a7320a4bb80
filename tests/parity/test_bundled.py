"""The bundled model, whose weights are trained, against the reference's classes that load its export."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from conversion import convert, export
from sd35flash_jax import FlashPipeline
from sd35flash_jax.checkpoint import BUNDLED, load_checkpoint, parameters
from sd35flash_jax.schedule import unshifted
from tests.parity.comparison import as_torch, rms_error

PROMPTS = ["three strawberries above a frog on a blue background", "a castle at sunset"]


def test_the_bundled_model_s_export_draws_the_same_pictures_in_the_reference(tmp_path, record_parity):
    ours = FlashPipeline.from_pretrained(dtype="float32")
    with pytest.warns(UserWarning, match="max_sequence_length=32"), pytest.warns(UserWarning, match=r"sigmas=\[1, "):
        export(BUNDLED, tmp_path / "exported")
    theirs = StableDiffusion3Pipeline.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    side = ours.config.default_size
    noise = np.asarray(ours.noise(3, len(PROMPTS), side, side))
    (sigmas,) = ours.config.schedule.sigmas
    expected = theirs(
        PROMPTS,
        latents=as_torch(noise.transpose(0, 3, 1, 2)),
        sigmas=unshifted(sigmas, ours.config.schedule.shift),
        guidance_scale=1.0,
        max_sequence_length=ours.max_t5_tokens,
        height=side,
        width=side,
        output_type="np",
    ).images
    pixels = np.asarray(ours.decode(ours.denoise(noise, ours.encode(PROMPTS), steps=len(sigmas))))
    assert expected.std() > 0.05, "a flat image would agree with anything"
    psnr = -20 * np.log10(rms_error([pixels], [expected]))
    record_parity("bundled model, 4 steps, pixels", np.abs(pixels - expected).max(), 1e-3, PSNR=f"{psnr:.0f} dB")


@pytest.mark.filterwarnings("ignore:neither layout", "ignore:this model's T5")
def test_the_bundled_model_comes_back_from_its_export_as_it_was(tmp_path):
    export(BUNDLED, tmp_path / "exported")
    convert(tmp_path / "exported", tmp_path / "again")
    before, after = (load_checkpoint(path, dtype="float32") for path in (BUNDLED, tmp_path / "again"))
    # A diffusers folder has no place for a model's own sigmas.
    assert after.config.to_json() | {"schedule": None} == before.config.to_json() | {"schedule": None}
    for name, component in before.components.items():
        arrays, again = parameters(component), parameters(after.components[name])
        assert all(np.array_equal(arrays[path], again[path]) for path in arrays)
