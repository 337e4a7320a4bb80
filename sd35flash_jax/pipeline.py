"""FlashPipeline: the only place where all parts meet. prompt -> tokens -> conditioning -> latents -> pixels."""

import math
import operator
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8
from PIL import Image
from tqdm import tqdm

from sd35flash_jax import compilation, sampling
from sd35flash_jax.checkpoint import (
    Checkpoint,
    bundled_checkpoint,
    on_host,
    open_checkpoint,
    own_path,
    parameters,
    read_config,
    read_weights,
    with_parameters,
)
from sd35flash_jax.config import DOWNSAMPLING, TEXT_ENCODERS, ModelConfig
from sd35flash_jax.frozen import Frozen
from sd35flash_jax.kept_programs import kept
from sd35flash_jax.models.vae import VAE
from sd35flash_jax.schedule import choose_sigmas
from sd35flash_jax.text import Conditioning, encode_tokens, load_prompt_tokenizer, token_counts, tokenize

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Result:
    """What a pipeline call returns.

    `images` are PIL images, `latents` `(batch, height/8, width/8, 16)` float32 at model scale, `timings` seconds for
    each stage (compilation included where a shape is new), and `metadata` what is needed to make each image again.
    """

    images: list[Image.Image]
    latents: Float[Array, "b h w c"]
    timings: dict[str, float]
    metadata: list[dict[str, str]]


