"""Scenes -> pixels, batches at a time, on whatever device JAX uses."""

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image

from sd35flash_jax.world.objects import THINGS
from sd35flash_jax.world.scenes import COLOURS, MOST_SPRITES, PLACES, Scene

ATLAS = Path(__file__).with_name("sprites.webp")
SPRITE_SIDE = 128
COLUMNS = 18


class SceneArrays(NamedTuple):
    """A batch of scenes as arrays; sprites are drawn in order, those beyond a scene's own have a side of 0."""

    kind: Int[Array | np.ndarray, " b"]
    """0 for a plain colour or a gradient, above for each of `PLACES`."""
    colours: Float[Array | np.ndarray, "b 2 3"]
    chance: Float[Array | np.ndarray, "b 4"]
    thing: Int[Array | np.ndarray, "b s"]
    x: Float[Array | np.ndarray, "b s"]
    y: Float[Array | np.ndarray, "b s"]
    side: Float[Array | np.ndarray, "b s"]
    mirrored: Bool[Array | np.ndarray, "b s"]


@cache
def sprites() -> UInt8[np.ndarray, "n 128 128 4"]:
    """Every thing's sprite, RGBA."""
    atlas = np.asarray(Image.open(ATLAS).convert("RGBA"))
    rows = atlas.shape[0] // SPRITE_SIDE
    tiles = atlas.reshape(rows, SPRITE_SIDE, COLUMNS, SPRITE_SIDE, 4).swapaxes(1, 2)
    return tiles.reshape(-1, SPRITE_SIDE, SPRITE_SIDE, 4)[: len(THINGS)]


def scene_arrays(scenes: Sequence[Scene]) -> SceneArrays:
    """Scenes side by side; the things that stand lower are drawn later."""
    count = len(scenes)
    kind, thing = np.zeros(count, np.int32), np.zeros((count, MOST_SPRITES), np.int32)
    colours, chance = np.zeros((count, 2, 3), np.float32), np.zeros((count, 4), np.float32)
    x, y, side = (np.zeros((count, MOST_SPRITES), np.float32) for _ in range(3))
    mirrored = np.zeros((count, MOST_SPRITES), bool)
    for row, scene in enumerate(scenes):
        background = scene.content.background
        rng = np.random.default_rng(scene.seed)
        chance[row] = rng.random(4)
        if background.kind == "place":
            kind[row] = 1 + PLACES.index(background.place)
        else:
            named = [COLOURS[name] for name in (background.colours * 2)[:2]]
            jitter = rng.normal(0, 7, (len(background.colours), 3))
            colours[row] = np.clip(np.array(named) + jitter, 0, 255) / 255
        for column, sprite in enumerate(sorted(scene.sprites, key=lambda sprite: sprite.y + sprite.side / 2)):
            thing[row, column], mirrored[row, column] = sprite.thing, sprite.mirrored
            x[row, column], y[row, column], side[row, column] = sprite.x, sprite.y, sprite.side
    return SceneArrays(kind, colours, chance, thing, x, y, side, mirrored)


@partial(jax.jit, static_argnames="size")
def compose(atlas: UInt8[Array, "n 128 128 4"], scenes: SceneArrays, size: int) -> Float[Array, "b size size 3"]:
    """Draw scenes as pixels in [0, 1]."""
    paint: Any = jax.vmap(partial(_background, size=size))
    picture = paint(scenes.kind, scenes.colours, scenes.chance)

    def add(picture: Array, sprite: tuple[Array, ...]) -> tuple[Array, None]:
        drawn = jax.vmap(partial(_sprite, atlas, size=size))(*sprite)
        return picture * (1 - drawn[..., 3:]) + drawn[..., :3], None

    by_sprite = tuple(jnp.swapaxes(array, 0, 1) for array in scenes[3:])
    return jnp.clip(jax.lax.scan(add, picture, by_sprite)[0], 0, 1)


def _sprite(
    atlas: Array, thing: Array, x: Array, y: Array, side: Array, mirrored: Array, *, size: int
) -> Float[Array, "size size 4"]:
    """One sprite on a clear canvas, colours multiplied by alpha, antialiased; nothing where its side is 0."""
    tile = atlas[thing].astype(jnp.float32) / 255
    tile = jnp.where(mirrored, tile[:, ::-1], tile)
    tile = jnp.concatenate([tile[..., :3] * tile[..., 3:], tile[..., 3:]], axis=-1)
    scale = jnp.maximum(side, 1e-3) * size / SPRITE_SIDE
    corner = jnp.stack([y - side / 2, x - side / 2]) * size
    drawn = jax.image.scale_and_translate(
        tile, (size, size, 4), (0, 1), jnp.stack([scale, scale]), corner, "linear", antialias=True
    )
    return drawn * (side > 0)


# Backgrounds. Each takes rows and columns in [0, 1] and four random numbers, and gives colours.


