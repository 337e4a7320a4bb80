from dataclasses import replace

import numpy as np
import pytest

from sd35flash_jax.models.clip import CLIPTextEncoder
from tests.parity.comparison import Pair, as_numpy, as_torch, max_error, record_bfloat16, run_ours
from tests.tiny_model import CLIP_VOCABULARY, CONFIG, END_OF_TEXT

STYLES = {
    "CLIP-L style": CONFIG.clip_l,
    "CLIP-G style": CONFIG.clip_g,
    "CLIP-G style, end of text below other ids": replace(CONFIG.clip_g, eos_token_id=7),
}
ORDINARY_IDS = (10, CLIP_VOCABULARY - 2)


@pytest.fixture(scope="module", params=STYLES)
def pair(request, tmp_path_factory):
    name = "clip_l" if STYLES[request.param].activation == "quick_gelu" else "clip_g"
    return request.param, Pair(name, STYLES[request.param], tmp_path_factory.mktemp("clip"))


def prompts(end_of_text: int, padding: int, words: tuple[int, ...], tokens: int, seed: int = 0) -> np.ndarray:
    """Rows of a start token, random words, the end of the text and padding."""
    random = np.random.default_rng(seed)
    rows = np.full((len(words), tokens), padding, np.int32)
    rows[:, 0] = 1
    for row, count in zip(rows, words, strict=True):
        row[1 : 1 + count] = random.integers(*ORDINARY_IDS, size=count)
        row[1 + count] = end_of_text
    return rows


def end_of_text(config) -> int:
    return END_OF_TEXT if config.eos_token_id == 2 else config.eos_token_id


def ours(pair: Pair, tokens: np.ndarray, dtype: str = "float32") -> list[np.ndarray]:
    return run_ours(CLIPTextEncoder.__call__, pair.ours[dtype], [tokens])


def reference(pair: Pair, tokens: np.ndarray, dtype: str = "float32") -> list[np.ndarray]:
    outputs = pair.reference[dtype](as_torch(tokens), output_hidden_states=True)
    return [as_numpy(outputs.hidden_states[-2]), as_numpy(outputs.text_embeds)]


@pytest.mark.parametrize("padding", ["the end of text", "another id"])
@pytest.mark.parametrize("tokens, words", [(77, (0, 5, 75)), (11, (9, 1))])
def test_states_equal_the_reference(pair, padding, tokens, words, record_parity):
    style, models = pair
    end = end_of_text(models.ours["float32"].config)
    ids = prompts(end, end if padding == "the end of text" else 0, words, tokens)
    for what, mine, expected in zip(("penultimate states", "pooled"), ours(models, ids), reference(models, ids)):
        error, size = max_error(mine, expected), np.abs(expected).max()
        item = f"{style}, {what}, {len(words)} x {tokens} tokens padded by {padding}"
        record_parity(item, error, 1e-4 * size, relative=error / size)


def test_rows_without_end_of_text_are_pooled_as_in_the_reference(pair, record_parity):
    style, models = pair
    ids = np.random.default_rng(1).integers(*ORDINARY_IDS, size=(3, 11)).astype(np.int32)
    expected = reference(models, ids)[1]
    error, size = max_error(ours(models, ids)[1], expected), np.abs(expected).max()
    record_parity(f"{style}, pooled, no end of text", error, 1e-4 * size, relative=error / size)


def test_bfloat16_rounds_no_worse_than_the_reference(pair, record_parity):
    style, models = pair
    end = end_of_text(models.ours["float32"].config)
    inputs = [prompts(end, 0, (5, 20, 75), 77, seed) for seed in range(6)]
    dtypes = ("float32", "bfloat16")
    for number, what in enumerate(("penultimate states", "pooled")):
        record_bfloat16(
            record_parity,
            f"{style}, {what}",
            {dtype: [ours(models, ids, dtype)[number] for ids in inputs] for dtype in dtypes},
            {dtype: [reference(models, ids, dtype)[number] for ids in inputs] for dtype in dtypes},
        )
