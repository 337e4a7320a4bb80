"""The benchmark against diffusers and transformers in PyTorch, eager or compiled; only a worker process imports it."""

import sys
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5EncoderModel
from transformers import T5Config as TorchT5Config

from benchmarks.cases import ITEMS, LOOP_STEPS, TEXT_TOKENS, TIMESTEP, Case, Request, token_ids
from benchmarks.machine import peak_resident_bytes, processor_name, versions
from conversion.diffusers_layout import (
    write_clip_config,
    write_t5_config,
    write_transformer_config,
    write_vae_config,
)
from sd35flash_jax.config import TEXT_ENCODERS, ModelConfig
from sd35flash_jax.pipeline import DOWNSAMPLING
from sd35flash_jax.schedule import TRAIN_TIMESTEPS, choose_sigmas


class DiffusersPeer:
    """The models of StableDiffusion3Pipeline, called as its `__call__` does but for the scheduler, whose step is the
    plain Euler update here."""

    items = tuple(ITEMS)

    def __init__(self, request: Request, compiled: bool):
        torch.set_grad_enabled(False)
        diffusers.utils.logging.set_verbosity_error()
        self.request, self.compiled = request, compiled
        self.device = torch.device("cpu" if request.platform == "cpu" else "cuda")
        self.dtype: torch.dtype = getattr(torch, request.dtype)
        self._programs: dict[str, Callable[..., Any]] = {}

    def about(self) -> dict[str, str]:
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else processor_name()
        mode = "torch.compile, reduce-overhead" if self.compiled else "eager"
        return {"device": device, "mode": mode} | versions("torch", "diffusers", "transformers")

    def gemm(self) -> None:
        """Our own side measures it."""

    def prepare(self, case: Case) -> Callable[[], Any]:
        run = self._call(case)

        def finished() -> None:
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return finished

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else peak_resident_bytes()

    def _call(self, case: Case) -> Callable[[], Any]:
        model, batch, steps = self.request.model, case.batch, self.request.steps
        names = [case.item] if case.item in TEXT_ENCODERS else [n for n in TEXT_ENCODERS if n in model.components]
        tokens = {name: token_ids(getattr(model, name), name, batch) for name in names}
        if case.size is None:
            return lambda: self._encode(tokens)
        assert model.transformer is not None and model.vae is not None
        side = case.size // DOWNSAMPLING
        noise = self._random(batch, model.vae.latent_channels, side, side)
        context = self._random(batch, TEXT_TOKENS, model.transformer.context_size)
        pooled = self._random(batch, model.transformer.pooled_size)
        calls: dict[str, Callable[[], Any]] = {
            "evaluation": lambda: self._velocity(noise, TIMESTEP, context, pooled),
            "step": lambda: self._denoise(noise, context, pooled, LOOP_STEPS),
            "denoise": lambda: self._denoise(noise, context, pooled, steps),
            "decode": lambda: self._decode(noise),
            "image": lambda: self._decode(self._denoise(noise, context, pooled, steps)),
            "prompt_to_pixels": lambda: _bytes(
                self._decode(self._denoise(self._random(*noise.shape), *self._encode(tokens), steps))
            ),
        }
        return calls[case.item]

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def _encode(self, tokens: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
        """Token ids on the host to context `(batch, tokens, 4096)` and pooled `(batch, 2048)`."""
        states = {
            name: self._program(name)(torch.from_numpy(ids).to(self.device, torch.int64))
            for name, ids in tokens.items()
        }
        assert self.request.model.transformer is not None
        width = self.request.model.transformer.context_size
        clips = [states[name] for name in ("clip_l", "clip_g") if name in states]
        parts = [states["t5"]] if "t5" in states else []
        if not clips:
            return parts[0], parts[0]
        joined = torch.cat([hidden for hidden, _ in clips], dim=-1)
        parts.insert(0, nn.functional.pad(joined, (0, width - joined.shape[-1])))
        return torch.cat(parts, dim=1), torch.cat([pooled for _, pooled in clips], dim=-1)

    def _velocity(self, latents: Tensor, timestep: float, context: Tensor, pooled: Tensor) -> Tensor:
        times = torch.full((len(latents),), timestep, device=self.device)
        return self._program("transformer")(latents, context, pooled, times)

    def _denoise(self, latents: Tensor, context: Tensor, pooled: Tensor, steps: int) -> Tensor:
        sigmas = choose_sigmas(self.request.model.schedule, steps).tolist()
        for sigma, following in zip(sigmas, sigmas[1:]):
            velocity = self._velocity(latents, sigma * TRAIN_TIMESTEPS, context, pooled)
            latents = latents + (following - sigma) * velocity
        return latents

    def _decode(self, latents: Tensor) -> Tensor:
        return (self._program("vae")(latents) / 2 + 0.5).clamp(0, 1)

    def _program(self, name: str) -> Callable[..., Any]:
        """A component as a function of tensors, made when it is first needed."""
        if name not in self._programs:
            function = _function(name, random_model(name, self.request.model, self.device, self.dtype))
            self._programs[name] = _compiled(name, function) if self.compiled else function
        return self._programs[name]


def random_model(name: str, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A component at its configuration's size, its parameters drawn where they stay."""
    part = getattr(config, name)
    with torch.device("meta"):
        if name == "transformer":
            model = SD3Transformer2DModel.from_config(write_transformer_config(part))
        elif name == "vae":
            model = AutoencoderKL.from_config(write_vae_config(part))
        elif name == "t5":
            model = T5EncoderModel(TorchT5Config.from_dict(write_t5_config(part)))
        else:
            model = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(write_clip_config(part)))
    model = model.to(dtype).to_empty(device=device)
    for path, parameter in model.named_parameters():
        if parameter.ndim > 1:
            is_table = path.endswith(("embedding.weight", "shared.weight", "embed_tokens.weight"))
            parameter.normal_(0, 0.2 if is_table else parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(1.0 if path.endswith("weight") else 0.0, 0.2)
    for path, buffer in model.named_buffers():
        if buffer.dtype.is_floating_point:
            buffer.normal_(0, 0.2)
        elif path.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.numel(), device=device).expand_as(buffer))
        else:
            raise ValueError(f"{path} of {name} is a buffer that this benchmark does not know")
    # The layout that PyTorch recommends for convolutions.
    return model.eval().to(memory_format=torch.channels_last) if name == "vae" else model.eval()


