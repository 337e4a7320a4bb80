import jax
import numpy as np
import pytest

from sd35flash_jax.config import TEXT_ENCODERS
from sd35flash_jax.text import load_tokenizer
from sd35flash_jax.world.captions import NUMBERS
from sd35flash_jax.world.objects import THINGS
from training.data import make_scenes, token_ids
from training.model import FLASH_MINI, TEXT_TOKENS


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def says_what_is_drawn(text, things):
    said = text.lower()
    for thing in set(things):
        count = things.count(thing)
        words = THINGS[thing].plurals if count > 1 else THINGS[thing].words
        if not any(word.lower() in said for word in words):
            return False
        if count > 1 and NUMBERS[count] not in said and str(count) not in said:
            return False
    return True


def drawn_things(scenes, row):
    return [int(thing) for thing, side in zip(scenes.thing[row], scenes.side[row]) if side > 0]


def test_scenes_are_the_same_at_every_call_and_others_with_another_seed():
    scenes, captions = make_scenes(30, 4, 2)
    assert_equal(make_scenes(30, 4, 2), (scenes, captions))
    other_scenes, other_captions = make_scenes(30, 5, 2)
    assert (other_scenes.x != scenes.x).any() and other_captions != captions


def test_a_scene_does_not_depend_on_how_many_there_are_or_on_their_captions():
    fewer, more = make_scenes(10, 4, 0)[0], make_scenes(30, 4, 3)[0]
    assert_equal(fewer, jax.tree.map(lambda array: array[:10], more))


def test_every_caption_says_what_is_drawn_in_its_scene(monkeypatch):
    """Also where several processes make the scenes."""
    monkeypatch.setattr("training.data.CHUNK", 40)
    scenes, captions = make_scenes(70, 0, 2)
    assert len(captions) == len(scenes.kind) == 70 and {len(texts) for texts in captions} == {2}
    rows = [drawn_things(scenes, row) for row in range(70)]
    assert all(rows) and len(set(map(tuple, rows))) > 60
    assert [texts for texts, row in zip(captions, rows) for text in texts if not says_what_is_drawn(text, row)] == []
    others = [says_what_is_drawn(texts[0], row) for texts, row in zip(captions, rows[1:] + rows[:1])]
    assert sum(others) < 7


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folders):
    return {name: load_tokenizer(name, folder) for name, folder in tokenizer_folders.items()}


def test_token_ids_are_those_of_each_tokenizer_cut_and_padded_to_what_its_encoder_reads(tokenizers):
    prompts = ["", "a rocket at night", "three cats and " * 30]
    ids = token_ids(tokenizers, prompts, FLASH_MINI)
    assert set(ids) == set(TEXT_ENCODERS)
    for name, tokenizer in tokenizers.items():
        assert ids[name].shape == (3, TEXT_TOKENS) and ids[name].dtype == np.int32
        own = tokenizer(prompts[1]).input_ids
        assert ids[name][1].tolist() == own + [tokenizer.pad_token_id] * (TEXT_TOKENS - len(own))
        assert ids[name].min() >= 0 and ids[name].max() < getattr(FLASH_MINI, name).vocabulary
        assert ids[name][2, -1] == tokenizer.eos_token_id


def test_token_ids_are_the_same_where_several_processes_make_them(tokenizers, monkeypatch):
    prompts = ["a rocket", "two cats", "", "a tree at night", "three frogs"]
    together = token_ids(tokenizers, prompts, FLASH_MINI)
    monkeypatch.setattr("training.data.CHUNK", 1)
    assert_equal(token_ids(tokenizers, prompts, FLASH_MINI), together)
