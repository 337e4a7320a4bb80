"""Arithmetic of the models, counted from their configurations: floating-point operations of matrix products and
convolutions, two for each multiply-add. Elementwise work, under one percent at true size, is left out."""

from sd35flash_jax.config import CLIPConfig, MMDiTConfig, T5Config, VAEConfig
from sd35flash_jax.models.mmdit import SINUSOIDS


def transformer_flops(config: MMDiTConfig, latent_height: int, latent_width: int, text_tokens: int) -> int:
    """One evaluation for one image."""
    size, patch = config.hidden_size, config.patch_size
    image = (latent_height // patch) * (latent_width // patch)
    patch_features = patch * patch * config.latent_channels
    depth, dual = config.depth, config.dual_attention_blocks

    projections = _linear(image + text_tokens, size, 3 * size)
    outputs = _linear(image, size, size) + _linear(image, size, 8 * size)
    text_outputs = _linear(text_tokens, size, size) + _linear(text_tokens, size, 8 * size)
    second_attention = _linear(image, size, 4 * size) + _attention(image, size) + _linear(1, size, 3 * size)
    modulation = _linear(1, size, 6 * size)
    blocks = (
        depth * (projections + _attention(image + text_tokens, size) + outputs + modulation)
        + (depth - 1) * (text_outputs + modulation)
        + _linear(1, size, 2 * size)  # the last block's text stream only feeds the attention
        + dual * second_attention
    )
    embeddings = (
        _linear(image, patch_features, size)
        + _linear(text_tokens, config.context_size, size)
        + _linear(1, SINUSOIDS + config.pooled_size + 2 * size, size)
    )
    return blocks + embeddings + _linear(1, size, 2 * size) + _linear(image, size, patch_features)


def decoder_flops(config: VAEConfig, latent_height: int, latent_width: int) -> int:
    """One decoding of one image."""
    widths = config.channels[::-1]
    pixels = latent_height * latent_width
    middle = 2 * _residual_block(pixels, widths[0], widths[0])
    middle += _linear(pixels, widths[0], 4 * widths[0]) + _attention(pixels, widths[0])
    total = _conv3x3(pixels, config.latent_channels, widths[0]) + middle
    for level, width in enumerate(widths):
        total += _residual_block(pixels, widths[max(level - 1, 0)], width)
        total += config.blocks_per_level * _residual_block(pixels, width, width)
        if level < len(widths) - 1:
            pixels *= 4
            total += _linear(pixels, 2 * 2 * width, width)  # 2x2 in place of 3x3: see `vae.Upsample`.
    return total + _conv3x3(pixels, widths[-1], 3)


def clip_flops(config: CLIPConfig, tokens: int) -> int:
    """One prompt."""
    size = config.hidden_size
    layer = _linear(tokens, size, 4 * size + 2 * config.feed_forward_size) + _attention(tokens, size)
    return config.layers * layer + _linear(1, size, config.projection_size)


def t5_flops(config: T5Config, tokens: int) -> int:
    """One prompt."""
    inner = config.heads * config.head_size
    layer = _linear(tokens, config.hidden_size, 4 * inner + 3 * config.feed_forward_size) + _attention(tokens, inner)
    return config.layers * layer


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _attention(tokens: int, width: int) -> int:
    return 4 * tokens * tokens * width


def _conv3x3(pixels: int, inputs: int, outputs: int) -> int:
    return 2 * 9 * pixels * inputs * outputs


def _residual_block(pixels: int, inputs: int, outputs: int) -> int:
    shortcut = _linear(pixels, inputs, outputs) if inputs != outputs else 0
    return _conv3x3(pixels, inputs, outputs) + _conv3x3(pixels, outputs, outputs) + shortcut
