import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sd35flash_jax.world.objects import THINGS
from sd35flash_jax.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    MOST_OF_ONE,
    MOST_SPRITES,
    PLACES,
    RELATIONS,
    Background,
    Content,
    Group,
    draw_content,
    fits_relation,
    held_out,
    held_out_background,
    held_out_count,
    held_out_pair,
    lay_out,
)

seeds = st.integers(0, 2**32 - 1)
things = st.integers(0, len(THINGS) - 1)
backgrounds = st.one_of(
    st.builds(lambda colour: Background("plain", (colour,)), st.sampled_from(list(COLOURS))),
    st.builds(
        lambda colours: Background("gradient", tuple(colours)),
        st.lists(st.sampled_from(list(COLOURS)), min_size=2, max_size=2, unique=True),
    ),
    st.builds(lambda place: Background("place", place=place), st.sampled_from(PLACES)),
)


@st.composite
def contents(draw):
    """Any content that a scene may have, held out or not."""
    groups = draw(st.integers(1, 4))
    chosen = draw(st.lists(things, min_size=groups, max_size=groups, unique=True))
    counts = [draw(st.integers(1, MOST_OF_ONE))] + [1] * (groups - 1) if groups <= 2 else [1] * groups
    sizes = [draw(st.sampled_from((None, "small", "large"))) if groups <= 2 else None for _ in chosen]
    relation = draw(st.sampled_from((None, *RELATIONS))) if groups == 2 else None
    return Content(tuple(map(Group, chosen, counts, sizes)), draw(backgrounds), relation)


@given(contents(), seeds)
@settings(deadline=None)
def test_a_layout_has_the_contents_things_within_the_picture_and_true_to_its_relation(content, seed):
    scene = lay_out(content, np.random.default_rng(seed))
    assert scene.content == content and len(scene.sprites) <= MOST_SPRITES
    for group in content.groups:
        assert sum(sprite.thing == group.thing for sprite in scene.sprites) == group.count
    for sprite in scene.sprites:
        half = sprite.side / 2 - 1e-9
        assert 0 < sprite.side <= 0.92
        assert half <= sprite.x <= 1 - half and half <= sprite.y <= 1 - half
    assert fits_relation(content, list(scene.sprites))


@given(contents(), seeds)
@settings(deadline=None)
def test_no_thing_of_a_layout_covers_most_of_another(content, seed):
    sprites = lay_out(content, np.random.default_rng(seed)).sprites
    for index, one in enumerate(sprites):
        for other in sprites[index + 1 :]:
            assert np.hypot(one.x - other.x, one.y - other.y) >= 0.45 * (one.side + other.side)


@given(contents(), seeds)
@settings(deadline=None, max_examples=20)
def test_a_layout_is_a_function_of_its_seed(content, seed):
    assert lay_out(content, np.random.default_rng(seed)) == lay_out(content, np.random.default_rng(seed))


@given(contents(), seeds)
@settings(deadline=None, max_examples=50)
def test_a_relation_does_not_hold_the_other_way_round(content, seed):
    sprites = list(lay_out(content, np.random.default_rng(seed)).sprites)
    fitting = [
        r
        for r in RELATIONS
        if len(content.groups) == 2 and fits_relation(Content(content.groups, content.background, r), sprites)
    ]
    assert fitting == [content.relation] if content.relation else len(fitting) <= 1


@given(seeds)
@settings(deadline=None)
def test_training_never_draws_what_is_held_out(seed):
    content = draw_content(np.random.default_rng(seed))
    chosen = [group.thing for group in content.groups]
    assert not held_out(content)
    assert not any(held_out_pair(one, other) for one in chosen for other in chosen if one != other)
    assert not any(held_out_count(group.thing, group.count) for group in content.groups)
    assert not any(held_out_background(thing, content.background.label) for thing in chosen)
    assert 1 <= sum(group.count for group in content.groups) <= MOST_SPRITES
    assert content.background.label in BACKGROUNDS


@given(things, things)
def test_a_pair_is_held_out_in_either_order(one, other):
    assert held_out_pair(one, other) == held_out_pair(other, one)


@given(things)
def test_one_of_a_thing_is_always_in_training(thing):
    assert not held_out_count(thing, 1)


@given(things, things, backgrounds, st.sampled_from(RELATIONS))
def test_a_content_is_held_out_if_any_of_its_combinations_is(one, other, background, relation):
    content = Content((Group(one), Group(other)), background, relation)
    assert held_out(content) == (
        held_out_pair(one, other)
        or held_out_background(one, background.label)
        or held_out_background(other, background.label)
    )


def test_about_a_tenth_of_each_kind_of_combination_is_held_out():
    numbers = range(len(THINGS))
    shares = [
        np.mean([held_out_pair(one, other) for one in numbers for other in numbers if one < other]),
        np.mean([held_out_count(thing, count) for thing in numbers for count in (2, 3, 4)]),
        np.mean([held_out_background(thing, label) for thing in numbers for label in BACKGROUNDS]),
    ]
    assert all(0.08 < share < 0.12 for share in shares)
