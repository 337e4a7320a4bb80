"""The reference implementations (diffusers and transformers, in PyTorch) at test size, with random weights.

Importing this module needs the reference extra; only tests that compare with the reference do.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5EncoderModel
from transformers import T5Config as ReferenceT5Config

from conversion.diffusers_layout import FOLDERS, TOKENIZER_FOLDERS
from sd35flash_jax.config import CLIPConfig, MMDiTConfig, ModelConfig, T5Config, VAEConfig
from tests.tiny_model import CONFIG, write_tokenizers


def transformer(config: MMDiTConfig, seed: int = 0) -> SD3Transformer2DModel:
    model = SD3Transformer2DModel(
        sample_size=config.position_base * config.patch_size,
        patch_size=config.patch_size,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        num_layers=config.depth,
        attention_head_dim=config.head_size,
        num_attention_heads=config.heads,
        joint_attention_dim=config.context_size,
        caption_projection_dim=config.hidden_size,
        pooled_projection_dim=config.pooled_size,
        pos_embed_max_size=config.position_table_side,
        dual_attention_layers=tuple(range(config.dual_attention_blocks)),
        qk_norm="rms_norm" if config.qk_norm else None,
    )
    return randomised(model, seed)


def vae(config: VAEConfig, seed: int = 0) -> AutoencoderKL:
    levels = len(config.channels)
    model = AutoencoderKL(
        block_out_channels=config.channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=config.blocks_per_level,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        scaling_factor=config.scale,
        shift_factor=config.shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return randomised(model, seed)


def clip(config: CLIPConfig, seed: int = 0) -> CLIPTextModelWithProjection:
    reference_config = CLIPTextConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.feed_forward_size,
        projection_dim=config.projection_size,
        hidden_act=config.activation,
        vocab_size=config.vocabulary,
        max_position_embeddings=config.positions,
        layer_norm_eps=config.norm_epsilon,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=config.eos_token_id,
    )
    return randomised(CLIPTextModelWithProjection(reference_config), seed)


def t5(config: T5Config, seed: int = 0) -> T5EncoderModel:
    reference_config = ReferenceT5Config(
        d_model=config.hidden_size,
        num_layers=config.layers,
        num_heads=config.heads,
        d_kv=config.head_size,
        d_ff=config.feed_forward_size,
        vocab_size=config.vocabulary,
        relative_attention_num_buckets=config.position_buckets,
        relative_attention_max_distance=config.position_max_distance,
        layer_norm_epsilon=config.norm_epsilon,
        feed_forward_proj="gated-gelu",
    )
    model = randomised(T5EncoderModel(reference_config), seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("SelfAttention.q.weight"):
                weight /= config.head_size**0.5  # T5 has no attention scale: its queries are small instead.
    return model


BUILDERS = {"transformer": transformer, "vae": vae, "clip_l": clip, "clip_g": clip, "t5": t5}


def randomised(model: Any, seed: int) -> Any:
    """Give every parameter a random value, the norms' scales near one, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                is_embedding = "embedding.weight" in name or name == "shared.weight"
                weight.copy_(noise if is_embedding else noise / weight[0].numel() ** 0.5)
            else:
                weight.copy_(1 + 0.2 * noise if name.endswith("weight") else 0.2 * noise)
    return model.eval()


def write_folder(folder: Path, config: ModelConfig = CONFIG) -> None:
    """A complete diffusers folder of Stable Diffusion 3's pipeline, in float32."""
    for name, sub in FOLDERS.items():
        BUILDERS[name](getattr(config, name)).save_pretrained(folder / sub)
    FlowMatchEulerDiscreteScheduler(shift=config.schedule.shift).save_pretrained(folder / "scheduler")
    write_tokenizers(folder, (TOKENIZER_FOLDERS["clip_l"], TOKENIZER_FOLDERS["clip_g"], TOKENIZER_FOLDERS["t5"]))
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
