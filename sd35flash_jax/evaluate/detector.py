"""The detector that marks flash-mini's pictures: which things of its world stand where, before what background.

A small residual network looks at a picture of 256 pixels a side, and at each place of a 16 x 16 grid says whether a
thing's centre is there, which thing, where exactly and how large (YOLO, arXiv 1506.02640); a second head names the
background. Its last features, averaged over the picture, are the space of the Frechet distance.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load_file

from sd35flash_jax.checkpoint import parameters, with_parameters
from sd35flash_jax.frozen import Frozen
from sd35flash_jax.world.objects import THINGS
from sd35flash_jax.world.scenes import BACKGROUNDS

WEIGHTS = Path(__file__).with_name("detector.safetensors")
SIDE = 256
GRID = 16
WIDTHS = (48, 96, 144)
GROUPS = 12
CERTAIN = 0.4
"""From which presence a thing counts as found."""
SAME = 0.45
"""Two finds whose centres are nearer than this share of their mean side are one."""


class Block(nnx.Module):
    """A residual block with group norms (arXiv 1803.08494)."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm_1 = nnx.GroupNorm(width, GROUPS, rngs=rngs)
        self.conv_1 = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.norm_2 = nnx.GroupNorm(width, GROUPS, rngs=rngs)
        self.conv_2 = nnx.Conv(width, width, (3, 3), rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = self.conv_1(jax.nn.silu(self.norm_1(x)))
        return x + self.conv_2(jax.nn.silu(self.norm_2(y)))


class Sight(NamedTuple):
    """What the network says: logits of a thing's presence and kind at each place, its centre within the place and the
    logarithm of its side in units of the picture, logits of the background, and the picture's features."""

    presence: Float[Array, "b 16 16"]
    thing: Float[Array, "b 16 16 things"]
    centre: Float[Array, "b 16 16 2"]
    log_side: Float[Array, "b 16 16"]
    background: Float[Array, "b backgrounds"]
    features: Float[Array, "b c"]


class Detector(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        first, second, third = WIDTHS
        self.stem = nnx.Conv(3, first, (6, 6), strides=4, padding=1, rngs=rngs)
        self.level_1 = nnx.List([Block(first, rngs=rngs)])
        self.down_1 = nnx.Conv(first, second, (3, 3), strides=2, rngs=rngs)
        self.level_2 = nnx.List([Block(second, rngs=rngs) for _ in range(2)])
        self.down_2 = nnx.Conv(second, third, (3, 3), strides=2, rngs=rngs)
        self.level_3 = nnx.List([Block(third, rngs=rngs) for _ in range(3)])
        self.norm_out = nnx.GroupNorm(third, GROUPS, rngs=rngs)
        self.places = nnx.Linear(third, 4 + len(THINGS), rngs=rngs)
        self.background = nnx.Linear(third, len(BACKGROUNDS), rngs=rngs)

    def __call__(self, pixels: Float[Array, "b 256 256 3"]) -> Sight:
        """Look at pixels in [0, 1]."""
        x = self.stem((2 * pixels - 1).astype(self.stem.kernel.dtype))
        for block in self.level_1:
            x = block(x)
        x = self.down_1(x)
        for block in self.level_2:
            x = block(x)
        x = self.down_2(x)
        for block in self.level_3:
            x = block(x)
        x = jax.nn.silu(self.norm_out(x)).astype(jnp.float32)
        at_places = self.places(x)
        features = x.mean(axis=(1, 2))
        return Sight(
            presence=at_places[..., 0],
            thing=at_places[..., 4:],
            centre=jax.nn.sigmoid(at_places[..., 1:3]),
            log_side=at_places[..., 3],
            background=self.background(features),
            features=features,
        )


class Found(NamedTuple):
    """A thing in a picture; x, y and side in units of the picture's side."""

    thing: int
    """The likeliest kind, however likely it is."""
    x: float
    y: float
    side: float
    certainty: float
    """The probability that some thing's centre is there. How sure its kind is takes no part in it, so a blob that
    looks like something counts as what it looks like most."""


def find(sight: Sight, row: int) -> list[Found]:
    """The things in one picture of a batch, most certain first; finds of one thing are not counted twice."""
    presence = 1 / (1 + np.exp(-np.asarray(sight.presence[row])))
    found: list[Found] = []
    for place in np.argsort(-presence, axis=None):
        y, x = divmod(int(place), GRID)
        if presence[y, x] < CERTAIN:
            break
        offset_y, offset_x = np.asarray(sight.centre[row, y, x])
        side = float(np.exp(sight.log_side[row, y, x]))
        one = Found(
            int(np.argmax(sight.thing[row, y, x])),
            float((x + offset_x) / GRID),
            float((y + offset_y) / GRID),
            side,
            float(presence[y, x]),
        )
        if all(np.hypot(one.x - other.x, one.y - other.y) > SAME * (one.side + other.side) / 2 for other in found):
            found.append(one)
    return found


class View(NamedTuple):
    """What the detector sees in one picture: things, most certain first, the background's label, and the features."""

    found: list[Found]
    background: str
    features: Float[np.ndarray, " c"]


def load_detector(path: Path = WEIGHTS) -> Detector:
    """The trained detector, in float32.

    Raises:
        ValueError: the file is absent, damaged, or holds other arrays than the detector has.
    """
    if not path.is_file():
        raise ValueError(f"the detector's weights {path} are missing; train them with python -m training.detector")
    detector = nnx.eval_shape(lambda: Detector(rngs=nnx.Rngs(0)))
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error}); install sd35flash-jax again") from None
    wanted = {name: array.shape for name, array in parameters(detector).items()}
    if {name: array.shape for name, array in arrays.items()} != wanted:
        raise ValueError(
            f"{path} holds the weights of another detector; train it again with python -m training.detector"
        )
    return with_parameters(  # type: ignore[return-value]
        detector, {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    )


def look(detector: Detector, images: UInt8[np.ndarray, "b h w 3"]) -> list[View]:
    """What is in each of some pictures; those of another size than `SIDE` are resized."""
    sight = jax.device_get(_see(Frozen(detector), images))
    labels = sight.background.argmax(axis=-1)
    return [View(find(sight, row), BACKGROUNDS[labels[row]], sight.features[row]) for row in range(len(images))]


@jax.jit
def _see(detector: Frozen[Detector], images: UInt8[Array, "b h w 3"]) -> Sight:
    pixels = images.astype(jnp.float32) / 255
    if pixels.shape[1:3] != (SIDE, SIDE):
        pixels = jax.image.resize(pixels, (len(pixels), SIDE, SIDE, 3), "linear", antialias=True)
    return detector.module(pixels)
