"""The MMDiT as the recipe's networks: parameters by dotted path in, velocities and intermediate features out."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from sd35flash_jax.checkpoint import abstract_component, with_parameters
from sd35flash_jax.config import ModelConfig
from sd35flash_jax.distill.flow import Velocity
from sd35flash_jax.distill.lora import Params, merge_lora
from sd35flash_jax.distill.updates import Features, Networks
from sd35flash_jax.models.layers import unstacked
from sd35flash_jax.models.mmdit import Streams
from sd35flash_jax.text import Conditioning


def mmdit_networks(config: ModelConfig, lora: bool, depths: Sequence[int], rematerialise: bool = False) -> Networks:
    """Student and proxy as float32 parameters that are rounded to the teacher's dtype for every evaluation, or as
    LoRAs on the teacher. The heads read the proxy's image stream after as many blocks as `depths` say."""
    structure = abstract_component("transformer", config)

    def whole(params: Params, teacher: Params) -> Params:
        if lora:
            return merge_lora(teacher, params)
        return teacher | {path: array.astype(teacher[path].dtype) for path, array in params.items()}

    def module(params: Params) -> Any:
        model = with_parameters(structure, params)
        return rematerialised(model) if rematerialise else model

    def velocity(params: Params) -> Velocity:
        # A loop over a stack writes and reads every activation that is kept for the way back once more.
        model = module(params) if rematerialise else unstacked(module(params))
        return lambda latents, timestep, text: model(latents, timestep, text.context, text.pooled)

    def features(params: Params) -> Features:
        model = module(params)
        return lambda latents, timestep, text: image_features(model, latents, timestep, text, depths)

    return Networks(
        teacher=velocity,
        student=lambda params, teacher: velocity(whole(params, teacher)),
        proxy=lambda params, teacher: velocity(whole(params, teacher)),
        features=lambda params, teacher: features(whole(params, teacher)),
    )


def image_features(
    model: Any,
    latents: Float[Array, "b h w c"],
    timestep: Float[Array, " b"],
    text: Conditioning,
    depths: Sequence[int],
) -> list[Float[Array, "b t c"]]:
    """An MMDiT's image stream after some numbers of blocks, from one pass."""
    streams = model.image_streams(latents, text.context, model.modulate(timestep, text.pooled))
    return [streams[depth - 1] for depth in depths]


class Rematerialised(nnx.Module):
    """A block, or a stack of them, that keeps its inputs alone for the way back and computes the rest again."""

    def __init__(self, block: Any):
        self.block = block

    def modulate(self, condition: Array) -> Any:
        return self.block.modulate(condition)

    def __call__(self, streams: Streams, modulation: Any, context_tokens: int) -> Streams:
        run: Callable[..., Streams] = jax.checkpoint(lambda block, *inputs: block(*inputs, context_tokens))
        return run(self.block, streams, modulation)


def rematerialised(model: Any) -> Any:
    """An MMDiT whose blocks are rematerialised: more arithmetic on the way back, for a fraction of the memory."""
    model = jax.tree.map(lambda array: array, model)
    for name in (*model.STACKS, "last_block"):
        block = getattr(model, name)
        setattr(model, name, None if block is None else Rematerialised(block))
    return model
