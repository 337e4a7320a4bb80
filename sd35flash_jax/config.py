"""Every component's shape, in frozen dataclasses: the published presets, and JSON in and out."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

Size = Annotated[int, Field(gt=0, le=2**24)]
Count = Annotated[int, Field(ge=0, le=2**24)]
Layers = Annotated[int, Field(gt=0, le=1024)]
Sigma = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]

TEXT_ENCODERS = ("clip_l", "clip_g", "t5")
COMPONENTS = ("transformer", "vae", *TEXT_ENCODERS)
DOWNSAMPLING = 8
"""Pixels of a side to one latent of it."""


@dataclass(frozen=True)
class MMDiTConfig:
    """The multimodal diffusion transformer (SD3 paper, arXiv 2403.03206, section 4 and figure 2).

    The first `dual_attention_blocks` blocks have a second, image-only attention (MMDiT-X).
    `position_table_side` is the side, in patches, of the stored table of 2-D sin-cos embeddings,
    and `position_base` the side at which its coordinates advance by one per patch.
    """

    depth: Layers
    heads: Size
    head_size: Size = 64
    patch_size: Size = 2
    latent_channels: Size = 16
    context_size: Size = 4096
    pooled_size: Size = 2048
    position_table_side: Size = 192
    position_base: Size = 64
    qk_norm: bool = False
    dual_attention_blocks: Count = 0

    @property
    def hidden_size(self) -> int:
        return self.heads * self.head_size


@dataclass(frozen=True)
class VAEConfig:
    """The 16-channel autoencoder. `channels` lists the widths of the four levels, each at half the
    resolution of the one before. Model-scale latents are `(raw latents - shift) * scale`."""

    channels: tuple[Size, Size, Size, Size] = (128, 256, 512, 512)
    blocks_per_level: Layers = 2
    latent_channels: Size = 16
    norm_groups: Size = 32
    scale: Positive = 1.5305
    shift: Annotated[float, Field(allow_inf_nan=False)] = 0.0609


@dataclass(frozen=True)
class CLIPConfig:
    """A CLIP text encoder; CLIP-L and OpenCLIP bigG differ in their sizes and activation alone.

    The pooled state is read at the first `eos_token_id`. As in transformers, the value 2, which the published
    configurations carry by mistake, stands for the highest token id in the prompt.
    """

    hidden_size: Size
    layers: Layers
    heads: Size
    feed_forward_size: Size
    projection_size: Size
    activation: Literal["quick_gelu", "gelu"]
    vocabulary: Size = 49408
    positions: Size = 77
    norm_epsilon: Positive = 1e-5
    eos_token_id: Count = 2


@dataclass(frozen=True)
class T5Config:
    """The encoder of a T5 v1.1 (gated tanh-GELU, no biases, relative positions).

    Its weights take any number of tokens; `max_tokens` is how many the transformer was trained with.
    """

    hidden_size: Size = 4096
    layers: Layers = 24
    heads: Size = 64
    head_size: Size = 64
    feed_forward_size: Size = 10240
    vocabulary: Size = 32128
    position_buckets: Size = 32
    position_max_distance: Size = 128
    norm_epsilon: Positive = 1e-6
    max_tokens: Size = 256


@dataclass(frozen=True)
class ScheduleConfig:
    """The rectified flow's schedule. `sigmas` holds the distilled schedules a checkpoint was trained for, at most
    one for each step count, without the final 0; other step counts are spaced by `shift`."""

    shift: Positive = 3.0
    sigmas: tuple[tuple[Sigma, ...], ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """A whole text-to-image model; a component that a checkpoint does not hold is None."""

    transformer: MMDiTConfig | None = None
    vae: VAEConfig | None = None
    clip_l: CLIPConfig | None = None
    clip_g: CLIPConfig | None = None
    t5: T5Config | None = None
    schedule: ScheduleConfig = ScheduleConfig()

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that are present, in the order of `COMPONENTS`."""
        return tuple(name for name in COMPONENTS if getattr(self, name) is not None)

    @property
    def default_size(self) -> int:
        """The side, in pixels, of the square pictures that the transformer was trained for last."""
        transformer = self.transformer or MMDiTConfig
        return transformer.position_base * transformer.patch_size * DOWNSAMPLING

    @property
    def t5_tokens(self) -> int:
        """How many tokens T5 reads unless told otherwise, or how many rows of zeros stand for it."""
        return (self.t5 or T5Config).max_tokens

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> "ModelConfig":
        """Read what `to_json` wrote.

        Raises:
            ValueError: a field is missing, unknown, of the wrong type, out of range or at odds with another; the
                message names it.
        """
        try:
            config = _ADAPTER.validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            raise ValueError(f"the model configuration is not valid: {describe_faults(error)}") from None
        _check_unknown_fields(data, config, "")
        faults = list(_inconsistencies(config))
        if faults:
            raise ValueError("the model configuration is not valid: " + "; ".join(faults))
        return config


