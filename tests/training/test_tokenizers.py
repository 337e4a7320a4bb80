import re

import numpy as np
import pytest

from sd35flash_jax.evaluate.suite import suite
from sd35flash_jax.text import load_tokenizer
from sd35flash_jax.world.captions import caption
from sd35flash_jax.world.objects import THINGS
from sd35flash_jax.world.scenes import draw_content
from tests.tiny_model import TEXT
from training.model import CLIP_VOCABULARY, T5_VOCABULARY, TEXT_TOKENS
from training.tokenizers import write_clip_tokenizer

ENCODERS = ("clip_l", "clip_g", "t5")


@pytest.fixture(scope="module")
def captions():
    """Others than the tokenizers were trained on."""
    rng = np.random.default_rng(77)
    return [caption(draw_content(rng), rng) for _ in range(5000)]


@pytest.fixture(scope="module")
def words(captions):
    of_things = (word for thing in THINGS for words in (thing.words, thing.plurals) for word in words)
    return sorted({word for text in (*captions, *of_things) for word in re.findall(r"[\w-]+", text)})


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folders):
    return {name: load_tokenizer(name, tokenizer_folders[name]) for name in ENCODERS}


@pytest.mark.parametrize("encoder, most", [("clip_l", 5), ("clip_g", 5), ("t5", 6)])
def test_words_of_captions_are_a_few_tokens_and_most_are_one(tokenizers, words, encoder, most):
    """T5 tells capitals apart, and they are rare: a word that begins with one may be as many tokens as letters."""
    tokenizer = tokenizers[encoder]
    counts = {word: len(tokenizer(word, add_special_tokens=False).input_ids) for word in words if word.islower()}
    assert len(counts) > 400
    assert {word: count for word, count in counts.items() if count > most} == {}
    assert np.mean([count == 1 for count in counts.values()]) > 0.8


@pytest.mark.parametrize("encoder", ENCODERS)
def test_prompts_of_the_suite_are_read_to_their_end_and_so_is_nearly_every_caption(tokenizers, captions, encoder):
    tokenizer = tokenizers[encoder]
    prompts = [prompt.text for prompt in suite()]
    assert max(map(len, tokenizer(prompts).input_ids)) <= TEXT_TOKENS
    cut = sum(len(ids) > TEXT_TOKENS for ids in tokenizer(captions).input_ids)
    assert cut <= (0.005 * len(captions) if encoder == "t5" else 0)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_no_part_of_a_caption_is_unknown_and_text_comes_back(tokenizers, captions, encoder):
    tokenizer = tokenizers[encoder]
    for text in captions[:300]:
        ids = tokenizer(text).input_ids
        assert ids.count(tokenizer.unk_token_id) == (tokenizer.unk_token_id == tokenizer.eos_token_id)
        expected = text if encoder == "t5" else text.lower()
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == expected.replace(" ", "")


def test_the_clip_tokenizers_have_clips_order_of_ids_and_differ_in_their_padding(tokenizers):
    for name, padding in (("clip_l", CLIP_VOCABULARY - 1), ("clip_g", 0)):
        tokenizer = tokenizers[name]
        assert (len(tokenizer), tokenizer.model_max_length) == (CLIP_VOCABULARY, TEXT_TOKENS)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (CLIP_VOCABULARY - 2, CLIP_VOCABULARY - 1)
        assert (tokenizer.pad_token_id, tokenizer.convert_ids_to_tokens(0)) == (padding, "!")


def test_the_t5_tokenizer_has_t5s_special_tokens_and_length(tokenizers):
    tokenizer = tokenizers["t5"]
    assert len(tokenizer) <= T5_VOCABULARY and tokenizer.model_max_length == 512
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("a cat").input_ids[-1] == 1


def test_text_that_yields_too_few_merges_for_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the text yields \d+ merges, but 4486 are wanted"):
        write_clip_tokenizer(tmp_path / "clip", TEXT.splitlines(), 5000, 77, padding="!")
    assert list(tmp_path.iterdir()) == []