def _function(name: str, model: Any) -> Callable[..., Any]:
    def transformer(latents: Tensor, context: Tensor, pooled: Tensor, times: Tensor) -> Tensor:
        return model(latents, context, pooled, times, return_dict=False)[0]

    def vae(latents: Tensor) -> Tensor:
        raw = latents / model.config.scaling_factor + model.config.shift_factor
        return model.decode(raw, return_dict=False)[0]

    def t5(ids: Tensor) -> Tensor:
        return model(ids)[0]

    def clip(ids: Tensor) -> tuple[Tensor, Tensor]:
        encoded = model(ids, output_hidden_states=True)
        return encoded.hidden_states[-2], encoded.text_embeds

    functions: dict[str, Callable[..., Any]] = {"transformer": transformer, "vae": vae, "t5": t5}
    return functions.get(name, clip)


def _compiled(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with CUDA graphs, a program for each shape; as one graph unless PyTorch cannot."""
    torch._dynamo.config.recompile_limit = 64
    options: dict[str, Any] = {"mode": "reduce-overhead", "dynamic": False}
    whole, broken = (torch.compile(function, fullgraph=fullgraph, **options) for fullgraph in (True, False))
    chosen = None

    def run(*inputs: Tensor) -> Any:
        nonlocal chosen
        if chosen is None:
            function(*inputs)  # transformers installs hooks in its first call, which cannot be compiled.
            chosen = whole
        torch.compiler.cudagraph_mark_step_begin()
        try:
            result = chosen(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            if chosen is broken:
                raise
            print(f"{name} compiles with graph breaks: {str(error).splitlines()[0]}", file=sys.stderr)
            chosen = broken
            result = chosen(*inputs)
        # The next run of a CUDA graph writes over its outputs.
        return result.clone() if isinstance(result, Tensor) else tuple(part.clone() for part in result)

    return run


def _bytes(pixels: Tensor) -> np.ndarray:
    """Pixels in [0, 1], `(batch, 3, height, width)`, as bytes on the host, channels last."""
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def open_side(request: Request, compiled: bool) -> DiffusersPeer:
    return DiffusersPeer(request, compiled)
