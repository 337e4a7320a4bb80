"""A diffusers folder of the tiny model, written without PyTorch: our parameters, taken back through the tables."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from conversion.diffusers_layout import FOLDERS, TABLES, TOKENIZER_FOLDERS
from sd35flash_jax.config import COMPONENTS, CLIPConfig, MMDiTConfig, T5Config, VAEConfig
from tests.tiny_model import CONFIG, random_parameters, write_tokenizers


def source_tensors(name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    tensors = {}
    for rule in TABLES[name](getattr(CONFIG, name)).rules:
        array = arrays[rule.param] if rule.layer is None else arrays[rule.param][rule.layer]
        tensors |= dict(zip(rule.sources, rule.transform.backward(array, len(rule.sources)), strict=True))
    return tensors


def weights_file(folder: Path, name: str) -> Path:
    stem = "model" if name in TOKENIZER_FOLDERS else "diffusion_pytorch_model"
    return folder / FOLDERS[name] / f"{stem}.safetensors"


def save_tensors(tensors: dict[str, np.ndarray], file: Path) -> None:
    save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, file)


def change_tensors(folder: Path, name: str, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Rewrite a component's weights after `change` has worked on the tensors in place."""
    file = weights_file(folder, name)
    tensors = load_file(file)
    change(tensors)
    save_tensors(tensors, file)


def change_config(folder: Path, sub: str, **changes: Any) -> None:
    file = next(path for path in (folder / sub).glob("*config.json") if not path.name.startswith("tokenizer"))
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def write_folder(folder: Path, components: Iterable[str] = COMPONENTS) -> dict[str, dict[str, np.ndarray]]:
    """Write the folder and return the parameters that its conversion must give."""
    expected = {name: random_parameters(name, seed) for seed, name in enumerate(components)}
    for name, arrays in expected.items():
        sub = folder / FOLDERS[name]
        sub.mkdir(parents=True)
        save_tensors(source_tensors(name, arrays), weights_file(folder, name))
        (sub / "config.json").write_text(json.dumps(source_config(getattr(CONFIG, name))))
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    write_tokenizers(folder, (TOKENIZER_FOLDERS["clip_l"], TOKENIZER_FOLDERS["clip_g"], TOKENIZER_FOLDERS["t5"]))
    return expected


def source_config(config: Any) -> dict[str, Any]:
    match config:
        case MMDiTConfig():
            return {
                "_class_name": "SD3Transformer2DModel",
                "attention_head_dim": config.head_size,
                "caption_projection_dim": config.hidden_size,
                "dual_attention_layers": list(range(config.dual_attention_blocks)),
                "in_channels": config.latent_channels,
                "joint_attention_dim": config.context_size,
                "num_attention_heads": config.heads,
                "num_layers": config.depth,
                "out_channels": config.latent_channels,
                "patch_size": config.patch_size,
                "pooled_projection_dim": config.pooled_size,
                "pos_embed_max_size": config.position_table_side,
                "qk_norm": "rms_norm" if config.qk_norm else None,
                "sample_size": config.position_base * config.patch_size,
            }
        case VAEConfig():
            return {
                "_class_name": "AutoencoderKL",
                "act_fn": "silu",
                "block_out_channels": list(config.channels),
                "down_block_types": ["DownEncoderBlock2D"] * len(config.channels),
                "in_channels": 3,
                "latent_channels": config.latent_channels,
                "layers_per_block": config.blocks_per_level,
                "norm_num_groups": config.norm_groups,
                "out_channels": 3,
                "scaling_factor": config.scale,
                "shift_factor": config.shift,
                "up_block_types": ["UpDecoderBlock2D"] * len(config.channels),
                "use_post_quant_conv": False,
                "use_quant_conv": False,
            }
        case CLIPConfig():
            return {
                "architectures": ["CLIPTextModelWithProjection"],
                "eos_token_id": config.eos_token_id,
                "hidden_act": config.activation,
                "hidden_size": config.hidden_size,
                "intermediate_size": config.feed_forward_size,
                "layer_norm_eps": config.norm_epsilon,
                "max_position_embeddings": config.positions,
                "num_attention_heads": config.heads,
                "num_hidden_layers": config.layers,
                "projection_dim": config.projection_size,
                "vocab_size": config.vocabulary,
            }
        case T5Config():
            return {
                "architectures": ["T5EncoderModel"],
                "d_ff": config.feed_forward_size,
                "d_kv": config.head_size,
                "d_model": config.hidden_size,
                "feed_forward_proj": "gated-gelu",
                "layer_norm_epsilon": config.norm_epsilon,
                "num_heads": config.heads,
                "num_layers": config.layers,
                "relative_attention_max_distance": config.position_max_distance,
                "relative_attention_num_buckets": config.position_buckets,
                "vocab_size": config.vocabulary,
            }
    raise TypeError(type(config).__name__)
