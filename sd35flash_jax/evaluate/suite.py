"""Prompts in the manner of GenEval (arXiv 2310.11513), about combinations that no training with captions shows.

Five categories: one thing, two things, a number of one thing, a thing before a background, and two things in a
relation. Pairs, numbers and backgrounds are those that `world.scenes` keeps out of training. Every single thing is in
training, so there it is the wording that is new: "a picture with ...", which `world.captions` never says.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice, product
from typing import Literal, TypeVar

import numpy as np

from sd35flash_jax.world.captions import describe_background, describe_group
from sd35flash_jax.world.objects import THINGS
from sd35flash_jax.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOST_OF_ONE,
    RELATIONS,
    Background,
    Content,
    Group,
    Relation,
    draw_background,
    held_out_background,
    held_out_count,
    held_out_pair,
)

Category = Literal["single object", "two objects", "counting", "background", "position", "given"]
CATEGORIES: tuple[Category, ...] = ("single object", "two objects", "counting", "background", "position")
MOST_PROMPTS = 110
"""In each category; counting has no more than the 96 held-out numbers of things."""

_RELATION_WORDS: dict[Relation, str] = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its picture must show; a prompt that is "given" comes from elsewhere and says only its text."""

    category: Category
    text: str
    groups: tuple[Group, ...] = ()
    relation: Relation | None = None
    background: Background | None = None
    """None where the prompt does not say it."""

    def content(self, rng: np.random.Generator) -> Content:
        """A content that fits the prompt; a background that it does not say is drawn as for training.

        Raises:
            ValueError: the prompt is "given", and nobody knows what it asks for.
        """
        if self.category == "given":
            raise ValueError(f"nothing can be composed for {self.text!r}: the world knows its own suite alone")
        return Content(self.groups, self.background or draw_background(rng), self.relation)


def suite(per_category: int = MOST_PROMPTS) -> list[Prompt]:
    """The prompts, the same at every call, category after category; fewer of each are the first ones of all.

    Raises:
        ValueError: `per_category` is not in [1, `MOST_PROMPTS`].
    """
    if not 1 <= per_category <= MOST_PROMPTS:
        raise ValueError(f"the suite has 1 to {MOST_PROMPTS} prompts of each category, not {per_category}")
    kinds = (_single_objects(), _two_objects(), _counts(), _backgrounds(), _positions())
    return [prompt for prompts in kinds for prompt in islice(prompts, per_category)]


def _single_objects() -> Iterator[Prompt]:
    for thing in _shuffled(range(len(THINGS)), "single"):
        group = Group(thing)
        yield Prompt("single object", f"a picture with {describe_group(group, _random(group))}", (group,))


def _two_objects() -> Iterator[Prompt]:
    for groups in _pairs("two"):
        rng = _random(groups)
        text = " and ".join(describe_group(group, rng) for group in groups)
        yield Prompt("two objects", text, groups)


def _counts() -> Iterator[Prompt]:
    several = product(range(len(THINGS)), range(2, MOST_OF_ONE + 1))
    for thing, count in _shuffled([combination for combination in several if held_out_count(*combination)], "count"):
        group = Group(thing, count)
        yield Prompt("counting", describe_group(group, _random(group)), (group,))


def _backgrounds() -> Iterator[Prompt]:
    plain_or_place = [label for label in BACKGROUNDS if label != "gradient"]
    unseen = [pair for pair in product(range(len(THINGS)), plain_or_place) if held_out_background(*pair)]
    for thing, label in _shuffled(unseen, "background"):
        group = Group(thing)
        background = Background("plain", (label,)) if label in COLOURS else Background("place", place=label)
        rng = _random((group, label))
        text = f"{describe_group(group, rng)} {describe_background(background, rng)}"
        yield Prompt("background", text, (group,), background=background)


def _positions() -> Iterator[Prompt]:
    for number, groups in enumerate(_pairs("position")):
        relation = RELATIONS[number % len(RELATIONS)]
        rng = _random((groups, relation))
        first, second = (describe_group(group, rng) for group in groups)
        yield Prompt("position", f"{first} {_RELATION_WORDS[relation]} {second}", groups, relation)


def _pairs(purpose: str) -> Iterator[tuple[Group, Group]]:
    unseen = [pair for pair in combinations(range(len(THINGS)), 2) if held_out_pair(*pair)]
    for pair in _shuffled(unseen, purpose):
        first, second = _random(pair).permutation(pair)
        yield Group(int(first)), Group(int(second))


def _shuffled(combinations: Sequence[_T], purpose: str) -> list[_T]:
    """In an order that depends on each combination alone, so that it does not change when others come or go."""
    return sorted(combinations, key=lambda combination: zlib.crc32(f"{purpose} {combination}".encode()))


def _random(of: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(of).encode()))
