import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd35flash_jax.evaluate.detector import GRID, Sight, find
from sd35flash_jax.world.compose import scene_arrays
from sd35flash_jax.world.objects import THINGS
from sd35flash_jax.world.scenes import BACKGROUNDS, COLOURS, Background, Content, Group, Scene, Sprite
from training.detector import background_labels, detection_loss

SCENES = (
    Scene(
        Content((Group(7), Group(200)), Background("plain", ("blue",))),
        (Sprite(7, 0.21, 0.47, 0.3, False), Sprite(200, 0.73, 0.52, 0.4, True)),
        0,
    ),
    Scene(Content((Group(31),), Background("place", place="sea")), (Sprite(31, 0.33, 0.62, 0.55, False),), 1),
)
ARRAYS = scene_arrays(SCENES)
LABELS = np.array([BACKGROUNDS.index(scene.content.background.label) for scene in SCENES])


def place(sprite):
    return int(sprite.y * GRID), int(sprite.x * GRID)


def right_sight():
    """What a detector that is never wrong says of the scenes."""
    count = len(SCENES)
    presence, log_side = np.full((count, GRID, GRID), -30.0), np.full((count, GRID, GRID), 5.0)
    things, centre = np.zeros((count, GRID, GRID, len(THINGS))), np.full((count, GRID, GRID, 2), 0.9)
    for row, scene in enumerate(SCENES):
        for sprite in scene.sprites:
            at = row, *place(sprite)
            presence[at], log_side[at], things[at][sprite.thing] = 30, np.log(sprite.side), 30
            centre[at] = sprite.y * GRID % 1, sprite.x * GRID % 1
    backgrounds = 30 * np.eye(len(BACKGROUNDS))[LABELS]
    return Sight(presence, things, centre, log_side, backgrounds, np.zeros((count, 1)))


def losses(sight):
    loss, metrics = detection_loss(Sight(*map(jnp.asarray, sight)), jax.tree.map(jnp.asarray, ARRAYS), LABELS)
    return {"loss": float(loss)} | {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("label", BACKGROUNDS)
def test_backgrounds_are_labelled_by_their_colour_or_place(label):
    if label == "gradient":
        pairs = [(one, other) for one in COLOURS for other in COLOURS if one != other]
        backgrounds = [Background("gradient", pair) for pair in pairs]
    elif label in COLOURS:
        backgrounds = [Background("plain", (label,))] * 50
    else:
        backgrounds = [Background("place", place=label)]
    scenes = [Scene(Content((Group(0),), background), (), seed) for seed, background in enumerate(backgrounds)]
    assert {BACKGROUNDS[number] for number in background_labels(scene_arrays(scenes))} == {label}


def test_seeing_all_right_costs_nothing():
    seen = losses(right_sight())
    assert seen["loss"] == pytest.approx(0, abs=1e-4)
    assert seen["right"] == seen["right_background"] == 1


def test_what_costs_nothing_is_what_the_evaluation_reads_as_the_scene():
    for row, scene in enumerate(SCENES):
        found = sorted(find(right_sight(), row))
        placed = sorted((sprite.thing, sprite.x, sprite.y, sprite.side) for sprite in scene.sprites)
        assert [one[:4] for one in found] == [pytest.approx(own) for own in placed]


def wrong_thing(sight, at):
    sight.thing[at] = 30 * np.eye(len(THINGS))[0]


def wrong_centre(sight, at):
    sight.centre[at] = sight.centre[at][::-1]


def wrong_side(sight, at):
    sight.log_side[at] += 0.5


def not_seen(sight, at):
    sight.presence[at] = -5


def seen_elsewhere(sight, at):
    sight.presence[at[0], 1, 1] = 5


def wrong_background(sight, at):
    sight.background[at[0]] = 30 * np.eye(len(BACKGROUNDS))[0]


@pytest.mark.parametrize(
    "spoil, term",
    [
        (wrong_thing, "thing"),
        (wrong_centre, "centre"),
        (wrong_side, "side"),
        (not_seen, "presence"),
        (seen_elsewhere, "presence"),
        (wrong_background, "background"),
    ],
)
def test_seeing_one_part_wrong_costs_in_its_own_term_alone(spoil, term):
    sight = right_sight()
    spoil(sight, (1, *place(SCENES[1].sprites[0])))
    spoilt = losses(sight)
    assert spoilt["loss"] > 0.1
    terms = ("presence", "thing", "centre", "side", "background")
    assert [name for name in terms if spoilt[name] > 1e-4] == [term]
    assert (spoilt["right"] < 1, spoilt["right_background"] < 1) == (term == "thing", term == "background")


def test_presence_beside_a_centre_costs_nothing_and_two_places_off_it_does():
    row, column = place(SCENES[1].sprites[0])
    for down in (-2, -1, 1, 2):
        for right in (-2, -1, 0, 1, 2):
            sight = right_sight()
            sight.presence[1, row + down, column + right] = 30
            near = max(abs(down), abs(right)) == 1
            assert losses(sight)["presence"] == pytest.approx(0 if near else 15, abs=1e-3)


def test_what_is_said_of_places_without_a_thing_costs_nothing():
    sight = right_sight()
    sight.thing[:, 0, 0], sight.centre[:, 0, 0], sight.log_side[:, 0, 0] = 99.0, 99.0, 99.0
    assert losses(sight)["loss"] == pytest.approx(0, abs=1e-4)
