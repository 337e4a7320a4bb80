import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings

from sd35flash_jax.world.compose import compose, scene_arrays, sprites
from sd35flash_jax.world.objects import THINGS
from sd35flash_jax.world.scenes import (
    COLOURS,
    MOST_SPRITES,
    PLACES,
    Background,
    Content,
    Group,
    Scene,
    Sprite,
    lay_out,
)
from tests.world.test_scenes import contents, seeds

SIZE = 64


def drawn(*scenes):
    return np.asarray(compose(jnp.asarray(sprites()), scene_arrays(scenes), SIZE))


WHITE = Background("plain", ("white",))


def scene(*placed, background=WHITE, seed=0):
    groups = tuple(Group(sprite.thing) for sprite in placed) or (Group(0),)
    return Scene(Content(groups, background), placed, seed)


def test_there_is_a_sprite_for_every_thing_and_no_two_are_alike():
    assert sprites().shape == (len(THINGS), 128, 128, 4)
    assert (sprites()[..., 3] > 128).mean(axis=(1, 2)).min() > 0.05
    assert len({tile.tobytes() for tile in sprites()}) == len(THINGS)


@given(contents(), seeds)
@settings(deadline=None)
def test_arrays_hold_a_scenes_sprites_from_the_highest_to_the_lowest_and_nothing_else(content, seed):
    laid_out = lay_out(content, np.random.default_rng(seed))
    arrays = scene_arrays([laid_out])
    count = len(laid_out.sprites)
    ours = [tuple(float(array[0, i]) for array in arrays[3:]) for i in range(count)]
    placed = [
        (sprite.thing, *np.float32((sprite.x, sprite.y, sprite.side, sprite.mirrored))) for sprite in laid_out.sprites
    ]
    assert sorted(ours) == sorted(placed)
    assert (np.diff((arrays.y + arrays.side / 2)[0, :count]) >= -1e-6).all()
    assert arrays.thing.shape == (1, MOST_SPRITES) and not arrays.side[0, count:].any()
    background = content.background
    assert arrays.kind[0] == (1 + PLACES.index(background.place) if background.kind == "place" else 0)
    named = [COLOURS[name] for name in (background.colours * 2)[:2]]
    if named:
        assert np.abs(arrays.colours[0] * 255 - named).max() < 50


def test_a_scene_is_drawn_alike_in_any_batch():
    one = scene(Sprite(3, 0.5, 0.5, 0.4, False), seed=1)
    two = scene(Sprite(9, 0.3, 0.6, 0.3, True), background=Background("place", place="night"), seed=2)
    np.testing.assert_allclose(drawn(one, two), np.concatenate([drawn(one, one)[:1], drawn(two, two)[:1]]), atol=1e-6)


def test_a_sprite_is_drawn_in_its_box_and_nowhere_else():
    cases = [
        (thing, x, y, side) for thing, (x, y, side) in enumerate([(0.3, 0.6, 0.4), (0.7, 0.25, 0.3), (0.5, 0.5, 0.9)])
    ]
    for thing, x, y, side in cases:
        for background in (Background("plain", ("purple",)), Background("place", place="beach")):
            with_it, without = drawn(
                scene(Sprite(thing, x, y, side, False), background=background), scene(background=background)
            )
            change = np.abs(with_it - without).max(axis=-1)
            row, column = np.indices((SIZE, SIZE)) + 0.5
            inside = np.maximum(np.abs(row / SIZE - y), np.abs(column / SIZE - x)) <= side / 2 + 1 / SIZE
            assert change[~inside].max() < 1e-5
            assert (change[inside] > 0.05).mean() > 0.2


def test_a_sprite_at_full_size_is_its_picture():
    tile = sprites()[5].astype(np.float32) / 255
    expected = tile[..., :3] * tile[..., 3:] + (1 - tile[..., 3:]) * 248 / 255
    arrays = scene_arrays([scene(Sprite(5, 0.5, 0.5, 1.0, False))])._replace(
        colours=np.full((1, 2, 3), 248 / 255, np.float32)
    )
    picture = compose(jnp.asarray(sprites()), arrays, 128)[0]
    np.testing.assert_allclose(picture, expected, atol=2e-3)


def test_a_mirrored_sprite_is_the_other_way_round():
    plain, mirrored = drawn(*(scene(Sprite(5, 0.5, 0.5, 0.6, flipped)) for flipped in (False, True)))
    np.testing.assert_allclose(plain[:, ::-1], mirrored, atol=2e-3)
    assert np.abs(plain - mirrored).max() > 0.1


def test_what_stands_lower_is_drawn_over_what_stands_higher():
    upper, lower = Sprite(0, 0.5, 0.45, 0.5, False), Sprite(1, 0.5, 0.55, 0.5, False)
    both, again, alone = drawn(scene(upper, lower), scene(lower, upper), scene(lower))
    np.testing.assert_array_equal(both, again)
    opaque = np.zeros((SIZE, SIZE), bool)
    middle = slice(SIZE * 55 // 100 - 3, SIZE * 55 // 100 + 3)
    opaque[middle, SIZE // 2 - 3 : SIZE // 2 + 3] = True
    np.testing.assert_allclose(both[opaque], alone[opaque], atol=0.02)


def test_every_background_has_its_own_look_and_places_vary_with_the_seed():
    places = [Background("place", place=place) for place in PLACES]
    first = drawn(*(scene(background=place, seed=1) for place in places))
    other = drawn(*(scene(background=place, seed=2) for place in places))
    assert first.min() >= 0 and first.max() <= 1
    assert all(np.abs(one - two).max() > 0.02 for one, two in zip(first, other))
    means = first.mean(axis=1)
    for index, mean in enumerate(means):
        assert all(np.abs(mean - means[later]).mean() > 0.02 for later in range(index + 1, len(means)))


def test_a_gradient_runs_from_its_first_colour_at_the_top_to_its_second():
    (picture,) = drawn(scene(background=Background("gradient", ("red", "blue"))))
    for line, name in ((0, "red"), (-1, "blue")):
        assert np.abs(picture[line] * 255 - COLOURS[name]).max() < 40
