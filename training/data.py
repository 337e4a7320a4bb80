"""Scenes with their captions and token ids, made by all processors at once."""

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np

from sd35flash_jax.config import ModelConfig
from sd35flash_jax.text import token_counts
from sd35flash_jax.world.captions import caption
from sd35flash_jax.world.compose import SceneArrays, scene_arrays
from sd35flash_jax.world.scenes import draw_content, lay_out

CHUNK = 5000


def make_scenes(count: int, seed: int, captions: int) -> tuple[SceneArrays, list[list[str]]]:
    """`count` scenes and for each some captions; scene i is a function of the seed and i alone."""
    starts = range(0, count, CHUNK)
    sizes = [min(CHUNK, count - start) for start in starts]
    chunks = _at_once(partial(_make_chunk, seed, captions), starts, sizes)
    arrays = jax.tree.map(lambda *parts: np.concatenate(parts), *(scenes for scenes, _ in chunks))
    return arrays, [texts for _, chunk in chunks for texts in chunk]


def _make_chunk(seed: int, captions: int, start: int, size: int) -> tuple[SceneArrays, list[list[str]]]:
    rng = np.random.default_rng([seed, start])
    scenes = [lay_out(draw_content(rng), rng) for _ in range(size)]
    return scene_arrays(scenes), [[caption(scene.content, rng) for _ in range(captions)] for scene in scenes]


def draw_captions(count: int, seed: int) -> list[str]:
    """Captions of contents that are not laid out."""
    rng = np.random.default_rng(seed)
    return [caption(draw_content(rng), rng) for _ in range(count)]


def token_ids(tokenizers: Mapping[str, Any], prompts: Sequence[str], config: ModelConfig) -> dict[str, np.ndarray]:
    """Ids of each encoder, `(prompts, tokens)` int32."""
    assert config.t5 is not None
    counts = token_counts(config, config.t5.max_tokens)
    chunks = [prompts[start : start + 2 * CHUNK] for start in range(0, len(prompts), 2 * CHUNK)]
    parts = _at_once(partial(_ids_of_chunk, tokenizers, counts), chunks)
    return {name: np.concatenate([part[name] for part in parts]) for name in tokenizers}


def _ids_of_chunk(
    tokenizers: Mapping[str, Any], counts: Mapping[str, int], prompts: Sequence[str]
) -> dict[str, np.ndarray]:
    return {
        name: np.array(
            tokenizer(list(prompts), padding="max_length", max_length=counts[name], truncation=True).input_ids, np.int32
        )
        for name, tokenizer in tokenizers.items()
    }


def _at_once(make: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
    """`map`, in as many processes as there are processors; a single chunk is made here."""
    chunks = len(arguments[0])
    if chunks == 1:
        return list(map(make, *arguments))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(chunks, os.cpu_count() or 1), context) as pool:
        return list(pool.map(make, *arguments))
