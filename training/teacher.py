"""The teacher: text encoders and transformer trained together by flow matching (arXiv 2403.03206) on composed scenes.

    python -m training.teacher AUTOENCODER OUTPUT --seconds 560 [--resume FOLDER --tokenizers FOLDER]

AUTOENCODER is a checkpoint directory with an autoencoder, such as what `training.autoencoder` wrote. The scenes are
encoded once and stay on the devices with their captions' token ids; the batch is divided over all devices. The result
is a checkpoint directory, OUTPUT/teacher, and its weights in pieces, from which another stretch can go on.
"""

import argparse
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from sd35flash_jax.checkpoint import (
    abstract_component,
    build_component,
    load_checkpoint,
    parameters,
    refuse_existing,
    save_checkpoint,
    with_parameters,
)
from sd35flash_jax.command import leave, run_command
from sd35flash_jax.config import TEXT_ENCODERS, ModelConfig
from sd35flash_jax.distill.flow import add_noise
from sd35flash_jax.distill.text_dropout import drop_text_encoders
from sd35flash_jax.frozen import Frozen
from sd35flash_jax.models.layers import unstacked
from sd35flash_jax.models.mmdit import sincos_table
from sd35flash_jax.text import clip_widths, encode_tokens, load_tokenizer, token_counts
from sd35flash_jax.world.compose import SceneArrays, compose, sprites
from training.clock import train
from training.data import draw_captions, make_scenes, token_ids
from training.model import CLIP_VOCABULARY, FLASH_MINI, SIZE, SOURCE, T5_VOCABULARY, TEXT_TOKENS
from training.optimizer import adam, muon
from training.pieces import load_pieces, save_pieces
from training.tokenizers import write_clip_tokenizer, write_t5_tokenizer

CAPTIONS = 2
ENCODED_AT_ONCE = 100
NO_CAPTION = 0.1
NO_ENCODER = 0.1
TRAINED = ("transformer", *TEXT_ENCODERS)


@partial(jax.tree_util.register_dataclass, data_fields=["latents", "tokens", "no_caption"], meta_fields=[])
@dataclass(frozen=True)
class Data:
    """What is on the devices, or its shapes, or where it lies: latents `(n, h, w, c)`, ids of some captions of each
    `(n, captions, tokens)` for each encoder, and those of an empty prompt `(tokens,)`."""

    latents: Any
    tokens: dict[str, Any]
    no_caption: dict[str, Any]


def write_tokenizers(folder: Path) -> dict[str, Path]:
    """The three tokenizers, trained on captions of their own, and where each lies."""
    lines = draw_captions(40_000, 5)
    write_clip_tokenizer(folder / "clip_l", lines, CLIP_VOCABULARY, TEXT_TOKENS, padding="<|endoftext|>")
    write_clip_tokenizer(folder / "clip_g", lines, CLIP_VOCABULARY, TEXT_TOKENS, padding="!")
    write_t5_tokenizer(folder / "t5", lines, T5_VOCABULARY)
    return {name: folder / name for name in TEXT_ENCODERS}


def initial_parameters(config: ModelConfig) -> dict[str, Array]:
    """Fresh float32 parameters of everything trained, by `component.path`; each block begins as the identity
    (adaLN-Zero, arXiv 2212.09748)."""
    params = {}
    for seed, name in enumerate(TRAINED):
        for path, array in parameters(build_component(name, config, seed)).items():
            if path == "position_table":
                continue
            closed = path.startswith("out.") or "modulation." in path
            params[f"{name}.{path}"] = jnp.zeros_like(array) if name == "transformer" and closed else array
    # T5 does not scale its logits, so its queries begin small (arXiv 1910.10683).
    assert config.t5 is not None
    queries = jnp.arange(3 * config.t5.heads * config.t5.head_size) < config.t5.heads * config.t5.head_size
    params["t5.layers.qkv.kernel"] *= jnp.where(queries, config.t5.head_size**-0.5, 1)
    return params