_ADAPTER = TypeAdapter(ModelConfig)


def describe_faults(error: ValidationError) -> str:
    """Every value that a configuration got wrong, by its place."""
    return "; ".join(".".join(map(str, fault["loc"])) + ": " + fault["msg"] for fault in error.errors())


def _check_unknown_fields(data: dict[str, Any], config: Any, prefix: str) -> None:
    for key, value in data.items():
        if key not in {field.name for field in dataclasses.fields(config)}:
            raise ValueError(f"the model configuration is not valid: {prefix}{key} is not a known field")
        part = getattr(config, key)
        if dataclasses.is_dataclass(part):
            _check_unknown_fields(value, part, f"{prefix}{key}.")


def _inconsistencies(config: ModelConfig) -> Iterator[str]:
    """What the shapes of the weights alone would not show."""
    transformer, vae, t5 = config.transformer, config.vae, config.t5
    clips = {name: clip for name in ("clip_l", "clip_g") if (clip := getattr(config, name)) is not None}
    for name, clip in clips.items():
        if clip.hidden_size % clip.heads:
            yield f"{name}.hidden_size {clip.hidden_size} does not divide into {clip.heads} heads"
        if clip.projection_size != clip.hidden_size:
            yield f"{name}.projection_size {clip.projection_size} is not its hidden_size {clip.hidden_size}"
    if t5 is not None and not 4 <= t5.position_buckets < 4 * t5.position_max_distance:
        distance = t5.position_max_distance
        yield f"t5.position_buckets {t5.position_buckets} do not fit t5.position_max_distance {distance}"
    if vae is not None and any(width % vae.norm_groups for width in vae.channels):
        yield f"vae.channels {vae.channels} do not divide into {vae.norm_groups} norm_groups"
    lengths = [len(sigmas) for sigmas in config.schedule.sigmas]
    if len(set(lengths)) < len(lengths):
        yield "schedule.sigmas has two schedules of one length"
    for sigmas in config.schedule.sigmas:
        if not sigmas or min(sigmas) <= 0 or any(later >= sigma for sigma, later in zip(sigmas, sigmas[1:])):
            yield f"schedule.sigmas {list(sigmas)} do not fall strictly within (0, 1]"
    if transformer is None:
        return
    if transformer.hidden_size % 4:
        yield f"transformer.heads x head_size {transformer.hidden_size} is not a multiple of 4"
    if transformer.dual_attention_blocks > transformer.depth:
        yield f"transformer.dual_attention_blocks {transformer.dual_attention_blocks} are more than its depth"
    if t5 is not None and t5.hidden_size != transformer.context_size:
        yield f"t5.hidden_size {t5.hidden_size} is not transformer.context_size {transformer.context_size}"
    width = sum(clip.hidden_size for clip in clips.values())
    if width > transformer.context_size:
        yield f"the CLIP encoders' widths {width} are more than transformer.context_size {transformer.context_size}"
    if width > transformer.pooled_size or (len(clips) == 2 and width != transformer.pooled_size):
        yield f"the CLIP encoders' widths {width} do not make transformer.pooled_size {transformer.pooled_size}"
    if len({clip.positions for clip in clips.values()}) == 2:
        yield f"clip_l.positions {clips['clip_l'].positions} are not clip_g's {clips['clip_g'].positions}"
    if vae is not None and vae.latent_channels != transformer.latent_channels:
        yield f"vae.latent_channels {vae.latent_channels} are not transformer's {transformer.latent_channels}"


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        ValueError: the file is missing, or is not UTF-8 JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again") from None


CLIP_L = CLIPConfig(768, 12, 12, 3072, 768, "quick_gelu")
CLIP_G = CLIPConfig(1280, 32, 20, 5120, 1280, "gelu")


def _preset(transformer: MMDiTConfig) -> ModelConfig:
    return ModelConfig(transformer, VAEConfig(), CLIP_L, CLIP_G, T5Config())


_LARGE = MMDiTConfig(depth=38, heads=38, qk_norm=True)

PRESETS: dict[str, ModelConfig] = {
    "sd3-medium": _preset(MMDiTConfig(depth=24, heads=24)),
    "sd3.5-medium": _preset(
        MMDiTConfig(depth=24, heads=24, position_table_side=384, qk_norm=True, dual_attention_blocks=13)
    ),
    "sd3.5-large": _preset(_LARGE),
    "sd3.5-large-turbo": _preset(_LARGE),
}
"""The published models by name."""
