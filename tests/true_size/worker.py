"""One step of a true-size check, run in a process of its own so that its peak memory can be read:

    python -m tests.true_size.worker STEP COMPONENT FOLDER

STEP is `make` (a diffusers folder with random weights), `convert`, `reference` or `ours`. Each prints one line of JSON;
`reference` and `ours` leave their output in FOLDER as .npy files.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

BATCH_SEED = 0
LATENT_SIDE = 32  # 256 px
T5_TOKENS = 32


def inputs(component: str) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(BATCH_SEED)
    if component == "transformer":
        return {
            "latents": draw.normal(size=(1, LATENT_SIDE, LATENT_SIDE, 16)).astype(np.float32),
            "timestep": np.array([857.69], np.float32),
            "context": draw.normal(size=(1, 333, 4096)).astype(np.float32),
            "pooled": draw.normal(size=(1, 2048)).astype(np.float32),
        }
    tokens = draw.integers(3, 32000, size=(1, T5_TOKENS if component == "t5" else 77))
    if component == "clip_g":
        tokens[:, 40:] = 49407
    return {"tokens": tokens.astype(np.int32)}


def reference_class(component: str):
    import diffusers
    import transformers

    if component == "transformer":
        config = {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        }
        return diffusers.SD3Transformer2DModel, config, "transformer", "diffusion_pytorch_model"
    if component == "t5":
        config = transformers.T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu",
        )  # fmt: skip
        return transformers.T5EncoderModel, config, "text_encoder_3", "model"
    config = transformers.CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280,
        hidden_act="gelu", eos_token_id=2,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection, config, "text_encoder_2", "model"


def make(component: str, folder: Path) -> dict[str, float]:
    """Random bfloat16 weights, at scales that keep activations near one, in shards of at most 2 GB."""
    import torch
    from safetensors.torch import save_file

    kind, config, sub, stem = reference_class(component)
    with torch.device("meta"):
        model = kind(**config) if isinstance(config, dict) else kind(config)
    (folder / "source" / sub).mkdir(parents=True)
    (model.save_config if isinstance(config, dict) else config.save_pretrained)(folder / "source" / sub)
    torch.manual_seed(0)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes.pop("encoder.embed_tokens.weight", None)
    shards: list[dict] = [{}]
    weight_map = {}

    def flush() -> None:
        name = f"{stem}-{len(shards):05d}.safetensors"
        save_file(shards[-1], folder / "source" / sub / name)
        weight_map.update(dict.fromkeys(shards[-1], name))
        shards[-1] = {}

    size = 0
    for name, shape in shapes.items():
        tensor = random_tensor(name, shape)
        if size + tensor.nbytes > 2e9:
            flush()
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    flush()
    index = folder / "source" / sub / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {"parameters": sum(int(np.prod(shape)) for shape in shapes.values())}


def random_tensor(name: str, shape: tuple[int, ...]):
    import torch

    if name.startswith("pos_embed.pos_embed"):
        from diffusers.models.embeddings import get_2d_sincos_pos_embed

        table = get_2d_sincos_pos_embed(shape[2], int(shape[1] ** 0.5), base_size=64, output_type="pt")
        return table.reshape(shape).to(torch.bfloat16)
    noise = torch.randn(shape, dtype=torch.bfloat16)
    if name == "shared.weight":
        return noise
    if len(shape) == 1:
        return noise * 0.02 + (1.0 if "norm" in name and name.endswith("weight") and "linear" not in name else 0.0)
    fan_in = int(np.prod(shape[1:]))
    # T5 does not scale its attention: its queries carry the scale.
    scale = 64**-0.5 if name.endswith("SelfAttention.q.weight") else 1.0
    return noise * (scale * fan_in**-0.5)


def convert(component: str, folder: Path) -> dict[str, float]:
    from conversion import convert

    convert(folder / "source", folder / "checkpoint")
    return {}


def reference(component: str, folder: Path) -> dict[str, float]:
    import torch

    kind, _, sub, _ = reference_class(component)
    model = kind.from_pretrained(folder / "source" / sub, torch_dtype=torch.float32, low_cpu_mem_usage=True).eval()
    given = {name: torch.from_numpy(array) for name, array in inputs(component).items()}
    start = time.perf_counter()
    with torch.no_grad():
        if component == "transformer":
            latents = given["latents"].permute(0, 3, 1, 2)
            output = model(latents, given["context"], given["pooled"], given["timestep"]).sample.permute(0, 2, 3, 1)
        elif component == "t5":
            output = model(given["tokens"].long())[0]
        else:
            encoded = model(given["tokens"].long(), output_hidden_states=True)
            np.save(folder / "reference_pooled.npy", encoded.text_embeds.numpy())
            output = encoded.hidden_states[-2]
    np.save(folder / "reference.npy", output.numpy())
    return {"evaluation_s": time.perf_counter() - start}


def ours(component: str, folder: Path) -> dict[str, float]:
    import jax

    from sd35flash_jax import load_checkpoint

    start = time.perf_counter()
    module = load_checkpoint(folder / "checkpoint", (component,), dtype="float32").components[component]
    loaded = time.perf_counter()
    arguments = tuple(inputs(component).values())
    program = jax.jit(lambda module, *arguments: module(*arguments)).lower(module, *arguments).compile()
    compiled = time.perf_counter()
    output = jax.block_until_ready(program(module, *arguments))
    evaluated = time.perf_counter()
    if component == "clip_g":
        output, pooled = output
        np.save(folder / "ours_pooled.npy", pooled)
    np.save(folder / "ours.npy", output)
    return {"load_s": loaded - start, "compile_s": compiled - loaded, "evaluation_s": evaluated - compiled}


if __name__ == "__main__":
    step, component, folder = sys.argv[1:]
    began = time.perf_counter()
    figures = {"make": make, "convert": convert, "reference": reference, "ours": ours}[step](component, Path(folder))
    figures["total_s"] = time.perf_counter() - began
    figures["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))
