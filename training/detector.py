"""The detector that marks pictures in evaluation, trained on composed scenes, half of them through the autoencoder.

python -m training.detector AUTOENCODER OUTPUT --seconds 100
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array
from safetensors.numpy import save_file

from sd35flash_jax.checkpoint import load_checkpoint, parameters, refuse_existing, with_parameters, written_whole
from sd35flash_jax.command import leave, run_command
from sd35flash_jax.evaluate.detector import GRID, SIDE, Detector, Sight
from sd35flash_jax.world.compose import SceneArrays, compose, sprites
from sd35flash_jax.world.scenes import BACKGROUNDS, COLOURS, PLACES
from training.clock import train
from training.data import make_scenes
from training.optimizer import adam

LEARNING_RATE = 2e-3


def background_labels(scenes: SceneArrays) -> np.ndarray:
    """The number in `BACKGROUNDS` of each scene's."""
    palette = np.array(list(COLOURS.values())) / 255
    top, bottom = (np.argmin(np.abs(scenes.colours[:, i, None] - palette).sum(-1), axis=1) for i in (0, 1))
    plain = np.where(top == bottom, top, BACKGROUNDS.index("gradient"))
    places = np.array([0, *(BACKGROUNDS.index(place) for place in PLACES)])
    return np.where(scenes.kind == 0, plain, places[scenes.kind]).astype(np.int32)


def detection_loss(sight: Sight, scenes: Any, backgrounds: Array) -> tuple[Array, dict[str, Array]]:
    """Presence at the place of each centre, with the eight places around it left open; kind, centre and side there."""
    batch = len(scenes.thing)
    row = jnp.arange(batch)[:, None]
    there = scenes.side > 0
    x, y = jnp.clip(scenes.x, 0, 0.999) * GRID, jnp.clip(scenes.y, 0, 0.999) * GRID
    column, line = x.astype(int), y.astype(int)
    grid = jnp.arange(GRID)
    near = (jnp.abs(grid[None, None, :, None] - line[..., None, None]) <= 1) & (
        jnp.abs(grid[None, None, None, :] - column[..., None, None]) <= 1
    )
    near = (near & there[..., None, None]).any(axis=1)
    present = jnp.zeros((batch, GRID, GRID)).at[row, line, column].max(there.astype(jnp.float32))
    of_presence = optax.sigmoid_binary_cross_entropy(sight.presence, present)
    presence = jnp.where(near & (present == 0), 0, of_presence).sum() / batch

    def mean(values: Array) -> Array:
        return jnp.where(there, values, 0).sum() / there.sum()

    logits = sight.thing[row, line, column]
    thing = mean(optax.softmax_cross_entropy_with_integer_labels(logits, scenes.thing))
    offset = jnp.stack([y - line, x - column], axis=-1)
    centre = mean(jnp.abs(sight.centre[row, line, column] - offset).sum(axis=-1))
    side = mean(jnp.abs(sight.log_side[row, line, column] - jnp.log(jnp.maximum(scenes.side, 1e-3))))
    background = optax.softmax_cross_entropy_with_integer_labels(sight.background, backgrounds).mean()
    metrics = {"presence": presence, "thing": thing, "centre": centre, "side": side, "background": background}
    metrics["right"] = mean(logits.argmax(-1) == scenes.thing)
    metrics["right_background"] = (sight.background.argmax(-1) == backgrounds).mean()
    return presence + thing + centre + side + 0.5 * background, metrics


def main(options: argparse.Namespace) -> None:
    until = time.monotonic() + options.seconds
    destination = options.output / "detector.safetensors"
    refuse_existing(destination)
    vae: Any = load_checkpoint(options.autoencoder, ("vae",), options.dtype).components["vae"]
    dtype = jnp.dtype(options.dtype)
    scenes, _ = make_scenes(options.scenes, 50, 0)
    data = jax.device_put((scenes, background_labels(scenes)))
    structure = nnx.eval_shape(lambda: Detector(rngs=nnx.Rngs(0)))
    params = parameters(Detector(rngs=nnx.Rngs(0)))
    atlas = jax.device_put(sprites())
    optimizer = adam()

    def loss(params: Any, rows: Any, labels: Array, key: Array) -> tuple[Array, dict[str, Array]]:
        pixels = compose(atlas, rows, SIDE)
        half = len(pixels) // 2
        seen = jax.lax.stop_gradient(vae.decode(vae.encode(pixels[:half])))
        noisy = pixels[half:] + 0.03 * jax.random.normal(key, pixels[half:].shape)
        detector = with_parameters(structure, {path: array.astype(dtype) for path, array in params.items()})
        return detection_loss(detector(jnp.concatenate([seen, noisy])), rows, labels)  # type: ignore[operator]

    @partial(jax.jit, donate_argnums=0)
    def update(state: Any, rate: Array, key: Array, data: Any) -> tuple[Any, dict[str, Array]]:
        def one(state: Any, key: Array) -> tuple[Any, dict[str, Array]]:
            params, average, moments = state
            row_key, noise_key = jax.random.split(key)
            chosen = jax.random.randint(row_key, (options.batch,), 0, options.scenes)
            rows, labels = jax.tree.map(lambda array: array[chosen], data)
            gradients, metrics = jax.grad(loss, has_aux=True)(params, rows, labels, noise_key)
            steps, moments = optimizer.update(gradients, moments, params)
            params = optax.apply_updates(params, jax.tree.map(lambda step: rate * step, steps))
            average = jax.tree.map(lambda old, new: 0.995 * old + 0.005 * new, average, params)
            return (params, average, moments), metrics

        state, metrics = jax.lax.scan(one, state, jax.random.split(key, options.per_call))
        return state, jax.tree.map(jnp.mean, metrics)

    def run(state: Any, rate: Any, key: Array) -> Any:
        return update(state, rate, key, data)

    state = (params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    log = options.output / "detector.csv"
    (_, average, _), calls = train(run, state, until, LEARNING_RATE, 1, log)
    rounded = {path: np.asarray(array, jnp.bfloat16) for path, array in average.items()}
    with written_whole(destination) as partial_path:
        save_file(rounded, partial_path)
    summary = {"updates": calls * options.per_call, "batch": options.batch, "seconds": options.seconds}
    (options.output / "detector.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary), log.read_text().splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the detector.")
    parser.add_argument("autoencoder", type=Path, help="checkpoint directory with an autoencoder")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=100.0, help="of the whole stretch")
    parser.add_argument("--scenes", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--per-call", type=int, default=20)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the arithmetic")
    options = parser.parse_args()
    leave(run_command(lambda: main(options), "training.detector"))
