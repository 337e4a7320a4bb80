from dataclasses import replace

import numpy as np
import pytest

from sd35flash_jax.evaluate.detector import Found, View
from sd35flash_jax.evaluate.scoring import Figure, Mark, WorldScorer, describe, is_right, stands
from sd35flash_jax.evaluate.suite import Prompt, suite
from sd35flash_jax.world.objects import THINGS
from sd35flash_jax.world.scenes import RELATIONS, Background, Group, lay_out

NAMES = [thing.name for thing in THINGS]
CAT, DOG, ROCKET = (NAMES.index(name) for name in ("cat", "dog", "rocket"))


def seen(*things, background="white"):
    """A view of things, each a number or `(number, x, y)` or `(number, x, y, certainty)`."""
    found = []
    for index, thing in enumerate(things):
        number, x, y, certainty = (*(thing if isinstance(thing, tuple) else (thing, 0.5, 0.5)), 0.9 - index / 100)[:4]
        found.append(Found(number, x, y, 0.3, certainty))
    return View(found, background, np.zeros(3))


ONE = Prompt("single object", "a picture with a cat", (Group(CAT),))
TWO = Prompt("two objects", "a cat and a rocket", (Group(CAT), Group(ROCKET)))
THREE = Prompt("counting", "three cats", (Group(CAT, 3),))
MEADOW = Prompt("background", "a cat on a lawn", (Group(CAT),), background=Background("place", place="meadow"))
RED = Prompt("background", "a cat on red", (Group(CAT),), background=Background("plain", ("red",)))


def related(relation):
    return Prompt("position", f"a cat {relation} a rocket", (Group(CAT), Group(ROCKET)), relation)


@pytest.mark.parametrize(
    ("prompt", "view", "right"),
    [
        (ONE, seen(CAT), True),
        (ONE, seen(DOG, CAT, CAT), True),
        (ONE, seen(DOG), False),
        (ONE, seen(), False),
        (TWO, seen(ROCKET, CAT), True),
        (TWO, seen(ROCKET, CAT, DOG), True),
        (TWO, seen(CAT, CAT), False),
        (TWO, seen(ROCKET), False),
        (THREE, seen(CAT, CAT, CAT), True),
        (THREE, seen(CAT, CAT, DOG, CAT), True),
        (THREE, seen(CAT, CAT), False),
        (THREE, seen(CAT, CAT, CAT, CAT), False),
        (THREE, seen(CAT, CAT, DOG), False),
        (MEADOW, seen(CAT, background="meadow"), True),
        (MEADOW, seen(CAT, background="beach"), False),
        (MEADOW, seen(DOG, background="meadow"), False),
        (RED, seen(CAT, background="red"), True),
        (RED, seen(CAT, background="gradient"), False),
        (related("left"), seen((CAT, 0.2, 0.5), (ROCKET, 0.8, 0.5)), True),
        (related("right"), seen((CAT, 0.2, 0.5), (ROCKET, 0.8, 0.5)), False),
        (related("left"), seen((CAT, 0.2, 0.5)), False),
        (related("above"), seen((CAT, 0.5, 0.2), (ROCKET, 0.5, 0.8)), True),
        (related("below"), seen((CAT, 0.5, 0.2), (ROCKET, 0.5, 0.8)), False),
        (related("left"), seen((CAT, 0.9, 0.5, 0.6), (CAT, 0.2, 0.5, 0.9), (ROCKET, 0.5, 0.5, 0.9)), True),
        (related("left"), seen((CAT, 0.9, 0.5, 0.9), (CAT, 0.2, 0.5, 0.6), (ROCKET, 0.5, 0.5, 0.9)), False),
    ],
)
def test_a_picture_is_right_by_the_rule_of_its_prompts_category(prompt, view, right):
    assert is_right(prompt, view) is right


