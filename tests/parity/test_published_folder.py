"""The published SD3.5-medium folder (its configurations and tokenizers from `../shared`) at reduced width: converted
and drawn with the command line, and compared with the reference pipeline."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from conversion import diffusers_layout as layout
from sd35flash_jax import FlashPipeline
from sd35flash_jax.cli import main
from sd35flash_jax.config import ModelConfig
from tests import reference_models
from tests.parity.comparison import as_torch

SHARED = Path(__file__).parents[3] / "shared"
PROMPT = "A red fox's portrait in the snow — 35mm film, golden hour!"

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the published configurations in ../shared")

REDUCED = {
    "transformer": {
        "num_attention_heads": 2,
        "caption_projection_dim": 128,
        "joint_attention_dim": 96,
        "pooled_projection_dim": 96,
        "pos_embed_max_size": 64,
    },
    "vae": {"block_out_channels": [32, 32, 64, 64]},
    "text_encoder": {"hidden_size": 32, "projection_dim": 32, "num_attention_heads": 4, "intermediate_size": 64},
    "text_encoder_2": {"hidden_size": 64, "projection_dim": 64, "num_attention_heads": 4, "intermediate_size": 64},
    "text_encoder_3": {"d_model": 96, "d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Everything as published but the widths: depth, dual attention, vocabularies, tokenizers and schedule."""
    folder = tmp_path_factory.mktemp("published") / "stable-diffusion-3.5-medium"
    shutil.copytree(SHARED / "sd3-medium-diffusers", folder, ignore=shutil.ignore_patterns("*.index*.json"))
    manifest = json.loads((SHARED / "manifests" / "sd3.5_medium.diffusers.json").read_text())
    fields = {}
    for name, sub in layout.FOLDERS.items():
        published = (
            manifest["config"] if sub == "transformer" else json.loads((folder / sub / "config.json").read_text())
        )
        reduced = published | REDUCED[sub]
        fields[name] = layout.CONFIGS[name](reduced)
    config = ModelConfig.from_json(fields)
    for name, sub in layout.FOLDERS.items():
        reference_models.BUILDERS[name](getattr(config, name)).save_pretrained(folder / sub)
    return folder


def test_the_published_folder_converts_and_draws_what_the_reference_draws(folder, tmp_path, capsys, record_parity):
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "fox.png"
    assert main(["convert", str(folder), str(checkpoint)]) == 0
    size = ["--height", "128", "--width", "80"]
    options = ["--checkpoint", str(checkpoint), "--output", str(output), "--dtype", "float32", "--seed", "5"]
    assert main(["generate", PROMPT, *options, *size]) == 0
    assert capsys.readouterr().out.splitlines() == [str(checkpoint), str(output)]
    image = Image.open(output)
    assert image.text["prompt"] == PROMPT and image.text["sigmas"].startswith("1 0.857692")
    drawn = np.asarray(image) / 255

    noise = np.asarray(FlashPipeline.from_pretrained(checkpoint, "float32", text_encoders=()).noise(5, 1, 128, 80))
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        PROMPT,
        latents=as_torch(noise.transpose(0, 3, 1, 2)),
        num_inference_steps=4,
        guidance_scale=1.0,
        height=128,
        width=80,
        output_type="np",
    ).images[0]
    assert expected.std() > 0.05
    # Half a level of eight bits is rounding.
    record_parity("published folder at reduced width, PNG pixels", np.abs(drawn - expected).max(), 0.5 / 255 + 1e-3)
