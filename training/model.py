"""flash-mini's shape: SD3.5-medium's anatomy at a hundredth of its size."""

from sd35flash_jax.config import CLIPConfig, MMDiTConfig, ModelConfig, ScheduleConfig, T5Config, VAEConfig

SIZE = 192
SOURCE = "trained by training/ of sd35flash-jax on compositions of Fluent 3D emoji"
TEXT_TOKENS = 32
CLIP_VOCABULARY = 1900
T5_VOCABULARY = 1024

_END_OF_TEXT = CLIP_VOCABULARY - 1

FLASH_MINI = ModelConfig(
    transformer=MMDiTConfig(
        depth=6,
        heads=5,
        context_size=320,
        pooled_size=320,
        position_table_side=24,
        position_base=12,
        qk_norm=True,
        dual_attention_blocks=3,
    ),
    vae=VAEConfig(channels=(32, 64, 96, 128), norm_groups=16),
    clip_l=CLIPConfig(
        128, 3, 2, 512, 128, "quick_gelu", CLIP_VOCABULARY, positions=TEXT_TOKENS, eos_token_id=_END_OF_TEXT
    ),
    clip_g=CLIPConfig(192, 3, 3, 768, 192, "gelu", CLIP_VOCABULARY, positions=TEXT_TOKENS, eos_token_id=_END_OF_TEXT),
    t5=T5Config(
        hidden_size=320,
        layers=2,
        heads=5,
        head_size=64,
        feed_forward_size=512,
        vocabulary=T5_VOCABULARY,
        max_tokens=TEXT_TOKENS,
    ),
    schedule=ScheduleConfig(shift=2.0),
)