def _background(kind: Array, colours: Array, chance: Array, *, size: int) -> Float[Array, "size size 3"]:
    centre = (jnp.arange(size) + 0.5) / size
    row, column = centre[:, None, None], centre[None, :, None]
    painted = [colours[0] + (colours[1] - colours[0]) * row + 0 * column]
    painted += [_PAINTERS[place](row, column, chance) for place in PLACES]
    return jnp.stack(painted)[kind]


def _rgb(red: int, green: int, blue: int) -> Array:
    return jnp.array([red, green, blue], jnp.float32) / 255


def _mix(one: Array, other: Array, share: Array) -> Array:
    return one + (other - one) * jnp.clip(share, 0, 1)


def _edge(distance: Array) -> Array:
    """0 before an edge, 1 behind it, soft over about a pixel."""
    return jnp.clip(distance * 200 + 0.5, 0, 1)


def _hills(row: Array, column: Array, height: Array, phase: Array, depth: float = 0.03) -> Array:
    return _edge(row - height - depth * jnp.sin(2 * jnp.pi * (column * 1.1 + phase)))


def _meadow(row: Array, column: Array, chance: Array) -> Array:
    sky = _mix(_rgb(122, 190, 250), _rgb(214, 238, 255), row * 1.6)
    grass = _mix(_rgb(122, 200, 82), _rgb(70, 150, 52), row * 1.4 - 0.4)
    return _mix(sky, grass, _hills(row, column, 0.55 + 0.15 * chance[0], chance[1]))


def _beach(row: Array, column: Array, chance: Array) -> Array:
    shore = 0.6 + 0.1 * chance[0]
    sky = _mix(_rgb(140, 206, 252), _rgb(226, 244, 255), row * 2)
    sea = _mix(_rgb(38, 140, 200), _rgb(70, 196, 214), (row - 0.4) * 4)
    sand = _mix(_rgb(244, 222, 164), _rgb(226, 190, 126), row * 2 - 1)
    picture = _mix(sky, sea, _edge(row - 0.42 - 0.06 * chance[2]) + 0 * column)
    return _mix(picture, sand, _hills(row, column, shore, chance[1], 0.02))


def _night(row: Array, column: Array, chance: Array) -> Array:
    sky = _mix(_rgb(10, 14, 44), _rgb(44, 52, 110), row) + 0 * column
    index = jnp.arange(24.0)
    star_x = jnp.modf(jnp.sin(index * 12.9898 + chance[0] * 40) * 4375.5)[0] ** 2
    star_y = jnp.modf(jnp.sin(index * 78.233 + chance[1] * 40) * 4375.5)[0] ** 2
    near = jnp.square(row - star_y) + jnp.square(column - star_x)
    return _mix(sky, _rgb(255, 250, 220), jnp.exp(-near / 1.6e-5).sum(axis=-1, keepdims=True))


def _snow(row: Array, column: Array, chance: Array) -> Array:
    sky = _mix(_rgb(168, 190, 214), _rgb(214, 226, 238), row * 1.6)
    ground = _mix(_rgb(250, 252, 255), _rgb(216, 228, 242), row * 2 - 1)
    return _mix(sky, ground, _hills(row, column, 0.55 + 0.15 * chance[0], chance[1]))


def _desert(row: Array, column: Array, chance: Array) -> Array:
    sky = _mix(_rgb(96, 176, 240), _rgb(252, 226, 178), row * 1.7)
    far = _hills(row, column, 0.5 + 0.1 * chance[0], chance[1], 0.05)
    near = _hills(row, column, 0.68 + 0.1 * chance[2], chance[3], 0.04)
    return _mix(_mix(sky, _rgb(226, 166, 92), far), _rgb(238, 184, 108), near)


def _sea(row: Array, column: Array, chance: Array) -> Array:
    water = _mix(_rgb(64, 186, 226), _rgb(8, 54, 120), row)
    ray = jnp.sin((column + 0.35 * row) * (16 + 8 * chance[0]) + chance[1] * 6)
    return water + jnp.clip(ray, 0, 1) * 0.1 * (1 - row)


def _sunset(row: Array, column: Array, chance: Array) -> Array:
    horizon = 0.62 + 0.1 * chance[0]
    high = _mix(_rgb(92, 58, 138), _rgb(250, 120, 88), row / horizon * 1.4)
    sky = _mix(high, _rgb(255, 206, 110), row / horizon * 2.2 - 1.2)
    ground = _rgb(62, 36, 74) + 0 * column
    return _mix(sky, ground, _hills(row, column, horizon, chance[1], 0.02))


_PAINTERS = {
    "meadow": _meadow,
    "beach": _beach,
    "night": _night,
    "snow": _snow,
    "desert": _desert,
    "sea": _sea,
    "sunset": _sunset,
}
