"""What is in a picture and where: backgrounds, groups of things, and the split that keeps combinations out of training.

A scene is one to two groups with a relation, or up to four groups without; at most `MOST_SPRITES` things in all. Places
and sizes are in units of the picture's side, from its top left corner.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sd35flash_jax.world.objects import THINGS

MOST_SPRITES = 5
MOST_OF_ONE = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 52, 48),
    "orange": (246, 146, 44),
    "yellow": (250, 218, 72),
    "green": (62, 168, 72),
    "blue": (48, 110, 220),
    "purple": (136, 72, 196),
    "pink": (248, 158, 196),
    "brown": (134, 88, 54),
    "black": (22, 22, 26),
    "white": (248, 248, 248),
    "gray": (142, 144, 150),
    "turquoise": (52, 196, 196),
}
PLACES = ("meadow", "beach", "night", "snow", "desert", "sea", "sunset")

Relation = Literal["left", "right", "above", "below"]
RELATIONS: tuple[Relation, ...] = ("left", "right", "above", "below")
Size = Literal["small", "large"]


@dataclass(frozen=True)
class Background:
    """A plain colour, a gradient from one colour (top) to another (bottom), or a place."""

    kind: Literal["plain", "gradient", "place"]
    colours: tuple[str, ...] = ()
    place: str = ""

    @property
    def label(self) -> str:
        """One word: the colour, "gradient", or the place."""
        return {"plain": self.colours[0] if self.colours else "", "gradient": "gradient"}.get(self.kind, self.place)


BACKGROUNDS: tuple[str, ...] = (*COLOURS, *PLACES, "gradient")
"""Every label of a background."""


@dataclass(frozen=True)
class Group:
    """Some of one thing, `thing` by its number in `THINGS`."""

    thing: int
    count: int = 1
    size: Size | None = None


@dataclass(frozen=True)
class Content:
    """What a scene is of; `relation` says where the first of two groups is, seen from the second."""

    groups: tuple[Group, ...]
    background: Background
    relation: Relation | None = None


@dataclass(frozen=True)
class Sprite:
    """One thing in its place: centre, side, and whether it is mirrored."""

    thing: int
    x: float
    y: float
    side: float
    mirrored: bool


@dataclass(frozen=True)
class Scene:
    content: Content
    sprites: tuple[Sprite, ...]
    seed: int
    """Of what varies in the background."""


# The split


def held_out_pair(first: int, second: int) -> bool:
    """Whether two things never meet in training: one pair in ten."""
    one, other = sorted((THINGS[first].name, THINGS[second].name))
    return _share(f"pair {one} {other}", 10)


def held_out_count(thing: int, count: int) -> bool:
    """Whether a number of a thing, above one, never comes in training: one in ten."""
    return count > 1 and _share(f"count {THINGS[thing].name} {count}", 10)


def held_out_background(thing: int, background: str) -> bool:
    """Whether a thing never stands before a background in training: one combination in ten."""
    return _share(f"background {THINGS[thing].name} {background}", 10)


def held_out(content: Content) -> bool:
    """Whether any combination in a scene is kept out of training."""
    things = [group.thing for group in content.groups]
    return (
        any(held_out_pair(a, b) for index, a in enumerate(things) for b in things[index + 1 :])
        or any(held_out_count(group.thing, group.count) for group in content.groups)
        or any(held_out_background(thing, content.background.label) for thing in things)
    )


def _share(text: str, parts: int) -> bool:
    return zlib.crc32(text.encode()) % parts == 0


# Drawing at random


def draw_content(rng: np.random.Generator) -> Content:
    """What a training picture is of: nothing that is held out."""
    while True:
        content = _draw_any_content(rng)
        if not held_out(content):
            return content


def _draw_any_content(rng: np.random.Generator) -> Content:
    forms = ("one", "several", "two", "related", "related groups", "many")
    form = rng.choice(forms, p=(0.2, 0.2, 0.15, 0.25, 0.1, 0.1))
    groups = {"one": 1, "several": 1, "many": int(rng.integers(3, 5))}.get(form, 2)
    things = rng.choice(len(THINGS), groups, replace=False)
    if form == "several":
        counts = [int(rng.integers(2, MOST_OF_ONE + 1))]
    elif form == "related groups":
        counts = [int(rng.integers(2, MOST_OF_ONE + 1)), 1]
        rng.shuffle(counts)
    else:
        counts = [1] * groups
    sizes: list[Size | None] = [None] * groups
    if groups <= 2 and rng.random() < 0.25:
        sizes[int(rng.integers(groups))] = "small" if rng.random() < 0.5 else "large"
    relation = RELATIONS[rng.integers(4)] if form.startswith("related") else None
    made = tuple(Group(int(thing), count, size) for thing, count, size in zip(things, counts, sizes))
    return Content(made, draw_background(rng), relation)


def draw_background(rng: np.random.Generator) -> Background:
    kind = rng.choice(("plain", "gradient", "place"), p=(0.5, 0.15, 0.35))
    if kind == "place":
        return Background("place", place=str(rng.choice(PLACES)))
    colours = rng.choice(list(COLOURS), 2, replace=False)
    return Background(kind, tuple(map(str, colours[: 2 if kind == "gradient" else 1])))


def lay_out(content: Content, rng: np.random.Generator) -> Scene:
    """Sizes and places for a content, without much overlap, and true to its relation."""
    total = sum(group.count for group in content.groups)
    shrink = 1.0
    while True:
        for _ in range(20):
            sprites = _try_layout(content, total, shrink, rng)
            if _apart(sprites) and fits_relation(content, sprites):
                return Scene(content, tuple(sprites), int(rng.integers(2**31)))
        shrink *= 0.95


_SIDES = {1: (0.5, 0.7), 2: (0.34, 0.46), 3: (0.29, 0.4), 4: (0.26, 0.34), 5: (0.24, 0.3)}
"""The range of a thing's side for a number of things in the picture."""
_SIZE_FACTORS: dict[Size | None, tuple[float, float]] = {None: (1, 1), "small": (0.5, 0.6), "large": (1.3, 1.45)}


