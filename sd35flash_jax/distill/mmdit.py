"""The MMDiT as the recipe's networks: parameters by dotted path in, velocities and intermediate features out."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sd35flash_jax.checkpoint import abstract_component, with_parameters
from sd35flash_jax.config import ModelConfig
from sd35flash_jax.distill.flow import Velocity
from sd35flash_jax.distill.lora import Params, merge_lora
from sd35flash_jax.distill.updates import Features, Networks
from sd35flash_jax.models.mmdit import MMDiT
from sd35flash_jax.text import Conditioning


def mmdit_networks(config: ModelConfig, lora: bool, depths: Sequence[int]) -> Networks:
    """Student and proxy as float32 parameters that are rounded to the teacher's dtype for every evaluation, or as
    LoRAs on the teacher. The heads read the proxy's image stream after as many blocks as `depths` say."""
    structure = abstract_component("transformer", config)

    def whole(params: Params, teacher: Params) -> Params:
        if lora:
            return merge_lora(teacher, params)
        return teacher | {path: array.astype(teacher[path].dtype) for path, array in params.items()}

    def velocity(params: Params) -> Velocity:
        model: Any = with_parameters(structure, params)
        return lambda latents, timestep, text: model(latents, timestep, text.context, text.pooled)

    def features(params: Params) -> Features:
        models: Any = [first_blocks(with_parameters(structure, params), depth) for depth in depths]
        return lambda latents, timestep, text: [image_stream(model, latents, timestep, text) for model in models]

    return Networks(
        teacher=velocity,
        student=lambda params, teacher: velocity(whole(params, teacher)),
        proxy=lambda params, teacher: velocity(whole(params, teacher)),
        features=lambda params, teacher: features(whole(params, teacher)),
    )


def first_blocks(model: Any, depth: int) -> MMDiT:
    """An MMDiT of the first `depth` blocks that ends in its normed image stream: its final modulation is none and its
    projection the identity."""
    model = jax.tree.map(lambda array: array, model)
    hidden, dtype = model.config.hidden_size, model.out.kernel.dtype
    for name in ("dual_blocks", "blocks"):
        stack = getattr(model, name)
        count = 0 if stack is None else len(jax.tree.leaves(stack)[0])
        if 1 <= depth <= count:
            model.last_block = _layers(stack, depth - 1)
        kept = count if depth > count else max(depth - 1, 0)
        setattr(model, name, _layers(stack, slice(kept)) if kept else None)
        depth -= count
    model.out_modulation = jax.tree.map(jnp.zeros_like, model.out_modulation)
    model.out.kernel = nnx.Param(jnp.eye(hidden, dtype=dtype))
    model.out.bias = nnx.Param(jnp.zeros(hidden, dtype))
    return model


def image_stream(
    model: Any, latents: Float[Array, "b h w c"], timestep: Float[Array, " b"], text: Conditioning
) -> Float[Array, "b t c"]:
    """What `first_blocks` ends in, token by token."""
    return model.patchify(model(latents, timestep, text.context, text.pooled))


def _layers(stack: Any, index: int | slice) -> Any:
    return jax.tree.map(lambda array: array[index], stack)
