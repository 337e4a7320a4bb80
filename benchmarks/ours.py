"""This project's side of the benchmark, through its public interface."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jaxtyping import Array

from benchmarks.cases import ITEMS, LOOP_STEPS, T5_TOKENS, TEXT_TOKENS, TIMESTEP, Case, Request, token_ids
from benchmarks.machine import jax_device_name, jax_peak_bytes, versions
from benchmarks.timing import measure
from sd35flash_jax import compilation
from sd35flash_jax.checkpoint import abstract_component, parameters, runs_stacked, with_parameters
from sd35flash_jax.config import TEXT_ENCODERS, ModelConfig
from sd35flash_jax.pipeline import DOWNSAMPLING, FlashPipeline, image_bytes
from sd35flash_jax.text import Conditioning

_GEMM_SIDES = {"cpu": 2048}
_GEMM_SIDE = 8192
_LARGE = 2**20
_NEEDS = {name: (name,) for name in TEXT_ENCODERS} | {
    "encode": TEXT_ENCODERS,
    "evaluation": ("transformer",),
    "step": ("transformer",),
    "denoise": ("transformer",),
    "decode": ("vae",),
    "image": ("transformer", "vae"),
    "prompt_to_pixels": ("transformer", "vae", *TEXT_ENCODERS),
}


class Ours:
    """JAX on its default device. Programs are compiled anew: the persistent cache is off."""

    items = tuple(ITEMS)

    def __init__(self, request: Request):
        compilation.configure()
        jax.config.update("jax_enable_compilation_cache", False)
        self.request = request
        self._components: dict[str, nnx.Module] = {}

    def about(self) -> dict[str, str]:
        found = versions("sd35flash-jax", "jax", "jaxlib", "flax")
        return {"device": jax_device_name(), "platform": jax.default_backend()} | found

    def gemm(self) -> float:
        return gemm_rate(self.request.dtype, self.request.repeats, self.request.seconds)

    def prepare(self, case: Case) -> Callable[[], Any]:
        pipe = self._pipeline(_NEEDS[case.item])
        run = self._call(case, pipe)
        return lambda: jax.block_until_ready(run())

    def peak_memory(self) -> int:
        return jax_peak_bytes()

    def _call(self, case: Case, pipe: FlashPipeline) -> Callable[[], Any]:
        batch, steps = case.batch, self.request.steps
        names = [name for name in _NEEDS[case.item] if name in TEXT_ENCODERS and name in pipe.components]
        tokens = {name: token_ids(getattr(pipe.config, name), name, batch) for name in names}
        if case.size is None:
            return lambda: pipe.encode_tokens(tokens)
        size = case.size
        noise, conditioning = random_latents(pipe, batch, size), random_conditioning(pipe, batch)

        def denoise(conditioning: Conditioning, steps: int = steps) -> Array:
            return pipe.denoise(noise, conditioning, steps=steps)

        calls: dict[str, Callable[[], Any]] = {
            "evaluation": lambda: pipe.velocity(noise, TIMESTEP, conditioning),
            "step": lambda: denoise(conditioning, LOOP_STEPS),
            "denoise": lambda: denoise(conditioning),
            "decode": lambda: pipe.decode(noise),
            "image": lambda: pipe.decode(denoise(conditioning)),
            "prompt_to_pixels": lambda: image_bytes(
                pipe.decode(pipe.denoise(pipe.noise(0, batch, size, size), pipe.encode_tokens(tokens), steps=steps))
            ),
        }
        return calls[case.item]

    def _pipeline(self, names: tuple[str, ...]) -> FlashPipeline:
        """A pipeline of the given components alone, each made when it is first needed."""
        config = self.request.model
        for name in names:
            if name in config.components and name not in self._components:
                self._components[name] = random_component(name, config, self.request.dtype)
        used = {name: self._components[name] for name in names if name in self._components}
        return FlashPipeline(config, used, {}, T5_TOKENS)


def gemm_rate(dtype: str, repeats: int, seconds: float) -> float:
    """FLOP/s of a large matrix product on JAX's default device."""
    side = _GEMM_SIDES.get(jax.default_backend(), _GEMM_SIDE)
    matrices = [jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2)]
    multiply = jax.jit(jnp.matmul)
    timing = measure(lambda: multiply(*matrices).block_until_ready(), repeats, seconds)
    return 2 * side**3 / timing.median


def random_component(name: str, config: ModelConfig, dtype: str) -> nnx.Module:
    """A component with random parameters: kernels scaled by their inputs, so that activations stay near one, the norms'
    scales around one."""
    module = abstract_component(name, config, stacked=runs_stacked(jax.default_backend()))
    shapes = {path: array.shape for path, array in parameters(module).items()}
    return with_parameters(module, random_parameters(shapes, dtype))


def random_parameters(
    shapes: Mapping[str, tuple[int, ...]], dtype: str, shardings: Mapping[str, Sharding] | None = None
) -> dict[str, Array]:
    """Random parameters by dotted path, on the default device, or each in the parts that its sharding says."""
    draw, places = np.random.default_rng(0), shardings or {}
    made = {path: _random(path, shape, dtype, draw, places.get(path)) for path, shape in shapes.items()}
    return jax.block_until_ready(made)


def _random(
    path: str, shape: tuple[int, ...], dtype: str, draw: np.random.Generator, sharding: Sharding | None
) -> Array:
    """Uniform values of one parameter. An accelerator makes large ones itself; small ones, of which there are many
    shapes, come from the host, so that nothing is compiled for them."""
    middle, deviation = (1.0 if path.endswith(".scale") else 0.0), 0.2
    if path.endswith(".kernel"):
        is_stacked = len(shape) in (3, 5)
        deviation = float(np.prod(shape[is_stacked:-1])) ** -0.5
    low, width = middle - deviation * 3**0.5, deviation * 2 * 3**0.5
    if np.prod(shape) >= _LARGE and jax.default_backend() != "cpu":
        return _random_on_device(jax.random.key(draw.integers(2**31)), shape, dtype, low, width, sharding)
    values = draw.random(shape, np.float32)
    values *= width
    values += low
    return jax.device_put(values.astype(dtype, copy=False), sharding)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "sharding"))
def _random_on_device(
    key: Array, shape: tuple[int, ...], dtype: str, low: float, width: float, sharding: Sharding | None
) -> Array:
    values = (low + width * jax.random.uniform(key, shape, dtype)).astype(dtype)
    return values if sharding is None else jax.lax.with_sharding_constraint(values, sharding)


def random_latents(pipe: FlashPipeline, batch: int, size: int) -> Array:
    """Unit noise as latents of square images."""
    config = pipe.config.vae or pipe.config.transformer
    assert config is not None
    side = size // DOWNSAMPLING
    return jax.random.normal(jax.random.key(2), (batch, side, side, config.latent_channels))


def random_conditioning(pipe: FlashPipeline, batch: int) -> Conditioning:
    config = pipe.config.transformer
    assert config is not None
    context, pooled = jax.random.split(jax.random.key(1))
    return Conditioning(
        jax.random.normal(context, (batch, TEXT_TOKENS, config.context_size), pipe.dtype),
        jax.random.normal(pooled, (batch, config.pooled_size), pipe.dtype),
    )


def open_side(request: Request) -> Ours:
    return Ours(request)
