"""The benchmark against KerasHub's MMDiT on Keras' JAX backend; only a worker process imports it. One evaluation is all
that it can be compared in: its sampler is bound to a whole KerasHub model."""

import os
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.cases import TEXT_TOKENS, TIMESTEP, Case, Request, repetitions
from benchmarks.machine import jax_device_name, jax_peak_bytes, versions
from sd35flash_jax.config import MMDiTConfig
from sd35flash_jax.pipeline import DOWNSAMPLING


class KerasHubPeer:
    """The model's stateless call, compiled, with the random weights that Keras gives it and Keras' own choice of
    attention, which is cuDNN's flash kernel where that applies."""

    items = ("evaluation", "step")

    def __init__(self, request: Request):
        os.environ["KERAS_BACKEND"] = "jax"  # Keras reads it when it is first imported.
        jax.config.update("jax_enable_compilation_cache", False)
        self.request = request
        self._side = 0
        self._evaluate: Callable[..., jax.Array] | None = None

    def about(self) -> dict[str, str]:
        return {"device": jax_device_name()} | versions("keras", "keras-hub", "jax")

    def gemm(self) -> None:
        """Our own side measures it."""

    def prepare(self, case: Case) -> Callable[[], Any]:
        config = self.request.model.transformer
        assert config is not None and case.size is not None
        side = case.size // DOWNSAMPLING
        if self._evaluate is None or side != self._side:
            self._evaluate = None  # A model is bound to its size: the one before makes room first.
            self._evaluate, self._side = evaluation(config, side, self.request.dtype), side
        evaluate, inputs = self._evaluate, random_inputs(config, case.batch, side, self.request.dtype)
        return lambda: jax.block_until_ready([evaluate(inputs) for _ in range(repetitions(case.item))])

    def peak_memory(self) -> int:
        return jax_peak_bytes()


def evaluation(config: MMDiTConfig, side: int, dtype: str) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """A transformer for latents of `side`, as a compiled function of its inputs."""
    from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT

    model = MMDiT(
        patch_size=config.patch_size,
        hidden_dim=config.hidden_size,
        num_layers=config.depth,
        num_heads=config.heads,
        position_size=config.position_table_side,
        latent_shape=(side, side, config.latent_channels),
        context_shape=(None, config.context_size),
        pooled_projection_shape=(config.pooled_size,),
        qk_norm="rms_norm" if config.qk_norm else None,
        dual_attention_indices=tuple(range(config.dual_attention_blocks)),
        dtype=dtype,
    )
    weights = [
        [variable.value for variable in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    ]
    compiled = jax.jit(lambda weights, inputs: model.stateless_call(*weights, inputs, training=False)[0])
    return lambda inputs: compiled(weights, inputs)


def random_inputs(config: MMDiTConfig, batch: int, side: int, dtype: str) -> dict[str, jax.Array]:
    shapes = {
        "latent": (batch, side, side, config.latent_channels),
        "context": (batch, TEXT_TOKENS, config.context_size),
        "pooled_projection": (batch, config.pooled_size),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    drawn = {name: jax.random.normal(key, shape, dtype) for key, (name, shape) in zip(keys, shapes.items())}
    return drawn | {"timestep": jax.numpy.full((batch, 1), TIMESTEP, dtype)}


def open_side(request: Request) -> KerasHubPeer:
    return KerasHubPeer(request)
