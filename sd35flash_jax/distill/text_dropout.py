"""Text-encoder dropout: the student sometimes reads a prompt through fewer encoders, so that it works without T5.

An encoder that is left out gives zeros, as when it is not loaded (`text.encode_tokens`). SD3 was pre-trained
so (arXiv 2403.03206), and SD3.5-Flash relies on it to run without T5-XXL.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sd35flash_jax.text import Conditioning


def drop_text_encoders(
    conditioning: Conditioning, key: Array, probability: float, clip_widths: tuple[int, int], clip_tokens: int
) -> Conditioning:
    """Zero what CLIP-L, CLIP-G and T5 said, each with the given probability, for each prompt on its own.

    Args:
        conditioning: context `(b, clip_tokens + T5 tokens, c)`, pooled `(b, p)`.
        key: random key.
        probability: of leaving an encoder out.
        clip_widths: the widths of CLIP-L's and CLIP-G's states, side by side in the first context rows and in `pooled`.
        clip_tokens: how many context rows are CLIP's.
    """
    context, pooled = conditioning.context, conditioning.pooled
    batch, tokens, width = context.shape
    keep_clip_l, keep_clip_g, keep_t5 = jax.random.bernoulli(key, 1 - probability, (3, batch, 1, 1))
    row, column = jnp.arange(tokens)[:, None], jnp.arange(width)
    of_t5 = row >= clip_tokens
    of_clip_l = ~of_t5 & (column < clip_widths[0])
    of_clip_g = ~of_t5 & (column >= clip_widths[0])
    keep_context = (of_clip_l & keep_clip_l) | (of_clip_g & keep_clip_g) | (of_t5 & keep_t5)
    keep_pooled = jnp.where(jnp.arange(pooled.shape[1]) < clip_widths[0], keep_clip_l[:, 0], keep_clip_g[:, 0])
    return Conditioning(jnp.where(keep_context, context, 0), jnp.where(keep_pooled, pooled, 0))
