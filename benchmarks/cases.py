"""What is measured: the request, and the cases that it makes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from benchmarks.flops import clip_flops, decoder_flops, t5_flops, transformer_flops
from sd35flash_jax.config import TEXT_ENCODERS, CLIPConfig, ModelConfig, T5Config
from sd35flash_jax.pipeline import DOWNSAMPLING, check_size

CLIP_TOKENS, T5_TOKENS = CLIPConfig.positions, T5Config.max_tokens
TEXT_TOKENS = CLIP_TOKENS + T5_TOKENS
LOOP_STEPS = 16
TIMESTEP = 857.0

ITEMS: dict[str, str] = {
    "clip_l": f"CLIP-L, {CLIP_TOKENS} tokens",
    "clip_g": f"CLIP-G, {CLIP_TOKENS} tokens",
    "t5": f"T5, {T5_TOKENS} tokens",
    "encode": "all text encoders",
    "evaluation": "transformer evaluation",
    "step": f"the same in a loop of {LOOP_STEPS}, each",
    "denoise": "denoising, {steps} steps",
    "decode": "VAE decoding",
    "image": "denoising and decoding",
    "prompt_to_pixels": "token ids to bytes on the host",
}
"""Every item and what it is called in tables. The prompt is already encoded in all of the last but one."""

TEXT_ITEMS = (*TEXT_ENCODERS, "encode")


@dataclass(frozen=True)
class Case:
    """One item at one batch and, unless it is about text alone, one square size in pixels."""

    item: str
    size: int | None
    batch: int


@dataclass(frozen=True)
class Request:
    """What to measure, and how long: `repeats` and `seconds` bound each case's timed runs."""

    model: ModelConfig
    sizes: tuple[int, ...]
    batches: tuple[int, ...]
    items: tuple[str, ...]
    dtype: str
    steps: int
    repeats: int
    seconds: float
    platform: str | None = None
    """Where the peers run: "cpu" or "gpu", as our own side found."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Request":
        lists = {name: tuple(data[name]) for name in ("sizes", "batches", "items")}
        return cls(**data | lists | {"model": ModelConfig.from_json(data["model"])})

    def cases(self) -> Iterator[Case]:
        """Text items first, then each size and batch; items that use the same program follow one another."""
        wanted = [item for item in ITEMS if item in self.items]
        for batch in self.batches:
            yield from (Case(item, None, batch) for item in wanted if item in TEXT_ITEMS)
        for size in self.sizes:
            for batch in self.batches:
                yield from (Case(item, size, batch) for item in wanted if item not in TEXT_ITEMS)


def make_request(
    model: ModelConfig,
    sizes: Sequence[int],
    batches: Sequence[int],
    items: Sequence[str] | None,
    dtype: str,
    steps: int,
    repeats: int,
    seconds: float,
) -> Request:
    """A request of all items unless some are given.

    Raises:
        ValueError: an option is out of range.
    """
    unknown = [item for item in items or () if item not in ITEMS]
    if unknown:
        raise ValueError(f"there is no item {unknown[0]!r} to measure; choose from {', '.join(ITEMS)}")
    for size in sizes:
        check_size(model, size, size)
    for name, value in (("batches", min(batches)), ("steps", steps), ("repeats", repeats), ("seconds", seconds)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, not {value}")
    return Request(model, tuple(sizes), tuple(batches), tuple(items or ITEMS), dtype, steps, repeats, seconds)


class Side(Protocol):
    """One implementation, in the process that measures it."""

    items: tuple[str, ...]

    def about(self) -> dict[str, str]:
        """The device and the versions of what runs on it."""

    def gemm(self) -> float | None:
        """FLOP/s of a large matrix product in the request's dtype, where this side measures it."""

    def prepare(self, case: Case) -> Callable[[], Any]:
        """The case as a call that returns when its work is done."""

    def peak_memory(self) -> int:
        """The most bytes held so far: of the device's memory on a GPU, else of the process."""


def repetitions(item: str) -> int:
    """How often one call of an item does what its table row is about."""
    return LOOP_STEPS if item == "step" else 1


def flops(case: Case, request: Request) -> int:
    """Model arithmetic of one call of a case, over `repetitions`."""
    model, side = request.model, (case.size or 0) // DOWNSAMPLING
    parts: dict[str, Callable[[], int]] = {
        "clip_l": lambda: clip_flops(model.clip_l, CLIP_TOKENS) if model.clip_l else 0,
        "clip_g": lambda: clip_flops(model.clip_g, CLIP_TOKENS) if model.clip_g else 0,
        "t5": lambda: t5_flops(model.t5, T5_TOKENS) if model.t5 else 0,
        "evaluation": lambda: transformer_flops(model.transformer, side, side, TEXT_TOKENS) if model.transformer else 0,
        "decode": lambda: decoder_flops(model.vae, side, side) if model.vae else 0,
    }
    evaluations, encodings = request.steps * ["evaluation"], list(TEXT_ENCODERS)
    composed = {
        "encode": encodings,
        "step": ["evaluation"],
        "denoise": evaluations,
        "image": [*evaluations, "decode"],
        "prompt_to_pixels": [*encodings, *evaluations, "decode"],
    }
    return case.batch * sum(parts[part]() for part in composed.get(case.item, [case.item]))


def token_ids(config: CLIPConfig | T5Config, encoder: str, batch: int) -> np.ndarray:
    """Random token ids for an encoder, as a tokenizer gives them on the host: `(batch, tokens)` int32."""
    tokens = T5_TOKENS if encoder == "t5" else CLIP_TOKENS
    return np.random.default_rng(0).integers(1, config.vocabulary, (batch, tokens)).astype(np.int32)
