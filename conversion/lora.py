"""LoRA files: low-rank updates of other projects' weights, carried to our parameters by the conversion tables.

A LoRA names weights `(out, in)` and holds two factors for each, down `(rank, in)` and up `(out, rank)`; it adds
`scale * alpha / rank * up @ down`. A table's rule turns source weights into a parameter by moving their elements, so
it turns what is added to the sources into what is added to the parameter just as well.
"""

import json
import math
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from conversion import diffusers_layout, single_file_layout
from conversion.rules import Rule, Shape
from conversion.safetensors_file import Tensor, open_safetensors
from sd35flash_jax.checkpoint import parameter_shapes
from sd35flash_jax.config import ModelConfig, read_json

PARTS = {
    ".lora_A.weight": "down",  # PEFT, and diffusers today
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",  # diffusers before PEFT
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down",  # kohya
    ".lora_up.weight": "up",
    ".alpha": "alpha",
}
"""How a key ends, and what its tensor is."""

PEFT_PREFIX = "base_model.model."
DOTTED_PREFIXES = {
    "transformer": ("transformer.", PEFT_PREFIX, "diffusion_model.", ""),
    "clip_l": ("text_encoder.",),
    "clip_g": ("text_encoder_2.",),
    "t5": ("text_encoder_3.",),
}
"""What stands before a weight's name in the styles of diffusers and PEFT."""

UNDERSCORED_PREFIXES = {
    "transformer": ("lora_unet_", "lora_transformer_"),
    "clip_l": ("lora_te1_",),
    "clip_g": ("lora_te2_",),
    "t5": ("lora_te3_",),
}
"""The same in kohya's style, which writes underscores for the dots of the name."""

OTHER_METHODS = {"dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa"}
"""What stands in the keys of methods that are not supported."""

FILE_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""How PEFT and diffusers name the file in a folder."""


@dataclass(frozen=True)
class Update:
    """What a LoRA adds to one parameter, or to one layer of a stacked one, through one of its rule's sources."""

    rule: Rule
    source: str
    source_shapes: Sequence[Shape]
    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> np.ndarray:
        down, up = (tensor.read().astype(np.float32).reshape(tensor.shape[0], -1) for tensor in (self.down, self.up))
        # Laid out column by column, which most rules transpose: the sum with the parameter then runs along its memory.
        product = (down.T @ (np.float32(self.scale) * up).T).T
        return self.rule.transform.forward(
            [
                product.reshape(shape) if source == self.source else np.zeros(shape, np.float32, "F")
                for source, shape in zip(self.rule.sources, self.source_shapes)
            ]
        )


LayerUpdates = dict[int | None, list[Update]]
"""A parameter's updates by layer, or by None where the parameter is not stacked."""

Updates = dict[str, dict[str, LayerUpdates]]
"""By component and parameter."""


def updated(piece: np.ndarray, updates: Iterable[Update]) -> np.ndarray:
    """A parameter, or its layer, with the updates added; float32, for the caller to round once."""
    return sum((update.delta() for update in updates), start=piece.astype(np.float32))


def merged(array: np.ndarray, layers: LayerUpdates) -> np.ndarray:
    """A whole parameter with the updates added, each element rounded once to its dtype."""
    result = np.array(array)
    for layer, updates in layers.items():
        index = ... if layer is None else layer
        result[index] = updated(array[index], updates)
    return result


@dataclass(frozen=True)
class _Target:
    """A source weight, and the rule that uses it."""

    component: str
    rule: Rule
    source: str


def open_lora(
    path: str | os.PathLike, scale: float, config: ModelConfig, components: Iterable[str] | None = None
) -> Updates:
    """Find the place of every pair of factors in a LoRA file. The factors stay in the file until they are added.

    Args:
        path: a safetensors file, or the folder that PEFT or diffusers saved it in.
        scale: what every update is multiplied by.
        config: the model's configuration.
        components: those of its components that the LoRA may change; all of them unless given.

    Raises:
        ValueError: the file is missing, damaged or of another method; or some of its tensors have no place in these
            components, no partner, a wrong shape or NaN in them, and the message names them all.
    """
    if not math.isfinite(scale):
        raise ValueError(f"the scale of a LoRA must be a finite number, not {scale}")
    file = _find_file(Path(path))
    tensors = open_safetensors(file)
    for mark, method in OTHER_METHODS.items():
        others = [key for key in tensors if mark in key]
        if others:
            raise ValueError(f"{file} is a {method}, but only plain LoRA is supported: {', '.join(others)}")

    components = tuple(config.components if components is None else components)
    targets = _targets(config, components)
    faults: dict[str, list[str]] = defaultdict(list)
    found: dict[_Target, dict[str, str]] = defaultdict(dict)
    for key in sorted(tensors):
        module, part = _split(key)
        if part is None or module not in targets:
            faults["tensors without a place"].append(key)
        elif part in found[targets[module]]:
            faults["tensors that repeat another"].append(key)
        else:
            found[targets[module]][part] = key

    shapes = {name: parameter_shapes(name, config) for name in {target.component for target in found}}
    adapters = _adapters(file, tensors)
    updates: Updates = {}
    for target, keys in found.items():
        rule, parts = target.rule, {part: tensors[key] for part, key in keys.items()}
        shape = shapes[target.component][rule.param]
        source_shapes = rule.transform.source_shapes(shape if rule.layer is None else shape[1:], len(rule.sources))
        shape = source_shapes[rule.sources.index(target.source)]
        fault = _fault(parts, shape)
        if fault:
            named = " and ".join(f"{key} {tensors[key].shape}" for key in keys.values())
            faults[fault].append(f"{named} for a weight {shape}")
            continue
        strength = _strength(_split(keys["down"])[0], parts, adapters)
        update = Update(rule, target.source, source_shapes, parts["down"], parts["up"], scale * strength)
        layers = updates.setdefault(target.component, {}).setdefault(rule.param, {})
        layers.setdefault(rule.layer, []).append(update)
    if faults:
        listed = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in faults.items())
        raise ValueError(f"{file} does not fit the {', '.join(components)} of this model: {listed}")
    if not updates:
        raise ValueError(f"{file} holds no tensors")
    return updates


