"""The autoencoder, trained on crowded random pictures; its latents' scale and shift are measured at the end.

python -m training.autoencoder OUTPUT --seconds 250
"""

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from PIL import Image

from sd35flash_jax.checkpoint import (
    abstract_component,
    build_component,
    parameters,
    refuse_existing,
    save_checkpoint,
    with_parameters,
)
from sd35flash_jax.command import leave, run_command
from sd35flash_jax.config import ModelConfig
from sd35flash_jax.world.compose import SceneArrays, compose, sprites
from sd35flash_jax.world.objects import THINGS
from sd35flash_jax.world.scenes import COLOURS, MOST_SPRITES, PLACES
from training.clock import train
from training.model import FLASH_MINI, SIZE, SOURCE
from training.optimizer import adam

KL_WEIGHT = 3e-4
LEARNING_RATE = 1e-3


def random_scenes(key: Array, batch: int) -> SceneArrays:
    """Any things anywhere, over one another: more to learn from in a picture than captions could describe."""
    keys = jax.random.split(key, 10)
    palette = jnp.array(list(COLOURS.values()), jnp.float32) / 255
    shape = (batch, MOST_SPRITES)
    plain = palette[jax.random.randint(keys[1], (batch, 2), 0, len(palette))]
    plain = jnp.where(jax.random.bernoulli(keys[8], 0.5, (batch, 1, 1)), plain, plain[:, :1])
    return SceneArrays(
        kind=jnp.maximum(jax.random.randint(keys[0], (batch,), -len(PLACES), len(PLACES) + 1), 0),
        colours=jnp.clip(plain + 0.03 * jax.random.normal(keys[2], (batch, 2, 3)), 0, 1),
        chance=jax.random.uniform(keys[3], (batch, 4)),
        thing=jax.random.randint(keys[4], shape, 0, len(THINGS)),
        x=jax.random.uniform(keys[5], shape),
        y=jax.random.uniform(keys[6], shape),
        side=jnp.exp(jax.random.uniform(keys[7], shape, minval=jnp.log(0.13), maxval=jnp.log(0.6))),
        mirrored=jax.random.bernoulli(keys[9], 0.5, shape),
    )


def reconstruction_loss(
    vae: Any, pixels: Float[Array, "b h w 3"], key: Array
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Absolute error of pixels and of their differences to the next ones, which keeps edges sharp, and a small
    Kullback-Leibler divergence of the posterior to unit noise (arXiv 1312.6114)."""
    dtype = vae.encoder.conv_in.kernel.dtype
    moments = vae.encoder((2 * pixels - 1).astype(dtype)).astype(jnp.float32)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    log_variance = jnp.clip(log_variance, -20, 10)
    latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    error = vae.decoder(latents.astype(dtype)).astype(jnp.float32) - (2 * pixels - 1)
    edges = jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean()
    divergence = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_variance) - 1 - log_variance)
    absolute = jnp.abs(error).mean()
    metrics = {"absolute": absolute, "edges": edges, "divergence": divergence, "squared": jnp.square(error).mean()}
    return absolute + edges + KL_WEIGHT * divergence, metrics


def measure_latents(vae: Any, atlas: Array, size: int) -> tuple[float, float]:
    """Shift (mean) and scale (one over the deviation) that make the raw latents unit noise's equals."""

    @jax.jit
    def raw(key: Array) -> Array:
        pixels = compose(atlas, random_scenes(key, 32), size)
        return vae.encode(pixels) / vae.config.scale + vae.config.shift

    values = np.stack([np.asarray(raw(jax.random.key(1000 + i))) for i in range(8)])
    return float(values.mean()), float(1 / values.std())


def main(output: Path, seconds: float, batch: int, per_call: int, size: int, dtype: str) -> None:
    refuse_existing(output / "autoencoder")
    structure = abstract_component("vae", FLASH_MINI)
    params = parameters(build_component("vae", FLASH_MINI))
    optimizer = adam()
    atlas = jax.device_put(sprites())

    def loss(params: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        scene_key, noise_key = jax.random.split(key)
        pixels = compose(atlas, random_scenes(scene_key, batch), size)
        vae = with_parameters(structure, {path: array.astype(dtype) for path, array in params.items()})
        return reconstruction_loss(vae, pixels, noise_key)

    @partial(jax.jit, donate_argnums=0)
    def update(state: Any, rate: Array, key: Array) -> tuple[Any, dict[str, Array]]:
        def one(state: Any, key: Array) -> tuple[Any, dict[str, Array]]:
            params, average, moments = state
            gradients, metrics = jax.grad(loss, has_aux=True)(params, key)
            steps, moments = optimizer.update(gradients, moments, params)
            params = optax.apply_updates(params, jax.tree.map(lambda step: rate * step, steps))
            average = jax.tree.map(lambda old, new: 0.995 * old + 0.005 * new, average, params)
            return (params, average, moments), metrics

        state, metrics = jax.lax.scan(one, state, jax.random.split(key, per_call))
        return state, jax.tree.map(jnp.mean, metrics)

    state = (params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    (_, params, _), calls = train(
        update, state, time.monotonic() + seconds, LEARNING_RATE, 0, output / "autoencoder.csv"
    )
    vae: Any = with_parameters(structure, params)
    shift, scale = measure_latents(vae, atlas, size)
    vae.config = replace(vae.config, shift=shift, scale=scale)
    pixels = compose(atlas, random_scenes(jax.random.key(7), 64), size)
    restored = jnp.concatenate([jax.jit(vae.decode)(jax.jit(vae.encode)(part)) for part in jnp.split(pixels, 4)])
    psnr = float(-10 * jnp.log10(jnp.square(pixels - restored).mean()))
    rounded = {path: np.asarray(array, jnp.bfloat16) for path, array in params.items()}
    save_checkpoint(output / "autoencoder", ModelConfig(vae=vae.config), {"vae": rounded}, source=SOURCE)
    summary = {"scale": scale, "shift": shift, "psnr": psnr, "updates": calls * per_call, "batch": batch}
    (output / "autoencoder.json").write_text(json.dumps(summary, indent=1) + "\n")
    pairs = np.concatenate([np.concatenate([pixels[i], restored[i]]) for i in range(8)], axis=1)
    Image.fromarray((np.asarray(pairs) * 255).round().astype(np.uint8)).save(output / "autoencoder.png")
    print(json.dumps(summary))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train flash-mini's autoencoder.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=250.0, help="of training, compilation included")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--per-call", type=int, default=20)
    parser.add_argument("--size", type=int, default=SIZE, help="pixels a side")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the arithmetic")
    options = parser.parse_args()
    leave(run_command(lambda: main(**vars(options)), "training.autoencoder"))
