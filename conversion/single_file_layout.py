"""Stability's own files: one safetensors file with a prefix for each component, or a component's file without one.

`sd3.5_medium.safetensors` and its like hold the transformer and the autoencoder under the names of Stability's
implementation; the `incl_clips` files hold text encoders too, and `clip_l`, `clip_g` and `t5xxl` files one each, under
the names of transformers. There are no configurations: what the shapes do not say is as in the published models.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from conversion import diffusers_layout
from conversion.rules import (
    Rule,
    Shape,
    Table,
    conv,
    linear,
    norm,
    patch_kernel,
    pointwise,
    square_table,
    stacked,
    under,
)
from conversion.safetensors_file import Tensor
from sd35flash_jax.config import CLIP_G, CLIP_L, CLIPConfig, MMDiTConfig, T5Config, VAEConfig

PREFIXES = {
    "transformer": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
_IGNORED_FILE_WIDE = frozenset(f"text_encoders.{name}.logit_scale" for name in ("clip_l", "clip_g", "t5xxl"))
_FP8_MARK = "scaled_fp8"
_HEAD_SIZE = 64


# Tables


def transformer_table(config: MMDiTConfig) -> Table:
    dual, depth = config.dual_attention_blocks, config.depth
    dual_stack = range(0, min(dual, depth - 1))
    plain_stack = range(len(dual_stack), depth - 1)
    block = "joint_blocks.{}."
    rules = [
        Rule(
            "patch_embed.kernel", ("x_embedder.proj.weight",), patch_kernel(config.patch_size, config.latent_channels)
        ),
        *linear("patch_embed", "x_embedder.proj")[1:],
        Rule("position_table", ("pos_embed",), square_table(config.position_table_side)),
        *_embedding_mlp("timestep_embed", "t_embedder"),
        *_embedding_mlp("pooled_embed", "y_embedder"),
        *linear("context_embed", "context_embedder"),
        *stacked("dual_blocks.", block, dual_stack, _joint_block(config, dual=True)),
        *stacked("blocks.", block, plain_stack, _joint_block(config)),
        *under("last_block.", block.format(depth - 1), _joint_block(config, dual=dual == depth, last=True)),
        *linear("out_modulation", "final_layer.adaLN_modulation.1"),
        *linear("out", "final_layer.linear"),
    ]
    return Table(rules, ignored=frozenset({_FP8_MARK}))


def _embedding_mlp(param: str, source: str) -> list[Rule]:
    return [*linear(f"{param}.linear_1", f"{source}.mlp.0"), *linear(f"{param}.linear_2", f"{source}.mlp.2")]


def _joint_block(config: MMDiTConfig, dual: bool = False, last: bool = False) -> list[Rule]:
    image = _stream(config.qk_norm)
    if dual:
        image += _projection("second_attention", "attn2", config.qk_norm)
        image += linear("second_attention.out", "attn2.proj")
    if last:
        context = [
            *linear("modulation", "adaLN_modulation.1"),
            *_projection("attention", "attn", config.qk_norm),
        ]
    else:
        context = _stream(config.qk_norm)
    return [*under("image.", "x_block.", image), *under("context.", "context_block.", context)]


def _stream(qk_norm: bool) -> list[Rule]:
    return [
        *linear("modulation", "adaLN_modulation.1"),
        *_projection("attention", "attn", qk_norm),
        *linear("attention.out", "attn.proj"),
        *linear("feed_forward.linear_1", "mlp.fc1"),
        *linear("feed_forward.linear_2", "mlp.fc2"),
    ]


def _projection(param: str, source: str, qk_norm: bool) -> list[Rule]:
    rules = linear(f"{param}.qkv", f"{source}.qkv")
    if qk_norm:
        rules += norm(f"{param}.query_norm", f"{source}.ln_q", bias=False)
        rules += norm(f"{param}.key_norm", f"{source}.ln_k", bias=False)
    return rules


def vae_table(config: VAEConfig) -> Table:
    levels, widths = len(config.channels), config.channels
    rules = [*under("encoder.", "encoder.", _vae_ends()), *under("decoder.", "decoder.", _vae_ends())]
    for number, width in enumerate(widths):
        # Both sides number their levels from the finest, so that the decoder's run backwards.
        down, up, level = f"encoder.down.{number}", f"decoder.up.{number}", levels - 1 - number
        widens = number > 0 and width != widths[number - 1]
        rules += _vae_blocks(f"encoder.levels.{number}", down, config.blocks_per_level, widens)
        narrows = number < levels - 1 and width != widths[number + 1]
        rules += _vae_blocks(f"decoder.levels.{level}", up, config.blocks_per_level + 1, narrows)
        if number < levels - 1:
            rules += conv(f"encoder.levels.{number}.resample.conv", f"{down}.downsample.conv")
        if number > 0:
            rules += conv(f"decoder.levels.{level}.resample.conv", f"{up}.upsample.conv")
    return Table(rules, ignored=frozenset({_FP8_MARK}))


def _vae_ends() -> list[Rule]:
    attention = "mid.attn_1"
    return [
        *conv("conv_in", "conv_in"),
        *under("middle.block_1.", "mid.block_1.", _residual_block(resizes=False)),
        *norm("middle.attention.norm", f"{attention}.norm"),
        *pointwise("middle.attention.qkv", f"{attention}.q", f"{attention}.k", f"{attention}.v"),
        *pointwise("middle.attention.out", f"{attention}.proj_out"),
        *under("middle.block_2.", "mid.block_2.", _residual_block(resizes=False)),
        *norm("norm_out", "norm_out"),
        *conv("conv_out", "conv_out"),
    ]


def _vae_blocks(param: str, source: str, blocks: int, first_resizes: bool) -> list[Rule]:
    return [
        rule
        for block in range(blocks)
        for rule in under(
            f"{param}.blocks.{block}.", f"{source}.block.{block}.", _residual_block(first_resizes and block == 0)
        )
    ]


def _residual_block(resizes: bool) -> list[Rule]:
    rules = [
        *norm("norm_1", "norm1"),
        *conv("conv_1", "conv1"),
        *norm("norm_2", "norm2"),
        *conv("conv_2", "conv2"),
    ]
    return rules + conv("shortcut", "nin_shortcut") if resizes else rules


def clip_l_table(config: CLIPConfig) -> Table:
    """SD3 takes CLIP-L's pooled state as it is. Published files say so by leaving the projection out, or by holding the
    identity in its place."""
    return replace(clip_g_table(config), optional={"text_projection.weight": lambda shape: np.eye(shape[0], shape[1])})


def clip_g_table(config: CLIPConfig) -> Table:
    table = diffusers_layout.clip_table(config)
    return replace(table, ignored=table.ignored | {_FP8_MARK, "logit_scale"})


def t5_table(config: T5Config) -> Table:
    # Stability's implementation reads the embedding under one name, diffusers under the other.
    table = diffusers_layout.t5_table(config)
    return replace(
        table, ignored=table.ignored | {_FP8_MARK, "logit_scale", "spiece_model"}, repeated=frozenset(table.aliases)
    )


TABLES: dict[str, Callable[[Any], Table]] = {
    "transformer": transformer_table,
    "vae": vae_table,
    "clip_l": clip_l_table,
    "clip_g": clip_g_table,
    "t5": t5_table,
}


# Configurations: each function turns the shapes of a component's tensors into the fields of the matching dataclass.
# A tensor that is not there raises KeyError with its name.


def transformer_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    hidden_size, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    qk_norm = "joint_blocks.0.x_block.attn.ln_q.weight" in shapes
    head_size = shapes["joint_blocks.0.x_block.attn.ln_q.weight"][0] if qk_norm else _HEAD_SIZE
    return {
        "depth": _count(shapes, r"joint_blocks\.(\d+)\."),
        "heads": hidden_size // head_size,
        "head_size": head_size,
        "patch_size": patch_size,
        "latent_channels": channels,
        "context_size": shapes["context_embedder.weight"][1],
        "pooled_size": shapes["y_embedder.mlp.0.weight"][1],
        "position_table_side": round(shapes["pos_embed"][1] ** 0.5),
        "qk_norm": qk_norm,
        "dual_attention_blocks": _count(shapes, r"joint_blocks\.(\d+)\.x_block\.attn2\."),
    }


def vae_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    return {
        "channels": [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)],
        "blocks_per_level": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
    }


def clip_l_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    return _clip_config(shapes, "quick_gelu")


def clip_g_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    return _clip_config(shapes, "gelu")


def _clip_config(shapes: Mapping[str, Shape], activation: str) -> dict[str, Any]:
    vocabulary, hidden_size = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "hidden_size": hidden_size,
        "layers": _count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        "heads": max(1, hidden_size // _HEAD_SIZE),
        "feed_forward_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "projection_size": shapes.get("text_projection.weight", (hidden_size,))[0],
        "activation": activation,
        "vocabulary": vocabulary,
        "positions": shapes["text_model.embeddings.position_embedding.weight"][0],
    }


def t5_config(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    embedding = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    vocabulary, hidden_size = shapes[embedding]
    return {
        "hidden_size": hidden_size,
        "layers": _count(shapes, r"encoder\.block\.(\d+)\."),
        "heads": heads,
        "head_size": shapes[f"{attention}.q.weight"][0] // heads,
        "feed_forward_size": shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        "vocabulary": vocabulary,
        "position_buckets": buckets,
    }


def _count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers the names show at the pattern's group."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


CONFIGS: dict[str, Callable[[Mapping[str, Shape]], dict[str, Any]]] = {
    "transformer": transformer_config,
    "vae": vae_config,
    "clip_l": clip_l_config,
    "clip_g": clip_g_config,
    "t5": t5_config,
}


# Which components a file holds

_TRANSFORMER_MARK = "x_embedder.proj.weight"
_VAE_MARK = "encoder.mid.attn_1.q.weight"
_CLIP_MARK = "text_model.embeddings.token_embedding.weight"
_T5_MARK = "encoder.block.0.layer.0.SelfAttention.q.weight"
_DIFFUSERS_MARKS = ("pos_embed.proj.weight", "encoder.mid_block.attentions.0.to_q.weight")


def split_components(file: Path, tensors: Mapping[str, Tensor], wanted: str | None) -> dict[str, dict[str, Tensor]]:
    """Each component's tensors without their prefix. `wanted` is the component that the file was given for, if it was
    given for one.

    Raises:
        ValueError: the tensors' names are those of no supported layout, or do not say whose they are.
    """
    tensors = _fold_scales(file, tensors)
    parts = {
        name: {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        for name, prefix in PREFIXES.items()
    }
    parts = {name: part for name, part in parts.items() if part}
    if not parts:
        return {_only_component(file, tensors, wanted): dict(tensors)}
    known = tuple(PREFIXES[name] for name in parts)
    surplus = sorted(key for key in tensors if not key.startswith(known) and key not in _IGNORED_FILE_WIDE)
    if surplus:
        raise ValueError(f"{file} holds {', '.join(parts)}, but also surplus tensors: {', '.join(surplus)}")
    return parts


def _only_component(file: Path, tensors: Mapping[str, Tensor], wanted: str | None) -> str:
    """The component of a file whose names have no prefix."""
    marks = [mark for mark in (_TRANSFORMER_MARK, _VAE_MARK, _CLIP_MARK, _T5_MARK) if mark in tensors]
    if any(mark in tensors for mark in _DIFFUSERS_MARKS):
        raise ValueError(
            f"{file} is a component's file of a diffusers folder; give the folder, which has its config.json too"
        )
    if len(marks) != 1:
        kind = "several components without prefixes" if marks else "no tensors of Stable Diffusion 3 or 3.5"
        raise ValueError(f"{file} holds {kind}: its first tensors are {', '.join(sorted(tensors)[:3]) or 'none'}")
    if marks[0] != _CLIP_MARK:
        return {_TRANSFORMER_MARK: "transformer", _VAE_MARK: "vae", _T5_MARK: "t5"}[marks[0]]
    width = tensors[_CLIP_MARK].shape[-1]
    published = {CLIP_L.hidden_size: "clip_l", CLIP_G.hidden_size: "clip_g"}.get(width)
    found = published or (wanted if wanted in ("clip_l", "clip_g") else None)
    if found is None:
        raise ValueError(f"{file} holds a CLIP text encoder of width {width}; say which with --clip-l or --clip-g")
    return found


def _fold_scales(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give each scaled fp8 weight its scale. The scales of inputs matter to fp8 arithmetic alone."""
    weights = {key: tensor for key, tensor in tensors.items() if not key.endswith((".scale_weight", ".scale_input"))}
    for key, scale in tensors.items():
        if key.endswith(".scale_weight"):
            scaled = key.removesuffix("scale_weight") + "weight"
            if scaled not in weights or scale.size != 1 or not weights[scaled].is_fp8:
                raise ValueError(f"{key} in {file} is not the one scale of an fp8 tensor {scaled}")
            weights[scaled] = replace(weights[scaled], scale=scale)
    return weights
