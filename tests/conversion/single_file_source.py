"""Stability's files of a small model, written without PyTorch: our parameters, taken back through the tables."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from conversion.single_file_layout import PREFIXES, TABLES
from sd35flash_jax.config import CLIPConfig, ModelConfig
from tests.diffusers_source import save_tensors
from tests.tiny_model import CLIP_VOCABULARY, CONFIG, random_parameters

SMALL = ModelConfig(
    replace(CONFIG.transformer, position_base=64, context_size=192, pooled_size=192),
    CONFIG.vae,
    CLIPConfig(64, 2, 1, 96, 64, "quick_gelu", CLIP_VOCABULARY),
    CLIPConfig(128, 3, 2, 160, 128, "gelu", CLIP_VOCABULARY),
    replace(CONFIG.t5, hidden_size=192),
)
"""A model that its tensors' shapes describe wholly."""


def original_tensors(
    name: str, arrays: dict[str, np.ndarray], config: ModelConfig = SMALL, prefix: bool = False
) -> dict[str, np.ndarray]:
    tensors = {}
    for rule in TABLES[name](getattr(config, name)).rules:
        array = arrays[rule.param] if rule.layer is None else arrays[rule.param][rule.layer]
        tensors |= dict(zip(rule.sources, rule.transform.backward(array, len(rule.sources)), strict=True))
    return {PREFIXES[name] + key if prefix else key: tensor for key, tensor in tensors.items()}


def write_file(
    file: Path, components: Iterable[str], config: ModelConfig = SMALL, dtype: np.dtype | type = np.float32
) -> dict[str, dict[str, np.ndarray]]:
    """Write a file with prefixes and return the parameters that its conversion must give."""
    expected = {}
    for seed, name in enumerate(components):
        arrays = random_parameters(name, seed, config)
        expected[name] = {path: array.astype(dtype) for path, array in arrays.items()}
    tensors = {}
    for name, arrays in expected.items():
        tensors |= original_tensors(name, arrays, config, prefix=True)
    save_tensors(tensors, file)
    return expected