def component(structures: Mapping[str, Any], params: Mapping[str, Array], name: str, dtype: Any) -> Any:
    """One component with its share of the parameters, rounded for the arithmetic, its blocks as a list: a loop over
    a stack would write and read every activation that the gradient needs once more."""
    own = {path.removeprefix(f"{name}."): array for path, array in params.items() if path.startswith(f"{name}.")}
    stacked: Any = with_parameters(structures[name], {path: array.astype(dtype) for path, array in own.items()})
    return unstacked(stacked)


def flow_matching_loss(
    structures: Mapping[str, Any], config: ModelConfig, params: Mapping[str, Array], data: Data, key: Array, dtype: Any
) -> tuple[Array, dict[str, Array]]:
    """`E | v(x_sigma, sigma) - (noise - clean) |^2` at levels whose logit is normal, shifted as sampling is. Captions,
    and what single encoders read of them, are left out now and then."""
    assert config.t5 is not None
    keys = jax.random.split(key, 5)
    batch = len(data.latents)
    which = jax.random.randint(keys[0], (batch,), 0, CAPTIONS)
    dropped = jax.random.bernoulli(keys[1], NO_CAPTION, (batch, 1))
    tokens = {
        name: jnp.where(dropped, data.no_caption[name], ids[jnp.arange(batch), which])
        for name, ids in data.tokens.items()
    }
    encoders = {name: Frozen(component(structures, params, name, dtype)) for name in TEXT_ENCODERS}
    text = encode_tokens(encoders, tokens, config=config, t5_tokens=config.t5.max_tokens)
    widths = clip_widths(config)
    text = drop_text_encoders(text, keys[2], NO_ENCODER, (widths["clip_l"], widths["clip_g"]), TEXT_TOKENS)

    level = jax.nn.sigmoid(jax.random.normal(keys[3], (batch,)))
    shift = config.schedule.shift
    sigma = shift * level / (1 + (shift - 1) * level)
    clean = data.latents.astype(jnp.float32)
    noise = jax.random.normal(keys[4], clean.shape)
    transformer = component(structures, params, "transformer", dtype)
    velocity = transformer(add_noise(clean, noise, sigma), 1000 * sigma, text.context, text.pooled)
    error = jnp.square(velocity.astype(jnp.float32) - (noise - clean)).mean(axis=(1, 2, 3))
    late = sigma < 0.5
    of_late = jnp.where(late, error, 0).sum() / jnp.maximum(late.sum(), 1)
    return error.mean(), {"loss": error.mean(), "late": of_late}


