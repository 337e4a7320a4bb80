"""The parity report: a converted checkpoint against the PyTorch reference, component by component and end to end, on
the same prompts and noise, in float32.

The only product file that imports torch, diffusers and transformers' models, and only when it is called. Components are
loaded one at a time, each side in turn, so that memory holds one component of one side.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from conversion.diffusers_layout import FOLDERS, TOKENIZER_FOLDERS
from sd35flash_jax.checkpoint import load_checkpoint, read_config
from sd35flash_jax.config import TEXT_ENCODERS, ModelConfig
from sd35flash_jax.pipeline import FlashPipeline, check_size
from sd35flash_jax.schedule import shifted_sigmas
from sd35flash_jax.text import Conditioning, clip_widths, load_tokenizer, token_counts

PROMPTS = ("a red fox in the snow, golden hour", "three strawberries on a blue plate; it's an oil painting!")
TIMESTEPS = (1000.0, 602.15, 8.93)
COMPONENT_TOLERANCE = 1e-4
END_TO_END_TOLERANCE = 1e-3

Embeds = dict[str, np.ndarray]
"""A conditioning in the making: `context` and `pooled`."""


@dataclass(frozen=True)
class Row:
    """One comparison. `relative` is the RMS difference over the reference's RMS, `psnr` is in decibels, of pixels
    alone. The tolerance bounds `max_abs` over the reference's largest magnitude, or over 1 where that is smaller."""

    item: str
    max_abs: float
    largest: float
    relative: float
    cosine: float
    psnr: float | None
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.max_abs <= self.tolerance * max(1.0, self.largest)


def compare(item: str, ours: Any, reference: Any, tolerance: float, pixels: bool = False) -> Row:
    """Measure how far `ours` is from `reference`, two arrays of one shape."""
    a, b = (np.asarray(array, np.float64).ravel() for array in (ours, reference))
    if np.shape(ours) != np.shape(reference):
        raise ValueError(f"{item}: our result has shape {np.shape(ours)} and the reference's {np.shape(reference)}")
    rms = float(np.sqrt(np.square(a - b).mean()))
    size = float(np.sqrt(np.square(b).mean()))
    tiny = float(np.finfo(np.float32).tiny)
    return Row(
        item,
        max_abs=float(np.abs(a - b).max()),
        largest=float(np.abs(b).max()),
        relative=rms / (size + tiny),
        cosine=float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + tiny)),
        psnr=float(-20 * np.log10(rms + tiny)) if pixels else None,
        tolerance=tolerance,
    )


