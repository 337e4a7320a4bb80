"""The whole pipeline against StableDiffusion3Pipeline: same weights, same prompts, same initial noise."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from conversion import convert, export
from sd35flash_jax import FlashPipeline
from tests import reference_models
from tests.diffusers_source import change_config
from tests.parity.comparison import as_torch, rms_error
from tests.tiny_model import CONFIG

PROMPTS = ["a red fox in the snow", "an astronaut rides a horse; it's 1984!"]
NEGATIVE = "blurry, a bowl of soup"
HEIGHT, WIDTH = 96, 144
CLIPS = ("clip_l", "clip_g")


@pytest.fixture(scope="module")
def ours(checkpoint) -> Callable[..., FlashPipeline]:
    def load(dtype: str = "float32", with_t5: bool = True) -> FlashPipeline:
        return FlashPipeline.from_pretrained(checkpoint, dtype, text_encoders=None if with_t5 else CLIPS)

    return load


@pytest.fixture(scope="module")
def reference(reference_folder) -> Callable[..., StableDiffusion3Pipeline]:
    def load(dtype: str = "float32", with_t5: bool = True) -> StableDiffusion3Pipeline:
        left_out: dict[str, Any] = {} if with_t5 else {"text_encoder_3": None, "tokenizer_3": None}
        pipe = StableDiffusion3Pipeline.from_pretrained(reference_folder, torch_dtype=getattr(torch, dtype), **left_out)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


def reference_pixels(
    pipe: StableDiffusion3Pipeline, noise: np.ndarray, guidance: float, steps: int, **options: Any
) -> np.ndarray:
    return pipe(
        PROMPTS,
        negative_prompt=[NEGATIVE] * len(PROMPTS),
        latents=as_torch(noise.transpose(0, 3, 1, 2)).to(pipe.dtype),
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=HEIGHT,
        width=WIDTH,
        output_type="np",
        **options,
    ).images


def our_pixels(pipe: FlashPipeline, noise: np.ndarray, guidance: float, steps: int) -> np.ndarray:
    negative = pipe.encode([NEGATIVE] * len(PROMPTS)) if guidance > 1 else None
    latents = pipe.denoise(noise, pipe.encode(PROMPTS), steps=steps, guidance=guidance, negative=negative)
    return np.asarray(pipe.decode(latents))


def psnr(ours: np.ndarray, reference: np.ndarray) -> float:
    return float(-20 * np.log10(rms_error([ours], [reference])))


@pytest.mark.parametrize("with_t5", [True, False], ids=["with-t5", "without-t5"])
@pytest.mark.parametrize("guidance", [1.0, 4.5], ids=["unguided", "guided"])
def test_pixels_after_four_steps_agree_with_the_reference(ours, reference, with_t5, guidance, record_parity):
    pipe = ours(with_t5=with_t5)
    noise = np.asarray(pipe.noise(0, len(PROMPTS), HEIGHT, WIDTH))
    expected = reference_pixels(reference(with_t5=with_t5), noise, guidance, steps=4)
    pixels = our_pixels(pipe, noise, guidance, steps=4)
    assert pixels.shape == expected.shape == (2, HEIGHT, WIDTH, 3)
    assert expected.std() > 0.05, "a flat image would agree with anything"
    t5 = "with T5" if with_t5 else "without T5"
    guided = f"guidance {guidance:g}" if guidance > 1 else "no guidance"
    item = f"pipeline, 4 steps, {t5}, {guided}, pixels"
    record_parity(item, np.abs(pixels - expected).max(), 1e-3, PSNR=f"{psnr(pixels, expected):.0f} dB")


def test_an_exported_model_of_32_tokens_a_text_encoder_draws_the_same_picture_in_the_reference(tmp_path, record_parity):
    encoders = {name: replace(getattr(CONFIG, name), positions=32) for name in CLIPS}
    source = tmp_path / "source"
    reference_models.write_folder(source, replace(CONFIG, **encoders))
    for sub in ("tokenizer", "tokenizer_2"):
        tokenizer = json.loads((source / sub / "tokenizer_config.json").read_text()) | {"model_max_length": 32}
        (source / sub / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    change_config(source, "text_encoder_3", max_sequence_length=32)
    convert(source, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "exported")
    ours = FlashPipeline.from_pretrained(tmp_path / "checkpoint", "float32")
    theirs = StableDiffusion3Pipeline.from_pretrained(tmp_path / "exported")
    theirs.set_progress_bar_config(disable=True)
    assert ours.encode(PROMPTS).context.shape[1] == 32 + 32
    noise = np.asarray(ours.noise(0, len(PROMPTS), HEIGHT, WIDTH))
    expected = reference_pixels(theirs, noise, 1.0, steps=2, max_sequence_length=32)
    pixels = our_pixels(ours, noise, 1.0, steps=2)
    assert expected.std() > 0.05, "a flat image would agree with anything"
    item = "pipeline, 2 steps, 32 tokens a text encoder, no guidance, pixels"
    record_parity(item, np.abs(pixels - expected).max(), 1e-3, PSNR=f"{psnr(pixels, expected):.0f} dB")


def test_prompts_are_encoded_as_the_reference_encodes_them(ours, reference, record_parity):
    conditioning = ours().encode(PROMPTS)
    pipe = reference()
    context, _, pooled, _ = pipe.encode_prompt(PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False)
    for item, mine, theirs in (
        ("context", conditioning.context, context),
        ("pooled", conditioning.pooled, pooled),
    ):
        assert mine.shape == tuple(theirs.shape)
        error = np.abs(np.asarray(mine) - theirs.numpy()).max()
        scale = np.abs(theirs.numpy()).max()
        record_parity(f"conditioning from prompts, {item}", error / scale, 1e-4)


def test_bfloat16_moves_the_image_no_further_than_it_moves_the_reference_s(ours, reference, record_parity):
    errors = {}
    for name, load, run in (("ours", ours, our_pixels), ("reference", reference, reference_pixels)):
        noise = np.asarray(ours().noise(1, len(PROMPTS), HEIGHT, WIDTH))
        exact, rounded = (run(load(dtype), noise, 4.5, 4) for dtype in ("float32", "bfloat16"))
        errors[name] = rms_error([rounded], [exact])
    record_parity(
        "pipeline, bfloat16 against float32 (RMS)",
        errors["ours"],
        1.2 * errors["reference"],
        reference_itself=f"{errors['reference']:.1e}",
        ratio=f"{errors['ours'] / errors['reference']:.2f}",
    )