def encode_scenes(vae: Any, scenes: SceneArrays, size: int, dtype: Any) -> Array:
    """Latents of scenes at model scale, `(n, size/8, size/8, 16)`."""
    atlas = jax.device_put(sprites())
    encode = jax.jit(lambda scenes: vae.encode(compose(atlas, scenes, size)).astype(dtype))
    count = len(scenes.kind)
    channels = vae.config.latent_channels
    latents = jnp.zeros((count, size // 8, size // 8, channels), dtype)
    put = jax.jit(lambda all, part, at: jax.lax.dynamic_update_slice(all, part, (at, 0, 0, 0)), donate_argnums=0)
    for start in range(0, count, ENCODED_AT_ONCE):
        rows = slice(start, start + ENCODED_AT_ONCE)
        latents = put(latents, encode(SceneArrays(*(array[rows] for array in scenes))), start)
    return latents


def check_options(options: argparse.Namespace, devices: int) -> None:
    """Refuse what would fail when much has been done, or give nonsense.

    Raises:
        FileExistsError: the checkpoint, or the tokenizers that are to be trained, are there already.
        ValueError: weights to go on from without their tokenizers, or scenes or a batch that do not fit the devices.
    """
    refuse_existing(options.output / options.name)
    if options.tokenizers is None:
        if options.resume:
            raise ValueError("--resume needs the --tokenizers of its weights, which know no others' ids")
        refuse_existing(options.output / "tokenizers")
    if options.batch < 1 or options.batch % devices:
        raise ValueError(
            f"--batch must be a positive multiple of the number of devices, {devices}, not {options.batch}"
        )
    if options.scenes < ENCODED_AT_ONCE * devices:
        raise ValueError(
            f"--scenes must be {ENCODED_AT_ONCE * devices} or more, {ENCODED_AT_ONCE} a device, not {options.scenes}"
        )


def main(options: argparse.Namespace) -> None:
    until = time.monotonic() + options.seconds
    devices = jax.devices()
    check_options(options, len(devices))
    dtype = jnp.dtype(options.dtype)
    loaded = load_checkpoint(options.autoencoder, ("vae",), options.dtype)
    config = replace(FLASH_MINI, vae=loaded.config.vae)
    structures = {name: table_in_place(abstract_component(name, config), config, name, dtype) for name in TRAINED}
    params = initial_parameters(config)
    if options.resume:
        resumed = load_pieces(options.resume)
        if {path: array.shape for path, array in resumed.items()} != {path: a.shape for path, a in params.items()}:
            raise ValueError(f"{options.resume} holds the weights of another model; give those of a teacher's stretch")
        params = {path: jnp.asarray(array, jnp.float32) for path, array in resumed.items()}
    folders = (
        write_tokenizers(options.output / "tokenizers")
        if options.tokenizers is None
        else {name: options.tokenizers / name for name in TEXT_ENCODERS}
    )
    tokenizers = {name: load_tokenizer(name, folder) for name, folder in folders.items()}
    scenes, captions = make_scenes(options.scenes, options.seed, CAPTIONS)
    options.output.mkdir(parents=True, exist_ok=True)
    optimizer = muon() if options.optimizer == "muon" else adam()
    state = (params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros(()))

    def update(state: Any, rate: Array, key: Array, data: Data) -> tuple[Any, dict[str, Array]]:
        """Some updates on one device's share of the scenes, with the gradients of all devices."""

        def one(state: Any, key: Array) -> tuple[Any, dict[str, Array]]:
            params, average, moments, count = state
            row_key, loss_key = jax.random.split(jax.random.fold_in(key, jax.lax.axis_index("data")))
            rows = jax.random.randint(row_key, (options.batch // len(devices),), 0, len(data.latents))
            tokens = {name: ids[rows] for name, ids in data.tokens.items()}
            chosen = replace(data, latents=data.latents[rows], tokens=tokens)
            loss = partial(flow_matching_loss, structures, config)
            gradients, metrics = jax.lax.pmean(jax.grad(loss, has_aux=True)(params, chosen, loss_key, dtype), "data")
            steps, moments = optimizer.update(gradients, moments, params)
            params = optax.apply_updates(params, jax.tree.map(lambda step: rate * step, steps))
            decay = jnp.minimum(0.999, (1 + count) / (10 + count))
            average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)
            return (params, average, moments, count + 1), metrics

        state, metrics = jax.lax.scan(one, state, jax.random.split(key, options.per_call))
        return state, jax.tree.map(jnp.mean, metrics)

    mesh = jax.make_mesh((len(devices),), ("data",))
    everywhere, divided = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    kept = options.scenes - options.scenes % (ENCODED_AT_ONCE * len(devices))
    shapes = data_shapes(config, kept, options.size, dtype)
    layout = Data(divided, dict.fromkeys(TEXT_ENCODERS, divided), dict.fromkeys(TEXT_ENCODERS, everywhere))
    specs = jax.tree.map(lambda sharding: sharding.spec, layout)
    sharded = jax.shard_map(update, mesh=mesh, in_specs=(P(), P(), P(), specs), out_specs=P(), check_vma=False)
    described = jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), shapes, layout
    )
    fixed = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=everywhere),
        jax.eval_shape(lambda: (state, jnp.zeros((), jnp.float32), jax.random.key(0))),
    )
    with ThreadPoolExecutor() as pool:
        # XLA compiles while the scenes are made ready.
        compiling = pool.submit(lambda: jax.jit(sharded, donate_argnums=0).lower(*fixed, described).compile())
        captions = captions[:kept]
        reading = pool.submit(token_ids, tokenizers, ["", *(text for texts in captions for text in texts)], config)
        chosen = SceneArrays(*(array[:kept] for array in scenes))
        latents = encode_scenes(loaded.components["vae"], chosen, options.size, dtype)
        ids = reading.result()
        data = Data(
            latents,
            {name: array[1:].reshape(-1, CAPTIONS, array.shape[-1]) for name, array in ids.items()},
            {name: array[0] for name, array in ids.items()},
        )
        data = jax.device_put(data, layout)
        compiled = compiling.result()

    def run(state: Any, rate: Any, key: Array) -> Any:
        return compiled(state, *jax.device_put((rate, key), everywhere), data)

    log = options.output / f"{options.name}.csv"
    state = jax.device_put(state, everywhere)
    (_, average, _, _), calls = train(run, state, until, options.rate, options.seed, log)
    rounded = {path: np.asarray(array, jnp.bfloat16) for path, array in average.items()}
    save_pieces(options.output / f"{options.name}-weights", rounded)
    summary = {"updates": calls * options.per_call, "batch": options.batch, "scenes": kept, "size": options.size}
    summary |= {"seconds": options.seconds, "rate": options.rate, "optimizer": options.optimizer}
    summary |= {"devices": [device.device_kind for device in devices]}
    (options.output / f"{options.name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))
    write_checkpoint(options.output / options.name, config, rounded, parameters(loaded.components["vae"]), folders)


def data_shapes(config: ModelConfig, count: int, size: int, dtype: Any) -> Data:
    """What will be on the devices."""
    assert config.vae is not None and config.t5 is not None
    ids = token_counts(config, config.t5.max_tokens)
    return Data(
        jax.ShapeDtypeStruct((count, size // 8, size // 8, config.vae.latent_channels), dtype),
        {name: jax.ShapeDtypeStruct((count, CAPTIONS, ids[name]), jnp.int32) for name in TEXT_ENCODERS},
        {name: jax.ShapeDtypeStruct((ids[name],), jnp.int32) for name in TEXT_ENCODERS},
    )


def table_in_place(structure: Any, config: ModelConfig, name: str, dtype: Any) -> Any:
    """The transformer's shapes with its position table, which is not trained."""
    if name != "transformer":
        return structure
    return with_parameters(structure, {"position_table": position_table(config).astype(dtype)})


def position_table(config: ModelConfig) -> Array:
    assert config.transformer is not None
    shape = config.transformer
    return sincos_table(shape.position_table_side, shape.hidden_size, shape.position_base)


def write_checkpoint(
    path: Path,
    config: ModelConfig,
    trained: Mapping[str, np.ndarray],
    vae: Mapping[str, np.ndarray],
    tokenizers: Mapping[str, Path],
) -> None:
    """The whole model as a checkpoint directory."""
    table = np.asarray(position_table(config))
    components: dict[str, dict[str, Any]] = {"vae": dict(vae), "transformer": {"position_table": table}}
    for full, array in trained.items():
        name, _, own = full.partition(".")
        components.setdefault(name, {})[own] = array
    save_checkpoint(path, config, components, tokenizers, source=SOURCE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train flash-mini's teacher.")
    parser.add_argument("autoencoder", type=Path, help="checkpoint directory with an autoencoder")
    parser.add_argument("output", type=Path)
    parser.add_argument("--name", default="teacher")
    parser.add_argument("--resume", type=Path, help="go on from a folder of weights in pieces; needs --tokenizers")
    parser.add_argument("--tokenizers", type=Path, help="folder of those that an earlier stretch trained")
    parser.add_argument("--seconds", type=float, default=560.0, help="of the whole stretch")
    parser.add_argument("--scenes", type=int, default=240_000)
    parser.add_argument("--batch", type=int, default=384)
    parser.add_argument("--per-call", type=int, default=20)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=("muon", "adam"), default="muon")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=SIZE, help="pixels a side")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the arithmetic")
    options = parser.parse_args()
    leave(run_command(lambda: main(options), "training.teacher"))