def parity(
    source: str | os.PathLike,
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    prompts: Sequence[str] = PROMPTS,
    steps: int = 4,
    guidance: float = 1.0,
    height: int = 256,
    width: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> list[Row]:
    """Compare a checkpoint with the diffusers folder that it was converted from.

    Writes `parity.json` and, where there is a VAE, `parity.png` into the folder `output`: for each prompt the
    reference's image, ours, and their difference scaled to be seen.

    Raises:
        ValueError: the source is not a diffusers folder with a transformer, the reference extra is missing, or an
            option is out of range.
        CheckpointError: the checkpoint is missing or damaged.
    """
    folder, checkpoint, output = Path(source), Path(checkpoint), Path(output)
    config = read_config(checkpoint)
    components = [name for name in config.components if (folder / FOLDERS[name]).is_dir()]
    if config.transformer is None or "transformer" not in components:
        raise ValueError(f"{folder} is not a diffusers folder with a transformer, as the checkpoint is")
    check_size(config, height, width)
    try:
        import diffusers
        import torch
        import transformers
    except ImportError:
        raise ValueError(
            "the parity report needs PyTorch and diffusers: pip install 'sd35flash-jax[reference]'"
        ) from None

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    draw = np.random.default_rng(seed)
    noise = draw.normal(size=(len(prompts), height // 8, width // 8, config.transformer.latent_channels))
    texts = (*prompts, "")
    rows: list[Row] = []
    with tqdm(total=len(components), desc="comparing", disable=not progress) as bar, torch.no_grad():
        ours, theirs = _zero_embeds(config, len(texts)), _zero_embeds(config, len(texts))
        encoders = [name for name in components if name in TEXT_ENCODERS]
        if not encoders:
            ours = theirs = {field: draw.normal(size=zeros.shape) for field, zeros in ours.items()}
        for name in encoders:
            part = _encode(_load(checkpoint, name), texts)
            reference = _encode_with_reference(folder, config, name, texts)
            for field in ("context", "pooled") if name != "t5" else ("context",):
                rows.append(compare(f"{name} {field}", part[field], reference[field], COMPONENT_TOLERANCE))
            ours = {field: ours[field] + part[field] for field in ours}
            theirs = {field: theirs[field] + reference[field] for field in theirs}
            bar.update()

        found, *latents = _compare_transformer(folder, checkpoint, noise, ours, theirs, steps, guidance)
        rows += found
        bar.update()
        output.mkdir(parents=True, exist_ok=True)
        if "vae" in components:
            found, *pixels = _compare_vae(folder, checkpoint, *latents)
            rows += found
            _side_by_side(*pixels).save(output / "parity.png")
            bar.update()
    report = [asdict(row) | {"passed": row.passed} for row in rows]
    (output / "parity.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return rows


def format_table(rows: Sequence[Row]) -> str:
    lines = [
        "| item | max abs | relative | cosine | PSNR | tolerance | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        psnr = "" if row.psnr is None else f"{row.psnr:.1f} dB"
        figures = f"{row.max_abs:.1e} | {row.relative:.1e} | {row.cosine:.8f} | {psnr} | {row.tolerance:.0e}"
        lines.append(f"| {row.item} | {figures} | {'ok' if row.passed else 'TOO FAR'} |")
    return "\n".join(lines)


# Text: each encoder alone fills its own part of the conditioning, and the parts add up to the whole


def _load(checkpoint: Path, *components: str) -> FlashPipeline:
    return FlashPipeline.from_checkpoint(load_checkpoint(checkpoint, components, "float32"))


def _encode(pipe: FlashPipeline, texts: Sequence[str]) -> Embeds:
    conditioning = pipe.encode(texts)
    return {"context": np.asarray(conditioning.context), "pooled": np.asarray(conditioning.pooled)}


def _encode_with_reference(folder: Path, config: ModelConfig, name: str, texts: Sequence[str]) -> Embeds:
    import torch
    import transformers

    part = _zero_embeds(config, len(texts))
    kind = transformers.T5EncoderModel if name == "t5" else transformers.CLIPTextModelWithProjection
    model = kind.from_pretrained(folder / FOLDERS[name], dtype=torch.float32, use_safetensors=True).eval()
    tokenizer = load_tokenizer(name, folder / TOKENIZER_FOLDERS[name])
    count = token_counts(config, config.t5_tokens)[name]
    tokens = tokenizer(list(texts), padding="max_length", max_length=count, truncation=True, return_tensors="pt")
    if name == "t5":
        part["context"][:, -count:] = model(tokens.input_ids)[0].numpy()
        return part
    encoded = model(tokens.input_ids, output_hidden_states=True)
    start = 0 if name == "clip_l" else clip_widths(config)["clip_l"]
    stop = start + clip_widths(config)[name]
    part["context"][:, :count, start:stop] = encoded.hidden_states[-2].numpy()
    part["pooled"][:, start:stop] = encoded.text_embeds.numpy()
    return part


def _zero_embeds(config: ModelConfig, batch: int) -> Embeds:
    assert config.transformer is not None
    tokens = token_counts(config, config.t5_tokens)["clip_l"] + config.t5_tokens
    shapes = {
        "context": (batch, tokens, config.transformer.context_size),
        "pooled": (batch, config.transformer.pooled_size),
    }
    return {field: np.zeros(shape, np.float32) for field, shape in shapes.items()}


def _conditioning(embeds: Embeds, rows: slice) -> Conditioning:
    return Conditioning(jnp.asarray(embeds["context"][rows]), jnp.asarray(embeds["pooled"][rows]))


# The transformer: single evaluations on the reference's conditioning, then the whole trajectory, each side on its own


def _compare_transformer(
    folder: Path,
    checkpoint: Path,
    noise: np.ndarray,
    ours: Embeds,
    theirs: Embeds,
    steps: int,
    guidance: float,
) -> tuple[list[Row], np.ndarray, np.ndarray]:
    import diffusers
    import torch

    batch = len(noise)

    model = diffusers.SD3Transformer2DModel.from_pretrained(
        folder / FOLDERS["transformer"], dtype=torch.float32, use_safetensors=True
    ).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    reference: Any = diffusers.StableDiffusion3Pipeline(
        transformer=model,
        scheduler=scheduler,
        vae=None,
        text_encoder=None,
        text_encoder_2=None,
        text_encoder_3=None,
        tokenizer=None,
        tokenizer_2=None,
        tokenizer_3=None,
    )
    reference.set_progress_bar_config(disable=True)
    context, pooled = (torch.from_numpy(theirs[field].astype(np.float32)) for field in ("context", "pooled"))
    start = torch.from_numpy(noise.astype(np.float32)).permute(0, 3, 1, 2)
    velocities = [
        model(start, context[:batch], pooled[:batch], torch.full((batch,), timestep)).sample.permute(0, 2, 3, 1).numpy()
        for timestep in TIMESTEPS
    ]
    expected = reference(
        prompt_embeds=context[:batch],
        pooled_prompt_embeds=pooled[:batch],
        negative_prompt_embeds=context[batch:].expand(batch, -1, -1),
        negative_pooled_prompt_embeds=pooled[batch:].expand(batch, -1),
        latents=start,
        height=8 * noise.shape[1],
        width=8 * noise.shape[2],
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
    ).images
    expected = expected.permute(0, 2, 3, 1).numpy()
    del model, reference

    pipe = _load(checkpoint, "transformer")
    given = _conditioning(theirs, slice(batch))
    rows = [
        compare(
            f"velocity at timestep {timestep:g}", pipe.velocity(noise, timestep, given), velocity, COMPONENT_TOLERANCE
        )
        for timestep, velocity in zip(TIMESTEPS, velocities)
    ]
    positive, negative = _conditioning(ours, slice(batch)), _conditioning(ours, slice(batch, None))
    sigmas = shifted_sigmas(steps, pipe.config.schedule.shift)
    latents = np.asarray(pipe.denoise(noise, positive, sigmas=sigmas, guidance=guidance, negative=negative))
    rows.append(compare(f"latents after {steps} steps", latents, expected, END_TO_END_TOLERANCE))
    return rows, latents, expected


# The VAE: decoding and encoding the reference's arrays, then the pixels of each side's own latents


def _compare_vae(
    folder: Path, checkpoint: Path, ours: np.ndarray, theirs: np.ndarray
) -> tuple[list[Row], np.ndarray, np.ndarray]:
    import diffusers
    import torch

    model = diffusers.AutoencoderKL.from_pretrained(folder / FOLDERS["vae"], dtype=torch.float32, use_safetensors=True)
    scale, shift = model.config.scaling_factor, model.config.shift_factor
    latents = torch.from_numpy(theirs).permute(0, 3, 1, 2)
    decoded = model.decode(latents / scale + shift).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1)
    mean = model.encode(2 * expected - 1).latent_dist.mean
    encoded = ((mean - shift) * scale).permute(0, 2, 3, 1).numpy()
    pixels = expected.permute(0, 2, 3, 1).numpy()
    del model

    pipe = _load(checkpoint, "vae")
    own = np.asarray(pipe.decode(ours))
    rows = [
        compare("vae decode", pipe.decode(theirs), pixels, COMPONENT_TOLERANCE, pixels=True),
        compare("vae encode", pipe.encode_image(pixels), encoded, COMPONENT_TOLERANCE),
        compare("image, end to end", own, pixels, END_TO_END_TOLERANCE, pixels=True),
    ]
    return rows, own, pixels


def _side_by_side(ours: np.ndarray, theirs: np.ndarray) -> Image.Image:
    """A row for each image: the reference's, ours, and their difference scaled to fill the range."""
    difference = np.abs(ours - theirs)
    difference = difference / max(float(difference.max()), 1e-12)
    rows = np.concatenate([np.concatenate(images, axis=1) for images in zip(theirs, ours, difference)])
    return Image.fromarray(np.round(255 * rows).astype(np.uint8))