def open_loras(loras: Iterable[tuple[str | os.PathLike, float]], config: ModelConfig) -> Updates:
    """Several LoRAs, each with its scale, as one."""
    updates: Updates = {}
    for path, scale in loras:
        for component, params in open_lora(path, scale, config).items():
            for param, layers in params.items():
                for layer, found in layers.items():
                    place = updates.setdefault(component, {}).setdefault(param, {})
                    place.setdefault(layer, []).extend(found)
    return updates


def _find_file(path: Path) -> Path:
    if path.is_dir():
        files = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if not files:
            raise ValueError(f"{path} holds no {' or '.join(FILE_NAMES)}; give the LoRA's safetensors file itself")
        return files[0]
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a safetensors file; other formats can run code when opened and are refused")
    return path


def _split(key: str) -> tuple[str, str | None]:
    """A key's module and part; no part if it does not end as a LoRA's keys do."""
    for suffix, part in PARTS.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), part
    return key, None


def _targets(config: ModelConfig, components: Iterable[str]) -> dict[str, _Target]:
    """Every weight that a LoRA can change, under each of its names."""
    targets: dict[str, _Target] = {}
    for component in set(components) & set(DOTTED_PREFIXES):
        for layout in (diffusers_layout, single_file_layout):
            for rule in layout.TABLES[component](getattr(config, component)).rules:
                for source in rule.sources:
                    if not source.endswith(".weight"):
                        continue
                    module, target = source.removesuffix(".weight"), _Target(component, rule, source)
                    for prefix in DOTTED_PREFIXES[component]:
                        targets.setdefault(prefix + module, target)
                    for prefix in UNDERSCORED_PREFIXES[component]:
                        targets.setdefault(prefix + module.replace(".", "_"), target)
    return targets


def _fault(parts: Mapping[str, Tensor], shape: Shape) -> str | None:
    """What keeps the parts from being an update of a weight of this shape."""
    if not {"down", "up"} <= parts.keys():
        return "tensors without a partner"
    down, up = parts["down"].shape, parts["up"].shape
    rank = down[0] if down else 0
    # For a convolution's weight the factors are convolutions too, the second with a kernel of 1x1.
    if len(shape) < 2 or rank < 1 or down[1:] != shape[1:] or up != (shape[0], rank, *(1 for _ in shape[2:])):
        return "wrong shapes"
    if "alpha" in parts and parts["alpha"].size != 1:
        return "alphas that are not one number"
    if not all(np.isfinite(tensor.read().astype(np.float32)).all() for tensor in parts.values()):
        return "NaN or infinite values"
    return None


@dataclass(frozen=True)
class _Adapter:
    """What PEFT's configuration says of the modules under a prefix: their alpha, and by pattern the exceptions."""

    prefix: str
    alpha: float
    exceptions: dict[re.Pattern[str], float]
    rank_stabilised: bool


def _strength(module: str, parts: Mapping[str, Tensor], adapters: Iterable[_Adapter]) -> float:
    """`alpha / rank`: from the file's own alpha, else from PEFT's configuration, else 1, as diffusers has it."""
    rank = parts["down"].shape[0]
    if "alpha" in parts:
        return float(parts["alpha"].read().reshape(())) / rank
    for adapter in adapters:
        if module.startswith(adapter.prefix):
            name = module.removeprefix(adapter.prefix)
            exceptions = (alpha for pattern, alpha in adapter.exceptions.items() if pattern.match(name))
            return next(exceptions, adapter.alpha) / (math.sqrt(rank) if adapter.rank_stabilised else rank)
    return 1.0


def _adapters(file: Path, tensors: Mapping[str, Tensor]) -> list[_Adapter]:
    """PEFT's configurations: in the header, where diffusers puts them, or in the file that PEFT writes beside."""
    config_file = file.with_name("adapter_config.json")
    if any(key.startswith(PEFT_PREFIX) for key in tensors):
        if config_file.is_file():
            return [_adapter(config_file, PEFT_PREFIX, read_json(config_file))]
        if not any(key.endswith(".alpha") for key in tensors):
            warnings.warn(
                f"{config_file} is missing, which says the alpha of {file.name}; it is taken to be the rank",
                stacklevel=1,
            )
    with safe_open(file, framework="numpy") as opened:
        header = (opened.metadata() or {}).get("lora_adapter_metadata")
    if header is None:
        return []
    try:
        fields = dict(json.loads(header))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the LoRA configuration in the header of {file} is damaged ({error})") from None
    prefixes = sorted({field.split(".", 1)[0] + "." for field in fields})
    return [
        _adapter(
            file, prefix, {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
        )
        for prefix in prefixes
    ]


def _adapter(file: Path, prefix: str, fields: Any) -> _Adapter:
    try:
        alpha, exceptions = float(fields["lora_alpha"]), {}
        for pattern, value in fields.get("alpha_pattern", {}).items():
            exceptions[re.compile(rf"(.*\.)?({pattern})$")] = float(value)
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise ValueError(f"the LoRA configuration in {file} is damaged ({error!r})") from None
    if not all(map(math.isfinite, (alpha, *exceptions.values()))):
        raise ValueError(f"the LoRA configuration in {file} holds an alpha that is not finite")
    return _Adapter(prefix, alpha, exceptions, fields.get("use_rslora", False))
