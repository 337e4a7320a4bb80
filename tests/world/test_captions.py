import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sd35flash_jax.world.captions import NUMBERS, caption, describe_background, describe_group
from sd35flash_jax.world.objects import THINGS
from sd35flash_jax.world.scenes import Background, Content, Group
from tests.world.test_scenes import contents, seeds, things

WHITE = Background("plain", ("white",))


@given(contents(), seeds)
@settings(deadline=None)
def test_a_caption_names_every_thing_and_every_number_above_one(content, seed):
    said = caption(content, np.random.default_rng(seed)).lower()
    for group in content.groups:
        thing = THINGS[group.thing]
        words = thing.plurals if group.count > 1 else thing.words
        assert any(word.lower() in said for word in words)
        assert group.count == 1 or NUMBERS[group.count] in said or str(group.count) in said


@given(contents(), seeds)
@settings(deadline=None)
def test_a_caption_is_one_tidy_line(content, seed):
    said = caption(content, np.random.default_rng(seed))
    assert said == said.strip() and "  " not in said and "\n" not in said and ".." not in said


@given(things, st.integers(2, 4), st.sampled_from(("small", "large")), seeds)
def test_a_size_is_said_before_the_thing(thing, count, size, seed):
    words = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}[size]
    said = describe_group(Group(thing, count, size), np.random.default_rng(seed))
    assert any(f" {word} " in said for word in words)


def test_a_relation_is_said_from_either_side():
    cat, rocket = (next(i for i, thing in enumerate(THINGS) if thing.name == name) for name in ("cat", "rocket"))
    content = Content((Group(cat), Group(rocket)), WHITE, "left")
    rng = np.random.default_rng(0)
    said = {caption(content, rng).lower() for _ in range(300)}
    cats_first = [s for s in said if min(s.find(word) % 999 for word in ("cat", "kitten")) < s.find("rocket")]
    others = [s for s in said if s not in cats_first]
    assert any("left of" in s for s in cats_first) and any("right of" in s for s in others)
    assert not any("right of" in s for s in cats_first) and not any("left of" in s for s in others)


def test_a_background_is_said_in_several_ways_and_sometimes_left_unsaid():
    rng = np.random.default_rng(0)
    assert len({describe_background(Background("place", place="meadow"), rng) for _ in range(100)}) >= 3
    assert {"gray", "grey"} == {
        word
        for _ in range(200)
        for word in describe_background(Background("plain", ("gray",)), rng).split()
        if word.startswith("gr")
    }
    said = [caption(Content((Group(0),), Background("place", place="desert")), rng) for _ in range(300)]
    unsaid = sum("desert" not in s.lower() and "dune" not in s.lower() for s in said)
    assert 50 < unsaid < 160


def test_articles_agree_with_the_sound_that_follows():
    rng = np.random.default_rng(0)
    for number, thing in enumerate(THINGS):
        for _ in range(30):
            first, *rest = describe_group(Group(number), rng).split()
            if first == "an":
                assert rest[0][0].lower() in "aeiouh", thing
            if first == "a":
                assert rest[0][0].lower() not in "aeio", thing


def test_an_orange_comes_with_its_article_in_front_of_a_gradient_too():
    rng = np.random.default_rng(0)
    for colours in (("orange", "red"), ("red", "orange")):
        said = " ".join(describe_background(Background("gradient", colours), rng) for _ in range(30))
        assert "a orange" not in said and "an red" not in said


def test_there_are_several_of_a_thing_and_there_is_one():
    rng = np.random.default_rng(0)
    for count, verb in ((1, "is"), (2, "are"), (4, "are")):
        said = [caption(Content((Group(0, count),), WHITE), rng).lower() for _ in range(800)]
        there = {text.split()[1] for text in said if text.startswith("there ")}
        assert there == {verb}