class FlashPipeline:
    """Text to image with a Stable Diffusion 3 or 3.5 checkpoint.

    Encoding, denoising and decoding are each compiled once for a batch, height and width. `dtype`, that of the
    components' parameters, is "bfloat16" or "float32"; the latter is strict parity mode, with matrix products at the
    highest precision.
    """

    def __init__(
        self,
        config: ModelConfig,
        components: Mapping[str, nnx.Module],
        tokenizers: "Mapping[str, Tokenizer]",
        max_t5_tokens: int | None = None,
    ):
        if not components:
            raise ValueError("there is no component to run: the checkpoint is empty, or all of it was left out")
        if max_t5_tokens is not None and max_t5_tokens < 1:
            raise ValueError(f"max_t5_tokens must be positive, not {max_t5_tokens}")
        for name, tokenizer in tokenizers.items():
            if not hasattr(tokenizer, "encode_batch"):
                raise ValueError(
                    f"the tokenizer of {name} is not one of the tokenizers library: load it with "
                    "sd35flash_jax.text.load_prompt_tokenizer"
                )
        self.config = config
        self.components = dict(components)
        self.tokenizers = dict(tokenizers)
        self.max_t5_tokens = config.t5_tokens if max_t5_tokens is None else max_t5_tokens
        self.loras: list[tuple[str, float]] = []
        self._originals: dict[str, dict[str, np.ndarray]] = {}
        self._frozen_components: dict[str, tuple[nnx.Module, Frozen]] = {}
        parameter = jax.tree.leaves(self.components)[0]
        self.dtype = parameter.dtype.name
        # Inputs are put where the parameters are: JAX compiles anew for an array it may place as it likes.
        self.placement = parameter.sharding
        self._keeps_programs = False

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike | None = None,
        dtype: str = "bfloat16",
        text_encoders: str | Sequence[str] | None = None,
        max_t5_tokens: int | None = None,
        device: jax.Device | jax.sharding.Sharding | None = None,
        progress: bool = False,
        compile_for: tuple[int, int | None, int | None] | None = None,
    ) -> "FlashPipeline":
        """Load a checkpoint directory, and set up compilation as `sd35flash_jax.compilation` says.

        Args:
            path: what `sd35flash-jax convert` made; the bundled model unless given.
            dtype: "bfloat16" or "float32".
            text_encoders: which of "clip_l", "clip_g" and "t5" to load; the others give zeros. All that the
                checkpoint has unless given.
            max_t5_tokens: how many tokens T5 reads; the checkpoint's own number unless given.
            device: where all parameters live, a device or a sharding that replicates; JAX's default device unless
                given.
            progress: show a bar on standard error.
            compile_for: a batch, height and width, as `compile` takes them, that are compiled for while the weights
                are read. On an accelerator one step is run as well, with the memory that an image takes. Programs are
                traced in the first process alone (`kept_programs`).

        Raises:
            ValueError: an option is out of range.
            CheckpointError: the checkpoint is missing, damaged, or lacks a component that was asked for; or no path is
                given and no model is bundled.
        """
        path = bundled_checkpoint() if path is None else Path(path).expanduser()
        compilation.configure()
        if isinstance(device, jax.sharding.Sharding) and not device.is_fully_replicated:
            raise ValueError(f"the pipeline runs on a device or on a sharding that replicates, not on {device}")
        text_encoders = (text_encoders,) if isinstance(text_encoders, str) else text_encoders
        unknown = set(text_encoders or ()) - set(TEXT_ENCODERS)
        if unknown:
            raise ValueError(f"there is no text encoder {unknown.pop()!r}; choose from {', '.join(TEXT_ENCODERS)}")
        present = read_config(path).components
        wanted = [name for name in present if name not in TEXT_ENCODERS]
        wanted += [name for name in present if name in TEXT_ENCODERS] if text_encoders is None else text_encoders
        opened = open_checkpoint(path, wanted, dtype, device, stacked=None)
        # What takes Python's time goes on beside what does not, one after another: threads that want Python at the same
        # time take longer together.
        beside = ThreadPoolExecutor(1)
        try:
            pipe = cls(opened.config, opened.components, {}, max_t5_tokens)
            if compile_for is not None:
                pipe._keeps_programs = _is_one_default_device(pipe.placement)
                compiled = beside.submit(pipe.compile, *compile_for, progress)
            tokenizers = beside.submit(_load_tokenizers, opened.tokenizers)
            weights = read_weights(path, opened, progress)
            if compile_for is not None:
                compiled.result()
            pipe.components = weights.components
            if compile_for is not None:
                pipe._run_once(*compile_for)
            pipe.tokenizers = tokenizers.result()
            return pipe
        finally:
            beside.shutdown(wait=False)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, max_t5_tokens: int | None = None) -> "FlashPipeline":
        """A pipeline of what `load_checkpoint` returned."""
        return cls(checkpoint.config, checkpoint.components, _load_tokenizers(checkpoint.tokenizers), max_t5_tokens)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        steps: int = 4,
        guidance: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        sigmas: Sequence[float] | np.ndarray | None = None,
        progress: bool = False,
    ) -> Result:
        """Make one image a prompt; image i starts from the noise of `seed + i`.

        Args:
            prompt: one prompt, or one for each image.
            negative_prompt: what to guide away from, when guidance is above 1.
            steps: Euler steps.
            guidance: classifier-free guidance; up to 1 there is none.
            height, width: pixels, multiples of 16; the model's own size, `config.default_size`, unless given.
            seed: in [0, 2**32).
            sigmas: noise levels in place of `steps`, strictly falling in (0, 1].
            progress: show a bar on standard error.

        Raises:
            ValueError: an option is out of range, or the checkpoint lacks a component.
            FloatingPointError: the image came out as NaN.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        check_request(self.config, len(prompts), steps, sigmas, guidance, height, width, seed)
        levels = choose_sigmas(self.config.schedule, steps, sigmas)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
        if len(negatives) != len(prompts):
            raise ValueError(f"{len(negatives)} negative prompts do not fit {len(prompts)} prompts")
        noise = self.noise(seed, len(prompts), *_size(self.config, height, width))
        clock = _Stopwatch()
        with clock.time("encode"):
            conditioning = self.encode(prompts)
            negative = self.encode(negatives) if guidance > 1 else None
            jax.block_until_ready((conditioning, negative))
        with clock.time("denoise"):
            latents = self.denoise(
                noise, conditioning, guidance=guidance, negative=negative, sigmas=levels, progress=progress
            )
            latents.block_until_ready()
        with clock.time("decode"):
            images = [Image.fromarray(image) for image in image_bytes(self.decode(latents))]
        shared = {
            "steps": str(len(levels) - 1),
            "sigmas": " ".join(f"{level:.9g}" for level in levels),
            "guidance": f"{guidance:g}",
            "dtype": self.dtype,
            "text_encoders": " ".join(name for name in TEXT_ENCODERS if name in self.components),
            "max_t5_tokens": str(self.max_t5_tokens),
            "software": f"sd35flash-jax {version('sd35flash-jax')}",
        }
        if self.loras:
            shared["loras"] = ", ".join(f"{name} {scale:g}" for name, scale in self.loras)
        metadata = [{"prompt": text, "seed": str(seed + index)} | shared for index, text in enumerate(prompts)]
        if guidance > 1:
            metadata = [own | {"negative_prompt": away} for own, away in zip(metadata, negatives)]
        return Result(images, latents, clock.seconds, metadata)

    def compile(
        self, batch: int = 1, height: int | None = None, width: int | None = None, progress: bool = False
    ) -> None:
        """Compile all that a call for so many images of this size runs, so that the first one need not wait for it.
        `progress` shows a bar on standard error, below one that is there already.

        Raises:
            ValueError: a size is not a positive multiple of 16 or too large for the model, the batch is not positive,
                or the checkpoint lacks the transformer or the VAE.
        """
        height, width = _size(self.config, height, width)
        check_size(self.config, height, width)
        seeds = _seeds(0, batch)
        model = self._component("transformer").config
        transformer, vae = self._frozen("transformer"), self._frozen("vae")
        counts = token_counts(self.config, self.max_t5_tokens)
        encoders = {name: self._frozen(name) for name in TEXT_ENCODERS if name in self.components}

        # What a call passes, in the places where it does: the host's arrays have none.
        placed = partial(jax.ShapeDtypeStruct, sharding=self.placement)
        tokens = {name: jax.ShapeDtypeStruct((batch, counts[name]), np.int32) for name in encoders}
        context = placed((batch, counts["clip_l"] + counts["t5"], model.context_size), self.dtype)
        pooled = placed((batch, model.pooled_size), self.dtype)
        shape = (height // DOWNSAMPLING, width // DOWNSAMPLING, model.latent_channels)
        latents, pixels = placed((batch, *shape), np.float32), placed((batch, height, width, 3), np.float32)
        timesteps = jax.ShapeDtypeStruct((sampling.STEPS_MODULATED, batch), np.float32)
        weight = jax.ShapeDtypeStruct((), np.float32)

        with ThreadPoolExecutor() as compilers:
            compiling = []

            def start(program: Any) -> None:
                compiling.append(compilers.submit(program.compile))

            start(_noise.lower(seeds, shape))
            start(_round_to_bytes.lower(pixels))
            with self._precision():
                if encoders:
                    options = {"config": self.config, "t5_tokens": self.max_t5_tokens}
                    start(encode_tokens.lower(encoders, tokens, **options))
                prepared = sampling.modulations.lower(transformer, timesteps, pooled)
                start(prepared)
                modulation = jax.tree.map(lambda out: placed(out.shape, out.dtype), prepared.out_info)
                first = jax.ShapeDtypeStruct((), np.int32)
                start(sampling.add_velocity.lower(transformer, latents, modulation, first, context, weight, latents))
                start(_decode.lower(vae, latents))
            waiting = as_completed(compiling)
            # On the second line: weights may be loading on the first.
            for compiled in tqdm(waiting, "compiling", len(compiling), False, position=1, disable=not progress):
                compiled.result()

    def _run_once(self, batch: int, height: int | None, width: int | None) -> None:
        """On an accelerator, encode, evaluate and decode nothing in particular, if there are text encoders: a program
        that an earlier process compiled sets up its kernels when it first runs, which takes as long as several images.
        """
        counts = token_counts(self.config, self.max_t5_tokens)
        tokens = {name: np.zeros((batch, counts[name]), np.int32) for name in TEXT_ENCODERS if name in self.components}
        if on_host(self.placement) or not tokens:
            return
        height, width = _size(self.config, height, width)
        latents = self.denoise(self.noise(0, batch, height, width), self.encode_tokens(tokens), steps=1)
        self.decode(latents).block_until_ready()

    def load_lora(self, path: str | os.PathLike, scale: float = 1.0) -> None:
        """Merge a LoRA into the loaded components, on top of those loaded before. Nothing recompiles.

        The weights that it replaces are kept in host memory for `unload_lora`. Interrupted while it merges, it unloads
        every LoRA.

        Args:
            path: a safetensors file with the key names of diffusers, PEFT or kohya, or the folder of a PEFT adapter.
            scale: what the LoRA is multiplied by.

        Raises:
            ValueError: the file is damaged, is not a plain LoRA, or does not fit the loaded components; the message
                names every tensor at fault, and nothing is changed.
        """
        from conversion.lora import merged, open_lora

        updates = open_lora(path, scale, self.config, self.components)
        self.loras.append((os.path.basename(os.path.abspath(path)), scale))
        try:
            for name, params in updates.items():
                for param, layers in params.items():
                    module = self.components[name]
                    places: dict[str, dict[int | None, list]] = {}
                    for layer, found in layers.items():
                        own, index = own_path(module, param, layer)
                        places.setdefault(own, {})[index] = found
                    present = parameters(module)
                    arrays = {own: np.asarray(present[own]) for own in places}
                    self._originals[name] = arrays | self._originals.get(name, {})
                    self._put(name, {own: merged(array, places[own]) for own, array in arrays.items()})
        except BaseException:
            self.unload_lora()  # Half a LoRA is worse than none.
            raise

    def unload_lora(self) -> None:
        """Put back every weight that LoRAs have replaced, bit for bit."""
        for name, arrays in self._originals.items():
            self._put(name, arrays)
        self._originals.clear()
        self.loras.clear()

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts: context `(batch, tokens, context_size)` and pooled `(batch, pooled_size)`.

        Raises:
            ValueError: no prompt, or no text encoder is loaded.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoders = {name: self.components[name] for name in TEXT_ENCODERS if name in self.components}
        if not prompts:
            raise ValueError("there is no prompt to encode")
        if self.config.transformer is None:
            raise ValueError("this checkpoint has no transformer, whose context the encoders' states are shaped for")
        if not encoders:
            raise ValueError("no text encoder is loaded: pass a Conditioning built from arrays to denoise instead")
        unread = [name for name in encoders if name not in self.tokenizers]
        if unread:
            raise ValueError(f"the checkpoint has no tokenizer for {', '.join(unread)}")
        counts = token_counts(self.config, self.max_t5_tokens)
        return self.encode_tokens(tokenize({name: self.tokenizers[name] for name in encoders}, prompts, counts))

    def encode_tokens(self, tokens: Mapping[str, Int[np.ndarray, "b t"]]) -> Conditioning:
        """Encode token ids of some of the text encoders; the others give zeros."""
        encoders = {name: self._frozen(name) for name in tokens}
        with self._precision():
            return encode_tokens(encoders, dict(tokens), config=self.config, t5_tokens=self.max_t5_tokens)

    def noise(self, seed: int, batch: int, height: int, width: int) -> Float[Array, "b h w c"]:
        """Unit noise `(batch, height/8, width/8, 16)` float32; row i is the noise of `seed + i` in any batch.

        Raises:
            ValueError: a size is not a positive multiple of 16 or too large for the model, or a seed not in [0, 2**32).
        """
        check_size(self.config, height, width)
        seeds = _seeds(seed, batch)
        channels = self._component("transformer").config.latent_channels
        return _noise(seeds, (height // DOWNSAMPLING, width // DOWNSAMPLING, channels))

    def denoise(
        self,
        noise: Float[Array | np.ndarray, "b h w c"],
        conditioning: Conditioning,
        *,
        steps: int = 4,
        guidance: float = 1.0,
        negative: Conditioning | None = None,
        sigmas: Sequence[float] | np.ndarray | None = None,
        progress: bool = False,
    ) -> Float[Array, "b h w c"]:
        """Noise to latents of the same shape, float32, model scale.

        Args:
            noise: `(batch, height/8, width/8, 16)`, at the level of the first sigma.
            conditioning: one row for each image, or one row for all.
            steps: Euler steps, spaced by the checkpoint's schedule.
            guidance: classifier-free guidance; up to 1 there is none.
            negative: what to guide away from; needed when guidance is above 1.
            sigmas: noise levels in place of `steps`, strictly falling in (0, 1].
            progress: show a bar on standard error.

        Raises:
            ValueError: shapes do not fit, or an option is out of range.
        """
        transformer = self._component("transformer")
        levels = choose_sigmas(self.config.schedule, steps, sigmas)
        _check_guidance(guidance)
        if guidance > 1 and negative is None:
            raise ValueError("guidance above 1 needs a negative Conditioning to guide away from, such as encode([''])")
        latents = self._latents(noise, transformer.config.latent_channels)
        conditioning = self._conditioning(conditioning, len(latents))
        negative = conditioning if negative is None or guidance <= 1 else self._conditioning(negative, len(latents))
        if negative.context.shape != conditioning.context.shape:
            raise ValueError(
                f"the negative context has {negative.context.shape[1]} tokens and the positive one "
                f"{conditioning.context.shape[1]}; encode both with the same number"
            )
        with self._precision(), tqdm(total=len(levels) - 1, desc="denoising", disable=not progress) as bar:
            return sampling.denoise(
                self._frozen("transformer"),
                latents,
                conditioning,
                negative,
                levels,
                guidance,
                bar.update if progress else None,
            )

    def velocity(
        self,
        latents: Float[Array | np.ndarray, "b h w c"],
        timestep: float | Float[Array | np.ndarray, " b"],
        conditioning: Conditioning,
    ) -> Float[Array, "b h w c"]:
        """One transformer evaluation, float32; `timestep` in [0, 1000], one or one for each image.

        Raises:
            ValueError: shapes do not fit, or the timestep is out of range.
        """
        transformer = self._component("transformer")
        latents = self._latents(latents, transformer.config.latent_channels)
        steps = np.asarray(timestep, np.float32)
        if steps.shape not in ((), (len(latents),)) or not ((steps >= 0) & (steps <= 1000)).all():
            raise ValueError(f"timestep must be one number in [0, 1000], or one for each image, not {timestep}")
        with self._precision():
            return sampling.velocity(
                self._frozen("transformer"),
                latents,
                np.broadcast_to(steps, len(latents)),
                self._conditioning(conditioning, len(latents)),
            )

    def decode(self, latents: Float[Array | np.ndarray, "b h w c"]) -> Float[Array, "b H W 3"]:
        """Model-scale latents to pixels `(batch, height, width, 3)` float32 in [0, 1]."""
        vae = self._component("vae")
        with self._precision():
            return _decode(self._frozen("vae"), self._latents(latents, vae.config.latent_channels))

    def encode_image(self, pixels: Float[Array | np.ndarray, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Pixels in [0, 1] to the posterior mean, `(batch, height/8, width/8, 16)` float32 at model scale.

        Raises:
            ValueError: the pixels are not `(batch, height, width, 3)` with sizes divisible by 16.
        """
        if not jnp.issubdtype(jnp.asarray(pixels).dtype, jnp.floating):
            raise ValueError(f"pixels must be floats in [0, 1], not {jnp.asarray(pixels).dtype}")
        pixels = self._placed(pixels, jnp.float32)
        if pixels.ndim != 4 or pixels.shape[-1] != 3:
            raise ValueError(f"pixels must be (batch, height, width, 3), not {pixels.shape}")
        check_size(self.config, *pixels.shape[1:3])
        with self._precision():
            return _encode_image(self._frozen("vae"), pixels)

    def _component(self, name: str) -> Any:
        if name not in self.components:
            raise ValueError(f"this checkpoint has no {name}; convert a source that holds one")
        return self.components[name]

    def _frozen(self, name: str) -> Frozen:
        module = self._component(name)
        if name not in self._frozen_components or self._frozen_components[name][0] is not module:
            kind = type(module)
            is_ours = kind.__module__.startswith("sd35flash_jax.")
            identity = f"{name}: {kind.__qualname__} of {module.config}" if self._keeps_programs and is_ours else None
            self._frozen_components[name] = module, Frozen(module, identity)
        return self._frozen_components[name][1]

    def _put(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace some of a component's parameters, placed as the ones before."""
        module = self.components[name]
        present = parameters(module)
        placed = {param: jax.device_put(array, present[param].sharding) for param, array in arrays.items()}
        self.components[name] = with_parameters(module, placed)
        self._frozen_components.pop(name, None)

    def _placed(self, array: Any, dtype: Any) -> Array:
        if (
            isinstance(array, jax.Array)
            and array.committed
            and (array.dtype, array.sharding) == (dtype, self.placement)
        ):
            return array
        return jax.device_put(jnp.asarray(array, dtype), self.placement)

    def _precision(self) -> AbstractContextManager[object]:
        return jax.default_matmul_precision("highest") if self.dtype == "float32" else nullcontext()

    def _latents(self, latents: Any, channels: int) -> Float[Array, "b h w c"]:
        latents = self._placed(latents, jnp.float32)
        if latents.ndim != 4 or latents.shape[-1] != channels or not len(latents):
            raise ValueError(f"latents must be (batch, height/8, width/8, {channels}), not {latents.shape}")
        check_size(self.config, *(DOWNSAMPLING * side for side in latents.shape[1:3]))
        return latents

    def _conditioning(self, conditioning: Conditioning, batch: int) -> Conditioning:
        config = self._component("transformer").config
        context = self._placed(conditioning.context, jnp.dtype(self.dtype))
        pooled = self._placed(conditioning.pooled, jnp.dtype(self.dtype))
        if context.ndim != 3 or context.shape[-1] != config.context_size:
            raise ValueError(f"context must be (batch, tokens, {config.context_size}), not {context.shape}")
        if pooled.ndim != 2 or pooled.shape[-1] != config.pooled_size:
            raise ValueError(f"pooled must be (batch, {config.pooled_size}), not {pooled.shape}")
        if {len(context), len(pooled)} - {1, batch}:
            raise ValueError(
                f"conditioning for {len(context)} images (context) and {len(pooled)} (pooled) does not fit a batch "
                f"of {batch}"
            )
        return Conditioning(
            jnp.broadcast_to(context, (batch, *context.shape[1:])), jnp.broadcast_to(pooled, (batch, *pooled.shape[1:]))
        )


def _is_one_default_device(placement: jax.sharding.Sharding) -> bool:
    devices: set[Any] = placement.device_set
    return [device.platform for device in devices] == [jax.default_backend()]


def _load_tokenizers(folders: Mapping[str, Path]) -> "dict[str, Tokenizer]":
    return {name: load_prompt_tokenizer(name, folder) for name, folder in folders.items()}


def image_bytes(pixels: Float[Array, "b H W 3"]) -> UInt8[np.ndarray, "b H W 3"]:
    """Pixels in [0, 1], rounded to bytes on their device and brought to the host.

    Raises:
        FloatingPointError: a pixel is NaN.
    """
    rounded, finite = jax.device_get(_round_to_bytes(pixels))
    if not finite:
        raise FloatingPointError(
            "the image came out as NaN: try a smaller guidance or dtype float32, and check the checkpoint"
        )
    return rounded


def check_request(
    config: ModelConfig,
    images: int,
    steps: int,
    sigmas: Sequence[float] | np.ndarray | None,
    guidance: float,
    height: int | None,
    width: int | None,
    seed: int,
) -> None:
    """Refuse what a pipeline call would refuse; a command does so before it loads the weights.

    Raises:
        ValueError: an option is out of range.
    """
    check_size(config, *_size(config, height, width))
    choose_sigmas(config.schedule, steps, sigmas)
    _check_guidance(guidance)
    _seeds(seed, images)


def _size(config: ModelConfig, height: int | None, width: int | None) -> tuple[int, int]:
    return config.default_size if height is None else height, config.default_size if width is None else width


def _check_guidance(guidance: float) -> None:
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, not {guidance}")


def _seeds(seed: int, batch: int) -> np.ndarray:
    seed, batch = operator.index(seed), operator.index(batch)
    if batch < 1:
        raise ValueError(f"there must be at least one image, not {batch}")
    if not 0 <= seed <= 2**32 - batch:
        raise ValueError(f"seeds must be in [0, 2**32), not {seed} to {seed + batch - 1}")
    return np.arange(seed, seed + batch, dtype=np.uint32)


def check_size(config: ModelConfig, height: int, width: int) -> None:
    """Refuse an image size, in pixels, that the model cannot make.

    Raises:
        ValueError: a side is not a positive multiple of 16, or has more patches than the position table.
    """
    patch = config.transformer.patch_size if config.transformer else 1
    unit = DOWNSAMPLING * patch
    for side, pixels in (("height", height), ("width", width)):
        if pixels <= 0 or pixels % unit:
            below = max(pixels // unit, 1) * unit
            raise ValueError(f"{side} {pixels} is not a positive multiple of {unit}; try {below} or {below + unit}")
        if config.transformer and pixels > config.transformer.position_table_side * unit:
            largest = config.transformer.position_table_side * unit
            raise ValueError(f"{side} {pixels} is beyond the model's position table, which ends at {largest}")


class _Stopwatch:
    """Wall-clock seconds of named stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


@partial(jax.jit, static_argnames="shape")
def _noise(seeds: Int[Array, " b"], shape: tuple[int, int, int]) -> Float[Array, "b h w c"]:
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


@jax.jit
@kept
def _decode(vae: Frozen[VAE], latents: Float[Array, "b h w c"]) -> Float[Array, "b H W 3"]:
    return vae.module.decode(latents)


@jax.jit
def _round_to_bytes(pixels: Float[Array, "b H W 3"]) -> tuple[UInt8[Array, "b H W 3"], Bool[Array, ""]]:
    return jnp.round(pixels * 255).astype(jnp.uint8), jnp.isfinite(pixels).all()


@jax.jit
def _encode_image(vae: Frozen[VAE], pixels: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
    return vae.module.encode(pixels)