@pytest.mark.parametrize(
    ("x", "y", "relations"),
    [
        (0.3, 0.5, {"left"}),
        (0.7, 0.5, {"right"}),
        (0.5, 0.3, {"above"}),
        (0.5, 0.7, {"below"}),
        (0.3, 0.35, {"left"}),
        (0.65, 0.3, {"above"}),
        (0.7, 0.7, set()),
        (0.71, 0.7, {"right"}),  # GenEval would say "below" too.
        (0.51, 0.5, {"right"}),  # GenEval would say nothing of things so close for their size.
        (0.5, 0.5, set()),
    ],
)
def test_a_thing_stands_where_its_centre_is_further_along_than_across(x, y, relations):
    there, middle = Found(CAT, x, y, 0.3, 0.9), Found(ROCKET, 0.5, 0.5, 0.3, 0.9)
    assert {
        relation for relation in ("left", "right", "above", "below") if stands(there, relation, middle)
    } == relations


def test_a_view_is_described_in_words():
    assert describe(seen(CAT, ROCKET, background="meadow")) == "cat, rocket; meadow"
    assert describe(seen()) == "nothing; white"


def test_a_figure_over_seeds_is_their_mean_and_standard_deviation():
    assert Figure.over_seeds([0.5, 0.7]) == pytest.approx((0.6, 0.1 * 2**0.5))
    assert Figure.over_seeds([0.5]) == (0.5, None)


def marks(prompts, seeds, wrong=(), width=3):
    rng = np.random.default_rng(0)
    return [[Mark(p.category not in wrong, "", rng.normal(size=width)) for p in prompts] for _ in range(seeds)]


def test_overall_is_the_mean_of_the_categories_however_many_prompts_each_has():
    prompts = [*suite(2), suite()[3]]  # Three of a single object.
    figures = WorldScorer(None, np.zeros((0, 3))).figures(prompts, marks(prompts, 2, wrong=("single object",)))
    assert figures["single object"] == (0, 0) and figures["counting"] == (1, 0)
    assert figures["overall"] == pytest.approx((0.8, 0))


def test_a_spread_is_over_seeds_not_over_prompts():
    prompts = suite(2)
    good, bad = marks(prompts, 1)[0], marks(prompts, 1, wrong=("counting",))[0]
    figures = WorldScorer(None, np.zeros((0, 3))).figures(prompts, [good, bad])
    assert figures["counting"] == pytest.approx((0.5, 0.5**0.5)) and figures["position"] == (1, 0)
    assert figures["overall"] == pytest.approx((0.9, 0.2 * 0.5**0.5))


def test_the_frechet_distance_is_left_out_where_there_are_too_few_pictures():
    prompts = suite(2)
    few, many = marks(prompts, 1, width=10), marks(prompts, 2, width=10)
    reference = np.random.default_rng(1).normal(size=(40, 10))
    assert "Frechet" not in WorldScorer(None, reference).figures(prompts, few)
    assert "Frechet" not in WorldScorer(None, reference[:10]).figures(prompts, many)
    assert WorldScorer(None, reference).figures(prompts, many)["Frechet"].mean > 0


def test_diversity_is_left_out_where_there_is_one_seed():
    prompts = suite(1)
    scorer = WorldScorer(None, np.zeros((0, 3)))
    assert "diversity" not in scorer.figures(prompts, marks(prompts, 1))
    assert scorer.figures(prompts, marks(prompts, 2))["diversity"].mean > 0


def truth(prompt, seed):
    """The view of a detector that is never wrong, of a picture composed for a prompt."""
    rng = np.random.default_rng(seed)
    scene = lay_out(prompt.content(rng), rng)
    found = [Found(sprite.thing, sprite.x, sprite.y, sprite.side, rng.uniform(0.5, 1)) for sprite in scene.sprites]
    return View(sorted(found, key=lambda find: -find.certainty), scene.content.background.label, np.zeros(3))


def test_a_picture_composed_for_a_prompt_is_right_for_it_and_wrong_for_others():
    prompts = suite()
    views = [truth(prompt, seed) for seed, prompt in enumerate(prompts)]
    assert all(is_right(prompt, view) for prompt, view in zip(prompts, views))
    for shift in (1, 2, 50):
        assert sum(is_right(prompt, views[index - shift]) for index, prompt in enumerate(prompts)) <= 5


def test_a_composed_relation_is_wrong_for_every_other_relation():
    prompts = [prompt for prompt in suite() if prompt.category == "position"]
    for seed, prompt in enumerate(prompts):
        others = [replace(prompt, relation=other) for other in RELATIONS if other != prompt.relation]
        assert not any(is_right(other, truth(prompt, seed)) for other in others)
