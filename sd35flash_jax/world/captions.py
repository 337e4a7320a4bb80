"""Contents in plain English: a small grammar with synonyms and free order."""

from collections.abc import Sequence

import numpy as np

from sd35flash_jax.world.objects import THINGS
from sd35flash_jax.world.scenes import Background, Content, Group

NUMBERS = ("zero", "one", "two", "three", "four")
_SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_PREFIXES = ("a picture of", "a photo of", "an image of", "an emoji of", "a drawing of", "there is", "i want", "draw")
_SEVERAL = tuple(f"{number} " for number in (*NUMBERS[2:], "2", "3", "4"))
_PLACES = {
    "meadow": ("on the grass", "in a meadow", "on a green meadow", "on a lawn"),
    "beach": ("on the beach", "at the beach", "on a sandy beach"),
    "night": ("at night", "under the stars", "under a night sky", "in the night sky"),
    "snow": ("in the snow", "in a snowy field", "in winter"),
    "desert": ("in the desert", "in a desert", "on a sand dune"),
    "sea": ("under water", "underwater", "in the sea", "deep in the ocean"),
    "sunset": ("at sunset", "in front of a sunset", "under an evening sky"),
}
_RELATIONS = {
    "left": ("to the left of", "left of", "on the left of"),
    "right": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
_OPPOSITES = {"left": "right", "right": "left", "above": "below", "below": "above"}
_WHERE = {
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "above": ("at the top", "above"),
    "below": ("at the bottom", "below"),
}


def caption(content: Content, rng: np.random.Generator) -> str:
    """One of the many ways to say what is in a scene; the background is left unsaid now and then."""
    main = _described(content, rng)
    draw = rng.random()
    if draw < 0.2 and content.relation is None:
        prefix = _one_of(_PREFIXES, rng)
        if prefix == "there is" and main.startswith(_SEVERAL):
            prefix = "there are"
        main = f"{prefix} {main}"
    if rng.random() < 0.65:
        where = describe_background(content.background, rng)
        form = rng.random()
        if form < 0.75:
            main = f"{main} {where}"
        elif form < 0.85:
            main = f"{main}, {where}"
        else:
            main = f"{where}, {main}"
    if rng.random() < 0.25:
        main = main[0].upper() + main[1:]
    return main + "." if rng.random() < 0.2 else main


def describe_background(background: Background, rng: np.random.Generator) -> str:
    if background.kind == "place":
        return _one_of(_PLACES[background.place], rng)
    if background.kind == "gradient":
        first, second = background.colours
        downwards = f"{first} to {second}"
        return _one_of((f"on {_article(first)} {downwards} gradient", f"on a gradient from {downwards}"), rng)
    colour = background.colours[0]
    colour = "grey" if colour == "gray" and rng.random() < 0.4 else colour
    coloured = f"{_article(colour)} {colour} background"
    forms = (
        f"on {coloured}",
        f"on {coloured}",
        f"on a plain {colour} background",
        f"against {coloured}",
        f"with {coloured}",
        f"on {colour}",
    )
    return _one_of(forms, rng)


def describe_group(group: Group, rng: np.random.Generator) -> str:
    """Such as "a small cat" or "three strawberries"."""
    thing = THINGS[group.thing]
    which = 0 if rng.random() < 0.7 else int(rng.integers(len(thing.words)))
    size = f"{_one_of(_SIZES[group.size], rng)} " if group.size else ""
    if group.count > 1:
        number = NUMBERS[group.count] if rng.random() < 0.85 else str(group.count)
        return f"{number} {size}{thing.plurals[which]}"
    noun = size + thing.words[which]
    draw = rng.random()
    article = "one" if draw < 0.08 else "the" if draw < 0.12 else _article(noun)
    return noun if 0.12 <= draw < 0.17 else f"{article} {noun}"


def _described(content: Content, rng: np.random.Generator) -> str:
    parts = [describe_group(group, rng) for group in content.groups]
    if content.relation is None:
        order = rng.permutation(len(parts))
        return _listed([parts[index] for index in order], rng)
    first, second = parts
    relation, form = content.relation, rng.random()
    if form < 0.6:
        return f"{first} {_one_of(_RELATIONS[relation], rng)} {second}"
    if form < 0.85:
        return f"{second} {_one_of(_RELATIONS[_OPPOSITES[relation]], rng)} {first}"
    here, there = _one_of(_WHERE[relation], rng), _one_of(_WHERE[_OPPOSITES[relation]], rng)
    return f"{first} {here} and {second} {there}"


def _listed(parts: Sequence[str], rng: np.random.Generator) -> str:
    if len(parts) == 1:
        return parts[0]
    joint = _one_of((" and ", " and ", " with ", " next to "), rng) if len(parts) == 2 else " and "
    return ", ".join(parts[:-1]) + joint + parts[-1]


def _article(noun: str) -> str:
    return "an" if noun.startswith(("a", "e", "i", "o", "umb", "hour")) else "a"


def _one_of(forms: Sequence[str], rng: np.random.Generator) -> str:
    return forms[int(rng.integers(len(forms)))]
