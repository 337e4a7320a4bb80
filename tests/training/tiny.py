"""flash-mini's anatomy at a size that trains on a CPU; its vocabularies are flash-mini's own."""

from dataclasses import replace

from sd35flash_jax.config import MMDiTConfig, VAEConfig
from training.model import FLASH_MINI

assert FLASH_MINI.clip_l is not None and FLASH_MINI.clip_g is not None and FLASH_MINI.t5 is not None
_CLIP = {"hidden_size": 16, "layers": 2, "heads": 2, "feed_forward_size": 32, "projection_size": 16}

SIZE = 64
TINY = replace(
    FLASH_MINI,
    transformer=MMDiTConfig(
        depth=2,
        heads=2,
        head_size=16,
        context_size=32,
        pooled_size=32,
        position_table_side=8,
        position_base=4,
        qk_norm=True,
        dual_attention_blocks=1,
    ),
    vae=VAEConfig(channels=(8, 8, 16, 16), blocks_per_level=1, norm_groups=4),
    clip_l=replace(FLASH_MINI.clip_l, **_CLIP),
    clip_g=replace(FLASH_MINI.clip_g, **_CLIP),
    t5=replace(FLASH_MINI.t5, hidden_size=32, layers=1, heads=2, head_size=16, feed_forward_size=32),
)