def _try_layout(content: Content, total: int, shrink: float, rng: np.random.Generator) -> list[Sprite]:
    sprites = []
    for index, group in enumerate(content.groups):
        base = rng.uniform(*_SIDES[total]) * rng.uniform(*_SIZE_FACTORS[group.size]) * shrink
        for _ in range(group.count):
            side = float(min(base * rng.uniform(0.93, 1.07), 0.92))
            x, y = _place(content, index, side, rng)
            sprites.append(Sprite(group.thing, x, y, side, bool(rng.random() < 0.5)))
    return sprites


def _place(content: Content, index: int, side: float, rng: np.random.Generator) -> tuple[float, float]:
    low, high = side / 2, 1 - side / 2
    along, across = rng.uniform(low, high, 2)
    if content.relation is None:
        return float(along), float(across)
    first = index == 0
    near_start = first == (content.relation in ("left", "above"))
    middle = float(rng.uniform(0.4, 0.6))
    half = (low, max(low, min(middle, high))) if near_start else (min(high, max(middle, low)), high)
    along = rng.uniform(*half)
    return (float(along), float(across)) if content.relation in ("left", "right") else (float(across), float(along))


def _apart(sprites: list[Sprite]) -> bool:
    return all(
        math.hypot(a.x - b.x, a.y - b.y) >= 0.46 * (a.side + b.side)
        for index, a in enumerate(sprites)
        for b in sprites[index + 1 :]
    )


def fits_relation(content: Content, sprites: list[Sprite]) -> bool:
    """Whether the first group's centre lies on the relation's side of the second's, more along it than across."""
    if content.relation is None:
        return True
    (x, y), (other_x, other_y) = (_centre(sprites, group.thing) for group in content.groups)
    dx, dy = x - other_x, y - other_y
    along, across = (dx, dy) if content.relation in ("left", "right") else (dy, dx)
    sign = -1 if content.relation in ("left", "above") else 1
    return sign * along > max(0.15, 1.15 * abs(across))


def _centre(sprites: list[Sprite], thing: int) -> tuple[float, float]:
    own = [sprite for sprite in sprites if sprite.thing == thing]
    return sum(sprite.x for sprite in own) / len(own), sum(sprite.y for sprite in own) / len(own)
