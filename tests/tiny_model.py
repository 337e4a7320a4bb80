"""A whole text-to-image model, small enough for a CPU: its configuration and tokenizers. Nothing here needs PyTorch."""

from pathlib import Path

import numpy as np

from sd35flash_jax.checkpoint import abstract_component, parameters
from sd35flash_jax.config import CLIPConfig, MMDiTConfig, ModelConfig, T5Config, VAEConfig
from training.tokenizers import write_clip_tokenizer, write_t5_tokenizer

CLIP_VOCABULARY = 700
T5_VOCABULARY = 128
END_OF_TEXT = CLIP_VOCABULARY - 1

CONFIG = ModelConfig(
    transformer=MMDiTConfig(
        depth=4,
        heads=4,
        head_size=16,
        context_size=96,
        pooled_size=80,
        position_table_side=24,
        position_base=12,
        qk_norm=True,
        dual_attention_blocks=2,
    ),
    vae=VAEConfig(channels=(32, 32, 64, 64), blocks_per_level=1),
    clip_l=CLIPConfig(32, 3, 4, 64, 32, "quick_gelu", CLIP_VOCABULARY),
    clip_g=CLIPConfig(48, 3, 4, 96, 48, "gelu", CLIP_VOCABULARY, eos_token_id=END_OF_TEXT),
    t5=T5Config(hidden_size=96, layers=3, heads=4, head_size=16, feed_forward_size=128, vocabulary=T5_VOCABULARY),
)
"""SD3.5-medium's style: q and k are normed, and the first half of the blocks has the second attention.

CLIP-L reads its pooled state by the rule of `eos_token_id == 2`, CLIP-G by its explicit id; the tokenizers below give
the end of text the highest id, as CLIP's do, so both rules mean the same token.
"""


def random_parameters(name: str, seed: int = 0, config: ModelConfig = CONFIG) -> dict[str, np.ndarray]:
    """A value for every parameter of a component, no two alike, so that none can be left out or exchanged unnoticed;
    of a size that keeps the activations near one."""
    random = np.random.default_rng(seed)
    shapes = {path: array.shape for path, array in parameters(abstract_component(name, config)).items()}
    return {path: _random_values(path, shape, random) for path, shape in sorted(shapes.items())}


def _random_values(path: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    noise = random.standard_normal(shape, np.float32)
    if path.endswith(".kernel"):
        layers = shape[0] if path.startswith(("layers.", "blocks.", "dual_blocks.")) else 1
        return noise / np.float32(np.sqrt(noise.size / layers / shape[-1]))
    if path.endswith(".scale"):
        return 1 + noise / 5
    return noise / 5 if path.endswith(".bias") else noise


TEXT = """A red fox sits in the snow under a winter sky. An astronaut rides a horse on the moon, in the style of an oil
painting. Two cats and three dogs play with a blue ball near the river. A bowl of soup; a cup of coffee; a slice of
cake! Portrait of an old sailor, 35mm film, golden hour, highly detailed. A small robot waters the flowers in a garden
at sunrise. The sign over the bakery says "fresh bread". Mountains, clouds and a quiet lake: a watercolour. A green
bicycle leans on the wall of a stone house. She doesn't know the city, but it's bright tonight. 1984, 2001 and 2049."""


def write_tokenizers(folder: Path, names: tuple[str, str, str] = ("clip_l", "clip_g", "t5")) -> None:
    """Train the three tokenizers on `TEXT` and write each into a new folder of the given name."""
    lines = TEXT.splitlines()
    write_clip_tokenizer(folder / names[0], lines, CLIP_VOCABULARY, 77, padding="<|endoftext|>")
    write_clip_tokenizer(folder / names[1], lines, CLIP_VOCABULARY, 77, padding="!")
    write_t5_tokenizer(folder / names[2], lines, T5_VOCABULARY)
