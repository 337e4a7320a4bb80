"""The diffusers folder: one sub-folder a component, separate q, k and v, and the configurations beside them."""

from collections.abc import Callable, Collection
from typing import Any

from conversion.rules import (
    Rule,
    Table,
    conv,
    embedding,
    linear,
    norm,
    patch_kernel,
    square_table,
    stacked,
    swapped_linear,
    under,
)
from sd35flash_jax.config import CLIPConfig, MMDiTConfig, ScheduleConfig, T5Config, VAEConfig

FOLDERS = {
    "transformer": "transformer",
    "vae": "vae",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "t5": "text_encoder_3",
}
TOKENIZER_FOLDERS = {"clip_l": "tokenizer", "clip_g": "tokenizer_2", "t5": "tokenizer_3"}
STEMS = {name: "model" if name in TOKENIZER_FOLDERS else "diffusion_pytorch_model" for name in FOLDERS}
"""What a component's weight files are called, before their number and ending."""
_CLASSES = {
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "clip_l": ["transformers", "CLIPTextModelWithProjection"],
    "clip_g": ["transformers", "CLIPTextModelWithProjection"],
    "t5": ["transformers", "T5EncoderModel"],
}
_TOKENIZER_CLASSES = {
    "clip_l": ["transformers", "CLIPTokenizer"],
    "clip_g": ["transformers", "CLIPTokenizer"],
    "t5": ["transformers", "T5TokenizerFast"],
}


# The transformer


def transformer_table(config: MMDiTConfig) -> Table:
    dual, depth = config.dual_attention_blocks, config.depth
    dual_stack = range(0, min(dual, depth - 1))
    plain_stack = range(len(dual_stack), depth - 1)
    block = "transformer_blocks.{}."
    rules = [
        Rule("patch_embed.kernel", ("pos_embed.proj.weight",), patch_kernel(config.patch_size, config.latent_channels)),
        *linear("patch_embed", "pos_embed.proj")[1:],
        Rule("position_table", ("pos_embed.pos_embed",), square_table(config.position_table_side)),
        *_embedding_mlp("timestep_embed", "time_text_embed.timestep_embedder"),
        *_embedding_mlp("pooled_embed", "time_text_embed.text_embedder"),
        *linear("context_embed", "context_embedder"),
        *stacked("dual_blocks.", block, dual_stack, _joint_block(config, dual=True)),
        *stacked("blocks.", block, plain_stack, _joint_block(config)),
        *under("last_block.", block.format(depth - 1), _joint_block(config, dual=dual == depth, last=True)),
        *swapped_linear("out_modulation", "norm_out.linear"),
        *linear("out", "proj_out"),
    ]
    return Table(rules)


def _embedding_mlp(param: str, source: str) -> list[Rule]:
    return [
        *linear(f"{param}.linear_1", f"{source}.linear_1"),
        *linear(f"{param}.linear_2", f"{source}.linear_2"),
    ]


