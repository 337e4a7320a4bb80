"""Right or wrong, from what the detector sees, by rules after GenEval's (arXiv 2310.11513).

As in GenEval's own program (`evaluation/evaluate_images.py` of djghosh13/geneval), whatever else a picture shows is not
held against it, a count must be exact, of several finds of a thing the most certain is the one whose place counts, and
"overall" is the mean over categories. Otherwise than there:

- One threshold serves all categories, `detector.CERTAIN`, and it is on a thing's presence alone. GenEval's is on the
  score of a class: 0.3, and 0.9 for counting.
- A place holds one thing, of its likeliest kind, and finds close together are one, whatever their kinds
  (`detector.SAME`). GenEval takes each class by itself, its 16 most certain boxes at most, and by default merges none.
- Position compares centres alone: the first's must be further along the named axis than across it. GenEval takes a
  tenth of both widths off the offset along x, and of both heights along y, and wants more than half of the centres'
  distance to be left on the axis. So a diagonal can be two relations there and is at most one here, and two things
  that are close for their size are in no relation there.
- Backgrounds stand in place of GenEval's colours of things and attribution of colours, which it asks of a CLIP model.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from sd35flash_jax.evaluate.detector import Detector, Found, View, look
from sd35flash_jax.evaluate.frechet import diversity, frechet_distance
from sd35flash_jax.evaluate.suite import Prompt
from sd35flash_jax.world.objects import THINGS
from sd35flash_jax.world.scenes import Relation


class Mark(NamedTuple):
    """What a scorer says of one picture."""

    right: bool | None
    """None where the scorer measures and does not judge."""
    seen: str
    """In a few words, for people."""
    values: Float[np.ndarray, " c"]
    """What the scorer's figures are made of."""


class Figure(NamedTuple):
    """A mean, and where there are several seeds and each has a figure, the standard deviation over them."""

    mean: float
    spread: float | None = None

    @classmethod
    def over_seeds(cls, values: Sequence[float] | np.ndarray) -> "Figure":
        return cls(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None)


class Scorer(Protocol):
    """A way to judge pictures: first each one, then all that a sampler made."""

    def mark(self, prompts: Sequence[Prompt], images: UInt8[np.ndarray, "b h w 3"]) -> list[Mark]: ...

    def figures(self, prompts: Sequence[Prompt], marks: Sequence[Sequence[Mark]]) -> dict[str, Figure]:
        """By name, of the marks of each seed."""
        ...


class WorldScorer:
    """Marks pictures of the suite's prompts with the detector; its figures are

    - for each category, the share of pictures that are right, and the mean of these: "overall";
    - "Frechet": `frechet_distance` of all pictures, in the space of the detector's features, to `reference`, the
      features of composed pictures of the same prompts. Left out where there are too few pictures;
    - "diversity": `diversity` in the same space. Left out where there is only one seed.
    """

    def __init__(self, detector: Detector, reference: Float[np.ndarray, "n c"]):
        self.detector = detector
        self.reference = reference

    def mark(self, prompts: Sequence[Prompt], images: UInt8[np.ndarray, "b h w 3"]) -> list[Mark]:
        views = look(self.detector, images)
        return [Mark(is_right(prompt, view), describe(view), view.features) for prompt, view in zip(prompts, views)]

    def figures(self, prompts: Sequence[Prompt], marks: Sequence[Sequence[Mark]]) -> dict[str, Figure]:
        right = np.array([[mark.right for mark in of_seed] for of_seed in marks], float)
        of_category = {
            category: right[:, [prompt.category == category for prompt in prompts]].mean(axis=1)
            for category in dict.fromkeys(prompt.category for prompt in prompts)
        }
        shown: dict[str, Figure] = {category: Figure.over_seeds(values) for category, values in of_category.items()}
        shown["overall"] = Figure.over_seeds(np.mean(list(of_category.values()), axis=0))
        features = np.array([[mark.values for mark in of_seed] for of_seed in marks])
        width = features.shape[-1]
        if min(right.size, len(self.reference)) > width:
            shown["Frechet"] = Figure(frechet_distance(features.reshape(-1, width), self.reference))
        if len(marks) > 1:
            shown["diversity"] = Figure(diversity(features))
        return shown


def is_right(prompt: Prompt, view: View) -> bool:
    """Whether a picture shows what its prompt says, by the rule of the prompt's category.

    - single object, two objects: each thing is there, and whatever else may be;
    - counting: there are exactly so many of the thing;
    - background: the thing is there, and the background is the one;
    - position: both are there, and the first's centre lies on the named side of the second's, further along that axis
      than across it. Of several finds of a thing, the most certain counts.
    """
    found = {group.thing: [find for find in view.found if find.thing == group.thing] for group in prompt.groups}
    if not all(found.values()):
        return False
    if prompt.category == "counting":
        return all(len(found[group.thing]) == group.count for group in prompt.groups)
    if prompt.background is not None:
        return view.background == prompt.background.label
    if prompt.relation is not None:
        first, second = (max(found[group.thing], key=lambda find: find.certainty) for group in prompt.groups)
        return stands(first, prompt.relation, second)
    return True


def stands(first: Found, relation: Relation, second: Found) -> bool:
    """Whether the first's centre lies on the relation's side of the second's, further along it than across."""
    dx, dy = first.x - second.x, first.y - second.y
    along, across = (dx, dy) if relation in ("left", "right") else (dy, dx)
    sign = -1 if relation in ("left", "above") else 1
    return sign * along > abs(across)


def describe(view: View) -> str:
    """Such as "cat, rocket; meadow"."""
    return f"{', '.join(THINGS[find.thing].name for find in view.found) or 'nothing'}; {view.background}"
