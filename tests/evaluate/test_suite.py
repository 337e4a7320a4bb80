import hashlib
from collections import Counter

import numpy as np
import pytest

from sd35flash_jax.evaluate.suite import CATEGORIES, MOST_PROMPTS, suite
from sd35flash_jax.world.captions import caption
from sd35flash_jax.world.objects import THINGS
from sd35flash_jax.world.scenes import (
    draw_content,
    fits_relation,
    held_out_background,
    held_out_count,
    held_out_pair,
    lay_out,
)


def of(category):
    return [prompt for prompt in suite() if prompt.category == category]


def test_the_suite_has_over_500_prompts_about_as_many_of_each_category_and_none_twice():
    counts = Counter(prompt.category for prompt in suite())
    assert dict(counts) == dict.fromkeys(CATEGORIES, MOST_PROMPTS) | {"counting": 96}
    assert len({prompt.text for prompt in suite()}) == len(suite()) == 536


def test_the_suite_is_the_one_that_published_figures_are_of():
    digest = hashlib.sha256("\n".join(map(repr, suite())).encode()).hexdigest()
    assert digest[:16] == "00edcab8156a649d"


def test_a_smaller_suite_is_the_beginning_of_each_category():
    small = suite(3)
    assert small == [prompt for category in CATEGORIES for prompt in of(category)[:3]]


@pytest.mark.parametrize("number", [0, -1, MOST_PROMPTS + 1])
def test_a_number_of_prompts_that_the_suite_does_not_have_is_refused(number):
    with pytest.raises(ValueError, match=f"1 to {MOST_PROMPTS} prompts of each category, not {number}"):
        suite(number)


@pytest.mark.parametrize("category", ["two objects", "position"])
def test_no_pair_of_the_suite_can_meet_in_training(category):
    for prompt in of(category):
        first, second = prompt.groups
        assert held_out_pair(first.thing, second.thing) and (prompt.relation is not None) == (category == "position")


def test_no_number_of_a_thing_in_the_suite_can_come_in_training():
    for prompt in of("counting"):
        (group,) = prompt.groups
        assert 2 <= group.count <= 4 and held_out_count(group.thing, group.count)


def test_no_background_in_the_suite_can_stand_behind_its_thing_in_training():
    kinds = Counter(prompt.background.kind for prompt in of("background"))
    assert set(kinds) == {"plain", "place"} and min(kinds.values()) >= 30
    for prompt in of("background"):
        assert held_out_background(prompt.groups[0].thing, prompt.background.label)


def test_every_relation_is_asked_for_about_equally_often():
    relations = Counter(prompt.relation for prompt in of("position"))
    assert set(relations) == {"left", "right", "above", "below"} and max(relations.values()) <= 28


def test_training_never_draws_what_the_suite_asks_for():
    pairs = {frozenset(group.thing for group in p.groups) for p in of("two objects") + of("position")}
    counts = {(prompt.groups[0].thing, prompt.groups[0].count) for prompt in of("counting")}
    backgrounds = {(prompt.groups[0].thing, prompt.background.label) for prompt in of("background")}
    rng = np.random.default_rng(0)
    for _ in range(5000):
        content = draw_content(rng)
        things = [group.thing for group in content.groups]
        assert not any(pair <= set(things) for pair in pairs)
        assert not counts & {(group.thing, group.count) for group in content.groups}
        assert not backgrounds & {(thing, content.background.label) for thing in things}


def test_training_never_words_a_single_thing_as_the_suite_does():
    rng = np.random.default_rng(0)
    assert all(prompt.text.startswith("a picture with ") for prompt in of("single object"))
    assert not any("picture with " in caption(draw_content(rng), rng).lower() for _ in range(5000))


def test_a_prompt_names_what_its_picture_must_show():
    for prompt in suite():
        for group in prompt.groups:
            words = THINGS[group.thing].plurals if group.count > 1 else THINGS[group.thing].words
            assert any(word in prompt.text for word in words)


def test_a_content_of_a_prompt_keeps_to_it_and_can_be_laid_out():
    rng = np.random.default_rng(0)
    for prompt in suite(5):
        content = prompt.content(rng)
        assert (content.groups, content.relation) == (prompt.groups, prompt.relation)
        assert prompt.background in (None, content.background)
        assert fits_relation(content, lay_out(content, rng).sprites)


def test_a_background_that_a_prompt_does_not_say_varies():
    prompt, rng = of("single object")[0], np.random.default_rng(0)
    assert len({prompt.content(rng).background for _ in range(20)}) > 5