def _joint_block(config: MMDiTConfig, dual: bool = False, last: bool = False) -> list[Rule]:
    rules = [
        *linear("image.modulation", "norm1.linear"),
        *_self_attention("image.attention", "attn", config.qk_norm),
        *_feed_forward("image.feed_forward", "ff"),
        *linear("context.attention.qkv", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    ]
    if config.qk_norm:
        rules += norm("context.attention.query_norm", "attn.norm_added_q", bias=False)
        rules += norm("context.attention.key_norm", "attn.norm_added_k", bias=False)
    if dual:
        rules += _self_attention("image.second_attention", "attn2", config.qk_norm)
    if last:
        return rules + swapped_linear("context.modulation", "norm1_context.linear")
    return [
        *rules,
        *linear("context.modulation", "norm1_context.linear"),
        *linear("context.attention.out", "attn.to_add_out"),
        *_feed_forward("context.feed_forward", "ff_context"),
    ]


def _self_attention(param: str, source: str, qk_norm: bool) -> list[Rule]:
    rules = [
        *linear(f"{param}.qkv", f"{source}.to_q", f"{source}.to_k", f"{source}.to_v"),
        *linear(f"{param}.out", f"{source}.to_out.0"),
    ]
    if qk_norm:
        rules += norm(f"{param}.query_norm", f"{source}.norm_q", bias=False)
        rules += norm(f"{param}.key_norm", f"{source}.norm_k", bias=False)
    return rules


def _feed_forward(param: str, source: str) -> list[Rule]:
    return [*linear(f"{param}.linear_1", f"{source}.net.0.proj"), *linear(f"{param}.linear_2", f"{source}.net.2")]


# The text encoders, as transformers names them


def clip_table(config: CLIPConfig) -> Table:
    layer = [
        *norm("attention_norm", "layer_norm1"),
        *linear("qkv", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        *linear("out", "self_attn.out_proj"),
        *norm("feed_forward_norm", "layer_norm2"),
        *linear("linear_1", "mlp.fc1"),
        *linear("linear_2", "mlp.fc2"),
    ]
    rules = [
        *embedding("token_embed", "text_model.embeddings.token_embedding"),
        *embedding("position_embed", "text_model.embeddings.position_embedding"),
        *stacked("layers.", "text_model.encoder.layers.{}.", range(config.layers), layer),
        *norm("final_norm", "text_model.final_layer_norm"),
        *linear("projection", "text_projection", bias=False),
    ]
    return Table(rules, ignored=frozenset({"text_model.embeddings.position_ids"}))


def t5_table(config: T5Config) -> Table:
    attention, feed_forward = "layer.0.SelfAttention", "layer.1.DenseReluDense"
    layer = [
        *norm("attention_norm", "layer.0.layer_norm", bias=False),
        *linear("qkv", f"{attention}.q", f"{attention}.k", f"{attention}.v", bias=False),
        *linear("out", f"{attention}.o", bias=False),
        *norm("feed_forward_norm", "layer.1.layer_norm", bias=False),
        *linear("gate", f"{feed_forward}.wi_0", bias=False),
        *linear("up", f"{feed_forward}.wi_1", bias=False),
        *linear("down", f"{feed_forward}.wo", bias=False),
    ]
    rules = [
        *embedding("token_embed", "shared"),
        *embedding("relative_attention_bias", f"encoder.block.0.{attention}.relative_attention_bias"),
        *stacked("layers.", "encoder.block.{}.", range(config.layers), layer),
        *norm("final_norm", "encoder.final_layer_norm", bias=False),
    ]
    return Table(rules, aliases={"encoder.embed_tokens.weight": "shared.weight"})


# The autoencoder


def vae_table(config: VAEConfig) -> Table:
    levels = range(len(config.channels))
    widths, reversed_widths = config.channels, config.channels[::-1]
    rules = [
        *under("encoder.", "encoder.", _vae_ends()),
        *under("decoder.", "decoder.", _vae_ends()),
    ]
    for level in levels:
        for side, blocks, size, resampler in (
            ("encoder", config.blocks_per_level, widths, "down_blocks.{}.downsamplers.0"),
            ("decoder", config.blocks_per_level + 1, reversed_widths, "up_blocks.{}.upsamplers.0"),
        ):
            source = resampler.split(".")[0]
            for block in range(blocks):
                widens = block == 0 and level > 0 and size[level] != size[level - 1]
                rules += under(
                    f"{side}.levels.{level}.blocks.{block}.",
                    f"{side}.{source}.{level}.resnets.{block}.",
                    _residual_block(widens),
                )
            if level < len(levels) - 1:
                rules += conv(f"{side}.levels.{level}.resample.conv", f"{side}.{resampler.format(level)}.conv")
    return Table(rules)


def _vae_ends() -> list[Rule]:
    attention = "mid_block.attentions.0"
    return [
        *conv("conv_in", "conv_in"),
        *under("middle.block_1.", "mid_block.resnets.0.", _residual_block(widens=False)),
        *norm("middle.attention.norm", f"{attention}.group_norm"),
        *linear("middle.attention.qkv", f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v"),
        *linear("middle.attention.out", f"{attention}.to_out.0"),
        *under("middle.block_2.", "mid_block.resnets.1.", _residual_block(widens=False)),
        *norm("norm_out", "conv_norm_out"),
        *conv("conv_out", "conv_out"),
    ]


def _residual_block(widens: bool) -> list[Rule]:
    rules = [
        *norm("norm_1", "norm1"),
        *conv("conv_1", "conv1"),
        *norm("norm_2", "norm2"),
        *conv("conv_2", "conv2"),
    ]
    return rules + conv("shortcut", "conv_shortcut") if widens else rules


TABLES: dict[str, Callable[[Any], Table]] = {
    "transformer": transformer_table,
    "vae": vae_table,
    "clip_l": clip_table,
    "clip_g": clip_table,
    "t5": t5_table,
}


# Configurations: what our fields are called, then for each component a function from its config.json to the fields of
# the matching dataclass and one back again

_TRANSFORMER_FIELDS = {
    "depth": "num_layers",
    "heads": "num_attention_heads",
    "head_size": "attention_head_dim",
    "patch_size": "patch_size",
    "latent_channels": "in_channels",
    "context_size": "joint_attention_dim",
    "pooled_size": "pooled_projection_dim",
    "position_table_side": "pos_embed_max_size",
}
_VAE_FIELDS = {
    "channels": "block_out_channels",
    "blocks_per_level": "layers_per_block",
    "latent_channels": "latent_channels",
    "norm_groups": "norm_num_groups",
    "scale": "scaling_factor",
    "shift": "shift_factor",
}
_VAE_FIXED = {
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
    "act_fn": "silu",
    "in_channels": 3,
    "out_channels": 3,
}
_CLIP_FIELDS = {
    "hidden_size": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "feed_forward_size": "intermediate_size",
    "projection_size": "projection_dim",
    "activation": "hidden_act",
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "norm_epsilon": "layer_norm_eps",
    "eos_token_id": "eos_token_id",
}
# A key of our own, named after the option of diffusers' pipeline that has to be given this number.
MAX_TOKENS = "max_sequence_length"
_T5_FIELDS = {
    "hidden_size": "d_model",
    "layers": "num_layers",
    "heads": "num_heads",
    "head_size": "d_kv",
    "feed_forward_size": "d_ff",
    "vocabulary": "vocab_size",
    "position_buckets": "relative_attention_num_buckets",
    "position_max_distance": "relative_attention_max_distance",
    "norm_epsilon": "layer_norm_epsilon",
    "max_tokens": MAX_TOKENS,
}


def transformer_config(data: dict[str, Any]) -> dict[str, Any]:
    data = {"sample_size": 128} | data
    dual_layers = _list("transformer", data, "dual_attention_layers")
    _require("transformer", data, "qk_norm", (None, "rms_norm"), absent=None)
    _require("transformer", data, "dual_attention_layers", (None, list(range(len(dual_layers)))), absent=None)
    _require("transformer", data, "out_channels", (data.get("in_channels"),), absent=data.get("in_channels"))
    config = _select("transformer", data, _TRANSFORMER_FIELDS)
    heads, head_size, patch_size, sample_size = (
        _number("transformer", data, key)
        for key in ("num_attention_heads", "attention_head_dim", "patch_size", "sample_size")
    )
    _require("transformer", data, "caption_projection_dim", (heads * head_size,), absent=None)
    return config | {
        "position_base": sample_size // patch_size,
        "qk_norm": data.get("qk_norm") == "rms_norm",
        "dual_attention_blocks": len(dual_layers),
    }


def _vae_blocks(levels: int) -> dict[str, list[str]]:
    return {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def vae_config(data: dict[str, Any]) -> dict[str, Any]:
    levels = len(_list("vae", data, "block_out_channels"))
    for key, value in (_VAE_FIXED | _vae_blocks(levels)).items():
        # The class of diffusers takes both 1x1 convolutions where the configuration is silent.
        _require("vae", data, key, (value,), absent=True if key.endswith("quant_conv") else value)
    return _select("vae", data, _VAE_FIELDS)


def clip_config(data: dict[str, Any]) -> dict[str, Any]:
    return _select("CLIP text encoder", data, _CLIP_FIELDS)


def t5_config(data: dict[str, Any]) -> dict[str, Any]:
    data = {MAX_TOKENS: T5Config.max_tokens} | data
    _require("T5 text encoder", data, "feed_forward_proj", ("gated-gelu",), absent=None)
    return _select("T5 text encoder", data, _T5_FIELDS)


def schedule_config(data: dict[str, Any]) -> dict[str, Any]:
    _require("scheduler", data, "_class_name", ("FlowMatchEulerDiscreteScheduler",), absent=None)
    for option in (
        "use_dynamic_shifting",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "invert_sigmas",
        "stochastic_sampling",
    ):
        _require("scheduler", data, option, (False,), absent=False)
    _require("scheduler", data, "num_train_timesteps", (1000,), absent=1000)
    _require("scheduler", data, "shift_terminal", (None,), absent=None)
    return _select("scheduler", data, {"shift": "shift"})


def write_transformer_config(config: MMDiTConfig) -> dict[str, Any]:
    return _renamed(config, _TRANSFORMER_FIELDS) | {
        "_class_name": "SD3Transformer2DModel",
        "out_channels": config.latent_channels,
        "caption_projection_dim": config.hidden_size,
        "sample_size": config.position_base * config.patch_size,
        "qk_norm": "rms_norm" if config.qk_norm else None,
        "dual_attention_layers": list(range(config.dual_attention_blocks)),
    }


def write_vae_config(config: VAEConfig) -> dict[str, Any]:
    blocks = _vae_blocks(len(config.channels))
    return _renamed(config, _VAE_FIELDS) | _VAE_FIXED | blocks | {"_class_name": "AutoencoderKL"}


def write_clip_config(config: CLIPConfig) -> dict[str, Any]:
    return _renamed(config, _CLIP_FIELDS) | {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "bos_token_id": 0,
        "pad_token_id": 1,
    }


def write_t5_config(config: T5Config) -> dict[str, Any]:
    return _renamed(config, _T5_FIELDS) | {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def write_schedule_config(config: ScheduleConfig) -> dict[str, Any]:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": config.shift,
    }


def write_model_index(components: Collection[str], tokenizers: Collection[str]) -> dict[str, Any]:
    """model_index.json: the class of every sub-folder, or nulls where there is none."""
    index = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    index |= {FOLDERS[name]: _CLASSES[name] for name in components}
    index |= {TOKENIZER_FOLDERS[name]: _TOKENIZER_CLASSES[name] for name in tokenizers}
    absent = {sub: [None, None] for sub in (*FOLDERS.values(), *TOKENIZER_FOLDERS.values())}
    return {"_class_name": "StableDiffusion3Pipeline"} | absent | index


def _renamed(config: Any, fields: dict[str, str]) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for ours, theirs in fields.items()}


def _select(component: str, data: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    absent = [key for key in fields.values() if data.get(key) is None]
    if absent:
        raise ValueError(f"the configuration of the {component} does not say {', '.join(absent)}")
    return {ours: data[theirs] for ours, theirs in fields.items()}


def _number(component: str, data: dict[str, Any], key: str) -> int:
    value = data.get(key)
    if type(value) is not int or value < 1:
        raise ValueError(f"the configuration of the {component} has {key} {value!r} in place of a positive number")
    return value


def _list(component: str, data: dict[str, Any], key: str) -> list[Any]:
    value = data.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f"the configuration of the {component} has {key} {value!r} in place of a list")
    return value


def _require(component: str, data: dict[str, Any], key: str, supported: tuple[Any, ...], absent: Any) -> None:
    value = data.get(key, absent)
    if value not in supported:
        choices = " or ".join(map(repr, supported))
        raise ValueError(f"the configuration of the {component} has {key} {value!r}, but only {choices} is supported")


CONFIGS = {
    "transformer": transformer_config,
    "vae": vae_config,
    "clip_l": clip_config,
    "clip_g": clip_config,
    "t5": t5_config,
}

WRITERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "transformer": write_transformer_config,
    "vae": write_vae_config,
    "clip_l": write_clip_config,
    "clip_g": write_clip_config,
    "t5": write_t5_config,
}
